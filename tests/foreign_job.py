"""A job of the process pool: one rank of a run over modules of torch_geometric."""

import warnings

from gnnpipe.trainer import Trainer


def train_job(num_stages: int, num_ways: int, directory: str, partition: str) -> None:
    """Trains the list that has modules of every adapter."""
    # Workers make errors of warnings; this one is torch_geometric's, on import.
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
    from foreign_cases import job_config, job_data, job_layers

    config = job_config(num_stages, num_ways, directory, partition=partition)
    Trainer(config, graph=job_data(), layers=job_layers()).fit()


def auc_job(num_stages: int, num_ways: int, directory: str, partition: str) -> None:
    """Trains two tasks that are judged by their ROC-AUC."""
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
    from foreign_cases import auc_layers, job_config, two_tasks

    config = job_config(
        num_stages, num_ways, directory, partition=partition, kind="multi_task_auc"
    )
    Trainer(config, graph=two_tasks(), layers=auc_layers()).fit()
