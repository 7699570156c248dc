"""The configuration of a run: its sections, filled from preset < file < overrides.

Pure Python, so that a mistake is found before anything heavy loads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

import yaml

from gnnpipe.errors import UserError
from gnnpipe.fields import (
    check_keys,
    check_seed,
    convert,
    dotted,
    require,
    settle,
    shown,
)
from gnnpipe.sections import (
    MODEL_OPTIONS,
    CheckpointConfig,
    CommConfig,
    DataConfig,
    HistoryConfig,
    KernelsConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    PartitionConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
)
from gnnpipe.sources import merge, read_file, read_override

PresetName = Literal[
    "gnnpipe-paper",
    "many-steps",
    "deepergcn",
    "jknet",
    "appnp",
    "dagnn",
    "transformer",
    "dgmlp",
    "revgnn",
]

PRESETS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "deepergcn": {
        "model": {"name": "deepergcn", "num_layers": 14, "hidden_channels": 64, "dropout": 0.2},
        "training": {"lr": 1e-3, "weight_decay": 0.0},
    },
    "jknet": {
        "model": {"name": "jknet", "num_layers": 8, "hidden_channels": 64, "dropout": 0.5},
        "training": {"lr": 5e-3},
    },
    "appnp": {
        "model": {"name": "appnp", "num_layers": 10, "hidden_channels": 64, "dropout": 0.5},
    },
    "dagnn": {
        "model": {"name": "dagnn", "num_layers": 10, "hidden_channels": 64, "dropout": 0.5},
    },
    "transformer": {
        "model": {"name": "transformer", "num_layers": 8, "hidden_channels": 64, "dropout": 0.2},
        "training": {"lr": 1e-3, "weight_decay": 0.0},
    },
    "dgmlp": {
        "model": {"name": "dgmlp", "num_layers": 12, "hidden_channels": 64, "dropout": 0.2},
    },
    "revgnn": {
        "model": {"name": "revgnn", "num_layers": 28, "hidden_channels": 64, "dropout": 0.2},
        "training": {"lr": 1e-3, "weight_decay": 0.0},
    },
    "many-steps": {
        "partition": {"num_chunks": 32, "method": "metis-grouped", "parts_per_chunk": 16},
        "training": {"steps_per_epoch": 32, "ema_decay": 0.9},
        "history": {"refresh_every": 0},
    },
    "gnnpipe-paper": {
        "partition": {"num_chunks": 32, "method": "metis-grouped"},
        "model": {"num_layers": 32, "hidden_channels": 100, "dropout": 0.5},
        "training": {"lr": 1e-3, "weight_decay": 0.0, "eval_every": 50},
        "history": {
            "period": 23,
            "warm_start": "zeros",
            "order": "shuffled",
            "cross_chunk_gradient": 2.0,
            "refresh_every": 0,
            "strata": 0,
        },
    },
}


STRATA = 16
"""Orders of magnitude of a degree that are told apart: the last is that of hubs above 32,767."""

LATE_GRADIENT = 0.5
"""All of it (1) gains more on squirrel and overshoots on Amazon Computers; see convergence.md."""

NO_NUMBA = "must be auto, torch or triton on a GPU, which runs no numba kernels here; take auto"
NO_TRITON = "must be auto, numba or torch on a CPU, for which Triton makes no code; take auto"
NO_GRAPHS = "must be false on a CPU, which needs nothing launched; leave it out"
NO_OFFLOAD = (
    "must be keep or recompute on a CPU, where there is no other memory to move anything to; take "
    "recompute"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, completely: what ``config.yaml`` in a run directory holds."""

    preset: PresetName | None = None
    """A named set of values below the file's: gnnpipe-paper is the published method, many-steps
    needs few epochs (32 optimizer steps in each), the others are deep models."""
    seed: int = 0
    """Seed of weights, chunk orders and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    history: HistoryConfig = dataclasses.field(default_factory=HistoryConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    comm: CommConfig = dataclasses.field(default_factory=CommConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        settle(self, "")
        check_seed("seed", self.seed)
        self._check_stages()
        steps, chunks = self.training.steps_per_epoch, self.partition.num_chunks
        rule = (
            f"must be at most `partition.num_chunks` (={chunks}); take fewer steps, or more chunks"
        )
        require(steps <= chunks, "training.steps_per_epoch", steps, rule)
        self._check_inductive()
        self._check_rounding()
        self._check_correction()
        if self.device != "auto":
            self.check_device(self.device)
        if self.task.kind == "link" and self.parallel.num_ways > 1:
            raise UserError(
                f"`parallel.num_ways` (={self.parallel.num_ways}) must be 1 with `task.kind` "
                "(=link), whose pairs have both ends on one rank; use stages instead"
            )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.parallel.num_stages * self.parallel.num_ways

    @property
    def num_strata(self) -> int:
        """Most strata whose drift moves historical rows."""
        if self.history.strata is not None:
            return self.history.strata
        is_one_step = self.training.steps_per_epoch == 1
        return STRATA if is_one_step and not self.model.is_plain_and_deep else 0

    @property
    def late_gradient(self) -> float:
        """Factor on earlier epochs' gradients, in layers that sum their neighbours."""
        if self.history.late_gradient is not None:
            return self.history.late_gradient
        is_one_step, is_whole = self.training.steps_per_epoch == 1, self.history.dtype is None
        return LATE_GRADIENT if self.num_strata and is_one_step and is_whole else 0.0

    @property
    def refresh_every(self) -> int | None:
        """Epochs between exact forwards that renew all histories; None without."""
        given = self.history.refresh_every
        if given is not None:
            return given or None
        return 5 if self.model.is_plain_and_deep else 10

    def check_device(self, kind: str) -> None:
        """Checks what only some kinds of device can do.

        Args:
            kind: ``cpu``, or one of GPUs.

        Raises:
            UserError: a setting that this kind has not.
        """
        if kind != "cpu":
            require(self.kernels.backend != "numba", "kernels.backend", "numba", NO_NUMBA)
            return
        require(self.kernels.backend != "triton", "kernels.backend", "triton", NO_TRITON)
        require(not self.kernels.cuda_graphs, "kernels.cuda_graphs", "true", NO_GRAPHS)
        require(self.memory.mode != "offload", "memory.mode", "offload", NO_OFFLOAD)

    def _check_rounding(self) -> None:
        rule = "must be fp32 with `model.dtype` (=float64); leave it out"
        is_right = self.training.precision == "fp32" or self.model.dtype == "float32"
        require(is_right, "training.precision", self.training.precision, rule)
        dtype, history = self.history.dtype, self.history
        if dtype is None:
            return
        kept = history.is_recalled or self.late_gradient > 0
        others = {
            "model.dtype": (self.model.dtype, "float32", self.model.dtype == "float32"),
            "parallel.num_ways": (self.parallel.num_ways, "1", self.parallel.num_ways == 1),
            "history": ("what is kept besides the tables", "without it", not kept),
        }
        for name, (value, rule, is_right) in others.items():
            text = f"goes with `{name}` {rule} only, not with {value}; set it to null"
            require(is_right, "history.dtype", dtype, text)

    def _check_correction(self) -> None:
        every, steps = self.history.correct_every, self.training.steps_per_epoch
        if every is None:
            return
        others = {
            "training.steps_per_epoch": (steps, "1", steps == 1),
            "comm.gradient": (self.comm.gradient, "fp32", self.comm.gradient == "fp32"),
            "kernels.cuda_graphs": ("true", "false", not self.kernels.cuda_graphs),
        }
        for name, (value, wanted, is_right) in others.items():
            rule = f"goes with `{name}` {wanted} only, not with {value}; set it to null"
            require(is_right, "history.correct_every", every, rule)

    def _check_inductive(self) -> None:
        given = {
            "partition.path": self.partition.path,
            "partition.file": self.partition.file,
        }
        for key, value in given.items():
            if self.data.inductive and value is not None:
                raise UserError(
                    f"`{key}` (={value}) must be null with `data.inductive` (=True), which cuts "
                    "the training part and the whole graph itself; leave it out"
                )

    def _check_stages(self) -> None:
        num_layers, stages = self.model.num_layers + 2, self.parallel.total_stages
        if stages > num_layers:
            raise UserError(
                f"`parallel.num_stages` x `parallel.virtual_stages` (={stages}) must be at most "
                f"`model.num_layers` + 2 (={num_layers}); use fewer stages or a deeper model"
            )
        split = self.parallel.layers_per_stage
        if split is not None and (
            len(split) != stages or min(split) < 1 or sum(split) != num_layers
        ):
            raise UserError(
                f"`parallel.layers_per_stage` (={shown(list(split))}) must hold {stages} "
                f"numbers of at least 1 with the sum {num_layers} (`model.num_layers` + 2); "
                "or set it to null"
            )


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration file and lays ``key.sub=value`` overrides on it.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: arguments such as ``model.dropout=0.3``; the last of a key counts.

    Raises:
        UserError: when anything in them is not as it must be.
    """
    mapping = read_file(path) if path is not None else {}
    text_keys = _text_keys()
    for override in overrides:
        mapping = merge(mapping, read_override(override, text_keys))
    return from_dict(mapping)


def from_dict(mapping: Mapping[Any, Any]) -> Config:
    """Builds a configuration from nested mappings; what is left out keeps its default."""
    keys = _keys()
    check_keys(mapping, "", keys)
    preset = convert(mapping.get("preset"), PresetName | None, "preset")
    values = merge(PRESETS.get(str(preset), {}), mapping)
    for name, hint in get_type_hints(Config).items():
        if name in values and dataclasses.is_dataclass(hint):
            values[name] = _section(values[name], name, hint, keys)
    return Config(**values)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts and lists, without other models' options."""
    values = dataclasses.asdict(config)
    options = {key for each in MODEL_OPTIONS.values() for key in each}
    for key in options - set(MODEL_OPTIONS[config.model.name]):
        del values["model"][key]
    split = config.parallel.layers_per_stage
    values["parallel"]["layers_per_stage"] = None if split is None else list(split)
    if isinstance(config.task.class_weight, tuple):
        values["task"]["class_weight"] = list(config.task.class_weight)
    return values


def to_yaml(config: Config) -> str:
    """The resolved configuration as the text of a file that gives it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _section(values: object, name: str, cls: Any, keys: Mapping[str, Sequence[str]]) -> object:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise UserError(
            f"`{name}` (={shown(values)}) must be a section of keys, such as {keys[name][0]}"
        )
    check_keys(values, name, keys)
    return cls(**values)


def _keys() -> dict[str, list[str]]:
    """The valid keys of each section; those at the top under the empty name."""
    hints = get_type_hints(Config)
    keys = {"": list(hints)}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            keys[name] = [field.name for field in dataclasses.fields(hint)]
    return keys


def _text_keys() -> dict[str, bool]:
    """Dotted keys whose value is free text, and whether they take null."""
    found = {}
    for section, hint in get_type_hints(Config).items():
        for name, kind in get_type_hints(hint).items() if dataclasses.is_dataclass(hint) else ():
            if kind is str or str in get_args(kind):
                found[dotted(section, name)] = kind is not str
    return found
