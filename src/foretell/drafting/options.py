"""Options of a method: one frozen dataclass, read by the command line, by checkpoints and by resumed trainings.

    @dataclass(frozen=True)
    class Options:
        length: int = option(3, "Guesses per step.", low=1, high=16)

A field has one of the types int, float, bool, str and tuple[int, ...], or None beside one of them. `parse` makes an
instance of what somebody typed, `described` lists the options for help. Nothing here imports torch.

What earlier versions had is declared in the same place: an earlier name with `former`, an earlier value with `unset`,
with `added` that they had only the default, and in `REMOVED: ClassVar[Mapping[str, Any]]` the options that are gone,
with the only value that is still accepted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from foretell.errors import UsageError, is_number

Table = TypeVar("Table")

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "whole numbers"}
SHORT = {int: "int", float: "float", bool: "true|false", str: "text", tuple: "int,int,..."}
TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class OptionHelp:
    """One option as help shows it; `type` and `default` are text."""

    name: str
    type: str
    default: str
    help: str


def option(
    default: Any, help: str, *, low: float | None = None, high: float | None = None,
    choices: tuple[str, ...] = (), former: str = "", unset: Any = None, added: bool = False, stored: bool = False,
) -> Any:  # fmt: skip
    """A field of an options dataclass.

    Args:
        low, high: the smallest and the largest number allowed, both included.
        choices: the only texts allowed.
        former: an earlier name, which is still read.
        unset: a value that meant the default in earlier versions, and still does.
        added: earlier versions did not name it, and trained as its default says.
        stored: a checkpoint keeps it, because what was trained has its shape from it.
    """
    about = {
        "help": help, "low": low, "high": high, "choices": choices, "former": former, "unset": unset, "added": added,
        "stored": stored,
    }  # fmt: skip
    return field(default=default, metadata=about)


def parse(cls: type[Table], given: Mapping[str, Any], owner: str = "This method") -> Table:
    """An instance of an options dataclass; what is not given keeps its default.

    Args:
        given: name -> value; a text is converted to the option's type.
        owner: names in errors what has the options, as in "Drafter 'medusa'".

    Raises:
        UsageError: for an unknown name, with near ones, or a value of another type or outside its range.
    """
    return cls(**converted(cls, given, owner))


def converted(cls: type[Any], given: Mapping[str, Any], owner: str = "This method") -> dict[str, Any]:
    """The given values alone, under their present names, as `parse` checks and converts them."""
    table, values = _fields(cls), dict[str, Any]()
    for name, value in _present(cls, given).items():
        if name in (removed := _removed(cls)):
            raise UsageError(f"{owner} no longer has the option {name!r}: it is always {_text(removed[name])}.")
        if name not in table:
            near = get_close_matches(name, table, n=1, cutoff=0.5)
            has = f"it has {', '.join(table)}" if table else "it has none"
            hint = f"did you mean {near[0]!r}? I{has[1:]}" if near else has
            raise UsageError(f"{owner} has no option {name!r}; {hint}.")
        values[name] = _value(table[name], _type(cls, name), value, owner)
    return values


def renamed(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with former names, and hyphens, replaced by present names."""
    present = {each.metadata.get("former"): each.name for each in fields(cls) if each.metadata.get("former")}
    return {present.get(name.replace("-", "_"), name.replace("-", "_")): value for name, value in values.items()}


def migrated(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an earlier version as this one would write them: `renamed`, and without what has no effect.

    A removed option is left out where it has the value that is still accepted; a value that meant the default is
    replaced by the default, and so is the lack of an option that was added.
    """
    added = {each.name: each.default for each in fields(cls) if each.metadata.get("added")}
    return added | _present(cls, values)


def _present(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """As `migrated`, with no option that is not given."""
    table, removed, out = _fields(cls), _removed(cls), dict[str, Any]()
    for name, value in renamed(cls, values).items():
        if name in removed and _is(value, removed[name]):
            continue
        unset = table[name].metadata.get("unset") if name in table else None
        out[name] = table[name].default if unset is not None and _is(value, unset) else value
    return out


def stored_options(options: Any) -> dict[str, Any]:
    """The options that a checkpoint keeps, by name."""
    return {each.name: getattr(options, each.name) for each in fields(options) if each.metadata.get("stored")}


def pairs(texts: Iterable[str]) -> dict[str, str]:
    """Splits key=value texts.

    Raises:
        UsageError: for a text without a key or an equals sign.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name):
            raise UsageError(f"--option {text!r} is not key=value; write, say, -o nodes=16.")
        found[name] = value
    return found


def described(cls: type[Any]) -> list[OptionHelp]:
    """The options of a dataclass in their order, for help."""
    out = []
    for each in fields(cls):
        kind, choices = _kind(_type(cls, each.name)), each.metadata.get("choices")
        default = "" if each.default is MISSING else each.default
        kinds = "|".join(choices or ()) or SHORT[kind]
        out.append(OptionHelp(each.name, kinds, _text(default), each.metadata.get("help", "")))
    return out


def _text(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _fields(cls: type[Any]) -> dict[str, Field[Any]]:
    return {each.name: each for each in fields(cls)}


def _removed(cls: type[Any]) -> Mapping[str, Any]:
    return getattr(cls, "REMOVED", {})


def _is(value: Any, other: Any) -> bool:
    """Returns whether a value, or its text form, equals another."""
    kind = type(other)
    converted = _from_text(kind, value) if isinstance(value, str) else value
    return type(converted) is kind and bool(converted == other)


def _type(cls: type[Any], name: str) -> Any:
    return get_type_hints(cls)[name]


def _kind(hint: Any) -> type:
    """int, float, bool, str or tuple: the type of an option, None beside it left out."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(each for each in get_args(hint) if each is not NoneType)
    kind = get_origin(hint) or hint
    if kind not in WORDS:
        raise TypeError(f"An option cannot have the type {hint!r}; choose int, float, bool, str or tuple[int, ...].")
    return kind


def _value(about: Field[Any], hint: Any, value: Any, owner: str) -> Any:
    """The value in its option's type, if it is allowed."""
    kind, metadata = _kind(hint), about.metadata
    if NoneType in get_args(hint) and (value is None or value == "none"):
        return None
    converted = _from_text(kind, value) if isinstance(value, str) else value
    if kind is float and is_number(converted, whole=True):
        converted = float(converted)
    if kind is str and isinstance(converted, os.PathLike):
        converted = os.fspath(converted)
    if kind is tuple and isinstance(converted, list):
        converted = tuple(converted)
    fits = isinstance(converted, kind) and (kind is bool or not isinstance(converted, bool))
    if not fits or (kind is tuple and not all(is_number(each, whole=True) for each in converted)):
        raise UsageError(f"Option {about.name!r} of {_within(owner)} is {value!r}; it must be {WORDS[kind]}.")
    if (choices := metadata.get("choices")) and converted not in choices:
        allowed = ", ".join(choices[:-1]) + " or " + choices[-1]
        raise UsageError(f"{about.name} is {value!r}; it must be {allowed}.")
    low, high = metadata.get("low"), metadata.get("high")
    for number in converted if kind is tuple else (converted,):
        if (low is not None and not low <= number) or (high is not None and not number <= high):  # NaN fits nothing
            shown = converted if isinstance(value, str) else value
            raise UsageError(f"{about.name} is {shown}; it must {_range(low, high)}.")
    return converted


def _from_text(kind: type, text: str) -> Any:
    """The text in an option's type; unchanged where that fails."""
    try:
        if kind is tuple:
            return tuple(int(part) for part in text.split(","))
        if kind is bool:
            return TRUTH.get(text.lower(), text)
        return kind(text)
    except ValueError:
        return text


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"be at most {high}" if low is None else f"be at least {low}"
    return f"lie between {low} and {high}"


def _within(owner: str) -> str:
    """The owner's name in the middle of a sentence."""
    return owner[0].lower() + owner[1:]
