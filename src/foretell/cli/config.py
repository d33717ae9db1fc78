"""`foretell config`: where the config file is, and which defaults are in force."""

from __future__ import annotations

import json
import os
from typing import Any


def config() -> None:
    """Show the config file's path and the defaults in force.

    The file sets defaults for options. In its first lines stand those of the panels Model and Sampling, for every verb
    that has them; in a table such as [generate] those of one verb; in one such as [options.medusa] those of a drafter.
    """
    from foretell.cli import VERBS, load_verb
    from foretell.cli.defaults import OPTIONS, config_file, of_drafter, of_verb, read, variable_of
    from foretell.cli.options import Loading, Sampling, shared_options

    path, content, shared = config_file(), read(), shared_options()
    for verb in VERBS:
        of_verb(verb, load_verb(verb), VERBS, shared)  # refuses what does not fit, of every verb
    for drafter in content.get(OPTIONS, {}):
        of_drafter(drafter)
    print(f"# {path}" + ("" if path.is_file() else " (does not exist, so these are foretell's own defaults)"))
    written = {key.replace("-", "_"): value for key, value in content.items()}
    defaults = vars(Loading()) | vars(Sampling())
    rows: list[tuple[str, str, str]] = []
    for name in shared:
        if variable := variable_of(name):
            rows.append((name, _toml(os.environ[variable]), f"from {variable}"))
        elif name in written:
            rows.append((name, _toml(written[name]), "from the file"))
        else:
            rows.append((name, _toml(defaults[name]), ""))
    _print_aligned(rows)
    for table in (*VERBS, OPTIONS):
        _print_table(table, content.get(table, {}))


def _print_aligned(rows: list[tuple[str, str, str]]) -> None:
    width = max(len(f"{name} = {value}") for name, value, _ in rows)
    for name, value, source in rows:
        line = f"# {name}" if value == "" else f"{name} = {value}"
        print(f"{line:{width}}  # {source}" if source else line)


def _print_table(name: str, table: dict[str, Any]) -> None:
    from foretell.cli.defaults import OPTIONS, variable_of

    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if plain:
        print(f"\n[{name}]")
        for key, value in plain.items():
            variable = None if name.startswith(OPTIONS) else variable_of(key.replace("-", "_"))
            print(f"{key} = {_toml(value)}" + (f"  # not in force: {variable} is set" if variable else ""))
    for key, value in table.items():
        if isinstance(value, dict):
            _print_table(f"{name}.{key}", value)


def _toml(value: Any) -> str:
    """A value as TOML writes it; empty for None, which TOML lacks."""
    return "" if value is None else json.dumps(value, ensure_ascii=False)
