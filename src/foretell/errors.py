"""What a user can do wrong, said in one sentence.

Every mistake that can be foreseen is refused at the door: the sentence names the value, what is allowed, and
what to do next. The command line prints it without a traceback and leaves with `exit_code`; a library caller
catches `ForetellError`. Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Container, Iterable


class ForetellError(Exception):
    """A mistake the user can mend: a missing file, a malformed checkpoint, no network, a full disk."""

    exit_code = 1


class UsageError(ForetellError):
    """A request that could never work as typed: an unknown name, flags that contradict each other."""

    exit_code = 2


class ContextError(UsageError):
    """A prompt that leaves its answer no room in the model's context."""


class ForetellWarning(UserWarning):
    """Something was done otherwise than it was asked for; the command line prints it as a note."""


def check(holds: object, sentence: str, error: type[Exception] = ValueError) -> None:
    """Guards what native code, which cannot look, takes for granted: unlike an assert also under `python -O`.

    Raises:
        ValueError: or another error; the caller has a bug.
    """
    if not holds:
        raise error(sentence)


def check_numbers(holder: object, ranges: Iterable[tuple[str, float, float]], whole: Container[str] = ()) -> None:
    """Refuses attributes that are no numbers, or outside [low, high]; those in `whole` must be whole.

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
    """Whether a value is a number; a truth value is none."""
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)
