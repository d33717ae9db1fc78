"""The config file: a user's own defaults for options, in TOML.

    model = "Qwen/Qwen3-0.6B"     # options of the panels Model and Sampling, for every verb that has them
    drafter = "medusa"
    lookup = true

    [generate]                    # options of one verb
    batch_size = 8

    [options.medusa]             # options of one drafter, as given with -o
    checkpoint = "~/heads/qwen3-0.6b"

Precedence: command line, environment (FORETELL_CACHE, ...), the verb's table, the first lines.
The file is $FORETELL_CONFIG, else foretell/config.toml in $XDG_CONFIG_HOME or ~/.config; it need not exist.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from foretell.errors import ForetellError, UsageError
from foretell.files import one_line

VARIABLES = {
    "cache_dir": ("FORETELL_CACHE",),
    "offline": ("FORETELL_OFFLINE", "HF_HUB_OFFLINE"),
    "kernel": ("FORETELL_KERNELS",),
}
"""Option -> environment variables that win over the file."""
OPTIONS = "options"
"""The table that holds one table of options for each drafter."""
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a text"}


def config_file() -> Path:
    """Returns where the config file is, or would be."""
    if chosen := os.environ.get("FORETELL_CONFIG"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "foretell" / "config.toml"


def read() -> dict[str, Any]:
    """Returns the config file's content; empty where there is no file.

    Raises:
        ForetellError: the file cannot be read or is not TOML, or FORETELL_CONFIG names one that is not there.
    """
    path = config_file()
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if os.environ.get("FORETELL_CONFIG"):
            raise ForetellError(f"FORETELL_CONFIG names {path}, which does not exist; create or unset it.") from None
        return {}
    except (OSError, ValueError) as error:  # tomllib's and Unicode's errors are ValueErrors
        raise ForetellError(f"The config file {path} cannot be read ({one_line(error)}); fix or delete it.") from error


def of_verb(verb: str, command: Any, verbs: Collection[str], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a verb's defaults by option; those of its own commands in a mapping under each command's name.

    Args:
        command: the verb's click command.
        verbs: all verbs, each of which may have a table.
        shared: options that may stand in the first lines -> their types.

    Raises:
        UsageError: an unknown key or a value of a wrong type, naming the file.
    """
    content = read()
    values = _checked_first_lines(content, shared, {*verbs, OPTIONS})
    return _of_command((verb,), command, values, content.get(verb, {}))


def variable_of(option: str) -> str | None:
    """Returns the environment variable that is set and wins over the file for an option."""
    return next(filter(os.environ.get, VARIABLES.get(option, ())), None)


def of_drafter(drafter: str) -> dict[str, Any]:
    """Returns a drafter's options by name."""
    tables = read().get(OPTIONS, {})
    if not isinstance(tables, Mapping):
        raise _refusal(f"{OPTIONS} must be a table of tables, such as [{OPTIONS}.medusa]")
    table = tables.get(drafter, {})
    if not isinstance(table, Mapping):
        raise _refusal(f"{OPTIONS}.{drafter} must be a table, such as [{OPTIONS}.{drafter}]")
    return dict(table)


def _checked_first_lines(
    content: Mapping[str, Any], hints: Mapping[str, Any], tables: Collection[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if key in tables and isinstance(value, Mapping):
            continue
        if name not in hints:
            what = f"unknown table [{key}]" if isinstance(value, Mapping) else f"unknown key {key!r}"
            known = tables if isinstance(value, Mapping) else {*hints}
            raise _refusal(f"{what}{_near(key, known)}; a verb's own options stand in a table such as [generate]")
        _check(key, value, hints[name])
        found[name] = value
    return found


def _of_command(
    words: tuple[str, ...], command: Any, shared: Mapping[str, Any], table: Mapping[str, Any]
) -> dict[str, Any]:
    """A command's defaults: those of `shared` that it has among its groups, and its table's."""
    if not isinstance(table, Mapping):
        raise _refusal(f"{'.'.join(words)} must be a table, such as [{'.'.join(words)}]")
    inner: Mapping[str, Any] = getattr(command, "commands", {})
    panels = {param.name: getattr(param, "rich_help_panel", None) for param in command.params}
    found = {name: value for name, value in shared.items() if panels.get(name) in ("Model", "Sampling")}
    hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
    hints = {name: hint for name, hint in hints.items() if name in panels and name != "option"}  # of one drafter
    for key, value in table.items():
        name = key.replace("-", "_")
        if key in inner:
            continue
        if name not in hints:
            raise _refusal(f"unknown key {key!r} in [{'.'.join(words)}]{_near(name, hints)}")
        _check(f"{'.'.join(words)}.{key}", value, hints[name])
        found[name] = value
    in_force = {name: value for name, value in found.items() if not variable_of(name)}
    return in_force | {
        name: _of_command((*words, name), each, shared, table.get(name, {})) for name, each in inner.items()
    }


def _check(key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise _refusal(f"{key} is {value!r}; it must be {_kind(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in inner if member is not NoneType)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is (str if hint is Path else hint)


def _kind(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, UnionType):
        return _kind(next(member for member in inner if member is not NoneType))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is list:
        return f"a list, each {_kind(inner[0])}"
    return KINDS[hint]


def _near(name: str, known: Any) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _refusal(what: str) -> UsageError:
    return UsageError(f"The config file {config_file()} does not fit: {what}.")
