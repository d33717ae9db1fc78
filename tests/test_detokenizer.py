"""Streamed text is what decoding all ids shows beyond the prompt, whatever the tokenizer's decoder does.

The truth is the tokenizers library decoding prompt and answer at once. Ids are drawn at random: special tokens, unknown
ids, bytes that are no UTF-8, spaces where a decoder strips some.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from random_backbones import examples
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from foretell.engine.text_stream import TextStream
from foretell.loading import Tokenizer
from foretell.loading import detokenizer as module

LETTERS = {byte: letter for letter, byte in module.BYTES.items()}
SPACE, FUSE, RUNS = decoders.Replace("▁", " "), decoders.Fuse(), decoders.ByteFallback()
DECODERS: dict[str, Any] = {
    "bytes": decoders.ByteLevel(),
    "bytes, then a strip": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    "llama": decoders.Sequence([SPACE, RUNS, FUSE, decoders.Strip(" ", 1, 0)]),
    "llama, nested": decoders.Sequence([decoders.Sequence([SPACE, RUNS]), FUSE, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([SPACE, RUNS, FUSE]),
    "three spaces": decoders.Sequence([SPACE, FUSE, decoders.Strip(" ", 3, 0)]),
    "each token stripped": decoders.Sequence([SPACE, decoders.Strip(" ", 1, 0)]),
    "metaspace": decoders.Metaspace(),
    "metaspace, no prefix": decoders.Metaspace(prepend_scheme="never"),
    "metaspace with bytes": decoders.Sequence([RUNS, decoders.Metaspace()]),
    "wordpiece": decoders.WordPiece(cleanup=True),
    "end of word": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "words": None,
    "whole": decoders.Sequence([SPACE, FUSE, decoders.Replace("the the", "THE")]),  # may change any text before
}
PIECES = [
    "▁", "▁▁", "▁▁▁▁", "▁the", "the", "is", "▁a", "x", " ", "x ", "", "\ufffd", "é", "日", ".", "▁.", "n't", "##ing",
    "do</w>", "</w>", "<pad>", "|", "<0xzz>",
    *(f"<0x{byte:02X}>" for byte in b"\n \xf0\x9f\x98\x80\xc3\xa9\xe2\x82\xac"),
]  # fmt: skip
SPELLED = [LETTERS[byte] for byte in b" \nx.\xf0\x9f\x98\x80\xc3\xa9\xe2\x82\xac\xed\xa0"]
BYTE_PIECES = ["Ġthe", "the", "is", "日", "ä½", *SPELLED]


@cache
def tokenizer(kind: str) -> Tokenizer:
    pieces = BYTE_PIECES if kind.startswith("bytes") else PIECES
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    if DECODERS[kind] is not None:
        backend.decoder = DECODERS[kind]
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    backend.add_tokens(["<think>"])
    return Tokenizer(backend, {}, None, kind)


def ids_of(kind: str, *pieces: str) -> list[int]:
    found = [tokenizer(kind)._backend.token_to_id(piece) for piece in pieces]
    assert None not in found
    return found


def beyond(kind: str, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text of both, cut at the prompt's: at the first character in which they differ."""
    before, whole = (tokenizer(kind).decode([*ids], skip_special=True) for ids in (prompt, [*prompt, *answer]))
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return whole[same:]


def streamed(kind: str, prompt: Sequence[int], answer: Sequence[int], stops: Sequence[str] = ()) -> tuple[str, int]:
    """The text, and how many tokens it took."""
    out, text = TextStream(tokenizer(kind), stops, prompt), ""
    for place, token in enumerate(answer, start=1):
        text += out.push(token)
        if out.stopped:
            return text, place
    return text + out.finish(), len(answer)


@st.composite
def talks(draw: st.DrawFn) -> tuple[str, list[int], list[int]]:
    """A kind, a prompt and an answer; of few different tokens, so that they meet, and often of bytes."""
    kind = draw(st.sampled_from(list(DECODERS)))
    backend = tokenizer(kind)._backend
    every = st.integers(0, backend.get_vocab_size() + 1)  # two more than there are
    bytes_only = [id for piece, id in sorted(backend.get_vocab().items()) if piece.startswith("<0x") or len(piece) == 1]
    pool = draw(st.lists(every, min_size=1, max_size=8) | st.lists(st.sampled_from(bytes_only), min_size=1))
    some = st.sampled_from(pool)
    return kind, draw(st.lists(some, max_size=6)), draw(st.lists(some, max_size=14))


@pytest.mark.slow
@examples(400)
@given(talks())
def test_streamed_text_is_that_of_all_ids_beyond_the_prompt(talk: tuple[str, list[int], list[int]]) -> None:
    kind, prompt, answer = talk
    assert streamed(kind, prompt, answer)[0] == beyond(kind, prompt, answer)


@examples(250)
@example(("whole", [], [11, 23, 23]), ["x"])  # text with U+FFFD that is held back to the end
@given(
    talks(), st.lists(st.sampled_from(["\n", " ", "the", " the", "é", "x", " a", "is x", "  "]), min_size=1, max_size=2)
)
def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(
    talk: tuple[str, list[int], list[int]], stops: list[str]
) -> None:
    kind, prompt, answer = talk
    text, count = streamed(kind, prompt, answer, stops)
    for place in range(1, len(answer) + 1):
        so_far = beyond(kind, prompt, answer[:place])
        ends = [(so_far.index(stop) + len(stop), so_far.index(stop)) for stop in stops if stop in so_far]
        if ends:
            assert (text, count) == (so_far[: min(ends)[1]], place)
            return
    assert (text, count) == (beyond(kind, prompt, answer), len(answer))


@examples(150)
@given(talks())
def test_what_was_shown_is_never_taken_back(talk: tuple[str, list[int], list[int]]) -> None:
    """Whatever follows: what is shown after some tokens begins the text of them and any others."""
    kind, prompt, answer = talk
    out, shown = TextStream(tokenizer(kind), (), prompt), ""
    for token in answer:
        shown += out.push(token)
        assert beyond(kind, prompt, answer).startswith(shown)


def test_text_is_shown_as_it_comes() -> None:
    """All but one kind stream: text waits for the end of a run of bytes, of a character, and for nothing else."""
    for kind in DECODERS:
        words = ids_of(kind, "the", "is", "x")
        out = TextStream(tokenizer(kind), (), words)
        pieces = [out.push(token) for token in words]
        assert all(pieces) == (kind != "whole"), kind
    run = ids_of("llama", "▁a", "<0xC3>", "<0xA9>", "x")
    out = TextStream(tokenizer("llama"), (), run[:1])
    assert [out.push(token) for token in run] == [" a", "", "", "éx"]


def test_the_space_between_prompt_and_answer_is_kept() -> None:
    for kind in ("llama", "metaspace", "three spaces", "metaspace with bytes"):
        assert streamed(kind, ids_of(kind, "▁a", "is"), ids_of(kind, "▁the")) == (" the", 1)
        assert streamed(kind, ids_of(kind, "is"), ids_of(kind, "▁▁▁▁", "x")) == ("    x", 2)  # an indent
        assert streamed(kind, ids_of(kind, "is"), ids_of(kind, "x", "▁the"), [" the"]) == ("x", 2)
        assert streamed(kind, ids_of(kind, "<s>"), ids_of(kind, "▁the")) == ("the", 1)  # the text begins here


def test_a_prompt_that_ends_within_a_character_loses_nothing() -> None:
    first, second = ids_of("bytes", "Ã", "©")  # the two bytes of é
    assert streamed("bytes", [first], [second]) == ("é", 1)
    assert streamed("bytes", [first], ids_of("bytes", "x")) == ("x", 1)
    assert streamed("llama", ids_of("llama", "x", "<0xC3>"), ids_of("llama", "<0xA9>", "x")) == ("éx", 2)
    assert streamed("llama", ids_of("llama", "x", "<0x0A>"), ids_of("llama", "<0x0A>", "x")) == ("\nx", 2)


def test_a_newline_among_byte_tokens_stops_at_once() -> None:
    """Llama-2 has no other newline; the run of bytes it begins could go on."""
    answer = ids_of("llama", "x", "<0x0A>", "x")
    assert streamed("llama", [], answer, ["\n"]) == ("x", 2)


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "whole"])
def test_a_token_costs_the_same_however_many_came_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids decoded are a few for each token."""
    decoded = 0
    true_decode = module.WindowText.__init__

    def counting(self: Any, decode: Any, *rest: Any) -> None:
        def count(ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return str(decode(ids))

        true_decode(self, count, *rest)

    monkeypatch.setattr(module.WindowText, "__init__", counting)
    half = LETTERS[0xF0] if kind.startswith("bytes") else "<0xF0>"
    many = ids_of(kind, "the", "is", half, "x") * 500
    assert streamed(kind, many, many)[0] == beyond(kind, many, many)
    assert decoded < 8 * len(many)
    if kind != "bytes, then a strip":  # nobody's, and its window grows while no character ends
        streamed(kind, [], ids_of(kind, half) * 2000)
        assert decoded < 8 * len(many) + 4 * 2000
