"""Every key of the configuration, read off the dataclasses: a reference, and a schema for editors.

Nothing is written twice: types, defaults and meanings come from the source of the sections.
"""

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from gnnpipe.config import PRESETS, Config
from gnnpipe.fields import dotted
from gnnpipe.sections import MODEL_OPTIONS

# A word of a key's name or of the first sentence of its meaning, and the unit it stands for.
NAME_UNITS = (
    ("_s", "seconds"),
    ("_bytes", "bytes"),
    ("_gb", "GB"),
    ("seed", "-"),
    ("heads", "heads"),
    ("period", "epochs"),
    ("warmup", "epochs"),
    ("patience", "epochs"),
)
MEANING_UNITS = (
    ("in seconds", "seconds"),
    ("epochs", "epochs"),
    ("passes over", "epochs"),
    ("newest checkpoints", "checkpoints"),
    ("chunks per", "chunks"),
    ("groups of chunks", "steps"),
    ("graph convolutions", "layers"),
    ("layers of each stage", "layers"),
    ("stages per rank", "stages"),
    ("pipeline ranks", "ranks"),
    ("ranks that", "ranks"),
    ("width", "numbers"),
    ("threads", "threads"),
    ("probability", "probability"),
    ("share", "share"),
    ("factor", "factor"),
)


class Key(NamedTuple):
    """One key of the configuration."""

    name: str
    """Dotted, as in an override."""
    kind: str
    """Its type as a user writes it."""
    choices: tuple[str, ...]
    """Of an enumeration: its values."""
    default: object
    unit: str
    """``-`` where a number has none, or the value is no number."""
    meaning: str


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Every key in the order of the file that ``--print-config`` prints."""
    return tuple(key for _, _, keys in _sections() for key in keys)


def config_reference() -> str:
    """Every key with its type, default, unit and meaning, as Markdown: a table per section."""
    parts = [
        "Values come from a preset, then the file, then `key.sub=value` arguments;"
        " the last one counts. An unknown key is an error that names the nearest one.\n"
    ]
    for section, purpose, keys in _sections():
        parts.append(f"## {section or 'at the top'}\n\n{purpose}\n")
        parts.append(_table(keys))
    parts.append("## Options of each model\n\n" + _model_options())
    parts.append("## Presets\n\n" + _presets())
    return "\n".join(parts)


def json_schema() -> dict[str, Any]:
    """The configuration file as a JSON schema, for editors that complete and check YAML."""
    top: dict[str, Any] = {}
    for section, purpose, keys in _sections():
        hints = get_type_hints(_class_of(section))
        found = {
            name: _schema_of(hints[name]) | {"description": key.meaning, "default": key.default}
            for key in keys
            for name in [key.name.rpartition(".")[2]]
        }
        if section:
            top[section] = _object(found) | {"description": purpose}
            top[section]["type"] = ["object", "null"]
        else:
            top |= found
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "gnnpipe configuration",
        **_object(top),
    }


def schema_text() -> str:
    """:func:`json_schema` as the text of a file."""
    return json.dumps(json_schema(), indent=2) + "\n"


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema_of(hint: Any) -> dict[str, Any]:
    """A declared type as JSON schema; numbers may be text, because YAML reads 5e-4 as text."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if len(members) > 1:
        return {"anyOf": [_schema_of(member) for member in members]}
    (member,) = members
    if get_origin(member) is Literal:
        return {"enum": list(get_args(member))}
    if get_origin(member) is tuple:
        return {"type": "array", "items": _schema_of(get_args(member)[0])}
    if member is float:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^[-+0-9.eE]+$"}]}
    names = {int: "integer", bool: "boolean", str: "string", NoneType: "null"}
    return {"type": names[member]}


def _sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Name, purpose and keys of the top and of each section."""
    yield "", _markdown(Config.__doc__ or ""), list(_keys_of("", Config))
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            yield name, _markdown(hint.__doc__ or ""), list(_keys_of(name, hint))


def _class_of(section: str) -> Any:
    return get_type_hints(Config)[section] if section else Config


def _keys_of(section: str, cls: Any) -> Iterator[Key]:
    hints, meanings = get_type_hints(cls), _meanings(cls)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:  # a section
            continue
        meaning = meanings[field.name]
        kind = _kind(hints[field.name])
        is_number = int in _members(hints[field.name]) or float in _members(hints[field.name])
        unit = _unit(field.name, meaning) if is_number else "-"
        name = dotted(section, field.name)
        yield Key(name, kind, _choices(hints[field.name]), field.default, unit, meaning)


def _meanings(cls: Any) -> dict[str, str]:
    """The string under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = _markdown(str(below.value.value))
    return found


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _members(hint: Any) -> list[Any]:
    """The types of a union, those inside lists too."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [get_args(m)[0] if get_origin(m) is tuple else m for m in members]


def _choices(hint: Any) -> tuple[str, ...]:
    return tuple(
        _yaml(choice)
        for member in _members(hint)
        if get_origin(member) is Literal
        for choice in get_args(member)
    )


def _kind(hint: Any) -> str:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}
    words = []
    for member in members:
        if get_origin(member) is Literal:
            words += [_yaml(choice) for choice in get_args(member)]
        elif get_origin(member) is tuple:
            words.append(f"list of {names[get_args(member)[0]]}s")
        else:
            words.append(names[member])
    return ", ".join(words)


def _unit(name: str, meaning: str) -> str:
    text = meaning.lower()
    by_name = [unit for part, unit in NAME_UNITS if name.endswith(part)]
    by_meaning = [unit for part, unit in MEANING_UNITS if part in text]
    return (by_name + by_meaning + ["-"])[0]


def _table(keys: Sequence[Key]) -> str:
    rows = ["| key | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for key in keys:
        cells = (f"`{key.name}`", key.kind, f"`{_yaml(key.default)}`", key.unit, key.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _model_options() -> str:
    rows = ["| model | options and defaults |", "| --- | --- |"]
    for name, options in MODEL_OPTIONS.items():
        shown = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in options.items())
        rows.append(f"| `{name}` | {shown or '-'} |")
    return "\n".join(rows) + "\n"


def _presets() -> str:
    rows = ["| preset | what it sets |", "| --- | --- |"]
    for name, sections in PRESETS.items():
        values = [f"`{s}.{k}={_yaml(v)}`" for s, keys in sections.items() for k, v in keys.items()]
        rows.append(f"| `{name}` | {', '.join(values)} |")
    return "\n".join(rows) + "\n"


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
