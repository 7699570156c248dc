"""The example configurations load, and say what their file names promise."""

from pathlib import Path

import pytest

from gnnpipe.config import load_config

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "examples" / "configs").glob("*.yaml"))


def test_there_are_example_configs() -> None:
    assert "demo" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_config_loads(path: Path) -> None:
    config = load_config(str(path), [])
    assert config.run.dir == f"runs/{path.stem}"


def test_demo_is_a_deep_pipeline_of_four_ranks() -> None:
    config = load_config(str(CONFIGS[[path.stem for path in CONFIGS].index("demo")]), [])
    assert (config.data.name, config.model.name, config.model.num_layers) == (
        "digits",
        "gcnii",
        32,
    )
    assert config.world_size == 4
