"""The configuration: precedence, messages that name the key, and the round trip."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnpipe.config import Config, from_dict, load_config, to_dict, to_yaml
from gnnpipe.errors import UserError
from gnnpipe.sections import (
    MODEL_OPTIONS,
    DataConfig,
    HistoryConfig,
    ModelConfig,
    ParallelConfig,
    PartitionConfig,
    RunConfig,
    TrainingConfig,
)


def write(directory: Path, text: str) -> str:
    path = directory / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_a_deep_gcnii_on_one_process() -> None:
    config = load_config(None)
    assert config == Config()
    assert (config.model.name, config.model.num_layers, config.world_size) == ("gcnii", 32, 1)
    assert config.model.options == {"alpha": 0.1, "theta": 0.5, "norm": "none"}


def test_world_size_is_stages_times_ways_without_virtual_stages() -> None:
    overrides = ["parallel.num_stages=3", "parallel.num_ways=2", "parallel.virtual_stages=4"]
    config = load_config(None, overrides)
    assert config.world_size == 6
    assert config.parallel.total_stages == 12


def test_file_wins_over_preset_and_override_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: gnnpipe-paper\nhistory: {period: 7}\nseed: 3\n")
    config = load_config(path, ["history.order=fixed", "seed=4"])
    assert config.history.warm_start == "zeros"  # preset
    assert config.history.period == 7  # file over preset's 23
    assert config.history.order == "fixed"  # override over preset
    assert config.seed == 4  # override over file


def test_preset_is_the_published_method() -> None:
    config = load_config(None, ["preset=gnnpipe-paper"])
    published = HistoryConfig(23, "zeros", "shuffled", 2.0, strata=0, refresh_every=0)
    assert config.history == published
    assert (config.partition.num_chunks, config.partition.method) == (32, "metis-grouped")
    assert (config.model.num_layers, config.model.hidden_channels) == (32, 100)
    assert (config.training.lr, config.training.weight_decay) == (1e-3, 0.0)
    assert config.training.eval_every == 50


def test_preset_of_many_steps_makes_one_over_each_mixed_chunk() -> None:
    config = load_config(None, ["preset=many-steps", "partition.num_chunks=40"])
    assert (config.partition.method, config.partition.parts_per_chunk) == ("metis-grouped", 16)
    assert (config.training.steps_per_epoch, config.training.ema_decay) == (32, 0.9)
    assert config.refresh_every is None  # Averaged weights need a forward of their own.
    assert config.model == Config().model  # Of any model.


def test_strata_are_sixteen_unless_an_epoch_has_several_steps() -> None:
    steps = "training.steps_per_epoch=2"
    cases: list[tuple[list[str], int]] = [
        ([], 16),
        (["history.strata=3"], 3),
        ([steps], 0),
        ([steps, "history.strata=3"], 3),
        (["preset=many-steps"], 0),
        (["preset=gnnpipe-paper"], 0),
        (["model.name=gcn"], 0),
        (["model.name=gcn", "history.strata=16"], 16),
    ]
    for overrides, num_strata in cases:
        assert load_config(None, overrides).num_strata == num_strata, overrides


def test_late_gradients_count_half_where_strata_move_rows() -> None:
    steps, strata = "training.steps_per_epoch=2", "history.strata=16"
    cases: list[tuple[list[str], float]] = [
        ([], 0.5),
        (["history.strata=3"], 0.5),
        (["history.strata=0"], 0.0),
        (["history.strata=0", "history.late_gradient=0.3"], 0.3),
        (["history.late_gradient=0"], 0.0),
        ([steps, strata], 0.0),
        ([steps, strata, "history.late_gradient=1"], 1.0),
        (["history.dtype=bfloat16"], 0.0),
        (["preset=many-steps"], 0.0),
        (["preset=gnnpipe-paper"], 0.0),
        (["model.name=gcn"], 0.0),
        (["model.name=gat"], 0.5),  # Of its layers that sum, of which it has none.
    ]
    for overrides, factor in cases:
        assert load_config(None, overrides).late_gradient == factor, overrides


def test_deep_models_without_shortcuts_refresh_their_histories_often() -> None:
    plain = ["model.name=gcn", "model.num_layers=16"]
    cases: list[tuple[list[str], int | None]] = [
        ([], 10),
        (["history.refresh_every=3"], 3),
        (["history.refresh_every=0"], None),
        (plain, 5),
        ([*plain, "history.refresh_every=10"], 10),
        ([*plain, "model.num_layers=15"], 10),
        ([*plain, "model.norm=layer"], 10),
        (["model.name=gat"], 10),
        (["preset=gnnpipe-paper", "model.name=gcn"], None),
    ]
    for overrides, every in cases:
        assert load_config(None, overrides).refresh_every == every, overrides


def test_last_override_of_a_key_counts() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "model:\n", "data: {}\n"])
def test_file_without_values_gives_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text)) == Config()


def test_section_without_keys_keeps_the_presets_values(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "preset: gnnpipe-paper\nmodel:\n"))
    assert config.model.hidden_channels == 100


def test_null_unsets_a_value_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {root: somewhere}\n")
    assert load_config(path, ["data.root=null"]).data.root is None


@pytest.mark.parametrize("text", ["5e-4", "0.0005", "5.0e-4", "'5e-4'"])
def test_numbers_may_be_written_without_a_dot(tmp_path: Path, text: str) -> None:
    assert load_config(None, [f"training.weight_decay={text}"]).training.weight_decay == 5e-4
    path = write(tmp_path, f"training: {{weight_decay: {text}}}")
    assert load_config(path).training.weight_decay == 5e-4


@pytest.mark.parametrize(
    "text", ["2024", "null", "true", "1e3", "[a]", "a: b", "a #b", "x=y", "@x", "*x", "01"]
)
def test_free_text_of_an_override_stays_as_it_is(text: str) -> None:
    assert load_config(None, [f"run.dir={text}"]).run.dir == text


def test_quotes_around_an_override_are_taken_off() -> None:
    assert load_config(None, ["run.dir='my dir'"]).run.dir == "my dir"


def test_override_may_hold_a_whole_section() -> None:
    config = load_config(None, ["model={name: gat, heads: 4}", "model.dropout=0"])
    assert config.model.options == {"heads": 4, "norm": "none"}
    assert config.model.dropout == 0.0


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "history: &h {period: 2}\n"
    assert load_config(write(tmp_path, text + "data:\n  <<: {name: cora}\n")).history.period == 2


def test_instances_made_in_python_are_converted_like_files() -> None:
    parallel = ParallelConfig(layers_per_stage=[20, 14], num_stages=2)  # type: ignore[arg-type]
    assert parallel.layers_per_stage == (20, 14)
    assert isinstance(TrainingConfig(lr=1).lr, float)


MISTAKES = [
    ("model.dropot=0.5", r"`model.dropot` is not a known key; the nearest is `model.dropout`"),
    ("modle.dropout=0.5", r"`modle` is not a known key; the nearest is `model`"),
    ("dropout=0.5", r"`dropout` is not a known key; the nearest is `model.dropout`"),
    ("training.num_stages=2", r"the nearest is `parallel.num_stages`"),
    ("checkpoints.every=50", r"`checkpoints` is not a known key"),
    ("storage.mode=keep", r"`storage` is not a known key"),
    ("parallel.plan=best", r"`parallel.plan` \(=best\) must be"),
    ("comm.halo=fp16", r"`comm.halo` \(=fp16\) must be"),
    ("history.noise=true", r"`history.noise` is not a known key"),
    ("model.num_layers=deep", r"`model.num_layers` \(=deep\) must be an integer"),
    ("model.num_layers=3.0", r"`model.num_layers` \(=3.0\) must be an integer"),
    ("model.num_layers=true", r"`model.num_layers` \(=true\) must be an integer"),
    ("model.num_layers=", r"`model.num_layers` \(=null\) must be an integer"),
    ("training.lr=fast", r"`training.lr` \(=fast\) must be a finite number"),
    ("training.lr=.nan", r"`training.lr` \(=nan\) must be a finite number"),
    ("training.lr=1e999", r"`training.lr` \(=1e999\) must be a finite number"),
    ("training.lr=true", r"`training.lr` \(=true\) must be a finite number"),
    ("training.lr=[1]", r"`training.lr` \(=\[1\]\) must be a finite number"),
    ("run.tensorboard=1", r"`run.tensorboard` \(=1\) must be true or false"),
    ("run={dir: 2024}", r"`run.dir` \(=2024\) must be text; put quotes around it"),
    ("data={root: 1}", r"`data.root` \(=1\) must be text or null; put quotes around it"),
    ("run.threads=many", r"`run.threads` \(=many\) must be auto or an integer"),
    ("model.name=gcnni", r"one of gcn, sage, .*; the nearest is gcnii"),
    ("data.undirected=1", r"`data.undirected` \(=1\) must be one of auto, true, false"),
    ("preset=paper", r"`preset` \(=paper\) must be one of gnnpipe-paper, .* or null"),
    ("parallel.layers_per_stage=34", r"must be a list of integers or null"),
    ("parallel.layers_per_stage=[a]", r"must be a list of integers or null"),
    ("model=3", r"`model` \(=3\) must be a section of keys"),
    ("seed.sub=3", r"`seed` \(=\{'sub': 3\}\) must be an integer"),
    ("seed=-1", r"`seed` \(=-1\) must be between 0 and 2147483647"),
    ("partition.seed=2147483648", r"`partition.seed` \(=2147483648\) must be between 0"),
    ("partition.num_chunks=0", r"`partition.num_chunks` \(=0\) must be at least 1"),
    (
        "partition.parts_per_chunk=8",
        r"`partition.parts_per_chunk` \(=8\) goes with `partition.method` \(=metis-grouped\) only",
    ),
    ("partition.method=file", r"`partition.file` \(=null\) goes with `partition.method`"),
    ("partition.file=a.npy", r"`partition.file` \(=a.npy\) goes with `partition.method`"),
    ("data.name=", r"`data.name` \(=''\) must not be empty; try digits"),
    ("model.num_layers=0", r"`model.num_layers` \(=0\) must be at least 1"),
    ("model.hidden_channels=0", r"`model.hidden_channels` \(=0\) must be at least 1"),
    ("model.dropout=1", r"`model.dropout` \(=1.0\) must be at least 0 and below 1"),
    ("model.dropout=-0.1", r"`model.dropout` \(=-0.1\) must be at least 0 and below 1"),
    ("model.alpha=1.5", r"`model.alpha` \(=1.5\) must be between 0 and 1"),
    ("model.theta=-1", r"`model.theta` \(=-1.0\) must be at least 0"),
    (
        "model.heads=4",
        r"`model.heads` \(=4\) is an option of gat, .*not of `model.name` \(=gcnii\)",
    ),
    ("model={name: gin, alpha: 0.2}", r"`model.alpha` \(=0.2\) is an option of gcnii"),
    ("model={name: gat, heads: 0}", r"`model.heads` \(=0\) must be at least 1"),
    ("model={name: gat, heads: 7}", r"`model.heads` \(=7\) must divide `model.hidden_channels`"),
    ("parallel.num_stages=0", r"`parallel.num_stages` \(=0\) must be at least 1"),
    ("parallel.schedule=1f1b", r"\(=1f1b\) must be one of fill_drain, split_backward"),
    ("parallel.num_stages=35", r"\(=35\) must be at most `model.num_layers` \+ 2 \(=34\)"),
    ("parallel={num_stages: 5, virtual_stages: 7}", r"\(=35\) must be at most"),
    ("parallel.layers_per_stage=[33]", r"must hold 1 numbers .* with the sum 34"),
    ("parallel={num_stages: 2, layers_per_stage: [34]}", r"must hold 2 numbers"),
    ("parallel={num_stages: 2, layers_per_stage: [0, 34]}", r"of at least 1"),
    ("training.epochs=0", r"`training.epochs` \(=0\) must be at least 1"),
    ("training.lr=0", r"`training.lr` \(=0.0\) must be above 0"),
    ("training.weight_decay=-1", r"`training.weight_decay` \(=-1.0\) must be at least 0"),
    ("training.eval_every=0", r"`training.eval_every` \(=0\) must be at least 1"),
    ("history.period=0", r"`history.period` \(=0\) must be at least 1"),
    ("history.cross_chunk_gradient=-1", r"cross_chunk_gradient` \(=-1.0\) must be at least 0"),
    ("run.dir=", r"`run.dir` \(=''\) must be a path"),
    ("run.log_every=0", r"`run.log_every` \(=0\) must be at least 1"),
    ("run.threads=0", r"`run.threads` \(=0\) must be auto or at least 1"),
    ("run.timeout_s=0", r"`run.timeout_s` \(=0.0\) must be above 0 seconds"),
    ("seed", r"`seed` is not an override; write it as key.sub=value"),
    ("=1", r"`=1` is not an override"),
    ("a..b=1", r"`a..b=1` is not an override"),
    ("model.name=[", r"the value of `model.name` is not valid YAML at line 1, column 2"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[each for each, _ in MISTAKES])
def test_mistake_is_named_in_one_line_without_full_stop(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(".")


BAD_FILES = [
    ("- a\n- b\n", r"must be a mapping such as"),
    ("just text\n", r"\(=just text\) must be a mapping"),
    ("a: [1\n", r"is not valid YAML at line 2, column 1"),
    ("a: !!python/object:os.system x\n", r"is not valid YAML"),
    ("a: 2020-99-99\n", r"is not valid YAML: month must be in 1..12"),
    ("a: " + "[" * 5000, r"is not valid YAML"),
    ("a: \x00\n", r"is not valid YAML"),
    ("seed: 1\nseed: 2\n", r"`seed` stands twice \(again in line 2\); keep one of them"),
    ("model: {dropout: 0.1, dropout: 0.2}\n", r"`dropout` stands twice"),
    ("1: 2\n", r"`1` is not a known key"),
    ("[a, b]: 2\n", r"is not valid YAML|not a known key"),
    ("model: [1]\n", r"`model` \(=\[1\]\) must be a section of keys"),
    ("seed: " + "9" * 5000, r"is not valid YAML|must be between"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_file_is_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_bad_section_of_the_file_is_not_hidden_by_an_override(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`model` \(=3\) must be a section of keys"):
        load_config(write(tmp_path, "model: 3\n"), ["model.dropout=0.1"])


def test_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nope.yaml`: No such file"):
        load_config(str(tmp_path / "nope.yaml"))


def test_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory; give the path of a YAML file"):
        load_config(str(tmp_path))


def test_binary_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        load_config(str(tmp_path / "x.yaml"))


def test_section_of_a_wrong_class_is_a_mistake() -> None:
    with pytest.raises(UserError, match="`model` .* must be a ModelConfig"):
        Config(model=3)  # type: ignore[arg-type]


def test_yaml_shows_only_the_models_own_options() -> None:
    for name, options in MODEL_OPTIONS.items():
        written = yaml.safe_load(to_yaml(load_config(None, [f"model.name={name}"])))
        common = {"name", "num_layers", "hidden_channels", "dropout", "dtype"}
        assert set(written["model"]) == common | set(options)


def literals(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    counts, share = st.integers(1, 10**6), st.floats(0, 1, exclude_max=True)
    positive = st.floats(0, exclude_min=True, allow_infinity=False)
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
    name = draw(literals(*MODEL_OPTIONS))
    options: dict[str, st.SearchStrategy[Any]] = {
        "alpha": share,
        "theta": positive,
        "heads": literals(1, 2, 4),
        "train_eps": st.booleans(),
        "norm": literals("none", "layer", "batch", "graph"),
        "aggregator": literals("mean", "max"),
    }
    split = draw(st.none() | st.lists(st.integers(1, 5), min_size=3, max_size=6))
    num_layers = sum(split) - 2 if split else draw(st.integers(1, 100))
    return draw(
        st.builds(
            Config,
            preset=literals(None, "gnnpipe-paper"),
            seed=st.integers(0, 2**31 - 1),
            data=st.builds(
                DataConfig,
                name=texts,
                root=st.none() | texts,
                undirected=literals("auto", True, False),
            ),
            partition=st.builds(
                PartitionConfig, num_chunks=counts, file=texts, method=literals("file")
            ),
            model=st.builds(
                ModelConfig,
                name=st.just(name),
                num_layers=st.just(num_layers),
                hidden_channels=counts.map(lambda n: 4 * n),
                dropout=share,
                **{key: options[key] for key in MODEL_OPTIONS[name]},
            ),
            parallel=st.builds(
                ParallelConfig,
                num_stages=st.just(len(split) if split else 3),
                layers_per_stage=st.just(tuple(split) if split else None),
            ),
            training=st.builds(TrainingConfig, lr=positive, weight_decay=positive),
            history=st.builds(HistoryConfig, period=counts, cross_chunk_gradient=positive),
            run=st.builds(RunConfig, dir=texts, threads=st.just("auto") | counts),
        )
    )


@settings(max_examples=60)
@given(configs())
def test_round_trip_gives_the_same_configuration(config: Config) -> None:
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_configuration_is_hashable_and_frozen() -> None:
    config = load_config(None, ["parallel.layers_per_stage=[34]"])
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
