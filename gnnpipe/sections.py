"""The sections of the configuration: each key with its type, default and meaning.

A key that is not here is refused; checks across sections are in :mod:`gnnpipe.config`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from gnnpipe.fields import at_least, check_seed, require, settle

ModelName = Literal[
    "gcn",
    "sage",
    "gin",
    "gat",
    "gcnii",
    "resgcn+",
    "deepergcn",
    "jknet",
    "appnp",
    "dagnn",
    "transformer",
    "dgmlp",
    "revgnn",
]

NormName = Literal["none", "layer", "batch", "graph"]

AggregatorName = Literal["mean", "max"]

Option = float | int | bool | NormName | AggregatorName

MODEL_OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "gcn": {"norm": "none"},
    "sage": {"aggregator": "mean", "norm": "none"},
    "gin": {"train_eps": False, "norm": "none"},
    "gat": {"heads": 8, "norm": "none"},
    "gcnii": {"alpha": 0.1, "theta": 0.5, "norm": "none"},
    "resgcn+": {"norm": "layer"},
    "deepergcn": {"norm": "layer"},
    "jknet": {"norm": "none"},
    "appnp": {"alpha": 0.1},
    "dagnn": {},
    "transformer": {"heads": 8, "norm": "layer"},
    "dgmlp": {},
    "revgnn": {"norm": "layer"},
}
"""The options that each model has besides the common ones, with their defaults."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which graph to train on."""

    name: str = "digits"
    """Data set: digits, a Planetoid name, or the path of a .npz or a PyG .pt file."""
    root: str | None = None
    """Directory with the files of a named data set; null where the data set needs none."""
    split: str = "public"
    """Which of the data set's train/validation/test splits to use."""
    undirected: Literal["auto", True, False] = "auto"
    """Add the reverse of every edge; auto does what is usual for the data set."""
    features: Literal["auto", "surrogate", "degree"] = "auto"
    """The data set's own node features, or ones made from the graph."""
    row_normalize: bool = False
    """Divide the features of each node by their sum."""
    inductive: bool = False
    """Train on the training nodes and the edges among them; evaluate on the whole graph."""

    def __post_init__(self) -> None:
        settle(self, "data")
        require(self.name != "", "data.name", self.name, "must not be empty; try digits")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is learned, and how it is judged."""

    kind: Literal[
        "auto", "single_label", "multi_label", "multi_task_auc", "regression", "link"
    ] = "auto"
    """Loss and metric: cross-entropy and accuracy; binary cross-entropy and micro-F1, or mean
    ROC-AUC over tasks; squared error and R^2; link holds out edges and asks for them. auto
    chooses by the labels."""
    link_metric: Literal["auc", "mrr"] = "auc"
    """link: area under the ROC curve, or mean reciprocal rank among 50 negatives."""
    class_weight: Literal["balanced"] | tuple[float, ...] | None = None
    """single_label: factor of each class's loss; balanced gives every class the same sum."""

    def __post_init__(self) -> None:
        settle(self, "task")


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """Which node goes into which chunk."""

    path: str | None = None
    """Directory written by ``python -m partition``; null partitions into the run directory."""
    num_chunks: int = 16
    """Chunks per epoch."""
    method: Literal["metis", "metis-grouped", "contiguous", "random", "bfs", "file"] = "metis"
    """How nodes are assigned; metis-grouped groups small parts at random into a chunk."""
    parts_per_chunk: int | None = None
    """metis-grouped (4): METIS parts in a chunk; 16 suit training.steps_per_epoch."""
    seed: int = 0
    """Seed of the method."""
    file: str | None = None
    """Assignment that someone else made, for the method file."""

    def __post_init__(self) -> None:
        settle(self, "partition")
        at_least(self, "partition", num_chunks=1, parts_per_chunk=1)
        check_seed("partition.seed", self.seed)
        is_consistent = (self.method == "file") == (self.file is not None)
        rule = "goes with `partition.method` (=file) and with no other; give both or neither"
        require(is_consistent, "partition.file", self.file, rule)
        is_known = self.parts_per_chunk is None or self.method == "metis-grouped"
        rule = "goes with `partition.method` (=metis-grouped) only; leave it out or take that"
        require(is_known, "partition.parts_per_chunk", self.parts_per_chunk, rule)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network: an input layer, ``num_layers`` convolutions, an output layer."""

    name: ModelName = "gcnii"
    """Architecture."""
    num_layers: int = 32
    """Graph convolutions between the input layer and the output layer."""
    hidden_channels: int = 64
    """Width of the hidden layers, all heads together."""
    dropout: float = 0.5
    """Probability that a value is zeroed in training, in [0, 1)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Element type of weights and activations."""
    alpha: float | None = None
    """gcnii, appnp (0.1): share of the first representation h0 in each layer, in [0, 1]."""
    theta: float | None = None
    """gcnii (0.5): strength of the weights; layer i uses log(theta / i + 1)."""
    heads: int | None = None
    """gat, transformer (8): attention heads; must divide hidden_channels."""
    train_eps: bool | None = None
    """gin (false): learn the weight of a node's own row."""
    aggregator: AggregatorName | None = None
    """sage (mean): what a node takes from its neighbours, column by column."""
    norm: NormName | None = None
    """Before the ReLU of gcn, sage, gin, gat, gcnii, jknet (none) and of the residual blocks of
    resgcn+, deepergcn, transformer, revgnn (layer): of each row, or of columns over all nodes."""

    def __post_init__(self) -> None:
        settle(self, "model")
        self._settle_options()
        at_least(self, "model", num_layers=1, hidden_channels=1, heads=1, theta=0)
        rule = "must be at least 0 and below 1; 0 switches it off"
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, rule)
        is_share = self.alpha is None or 0 <= self.alpha <= 1
        require(is_share, "model.alpha", self.alpha, "must be between 0 and 1; 0.1 is usual")
        rule = f"must divide `model.hidden_channels` (={self.hidden_channels}); change either"
        require(self.hidden_channels % (self.heads or 1) == 0, "model.heads", self.heads, rule)

    @property
    def options(self) -> dict[str, Option]:
        """The options of this very model, by name."""
        return {key: getattr(self, key) for key in MODEL_OPTIONS[self.name]}

    @property
    def is_plain_and_deep(self) -> bool:
        """Whether signals pass many layers, by way of neighbours alone: no norm, no shortcut."""
        return self.name == "gcn" and self.norm == "none" and self.num_layers >= 16

    def _settle_options(self) -> None:
        """Fills this model's options and refuses those of another."""
        own = MODEL_OPTIONS[self.name]
        for key in sorted({key for options in MODEL_OPTIONS.values() for key in options}):
            value = getattr(self, key)
            if key in own and value is None:
                object.__setattr__(self, key, own[key])
            owners = ", ".join(name for name, options in MODEL_OPTIONS.items() if key in options)
            rule = f"is an option of {owners}, not of `model.name` (={self.name}); leave it out"
            require(key in own or value is None, f"model.{key}", value, rule)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread over processes."""

    plan: Literal["manual", "auto"] = "manual"
    """auto: measure this machine, and choose stages, ways and virtual stages for its ranks."""
    num_stages: int = 1
    """Pipeline ranks, each with consecutive layers over the whole graph."""
    num_ways: int = 1
    """Ranks that share the nodes of one stage."""
    virtual_stages: int = 1
    """Stages per rank."""
    schedule: Literal["fill_drain", "split_backward"] = "fill_drain"
    """All forwards, then all backwards in reverse; split_backward makes and sends the gradient of
    a stage's input before those of its weights. That gains with wide layers and many stages."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each stage, input and output layer included; null balances their cost."""

    def __post_init__(self) -> None:
        settle(self, "parallel")
        at_least(self, "parallel", num_stages=1, num_ways=1, virtual_stages=1)

    @property
    def total_stages(self) -> int:
        """Stages of the pipeline, virtual ones included."""
        return self.num_stages * self.virtual_stages


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The optimisation."""

    epochs: int = 200
    """Passes over the graph."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule: Adam, Adam with decoupled weight decay, or gradient descent with momentum."""
    lr: float = 0.01
    """Learning rate."""
    weight_decay: float = 5.0e-4
    """L2 penalty added to the gradient, times the weight; adamw shrinks the weight instead."""
    momentum: float = 0.9
    """sgd: share of the last update in the next, in [0, 1)."""
    schedule: Literal["cosine", "step"] | None = None
    """Learning rate over the epochs: constant (null), falling to 0 along a cosine, or in steps."""
    warm_up_epochs: int = 0
    """First epochs, over which the learning rate rises linearly to lr."""
    decay_every: int = 100
    """step: epochs between two steps."""
    decay: float = 0.5
    """step: factor of the learning rate at each step, in (0, 1]."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all weights together; null is unbounded."""
    ema_decay: float = 0.0
    """Above 0, evaluations and saved weights take an exponential moving average of the weights
    over optimizer steps; this is the share of the old average in the new one, in [0, 1)."""
    label_smoothing: float = 0.0
    """single_label: share of each target that is spread over all classes, in [0, 1)."""
    early_stop: int | None = None
    """Epochs without a better validation figure after which an evaluation ends the training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of dense products: as everything else, or of operands rounded to bfloat16, with sums and
    results of float32. Evaluations are not rounded."""
    steps_per_epoch: int = 1
    """Optimizer steps of an epoch, each over a group of chunks; histories carry the rest."""
    eval_every: int = 10
    """Epochs between exact evaluations; the last epoch is always evaluated."""

    def __post_init__(self) -> None:
        settle(self, "training")
        at_least(self, "training", epochs=1, weight_decay=0, eval_every=1, warm_up_epochs=0)
        at_least(self, "training", decay_every=1, early_stop=1, steps_per_epoch=1)
        require(self.lr > 0, "training.lr", self.lr, "must be above 0; 0.01 is usual")
        for key in ("momentum", "label_smoothing", "ema_decay"):
            value = getattr(self, key)
            require(0 <= value < 1, f"training.{key}", value, "must be at least 0 and below 1")
        rule = "must be above 0 and at most 1; 0.5 halves the learning rate at each step"
        require(0 < self.decay <= 1, "training.decay", self.decay, rule)
        is_bound = self.clip_norm is None or self.clip_norm > 0
        require(is_bound, "training.clip_norm", self.clip_norm, "must be above 0, or null")


@dataclasses.dataclass(frozen=True)
class HistoryConfig:
    """The historical embeddings that stand in for chunks not computed yet."""

    period: int = 1
    """Epochs between refreshes of the historical tables."""
    warm_start: Literal["exact", "zeros"] = "exact"
    """First history: one exact forward, or zeros."""
    order: Literal["shuffled", "antithetic", "fixed"] = "shuffled"
    """Order of the chunks: drawn anew every epoch, every second epoch the one before reversed, or
    always ascending."""
    cross_chunk_gradient: float = 1.0
    """Factor on gradients along fresh edges between chunks; 1 is plain autograd."""
    strata: int | None = None
    """Most strata of nodes, by the magnitude of their degrees: historical rows are moved by the
    mean drift of their stratum's fresh rows, and gradients flow through that; 0 leaves them. null
    is 16, and 0 with several optimizer steps an epoch, which leave rows of all ages, and where
    `history.refresh_every` is 5 by itself."""
    late_gradient: float | None = None
    """Factor on earlier epochs' gradients along edges that were read as history, in layers that
    sum their neighbours; 0 has none, and saves a table of each layer's rows. null is 0.5 where
    `history.strata` moves rows, but 0 with several optimizer steps an epoch or `history.dtype`."""
    late_gradient_momentum: float = 0.8
    """Share of the old value in a kept gradient, in [0, 1): averages last epochs' gradients."""
    dropout: bool = True
    """Keep rows as they were dropped out; false keeps them before, and drops them when read."""
    momentum: float = 0.0
    """Share of the old value in a kept one, in [0, 1)."""
    dtype: Literal["bfloat16", "float16"] | None = None
    """Element type of the tables' rows; null is the model's. The others round every row that is
    read from a table, fresh ones included; sums, gradients and weights stay float32. float16 is
    finer, and infinite above 65,504."""
    predict: Literal["linear"] | None = None
    """Extrapolate kept rows along their last change, by a coefficient fitted to each layer."""
    refresh_every: int | None = None
    """Epochs between exact forwards that renew all histories; 0 has none. One that falls on an
    evaluation serves for both. null is 10, and 5 for gcn of 16 layers or more without a norm,
    which needs young histories."""
    correct_every: int | None = None
    """Epochs between exact gradients, for which stages wait for each other; what the pipeline's
    lack is added to those in between, as far as it has lasted before. null has none."""
    max_drift: float | None = None
    """Renew all histories by an exact forward after an epoch whose values were, in some layer,
    more than this share away from the historical ones that it read; null never does."""

    def __post_init__(self) -> None:
        settle(self, "history")
        at_least(self, "history", period=1, cross_chunk_gradient=0, max_drift=0, refresh_every=0)
        at_least(self, "history", correct_every=1, strata=0)
        rule = "must be at least 0 and below 1; 0 keeps the newest value"
        require(0 <= self.momentum < 1, "history.momentum", self.momentum, rule)
        rule = "must be between 0 (none) and 1 (undamped)"
        factor = self.late_gradient
        is_share = factor is None or 0 <= factor <= 1
        require(is_share, "history.late_gradient", factor, rule)
        momentum = self.late_gradient_momentum
        rule = "must be at least 0 and below 1; 0 keeps the newest gradient"
        require(0 <= momentum < 1, "history.late_gradient_momentum", momentum, rule)
        is_possible = self.predict is None or self.period == 1
        rule = f"goes with `history.period` (={self.period}) 1 only; leave either out"
        require(is_possible, "history.predict", self.predict, rule)

    @property
    def is_recalled(self) -> bool:
        """Whether tables keep more than their last values."""
        return not self.dropout or self.momentum > 0 or self.predict is not None


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What a rank holds while it trains."""

    mode: Literal["keep", "recompute", "offload"] = "keep"
    """What backwards need of the forwards: kept, computed again, or kept in the host's memory (on
    a GPU). The losses are the same."""

    def __post_init__(self) -> None:
        settle(self, "memory")


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """What sums over neighbours."""

    backend: Literal["auto", "numba", "torch", "triton"] = "auto"
    """auto: numba on CPUs, torch elsewhere. torch on a CPU is slower, and differs in last bits;
    triton (GPUs, if installed) has never been timed on one."""
    cuda_graphs: bool = False
    """On a GPU, launch all layers of a chunk at once that run without autograd, as CUDA graphs
    captured in the second epoch. Stages of several ways, and epochs that measure how stale
    histories are, launch every kernel by itself. It has never run on a GPU: compare losses."""

    def __post_init__(self) -> None:
        settle(self, "kernels")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept so that a run can go on after an end of any kind."""

    every: int = 50
    """Epochs between checkpoints, and one after the last epoch; 0 is off."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best."""
    resume: str = "auto"
    """auto goes on where the run in run.dir stopped; none never; or the path of a checkpoint."""
    histories: Literal["save", "rewarm"] = "save"
    """Historical tables: saved, or computed anew on resume: smaller, but not bit-exact."""
    asynchronous: bool = True
    """Write while the next epoch runs, from a copy in memory; false waits for the disk."""

    def __post_init__(self) -> None:
        settle(self, "checkpoint")
        at_least(self, "checkpoint", every=0, keep=1)
        is_path = self.resume != "" and "\0" not in self.resume
        require(is_path, "checkpoint.resume", self.resume, "must be auto, none or a path")


@dataclasses.dataclass(frozen=True)
class CommConfig:
    """How messages travel, by kind; evaluations are always exact."""

    boundary: Literal["fp32", "bf16", "int8"] = "fp32"
    """Rows between stages and their gradients; fp32 is as computed, in 64-bit models too."""
    carried: Literal["fp32", "bf16", "int8"] = "fp32"
    """Tensors that skip layers, such as h0, and their gradients."""
    halo: Literal["fp32", "bf16", "int8"] = "fp32"
    """Rows that the ways of a stage trade, and their gradients."""
    gradient: Literal["fp32", "bf16", "int8"] = "fp32"
    """Weight gradients between ways; what rounding loses is added to the next step's."""

    def __post_init__(self) -> None:
        settle(self, "comm")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where results go and how the run behaves."""

    dir: str = "runs/default"
    """Run directory."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""
    trace: bool = False
    """Write trace.json, a timeline of the last epochs that Perfetto and Chrome show."""
    log_every: int = 10
    """Epochs between log lines."""
    threads: Literal["auto"] | int = "auto"
    """CPU threads of each rank; auto: OMP_NUM_THREADS, else 1 with several ranks, else all."""
    timeout_s: float = 120.0
    """Longest wait for another rank, in seconds."""
    check_memory: bool = True
    """Refuse to start what the machine has no memory for, by a prediction."""

    def __post_init__(self) -> None:
        settle(self, "run")
        is_path = self.dir != "" and "\0" not in self.dir
        require(is_path, "run.dir", self.dir, "must be a path; runs/default is usual")
        at_least(self, "run", log_every=1)
        is_count = self.threads == "auto" or self.threads >= 1
        require(is_count, "run.threads", self.threads, "must be auto or at least 1")
        require(self.timeout_s > 0, "run.timeout_s", self.timeout_s, "must be above 0 seconds")
