"""Incremental detokenization: text token by token, equal to decoding all ids at once.

A tokenizer's decoder looks at more than one token: sentencepiece's drops the first space of a text, some tokens are
only part of a character, and a run of byte tokens is text only if all of it is valid UTF-8. So the text of an answer is
defined as decode(prompt + answer) without decode(prompt): the part after the first character in which they differ (they
may differ within the prompt, which can end within a character). Decoding everything again at every token would take
time quadratic in the length, so one of two classes does it, by the kind of decoder:

    ByteText     GPT-2's decoder joins bytes: an incremental UTF-8 decoder is the whole state.
    WindowText   all others: decodes from the last solid token (see `Kind`) on, usually one or two tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[+0-9A-Fa-f][0-9A-Fa-f]>")  # the library reads +A as a number too
_JOINING = ("Fuse", "ByteLevel")
_BY_TOKEN = {"Replace", "ByteFallback", "Strip", "Metaspace", "WordPiece", "CTC"}
"""Decoders that look at one token, whether it is the first or repeats the one before, and at runs of byte tokens."""
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_UNPRINTABLE = (byte for byte in range(256) if byte not in _PRINTABLE)
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_UNPRINTABLE)}
"""The letters in which GPT-2's vocabulary spells bytes."""


class Detokenizer(Protocol):
    """Text of one answer, token by token."""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that no later token can change any more."""
        ...

    def pending(self) -> str:
        """Returns the text held back so far, as it reads if no token follows."""
        ...


@dataclass(frozen=True)
class Kind:
    """The context that a decoder looks at besides the token itself.

    A token is solid if it decodes, alone, to text without half a character, and is not part of a run of bytes. If a
    decoder is `local`, a solid token t separates its neighbours: for any tokens x before and y after it,
    decode(x t y) = decode(x t) + (decode(t y) without decode(t)).

    Attributes:
        local: true for decoders that work token by token, then join, then at most strip.
        runs: consecutive byte tokens are decoded together.
        halves: a token may end within a character, which decodes to U+FFFD until it is complete.
        joins_bytes: the text is the bytes of all tokens, decoded as UTF-8, and nothing else.
    """

    local: bool
    runs: bool
    halves: bool
    joins_bytes: bool

    @classmethod
    def of(cls, decoder: Any) -> Kind:
        """Reads it off a decoder of the tokenizers library; None joins tokens with spaces."""
        names = _names(json.loads(decoder.__getstate__())) if decoder is not None else []
        joined = next((i for i, name in enumerate(names) if name in _JOINING), len(names))
        by_token = _BY_TOKEN.issuperset(names[:joined]) and {*_JOINING, "Strip"}.issuperset(names[joined:])
        return cls(
            local=by_token or names == ["BPEDecoder"], runs="ByteFallback" in names, halves="ByteLevel" in names,
            joins_bytes=names == ["ByteLevel"],
        )  # fmt: skip


def follow(backend: tokenizers.Tokenizer, kind: Kind, special: frozenset[int], prompt: Sequence[int]) -> Detokenizer:
    """Returns a detokenizer for what follows a prompt; `special` tokens have no text."""

    def piece(token: int) -> str | None:
        return None if token in special else backend.id_to_token(token)

    if kind.joins_bytes:
        return ByteText(lambda token: _bytes(piece(token) or ""), prompt)
    return WindowText(backend.decode, piece, kind, prompt)


class ByteText:
    """Detokenizer of a tokenizer that joins bytes."""

    def __init__(self, bytes_of: Callable[[int], bytes], prompt: Sequence[int]):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token in reversed(prompt):
            if len(tail) >= 3:  # the most bytes of a character that is not complete
                break
            tail = bytes_of(token) + tail
        self._decoder.decode(tail)
        self._before = self._half()

    def push(self, token: int) -> str:
        text = self._decoder.decode(self._bytes_of(token))
        if text and self._before:
            text, self._before = _beyond(self._before, text), ""
        return text

    def pending(self) -> str:
        return _beyond(self._before, self._half())

    def _half(self) -> str:
        return self._decoder.getstate()[0].decode("utf-8", "replace")


class WindowText:
    """Detokenizer of any other tokenizer; where its kind is not `local`, all text is held back until the end."""

    def __init__(
        self, decode: Callable[[list[int]], str], piece: Callable[[int], str | None], kind: Kind, prompt: Sequence[int]
    ):
        self._decode, self._piece, self._kind = decode, piece, kind
        start = next((i for i in reversed(range(len(prompt))) if self._solid(prompt[i])), 0)
        self._window = [token for token in prompt[start:] if piece(token) is not None]
        self._shown = decode(self._window)
        self._held = False

    def push(self, token: int) -> str:
        if self._piece(token) is None:
            return ""
        self._window.append(token)
        self._held = True
        if not self._kind.local or self._in_run(token):
            return ""
        text = self._decode(self._window)
        if self._kind.halves and text.endswith("\ufffd"):
            return ""
        self._held = False
        new, self._shown = _beyond(self._shown, text), text
        if self._solid(token):
            self._window, self._shown = [token], self._decode([token])
        return new

    def pending(self) -> str:
        return _beyond(self._shown, self._decode(self._window)) if self._held else ""

    def _solid(self, token: int) -> bool:
        if not self._kind.local or self._piece(token) is None or self._in_run(token):
            return False
        alone = self._decode([token])
        return bool(alone) and not (self._kind.halves and "\ufffd" in alone)

    def _in_run(self, token: int) -> bool:
        return self._kind.runs and _BYTE_TOKEN.fullmatch(self._piece(token) or "") is not None


def _beyond(before: str, text: str) -> str:
    """Returns `text` from the first character in which it differs from `before`."""
    if text.startswith(before):
        return text[len(before) :]
    return text[next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text)) :]


def _bytes(piece: str) -> bytes:
    """Returns the bytes that GPT-2's spelling stands for; an added token may be spelled as it is."""
    try:
        return bytes(BYTES[letter] for letter in piece)
    except KeyError:
        return piece.encode()


def _names(decoder: dict[str, Any]) -> list[str]:
    """The decoders in a sequence of sequences."""
    if decoder["type"] == "Sequence":
        return [name for part in decoder["decoders"] for name in _names(part)]
    return [str(decoder["type"])]
