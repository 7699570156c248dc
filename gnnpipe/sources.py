"""Where settings come from: a YAML file and ``key.sub=value`` overrides, as nested mappings."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from gnnpipe.errors import UserError
from gnnpipe.fields import shown

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)


def is_override(argument: str) -> bool:
    """Tells ``key.sub=value`` from a path; a path with ``=`` in it can start with ``./``."""
    return OVERRIDE.match(argument) is not None


def read_file(path: str) -> dict[Any, Any]:
    """Reads a YAML file that holds one mapping, or nothing.

    Raises:
        UserError: when the file cannot be read, is not YAML or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"cannot read the configuration file `{path}`: {reason}; give the path of a YAML file"
        ) from error
    content = _parse(text, f"the configuration file `{path}`")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"the configuration file `{path}` (={shown(content)}) must be a mapping "
            "such as `seed: 0`; see --print-config for every key"
        )
    return content


def read_override(argument: str, text_keys: Mapping[str, bool]) -> dict[str, Any]:
    """Turns ``a.b=value`` into ``{"a": {"b": value}}``, the value read as YAML.

    Args:
        argument: one argument of the command line.
        text_keys: dotted keys whose value is free text, kept letter by letter (a directory
            named 2024 is no number); true when the key also takes null.
    """
    key, separator, text = argument.partition("=")
    if not separator or not is_override(argument) or not all(key.split(".")):
        raise UserError(f"`{argument}` is not an override; write it as key.sub=value")
    is_quoted = text[:1] in ("'", '"') and text[:1] == text[-1:] and len(text) > 1
    is_null = text_keys.get(key, False) and text in ("null", "~", "")
    value: Any = text
    if key not in text_keys or is_quoted or is_null:
        value = _parse(text, f"the value of `{key}`")
    *sections, name = key.split(".")
    nested = {name: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


def merge(base: Mapping[Any, Any], over: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """Lays ``over`` on ``base``, section by section; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if below is None or not isinstance(value, Mapping | None):
            merged[key] = value
        elif isinstance(value, Mapping):
            if not isinstance(below, Mapping):
                raise UserError(f"`{prefix}{key}` (={shown(below)}) must be a section of keys")
            merged[key] = merge(below, value, f"{prefix}{key}.")
        elif not isinstance(below, Mapping):
            merged[key] = None  # Over a section, null only means that its keys are left out.
    return merged


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice; plain YAML would silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # Any: untyped in yaml
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise UserError(f"`{name}` stands twice (again in line {line}); keep one of them")
            seen.add(name)
        return node


def _parse(text: str, what: str) -> Any:  # Any: whatever YAML holds
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{what} is not valid YAML{place}: {reason}; mend it there") from error
