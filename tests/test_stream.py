"""Text that is shown is certain: never half a character, never a piece of a stop string, nothing lost at the end.

The truth is the whole text, decoded at once and cut at the first stop string to be completed. However it is cut
into tokens, the pieces must join to that.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import examples

from foretell.engine.stream import TextStream

SAMPLE = "naïve Ångström — 日本語 👩🏽‍🚀🇺🇳 \U0001f9d1\U0001f3fe\u200d\U0001f91d end\n\n  x"


class Bytes:
    """A byte-level tokenizer: a token is any string of bytes, and half characters decode to U+FFFD. -1 is special."""

    def __init__(self, tokens: Sequence[bytes]):
        self.tokens = tokens

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        assert skip_special
        return b"".join(self.tokens[i] for i in ids if i >= 0).decode("utf-8", errors="replace")


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The bytes in pieces: a token boundary at every place."""
    ends = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(ends)]


def stream(tokens: Sequence[bytes], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What each token shows, and the rest at the end; and whether a stop string ended it."""
    out = TextStream(Bytes(tokens), stops)
    pieces = []
    for token in range(len(tokens)):
        pieces.append(out.push(token))
        if out.stopped:
            return pieces, True
    pieces.append(out.finish())
    return pieces, out.stopped


def first_completed(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop string that is complete first, reading character by character; None without one."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


places = st.lists(st.integers(0, 500), max_size=60)
words = st.text(alphabet="abé日👩", max_size=40)


@examples(200)
@given(words | st.just(SAMPLE), places, st.lists(st.text(alphabet="abé日👩", min_size=1, max_size=5), max_size=3))
def test_the_pieces_join_to_the_text_up_to_the_stop(text: str, boundaries: list[int], stops: list[str]) -> None:
    pieces, stopped = stream(cut(text.encode(), boundaries), stops)
    before = first_completed(text, stops)
    assert "".join(pieces) == (text if before is None else before)
    assert stopped == (before is not None)
    assert not any("\ufffd" in piece for piece in pieces)


def certain(text: str, stops: Sequence[str]) -> str:
    """The text without the longest end of it that could begin a stop string."""
    unsure = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(unsure, default=0)]


@examples(150)
@given(words, places, st.lists(st.text(alphabet="abé日👩", min_size=1, max_size=5), max_size=3))
def test_text_is_shown_as_soon_as_it_is_certain_and_never_before(
    text: str, boundaries: list[int], stops: list[str]
) -> None:
    tokens, shown = cut(text.encode(), boundaries), ""
    out = TextStream(Bytes(tokens), stops)
    for token in range(len(tokens)):
        shown += out.push(token)
        if out.stopped:
            break
        so_far = b"".join(tokens[: token + 1])
        known = certain(so_far.decode("utf-8", errors="ignore"), stops)
        whole_characters = not so_far.decode("utf-8", errors="replace").endswith("\ufffd")
        assert shown == known if whole_characters else known.startswith(shown)


@examples(100)
@given(st.binary(max_size=40), places)
def test_any_bytes_join_to_what_decoding_them_at_once_gives(data: bytes, boundaries: list[int]) -> None:
    """Models do write invalid UTF-8; its replacement characters come late, but they come."""
    pieces, _ = stream(cut(data, boundaries))
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def test_a_character_is_shown_with_its_last_byte() -> None:
    pieces, _ = stream([bytes([byte]) for byte in "a👩é".encode()])
    assert pieces == ["a", "", "", "", "👩", "", "é", ""]


def test_a_stop_string_in_the_making_is_held_back_and_released_when_it_was_none() -> None:
    pieces, stopped = stream([b"one <", b"e", b"n", b"x> ", b"<en", b"d", b"> more"], ["<end>"])
    assert pieces == ["one ", "", "", "<enx> ", "", "", ""]
    assert stopped
    pieces, stopped = stream([b"one <en", b"d"], ["<end>"])
    assert pieces == ["one ", "", "<end"]  # the end of the output settles it
    assert not stopped


def test_of_two_stop_strings_the_one_complete_first_ends_the_text_however_it_is_cut() -> None:
    assert stream([b"xab", b"c"], ["abc", "b"]) == (["xa"], True)
    assert stream([b"xabc"], ["abc", "b"]) == (["xa"], True)


def test_special_tokens_show_nothing() -> None:
    out = TextStream(Bytes([b"hello ", b"world"]))
    assert [out.push(token) for token in (-1, 0, -1, -1, 1, -1)] == ["", "hello ", "", "", "world", ""]
    assert out.finish() == ""


def test_without_a_tokenizer_there_is_no_text() -> None:
    out = TextStream(None, ["stop"])
    assert (out.push(3), out.finish(), out.stopped) == ("", "", False)


@pytest.mark.real
@pytest.mark.parametrize("stop", ["", "語 👩", "🚀", "— 日", "\n\n", "end\n"])
def test_the_real_tokenizer_shows_whole_characters(demo_folder: Path, stop: str) -> None:
    from foretell.backbone import Tokenizer

    tokenizer = Tokenizer.from_folder(demo_folder)
    text = SAMPLE + " and ﷽ \u0301 e\u0301 𝕏 done"
    out = TextStream(tokenizer, [stop] if stop else [])
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(out.push(token))
        if out.stopped:
            break
    pieces.append(out.finish())
    assert "".join(pieces) == (text[: text.index(stop)] if stop else text)
    assert out.stopped == bool(stop)
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5  # it does stream
