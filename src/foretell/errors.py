"""Errors that a user can fix, each one sentence.

Foreseeable mistakes are refused early: the sentence names the value, what is allowed, and what to do next. The command
line prints it without a traceback and exits with `exit_code`; a library caller catches `ForetellError`. Any other
exception is a bug of foretell and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Container, Iterable


class ForetellError(Exception):
    """An error that the user can fix: a missing file, a malformed checkpoint, no network, a full disk."""

    exit_code = 1


class UsageError(ForetellError):
    """A request that cannot work as typed: an unknown name, options that contradict each other."""

    exit_code = 2


class ContextError(UsageError):
    """A prompt that leaves its answer no room in the model's context."""


class ForetellWarning(UserWarning):
    """Warns that something was done differently than requested; the command line prints it as a note."""


def check(holds: object, sentence: str, error: type[Exception] = ValueError) -> None:
    """Checks what native code relies on and cannot check itself; unlike an assert, under `python -O` too.

    Raises:
        ValueError: or the given error: the caller has a bug.
    """
    if not holds:
        raise error(sentence)


def check_numbers(holder: object, ranges: Iterable[tuple[str, float, float]], whole: Container[str] = ()) -> None:
    """Refuses attributes that are not numbers in [low, high]; those in `whole` must be integers.

    Raises:
        UsageError: naming the attribute, its value and what is allowed.
    """
    for name, low, high in ranges:
        value = getattr(holder, name)
        if not is_number(value, name in whole):
            raise UsageError(f"{name} is {value!r}; it must be a {'whole ' if name in whole else ''}number.")
        if not low <= value <= high:  # catches NaN too
            raise UsageError(f"{name} is {value}; it must lie between {low} and {high}.")


def is_number(value: object, whole: bool = False) -> bool:
    """Returns whether a value is a number (an integer, if `whole`); a bool is not."""
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)
