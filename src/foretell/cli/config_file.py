"""The config file: a user's own defaults for options, in TOML.

    model = "Qwen/Qwen3-0.6B"     # options of the panels Model and Sampling, for every verb that has them
    drafter = "medusa"
    lookup = true

    [generate]                    # options of one verb
    batch_size = 8

    [options.medusa]             # options of one drafter, as given with -o
    checkpoint = "~/heads/qwen3-0.6b"

The command line wins over a verb's table, that over the first lines, and FORETELL_CACHE and FORETELL_OFFLINE over both.
The file is $FORETELL_CONFIG, else foretell/config.toml in $XDG_CONFIG_HOME or ~/.config; it need not exist.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError, UsageError
from foretell.files import one_line

OPTIONS = "options"
"""The table that holds one table of options for each drafter."""


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


def of_drafter(drafter: str) -> list[str]:
    """Returns a drafter's options as key=value, as they would be given with -o."""
    tables = read().get(OPTIONS, {})
    if not isinstance(tables, Mapping):
        raise refusal(f"{OPTIONS} must be a table of tables, such as [{OPTIONS}.medusa]")
    table = tables.get(drafter, {})
    if not isinstance(table, Mapping):
        raise refusal(f"{OPTIONS}.{drafter} must be a table, such as [{OPTIONS}.{drafter}]")
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in table.items()]


def refusal(what: str) -> UsageError:
    """The error of a file whose content is not what it must be."""
    return UsageError(f"The config file {config_file()} does not fit: {what}.")
