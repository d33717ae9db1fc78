"""From token ids to text that is certain: no half characters, no piece of a stop string.

A token may end inside a UTF-8 character, and text may end inside a stop string. Both are held back until the next
token settles them; only the end of the output releases what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decodes(Protocol):
    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str: ...


class TextStream:
    """Text of one output, token by token. `stops` end it and are not part of it."""

    def __init__(self, tokenizer: Decodes | None, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._start = self._read = 0  # ids before _read are shown; _start gives the decoder some context
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that became certain. Sets `stopped` when a stop string is complete."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        shown, whole = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if whole.endswith("\ufffd") or len(whole) <= len(shown):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(whole[len(shown) :])

    def finish(self) -> str:
        """The text held back, once no token follows."""
        if self._tokenizer is None or self.stopped:
            return ""
        shown, whole = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        self._start = self._read = len(self._ids)
        text = self._release(whole[len(shown) :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, begin: int, end: int) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(self._ids[begin:end], skip_special=True)

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that was complete first ends the text, however it was cut into tokens
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
