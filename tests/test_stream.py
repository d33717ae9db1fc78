"""Text that is shown is certain: never half a character, never a piece of a stop string, nothing lost at the end.

The truth is the whole text, decoded at once and cut at the first stop string to be completed. However it is cut
into tokens, the pieces must join to that. What decoders make of a beginning, or of invalid bytes, is the subject of
test_detokenizer.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import examples
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from foretell.engine.text_stream import TextStream
from foretell.errors import UsageError
from foretell.loading import Tokenizer
from foretell.loading.detokenizer import BYTES

SAMPLE = "naïve Ångström — 日本語 👩🏽‍🚀🇺🇳 \U0001f9d1\U0001f3fe\u200d\U0001f91d end\n\n  x"


LETTERS = {byte: letter for letter, byte in BYTES.items()}


def byte_tokenizer(tokens: Sequence[bytes]) -> tuple[Tokenizer, list[int]]:
    """A byte-level tokenizer of these tokens, and their ids; the next two ids are <end> and </s>, both special."""
    vocab: dict[str, int] = {}
    ids = [vocab.setdefault("".join(LETTERS[byte] for byte in token), len(vocab)) for token in tokens]
    backend = Backend(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>"), AddedToken("</s>")])
    return Tokenizer(backend, {}, None, "bytes"), ids


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The bytes in pieces: a token boundary at every place."""
    ends = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(ends)]


def stream(tokens: Sequence[bytes], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What each token shows, and the rest at the end; and whether a stop string ended it."""
    tokenizer, ids = byte_tokenizer(tokens)
    out = TextStream(tokenizer, stops)
    pieces = []
    for token in ids:
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
    tokenizer, ids = byte_tokenizer(tokens)
    out = TextStream(tokenizer, stops)
    for place, token in enumerate(ids):
        shown += out.push(token)
        if out.stopped:
            break
        so_far = b"".join(tokens[: place + 1])
        known = certain(so_far.decode("utf-8", errors="ignore"), stops)
        assert shown == known


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
    pieces, stopped = stream([b"one <", b"E", b"N", b"x> ", b"<EN", b"D", b"> more"], ["<END>"])
    assert pieces == ["one ", "", "", "<ENx> ", "", "", ""]
    assert stopped
    pieces, stopped = stream([b"one <EN", b"D"], ["<END>"])
    assert pieces == ["one ", "", "<END"]  # the end of the output settles it
    assert not stopped


def test_of_two_stop_strings_the_one_complete_first_ends_the_text_however_it_is_cut() -> None:
    assert stream([b"xab", b"c"], ["abc", "b"]) == (["xa"], True)
    assert stream([b"xabc"], ["abc", "b"]) == (["xa"], True)


def test_special_tokens_show_nothing() -> None:
    tokenizer, (hello, world) = byte_tokenizer([b"hello ", b"world"])
    end, other, unknown = 2, 3, 99
    out = TextStream(tokenizer)
    shown = [out.push(token) for token in (end, hello, other, unknown, world, end)]
    assert shown == ["", "hello ", "", "", "world", ""]
    assert out.finish() == ""


def test_a_special_token_that_is_a_stop_string_ends_the_text() -> None:
    tokenizer, (one, less, world) = byte_tokenizer([b"one ", b"<", b"world"])
    end, other = 3, 4
    for stops in (["<end>"], ["</s>", "<end>"], ["zzz", "<end>"]):
        out = TextStream(tokenizer, stops)
        assert [out.push(token) for token in (one, less)] == ["one ", ""]  # < may begin <end> as text
        assert (out.push(end), out.stopped, out.finish()) == ("<", True, "")
    out = TextStream(tokenizer, ["<end>"])
    assert [out.push(token) for token in (one, other, world)] == ["one ", "", "world"]
    assert not out.stopped
    spelled, ids = byte_tokenizer([b"one <e", b"nd", b"> more"])  # letter by letter it is text, and ends it too
    out = TextStream(spelled, ["<end>"])
    assert ["".join(out.push(token) for token in ids), out.stopped] == ["one ", True]


@pytest.mark.parametrize("stop", ["<end>\n", "\n<end>", "a</s>b"])
def test_a_stop_string_that_could_never_be_met_is_refused(stop: str) -> None:
    tokenizer, _ = byte_tokenizer([b"a"])
    with pytest.raises(UsageError, match=r"holds '<.*>', a special token, which is never part of the text; give '<"):
        TextStream(tokenizer, ["fine", stop])


def test_without_a_tokenizer_there_is_no_text() -> None:
    out = TextStream(None)
    assert (out.push(3), out.finish(), out.stopped) == ("", "", False)
    with pytest.raises(UsageError, match=r"stop is \('x',\), but there is no tokenizer to find it; give token ids in"):
        TextStream(None, ["x"])


@pytest.mark.real
@pytest.mark.parametrize("stop", ["", "語 👩", "🚀", "— 日", "\n\n", "end\n"])
def test_the_real_tokenizer_shows_whole_characters(demo_folder: Path, stop: str) -> None:
    from foretell.loading import Tokenizer

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
