"""What the program says of its own configuration: reference, JSON schema, completion."""

import dataclasses
import json
import shutil
import subprocess
from typing import Any, get_type_hints

import jsonschema
import pytest
import yaml

from gnnpipe.cli import main
from gnnpipe.completion import completion_script
from gnnpipe.config import Config, load_config, to_dict
from gnnpipe.keys import all_keys, config_reference, json_schema
from gnnpipe.run_directory import flatten


def test_reference_has_every_key_with_a_meaning() -> None:
    names = {"preset", "seed", "device"}
    for section, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            names |= {f"{section}.{field.name}" for field in dataclasses.fields(hint)}
    keys = all_keys()
    assert {key.name for key in keys} == names
    assert [key.name for key in keys if len(key.meaning) < 8] == []
    text = config_reference()
    assert [name for name in names if f"| `{name}` |" not in text] == []


def test_reference_states_type_default_unit_and_meaning() -> None:
    lines = config_reference().splitlines()
    assert (
        "| `run.timeout_s` | number | `120.0` | seconds |"
        in lines[next(i for i, line in enumerate(lines) if "run.timeout_s" in line)]
    )
    assert any(
        line.startswith("| `checkpoint.every` | integer | `50` | epochs |") for line in lines
    )
    assert "| `gat` | `heads: 8`, `norm: none` |" in lines


def checked(values: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(json_schema())
    return [error.message for error in validator.iter_errors(values)]


def test_schema_takes_every_default_and_preset() -> None:
    for preset in ("null", "gnnpipe-paper", "many-steps", "transformer"):
        assert checked(to_dict(load_config(None, [f"preset={preset}"]))) == []
    assert checked(yaml.safe_load("model:\ntraining: {lr: 5e-4, epochs: 3}")) == []


@pytest.mark.parametrize(
    "text", ["sed: 1", "model: {dropot: 1}", "model: {name: gnc}", "training: {epochs: many}"]
)
def test_schema_refuses_what_the_program_refuses(text: str) -> None:
    assert checked(yaml.safe_load(text))


def test_schema_is_a_schema_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert main(["keys"]) == 0
    assert capsys.readouterr().out == config_reference()


def completed(*words: str) -> list[str]:
    """What bash offers after these words; it splits at ``=`` as an interactive bash does."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    script = completion_script("bash") + (
        f"COMP_WORDS=({' '.join(map(repr, words))})\nCOMP_CWORD={len(words) - 1}\n"
        'compopt() { :; }\n_gnnpipe\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_keys_and_values() -> None:
    assert {"train", "plan", "keys", "launch"} <= set(completed("gnnpipe", ""))
    assert completed("gnnpipe", "pre") == ["predict"]
    assert completed("gnnpipe", "train", "--print") == ["--print-config"]
    assert completed("gnnpipe", "train", "model.dr") == ["model.dropout="]
    assert completed("gnnpipe", "train", "history.order", "=", "sh") == ["shuffled"]
    assert completed("gnnpipe", "train", "history.order", "=") == [
        "shuffled",
        "antithetic",
        "fixed",
    ]
    assert completed("gnnpipe", "evaluate", "--we") == ["--weights"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_key_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    keys = set(flatten(to_dict(Config())))
    assert [key for key in keys if f"{key}=" not in script] == []


def test_unknown_shell_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err.startswith("error: argument shell: invalid choice: 'tcsh'")
