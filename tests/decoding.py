"""Runs an engine to the end, and compares it with plain decoding of each request alone.

The reference is one request at a time, one token at a time, each with a cache of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from random_backbones import prefilled, same
from toy_drafters import Answers

from foretell.backbone import Backbone, KVCache
from foretell.contracts import Draft, Drafter, Row
from foretell.drafters.plain import Plain
from foretell.drafters.prompt_lookup import WithLookup
from foretell.engine import BatchDecoder, SpeculativeDecoder
from foretell.requests import Event, SamplingParams, Statistics, TokenLogprob

Request = tuple[list[int], SamplingParams]
Method = TypeVar("Method", bound=Drafter)


@dataclass
class Output:
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    drafted: list[bool] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    statistics: Statistics = field(default_factory=Statistics)

    def add(self, event: Event) -> None:
        assert self.finish_reason is None, "an event after the last"
        self.ids += event.tokens
        self.logprobs += event.logprobs
        self.text += event.text
        self.drafted += event.drafted
        assert "".join(text for text, _ in event.pieces) == event.text
        self.finish_reason, self.statistics = event.finish_reason, event.statistics or self.statistics
        self.error = event.error


def finish(decoder: BatchDecoder, requests: Sequence[Request], keys: Sequence[int] = ()) -> list[Output]:
    """Submits all, steps until all are done; `keys` fix the noise (by default the order of the requests)."""
    keys = keys or range(len(requests))
    numbers = [
        decoder.submit(ids, replace(params, seed=params.seed or 0), key)
        for (ids, params), key in zip(requests, keys, strict=True)
    ]
    outputs = {number: Output() for number in numbers}
    while decoder.busy:
        for event in decoder.step():
            outputs[event.request].add(event)
    return list(outputs.values())


def finish_in_spite_of(
    error: type[BaseException], place: str, decoder: BatchDecoder, requests: Sequence[Request], every: int = 7
) -> tuple[list[Output], int]:
    """As `finish`, while one call in `every` of a method ("cache.commit") of the decoder raises; counts the errors."""
    holder: Any = decoder
    *path, name = place.split(".")
    for each in path:
        holder = getattr(holder, each)
    usual, calls, raised = getattr(holder, name), [0], 0

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] % every == every - 2:
            raise error("disk")
        return usual(*args, **kwargs)

    put(holder, name, sometimes)
    numbers = [decoder.submit(ids, params, key) for key, (ids, params) in enumerate(requests)]
    outputs = {number: Output() for number in numbers}
    try:
        for _ in range(2000):
            if not decoder.busy:
                break
            try:
                for event in decoder.step():
                    outputs[event.request].add(event)
            except error:
                raised += 1
    finally:
        put(holder, name, usual)
    return list(outputs.values()), raised


def plainly(backbone: Backbone, requests: Sequence[Request], tokenizer: Any = None) -> list[Output]:
    """The reference: one request at a time, one token at a time, each in a cache of its own."""
    return [
        finish(SpeculativeDecoder(backbone, Plain(), tokenizer), [request], [key])[0]
        for key, request in enumerate(requests)
    ]


def answers(requests: Sequence[Request], truth: Sequence[Output]) -> Answers:
    return {tuple(ids): output.ids for (ids, _), output in zip(requests, truth, strict=True)}


def assert_same(ours: Sequence[Output], truth: Sequence[Output], name: str = "") -> None:
    for mine, right in zip(ours, truth, strict=True):
        assert mine.ids == right.ids, name
        assert mine.logprobs == right.logprobs  # floats, bit for bit
        assert (mine.text, mine.finish_reason) == (right.text, right.finish_reason)
        assert_adds_up(mine)


def assert_adds_up(output: Output) -> None:
    s = output.statistics
    assert s.new_tokens == len(output.ids) == len(output.drafted)
    assert s.accepted == sum(output.drafted) == sum(kept for _, kept in s.by_depth)
    assert s.accepted <= s.drafted
    assert s.new_tokens - s.accepted in (s.steps, s.steps - 1)  # the last bonus token may lie past the end
    assert s.plain_steps <= s.steps
    offered = [steps for steps, _ in s.by_depth]
    assert offered == sorted(offered, reverse=True)
    assert all(kept <= steps for steps, kept in s.by_depth)


def decoder_of(backbone: Backbone, drafter: Drafter, tokenizer: Any = None, **options: Any) -> SpeculativeDecoder:
    """Always speculating: what the governor decides depends on the clock."""
    return SpeculativeDecoder(backbone, drafter, tokenizer, **({"adapt": False} | options))


STEPS_AND_THRESHOLDS = ((0, 0.6), (1, 0.0), (3, 0.1), (8, 0.0), (8, 1.0))
"""Levels of a draft that lower layers grow, and how sure a chain must be to go on."""


def assert_changes_no_token(
    backbone: Backbone, drafter: Drafter, requests: Sequence[Request], truth: Sequence[Output], turn: int
) -> None:
    """Whatever it drafts: the same ids and log-probabilities, and a cache as a fresh prefill leaves it.

    One row and three by turns, the drafter alone in two turns and with lookup in the next two: of the many settings of
    a method each is decoded once.
    """
    each = WithLookup(drafter) if turn // 2 % 2 else drafter
    decoder = decoder_of(backbone, each, max_rows=3 if turn % 2 else 1)
    assert decoder.lossless
    assert_same(finish(decoder, requests), truth)
    assert held_like_a_fresh_prefill(decoder) > 0


def put(owner: Any, name: str, value: Any) -> None:
    """Replaces a method of one object."""
    setattr(owner, name, value)


def watched(drafter: Method) -> Method:
    """The same drafter, which engines attach itself instead of a copy of it, so that a test can inspect it."""

    def attached(cache: KVCache) -> Drafter:
        drafter.bind(cache)
        return drafter

    put(drafter, "attached", attached)
    return drafter


def shared(drafter: Method) -> Method:
    """The same drafter, attached as copies that share its weights: undoes `watched`."""
    drafter.__dict__.pop("attached", None)
    return drafter


def drafts_of(drafter: Drafter) -> list[Draft]:
    """Returns a list to which every later draft is appended."""
    seen: list[Draft] = []
    made = watched(drafter).draft

    def draft(rows: Sequence[Row]) -> Draft:
        seen.append(made(rows))
        return seen[-1]

    put(drafter, "draft", draft)
    return seen


def texts_and_drafts(backbone: Backbone, drafter: Drafter, steps: int) -> Iterator[tuple[list[int], Draft]]:
    """Yields a row's tokens before each of its first steps, and the draft of that step."""
    seen, decoder, text = drafts_of(drafter), decoder_of(backbone, drafter), [1, 2, 3, 4, 5, 6]
    decoder.submit(text, SamplingParams(max_new_tokens=40, ignore_eos=True))
    for _ in range(steps):
        decoder.step()
        yield text, seen[-1]
        text = list(decoder._rows[0].tokens)


def held_like_a_fresh_prefill(decoder: SpeculativeDecoder) -> int:
    """Compares every parked cache with a prefill of its tokens, bit for bit; returns how many tokens they hold."""
    for slot, tokens in decoder._parked.items():
        assert decoder.cache.lengths[slot] == len(tokens)
        if tokens:
            fresh, _ = prefilled(decoder.backbone, tokens)
            for ours, theirs in zip(decoder.cache.read(slot), fresh.read(0), strict=True):
                assert same(ours, theirs)
    return sum(map(len, decoder._parked.values()))
