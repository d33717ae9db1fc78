"""The text of ids as they come, equal to that of decoding them all at once.

Decoders of tokenizers look beyond the token at hand: sentencepiece's drop the first space of a text, bytes make a
character only together, and a run of byte tokens is text only if all of it is valid UTF-8. So the text of an answer is
what decoding prompt and answer shows beyond the prompt's own text (from the first character in which they differ, as
where a prompt ends within a character). Decoding everything anew at every token would cost the square of the length.
What is decoded instead depends on the kind of decoder:

    ByteText     GPT-2's kind joins bytes: an incremental UTF-8 decoder is all its state.
    WindowText   others, from the last solid token on (see `Kind`): it grows over tokens that show nothing only.
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
"""Decoders that change a token by itself, by whether it is the first or the same as the one before, or within a run of
byte tokens."""
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""The letters in which GPT-2's vocabulary spells bytes."""


class Detokenizer(Protocol):
    """Text of one answer, token by token."""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that no later token can change any more."""
        ...

    def pending(self) -> str:
        """What is held back, as it would read if no token followed."""
        ...


@dataclass(frozen=True)
class Kind:
    """What a decoder looks at besides the token.

    A token is solid if it shows text by itself that is no half character and no byte of a run. Let t be a solid token
    and x and y any others. `local` promises that decoding x t y shows decode(x t), then what decode(t y) shows beyond
    decode(t): whoever looks at the first token, at the one before or at a space to strip finds t in both.

    Attributes:
        local: whether that holds. It does for decoders that go token by token, then join, then strip at most.
        runs: byte tokens in a row are read together.
        halves: a token may end within a character, which reads U+FFFD until it is complete.
        joins_bytes: the text is the bytes of all tokens, read as UTF-8, and nothing else.
    """

    local: bool
    runs: bool
    halves: bool
    joins_bytes: bool

    @classmethod
    def of(cls, decoder: Any) -> Kind:
        """Of a decoder of the tokenizers library; None joins tokens with spaces."""
        names = _names(json.loads(decoder.__getstate__())) if decoder is not None else []
        joined = next((i for i, name in enumerate(names) if name in _JOINING), len(names))
        by_token = _BY_TOKEN.issuperset(names[:joined]) and {*_JOINING, "Strip"}.issuperset(names[joined:])
        return cls(
            local=by_token or names == ["BPEDecoder"], runs="ByteFallback" in names, halves="ByteLevel" in names,
            joins_bytes=names == ["ByteLevel"],
        )  # fmt: skip


def follow(backend: tokenizers.Tokenizer, kind: Kind, special: frozenset[int], prompt: Sequence[int]) -> Detokenizer:
    """The text of what follows a prompt; `special` tokens show nothing."""

    def piece(token: int) -> str | None:
        return None if token in special else backend.id_to_token(token)

    if kind.joins_bytes:
        return ByteText(lambda token: _bytes(piece(token) or ""), prompt)
    return WindowText(backend.decode, piece, kind, prompt)


class ByteText:
    """Of a tokenizer that joins bytes."""

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
    """Of any other tokenizer. Where its kind is not `local`, nothing is certain before the end."""

    def __init__(
        self, decode: Callable[[list[int]], str], piece: Callable[[int], str | None], kind: Kind, prompt: Sequence[int]
    ):
        self._decode, self._piece, self._kind = decode, piece, kind
        start = next((at for at in reversed(range(len(prompt))) if self._solid(prompt[at])), 0)
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
        whole = self._decode(self._window)
        if self._kind.halves and whole.endswith("\ufffd"):
            return ""
        self._held = False
        text, self._shown = _beyond(self._shown, whole), whole
        if self._solid(token):
            self._window, self._shown = [token], self._decode([token])
        return text

    def pending(self) -> str:
        return _beyond(self._shown, self._decode(self._window)) if self._held else ""

    def _solid(self, token: int) -> bool:
        if not self._kind.local or self._piece(token) is None or self._in_run(token):
            return False
        alone = self._decode([token])
        return bool(alone) and not (self._kind.halves and "\ufffd" in alone)

    def _in_run(self, token: int) -> bool:
        return self._kind.runs and _BYTE_TOKEN.fullmatch(self._piece(token) or "") is not None


def _beyond(before: str, whole: str) -> str:
    """What a text shows beyond another, from the first character in which they differ."""
    if whole.startswith(before):
        return whole[len(before) :]
    return whole[next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole)) :]


def _bytes(piece: str) -> bytes:
    """What GPT-2's spelling of bytes stands for; an added token may be spelled as it is."""
    try:
        return bytes(BYTES[letter] for letter in piece)
    except KeyError:
        return piece.encode()


def _names(decoder: dict[str, Any]) -> list[str]:
    """The decoders in a sequence of sequences."""
    if decoder["type"] == "Sequence":
        return [name for each in decoder["decoders"] for name in _names(each)]
    return [str(decoder["type"])]
