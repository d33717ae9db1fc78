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
    """A tokenizer, as far as the engine needs one."""

    @property
    def special(self) -> Mapping[str, int]:
        """Special tokens: how each is written -> its id. None of them is part of the text."""
        ...

    def follow(self, prompt: Sequence[int]) -> Detokenizer:
        """A detokenizer for the tokens after a prompt."""
        ...


class TextStream:
    """The text of one output, token by token.

    The output ends with the first token after which its text contains a stop string, or with a special token that is
    one as it is written. Stop strings are not part of the text.

    Args:
        tokenizer: None gives no text at all.
        stops: stop strings.
        prompt: token ids before the output, on which its first characters may depend.

    Raises:
        UsageError: a stop string could never occur.
    """

    def __init__(self, tokenizer: Decodes | None, stops: Sequence[str] = (), prompt: Sequence[int] = ()):
        if stops and tokenizer is None:
            raise UsageError(
                f"stop is {tuple(stops)}, but there is no tokenizer to find it; give token ids in `stop_ids=`."
            )
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
        """Appends a token and returns the text that became certain; `stopped` tells whether a stop string ended it."""
        if self._text is None:
            return ""
        if token in self._ends:
            text, self.stopped = self.finish(), True
            return text
        text = self._text.push(token)
        ahead = self._text.pending() if self._stops else ""
        return self._release(text, ahead.rstrip("\ufffd"))  # which may still become a character

    def finish(self) -> str:
        """Ends the output and returns the text that was held back."""
        if self._text is None or self.stopped:
            return ""
        text = self._release(self._text.pending())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str, ahead: str = "") -> str:
        """Appends certain text and returns what cannot begin a stop string.

        Args:
            ahead: text that would follow if the output ended here.
        """
        text = self._held + text
        complete = text + ahead
        found = [(start + len(stop), start) for stop in self._stops if (start := complete.find(stop)) >= 0]
        if found:  # the first one to be complete ends the text, however it is split into tokens
            self.stopped, self._held = True, ""
            return complete[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
