"""Fields of a frozen dataclass as a user writes them: converted, checked, named when wrong.

A declared type is the whole rule: ``int``, ``float``, ``bool``, ``str``, ``Literal[...]``,
``tuple[int, ...]`` and unions of these. Pure Python: mistakes are found before numpy loads.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gnnpipe.errors import UserError

MAX_SHOWN = 60
MAX_SEED = 2**31 - 1  # METIS takes no larger one.


def settle(instance: object, section: str) -> None:
    """Converts every field of a frozen dataclass to its declared type, in place.

    Args:
        instance: the dataclass, called from its ``__post_init__``.
        section: name before the dot in messages, empty at the top.

    Raises:
        UserError: naming the first field whose value does not fit.
    """
    for name, hint in get_type_hints(type(instance)).items():
        value = convert(getattr(instance, name), hint, dotted(section, name))
        object.__setattr__(instance, name, value)


def convert(value: object, hint: Any, key: str) -> object:
    """Returns ``value`` as the type that ``hint`` declares.

    Raises:
        UserError: naming the key, the value and what was expected.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for member in members:
        try:
            return _as_member(value, member)
        except TypeError:
            continue
    expected = " or ".join(_describe(member) for member in members)
    raise UserError(f"`{key}` (={shown(value)}) must be {expected}{_way_out(value, members)}")


def require(is_met: bool, key: str, value: object, rule: str) -> None:
    """Raises a UserError that reads ``key`` (=value) rule, unless the rule is met."""
    if not is_met:
        raise UserError(f"`{key}` (={shown(value)}) {rule}")


def at_least(instance: object, section: str, **minimum: float) -> None:
    """Checks lower bounds of fields, by name; a value of None has none."""
    for name, bound in minimum.items():
        value = getattr(instance, name)
        is_met = value is None or value >= bound
        require(is_met, dotted(section, name), value, f"must be at least {bound}")


def check_seed(key: str, seed: int) -> None:
    """Checks that every generator in use takes the seed."""
    require(0 <= seed <= MAX_SEED, key, seed, f"must be between 0 and {MAX_SEED}")


def check_keys(
    given: Mapping[Any, object], section: str, valid: Mapping[str, Sequence[str]]
) -> None:
    """Refuses a key that a section does not have, and names the nearest one.

    Args:
        given: what the user wrote in this section.
        section: the section's name, empty for the top.
        valid: keys of every section.
    """
    for key in given:
        if key not in valid[section]:
            nearest = _nearest(str(key), section, valid)
            raise UserError(
                f"`{dotted(section, str(key))}` is not a known key; the nearest is `{nearest}`"
            )


def dotted(section: str, name: str) -> str:
    """Joins a section and a key: ``model.dropout``, or ``seed`` at the top."""
    return f"{section}.{name}" if section else name


def shown(value: object) -> str:
    """The value as it stands in a message: short, on one line."""
    if isinstance(value, bool | None):
        return _literal(value)
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _nearest(key: str, section: str, valid: Mapping[str, Sequence[str]]) -> str:
    """A close name in the section, else the same name elsewhere, else the least far name."""
    close = difflib.get_close_matches(key, valid[section], n=1, cutoff=0.75)
    elsewhere = [dotted(other, key) for other, keys in valid.items() if key in keys]
    if not close and elsewhere:
        return elsewhere[0]
    return dotted(section, (close or difflib.get_close_matches(key, valid[section], 1, 0.0))[0])


def _as_member(value: object, member: Any) -> object:
    """Converts to one member of a union; raises TypeError when the value does not fit."""
    if get_origin(member) is Literal:
        # 1 == True in Python, so the types are compared too.
        if any(value == each and type(value) is type(each) for each in get_args(member)):
            return value
    elif member is float:
        return _as_float(value)
    elif get_origin(member) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_as_member(each, get_args(member)[0]) for each in value)
    elif type(value) is member:  # bool is an int to isinstance
        return value
    raise TypeError(f"{value!r} is not {member}")


def _as_float(value: object) -> float:
    """A finite number; text too, because YAML 1.1 reads ``5e-4`` (without a dot) as text."""
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise TypeError from None
        if math.isfinite(number):
            return number
    raise TypeError


def _describe(member: Any) -> str:
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}
    if get_origin(member) is Literal:
        choices = [_literal(choice) for choice in get_args(member)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if get_origin(member) is tuple:
        return "a list of integers"
    if member is NoneType:
        return "null"
    return names.get(member, f"a {member.__name__}")


def _literal(choice: object) -> str:
    """A choice as YAML writes it."""
    if choice is None:
        return "null"
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _way_out(value: object, members: Sequence[Any]) -> str:
    if str in members and not isinstance(value, str):
        return "; put quotes around it"
    choices = [str(c) for m in members if get_origin(m) is Literal for c in get_args(m)]
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    return f"; the nearest is {near[0]}" if near else ""
