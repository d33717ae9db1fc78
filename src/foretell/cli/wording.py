"""The library's sentences in the words of the command line.

The library speaks Python: it names an argument in backticks with its sign of equality, `device='cpu'`. Here that
becomes the option that sets it: --device cpu, or -o nodes=16 where it is an option of the drafter.
"""

from __future__ import annotations

import re
from dataclasses import fields

from foretell.cli.options import Loading, Sampling, Training
from foretell.cli.terminal import note

_ARGUMENT = re.compile(r"`(\w+)=([^`]*)`")
_OPTIONS = {each.name: f"--{each.name.replace('_', '-')}" for group in (Loading, Sampling, Training)
            for each in fields(group)}  # fmt: skip
_OPTIONS |= {
    "batch_size": "--batch-size", "data": "--data", "keep_features": "--keep-features", "learning_rate": "--lr",
    "other_model": "--other-model", "out": "--out",
    "prompts": "--prompts", "raw": "--raw", "start": "--start", "stop_ids": "--stop-id",
}  # fmt: skip
"""Argument -> option of a verb; an argument that is not here is an option of the drafter."""


def for_command_line(sentence: str) -> str:
    """Returns the sentence with its arguments written as options."""

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'\"")
        if name not in _OPTIONS:
            return f"-o {name}={value.lower() if value in ('True', 'False') else value}"
        return _OPTIONS[name] if value in ("", "True") else f"{_OPTIONS[name]} {value}"

    return _ARGUMENT.sub(option, sentence)


def note_error(error: Exception) -> None:
    """Prints what went wrong on stderr."""
    note(f"error: {for_command_line(str(error))}")
