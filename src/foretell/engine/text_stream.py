"""From token ids to text that is certain: no half characters, no piece of a stop string.

A token may end inside a character, and text may end inside a stop string. Both are held back until the next tokens
settle them; only the end of the output releases what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from foretell.errors import UsageError
from foretell.loading.detokenizer import Detokenizer


class Decodes(Protocol):
    """What the engine asks of a tokenizer."""

    @property
    def special(self) -> Mapping[str, int]:
        """The tokens that are no text, by how they are written."""
        ...

    def follow(self, prompt: Sequence[int]) -> Detokenizer:
        """The text of what is written after a prompt."""
        ...


class TextStream:
    """Text of one output, token by token. `stops` end it and are not part of it.

    The output ends with the first token after which its text holds a stop string, or that is one: special tokens are
    no text, but may be asked for by how they are written.

    Raises:
        UsageError: a stop string that could never be met.
    """

    def __init__(self, tokenizer: Decodes | None, stops: Sequence[str] = (), prompt: Sequence[int] = ()):
        if stops and tokenizer is None:
            raise UsageError(f"stop is {tuple(stops)}, but there is no tokenizer to find it; name ids in stop_ids.")
        special = tokenizer.special if tokenizer and stops else {}
        for stop in stops:
            if inside := next((mark for mark in special if mark in stop and mark != stop), None):
                raise UsageError(
                    f"The stop string {stop!r} holds {inside!r}, a special token, which is never part of the text; "
                    f"give {inside!r} alone."
                )
        self._text = tokenizer.follow(prompt) if tokenizer else None
        self._stops = tuple(stops)
        self._ends = {special[stop] for stop in stops if stop in special}
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that became certain. Sets `stopped` when a stop string is complete."""
        if self._text is None:
            return ""
        if token in self._ends:
            text, self.stopped = self.finish(), True
            return text
        text = self._text.push(token)
        ahead = self._text.pending() if self._stops else ""
        return self._release(text, "" if "\ufffd" in ahead else ahead)

    def finish(self) -> str:
        """The text held back, once no token follows."""
        if self._text is None or self.stopped:
            return ""
        text = self._release(self._text.pending())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str, ahead: str = "") -> str:
        """Adds certain text; returns what is no beginning of a stop string. `ahead` is the text if it ended here."""
        text = self._held + text
        whole = text + ahead
        found = [(at + len(stop), at) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:  # the one that was complete first ends the text, however it was cut into tokens
            self.stopped, self._held = True, ""
            return whole[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
