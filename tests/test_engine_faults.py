"""What goes wrong in one request, or in mid-step, leaves the others as they were and the engine ready to go on."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding import (
    Output,
    answers,
    assert_same,
    decoder_of,
    finish,
    finish_in_spite_of,
    held_like_a_fresh_prefill,
    plainly,
    put,
    shared,
)
from random_backbones import Model
from test_engine import Letters, mixed_requests, tiny
from tiny_models import DIMENSIONS
from torch import Tensor
from toy_drafters import EarlyExit, Inserter, Oracle, RandomTrees

from foretell import drafters
from foretell.api import LLM
from foretell.backbone import Backbone
from foretell.backbone import kv_cache as cache_module
from foretell.contracts import Draft, Drafter, Features, Row
from foretell.conversations import Conversation, converse
from foretell.drafters.plain import Plain
from foretell.drafters.prompt_lookup import PromptLookup, WithLookup
from foretell.engine import SpeculativeDecoder
from foretell.engine.text_stream import TextStream
from foretell.errors import ForetellError
from foretell.requests import SamplingParams
from foretell.verify import Typical

NEW = SamplingParams(max_new_tokens=16, ignore_eos=True)


def drain(decoder: SpeculativeDecoder, outputs: dict[int, Output], steps: int = 500) -> None:
    for _ in range(steps):
        if not decoder.busy:
            return
        for event in decoder.step():
            outputs[event.request].add(event)
    raise AssertionError("the engine makes no progress")


# -- admission ------------------------------------------------------------------------------------------------------


def room_for(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pool of more slots can be had."""
    usual = cache_module._room

    def little(shape: tuple[int, ...], *rest: Any) -> Any:
        if shape[2] > slots:
            raise ForetellError(f"A cache of {shape[2]} tokens is more than there is.")
        return usual(shape, *rest)

    monkeypatch.setattr(cache_module, "_room", little)


def test_a_request_that_finds_no_room_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny()
    small, large = ([1, 2, 3], NEW), ([4, 5], replace(NEW, max_new_tokens=300))
    truth = plainly(backbone, [small])
    room_for(300, monkeypatch)
    decoder = decoder_of(backbone, PromptLookup(shortest=1), max_rows=3)
    numbers = [decoder.submit(*request) for request in (small, large, small)]
    outputs = {number: Output() for number in numbers}
    drain(decoder, outputs)
    refused = outputs[numbers[1]]
    assert (refused.ids, refused.finish_reason) == ([], "error")
    assert "more than there is" in refused.error
    for number in (numbers[0], numbers[2]):
        assert outputs[number].ids == truth[0].ids
    assert finish(decoder, [small])[0].ids == truth[0].ids


def test_what_finished_requests_left_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, request = tiny(), ([1, 2, 3], NEW)
    room_for(200, monkeypatch)
    decoder = decoder_of(backbone, Plain(), max_rows=4)
    for first in range(4):
        (output,) = finish(decoder, [([first, 9, 9], NEW)])
        assert output.finish_reason == "length"
    assert finish(decoder, [request])[0].ids == plainly(backbone, [request])[0].ids


@pytest.mark.parametrize("name", ["plain", "hydra++", "kangaroo"])
def test_a_new_request_needs_no_room_for_what_it_replaces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old pool and new must not lie side by side where the old one holds nothing but what finished requests left."""
    backbone = tiny(num_hidden_layers=4, max_position_embeddings=4096)
    decoder = decoder_of(backbone, shared_drafter(name, backbone), max_rows=2)
    long, other = ([1, 2, 3] * 300, NEW), ([4, 5, 6] * 340, NEW)
    (right,) = plainly(backbone, [other])
    finish(decoder, [long])
    usual, alive = cache_module._room, {id(decoder.cache.keys): decoder.cache.keys.shape[2]}
    weakref.finalize(decoder.cache.keys, alive.pop, id(decoder.cache.keys))

    def scarce(shape: tuple[int, ...], *rest: Any) -> Any:
        if shape[0] > 1 and sum(alive.values()) + shape[2] > 1500:
            raise ForetellError(f"A cache of {shape[2]} tokens is more than there is.")
        keys, values = usual(shape, *rest)
        if shape[0] > 1:  # of the engine: drafters' own caches have one layer
            alive[id(keys)] = shape[2]
            weakref.finalize(keys, alive.pop, id(keys))
        return keys, values

    monkeypatch.setattr(cache_module, "_room", scarce)
    (output,) = finish(decoder, [other], [0])
    assert (output.error, output.ids) == ("", right.ids)


@pytest.mark.parametrize("name", ["plain", "hydra++", "kangaroo", "layerskip"])
def test_no_memory_is_asked_for_in_mid_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the whole request is there when its first token comes."""
    backbone = tiny(num_hidden_layers=4, max_position_embeddings=2048)
    decoder = decoder_of(backbone, shared_drafter(name, backbone), max_rows=2)
    requests = [([1, 2, 3] * 9, replace(NEW, max_new_tokens=700)), ([7] * 50, replace(NEW, max_new_tokens=400))]
    truth = plainly(backbone, requests)
    numbers = [decoder.submit(ids, params) for ids, params in requests]
    outputs = {number: Output() for number in numbers}
    for event in decoder.step():
        outputs[event.request].add(event)
    room_for(-1, monkeypatch)
    drain(decoder, outputs, 2000)
    assert [outputs[number].ids for number in numbers] == [right.ids for right in truth]


def test_a_drafter_that_cannot_begin_a_row_costs_that_request_only() -> None:
    class Refuses(RandomTrees):
        def reset(self, rows: Sequence[Row]) -> None:
            if any(row.tokens[0] == 60 for row in rows):
                raise RuntimeError("no such row")

    backbone = tiny()
    good, bad = ([1, 2, 3], NEW), ([60, 61], NEW)
    decoder = decoder_of(backbone, Refuses(64), max_rows=2)
    numbers = [decoder.submit(*request) for request in (bad, good)]
    outputs = {number: Output() for number in numbers}
    drain(decoder, outputs)  # nothing is raised to whoever steps: it may be somebody else's request
    assert (outputs[numbers[0]].finish_reason, outputs[numbers[0]].error) == ("error", "no such row")
    assert outputs[numbers[1]].ids == plainly(backbone, [good])[0].ids


# -- an exception anywhere in a step --------------------------------------------------------------------------------

PLACES = ["drafter.draft", "drafter.observe", "backbone.run_layers", "_verify", "cache.commit", "_emit", "cache.gather"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("toy", ["random", "early exit", "inserter"])
def test_an_error_anywhere_in_a_step_changes_no_answer(place: str, error: type[BaseException], toy: str) -> None:
    backbone, requests = Model({"model_type": "llama", **DIMENSIONS}).build(), mixed_requests()
    truth = plainly(backbone, requests)
    make: dict[str, Callable[[], Drafter]] = {
        "random": lambda: RandomTrees(
            64, 12, answers={tuple(r[0]): t.ids for r, t in zip(requests, truth, strict=True)}
        ),
        "early exit": lambda: EarlyExit(backbone, 1),
        "inserter": lambda: Inserter(backbone, 1),
    }
    decoder = decoder_of(backbone, make[toy](), max_rows=3)
    outputs, raised = finish_in_spite_of(error, place, decoder, requests)
    assert raised > 0
    assert not decoder.busy
    for output, right in zip(outputs, truth, strict=True):
        assert output.ids == right.ids
        assert (output.text, output.finish_reason) == (right.text, right.finish_reason)
    held_like_a_fresh_prefill(decoder)
    assert_same(finish(decoder, requests[:2]), truth[:2])


def test_a_tokenizer_that_fails_ends_its_own_request_only() -> None:
    class Breaks(Letters):
        def decode(self, ids: Sequence[int]) -> str:
            if 13 in ids:
                raise ValueError("no such piece")
            return super().decode(ids)

    backbone = tiny()
    requests = [([first, 2, 3], replace(NEW, max_new_tokens=24)) for first in range(12)]
    truth = plainly(backbone, requests)
    hit = [13 in right.ids for right in truth]
    assert 0 < sum(hit) < len(hit)
    outputs = finish(decoder_of(backbone, RandomTrees(64, 8), Breaks(), max_rows=4), requests)
    for output, right, broken in zip(outputs, truth, hit, strict=True):
        if broken:
            assert output.finish_reason == "error"
            assert "no such piece" in output.error
            assert output.ids == right.ids[: right.ids.index(13) + 1]
        else:
            assert output.ids == right.ids


@pytest.mark.parametrize("verb", ["push", "finish"])
@pytest.mark.parametrize("stop", [(), ("zz", "qkd")])
def test_an_interrupt_inside_the_text_loses_none(verb: str, stop: tuple[str, ...], monkeypatch: Any) -> None:
    backbone = tiny()
    requests = [([first, 2, 3], replace(NEW, stop=stop)) for first in range(6)]
    truth = finish(decoder_of(backbone, Plain(), Letters()), requests)
    usual, calls = getattr(TextStream, verb), [0]

    def sometimes(stream: TextStream, *args: Any) -> str:
        calls[0] += 1
        text: str = usual(stream, *args)
        if calls[0] in (2, 5, 9, 30, 55, 81, 120):
            raise KeyboardInterrupt
        return text

    decoder = decoder_of(backbone, RandomTrees(64, 12, answers=answers(requests, truth)), Letters(), max_rows=3)
    numbers = [decoder.submit(*request) for request in requests]
    outputs, raised = {number: Output() for number in numbers}, 0
    with monkeypatch.context() as patched:
        patched.setattr(TextStream, verb, sometimes)
        while decoder.busy:
            try:
                for event in decoder.step():
                    outputs[event.request].add(event)
            except KeyboardInterrupt:
                raised += 1
    assert raised > 1
    for output, right in zip(outputs.values(), truth, strict=True):
        assert (output.ids, output.text, output.finish_reason) == (right.ids, right.text, right.finish_reason)


# -- logits that are no numbers -------------------------------------------------------------------------------------


def damaged(backbone: Backbone, value: float, token: int = 60) -> None:
    """Embeds one token as no number: logits behind it are none."""
    usual = backbone.embed

    def embed(tokens_M: Tensor) -> Tensor:
        states_Md = usual(tokens_M)
        states_Md[tokens_M == token] = value
        return states_Md

    put(backbone, "embed", embed)


KINDS = {
    "greedy": NEW, "sampled": replace(NEW, temperature=0.7, seed=3), "edited": replace(NEW, repetition_penalty=1.3),
    "logprobs": replace(NEW, logprobs=2), "truncated": replace(NEW, temperature=1.0, seed=1, top_k=3, top_p=0.9),
}  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["", "eager"])
def test_logits_that_are_no_numbers_end_that_request(kind: str, value: float, kernel: str) -> None:
    backbone = Model({"model_type": "llama", **DIMENSIONS}).build(kernel)
    requests = [([1, 2, 3], KINDS[kind]), ([4, 60, 5], KINDS[kind]), ([6, 7], KINDS[kind])]
    truth = plainly(backbone, [requests[0], requests[2]])
    truth_2 = finish(decoder_of(backbone, Plain()), [requests[2]], [2])
    damaged(backbone, value)
    for drafter in (Plain(), RandomTrees(59, 8)):
        outputs = finish(decoder_of(backbone, drafter, max_rows=3), requests)
        assert outputs[0].ids == truth[0].ids
        assert outputs[2].ids == truth_2[0].ids
        assert (outputs[1].ids, outputs[1].finish_reason) == ([], "error")
        assert "After 3 tokens the model's logits are not finite numbers" in outputs[1].error


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_before_the_damage_is_kept_with_any_drafter(kind: str) -> None:
    """The damaged state is reached in mid-answer: plain and speculative say the same up to there."""
    backbone, params = tiny(), replace(KINDS[kind], max_new_tokens=40)
    request = ([1, 2, 3], params)
    (whole,) = plainly(backbone, [request])
    damaged(backbone, float("nan"), whole.ids[9])
    (plain,) = plainly(backbone, [request])
    assert plain.finish_reason == "error"
    assert plain.ids == whole.ids[: whole.ids.index(whole.ids[9]) + 1]
    right = Oracle({(1, 2, 3): whole.ids}, 64, 6)
    (ours,) = finish(decoder_of(backbone, right), [request])
    assert (ours.ids, ours.logprobs, ours.error) == (plain.ids, plain.logprobs, plain.error)


def test_a_wrong_guess_of_damaged_states_harms_nobody() -> None:
    """A token that the model never says, and whose states are no numbers, is guessed at every step."""
    backbone, request = tiny(), ([1, 2, 3], KINDS["sampled"])
    (truth,) = plainly(backbone, [request])
    never = next(token for token in range(64) if token not in truth.ids)
    damaged(backbone, float("nan"), never)
    guesses = [[token, never, token] for token in truth.ids]
    for shift in range(3):
        drafter = Oracle({(1, 2, 3): [token for three in guesses for token in three[shift:]]}, 64, 4)
        (ours,) = finish(decoder_of(backbone, drafter), [request])
        assert (ours.ids, ours.finish_reason) == (truth.ids, truth.finish_reason)


def test_typical_acceptance_meets_damage_too() -> None:
    backbone = tiny()
    damaged(backbone, float("nan"))
    outputs = finish(
        decoder_of(backbone, RandomTrees(59, 8), rule=Typical(), max_rows=2), [([4, 60], NEW), ([1, 2], NEW)]
    )
    assert [output.finish_reason for output in outputs] == ["error", "length"]


def test_callers_are_told() -> None:
    backbone = tiny()
    damaged(backbone, float("nan"))
    llm = LLM(backbone, Letters(), Plain())  # type: ignore[arg-type]
    with pytest.raises(ForetellError, match="not finite numbers"):
        llm.generate([4, 60, 5], max_new_tokens=4)
    both = llm.generate([[4, 60, 5], [1, 2]], max_new_tokens=4, ignore_eos=True)
    assert [(len(result.ids), result.finish_reason) for result in both] == [(0, "error"), (4, "length")]
    assert "not finite numbers" in both[0].error
    with pytest.raises(ForetellError, match="not finite numbers"):
        list(llm.stream([4, 60, 5], max_new_tokens=4))
    asked = [Conversation((text,), line, f"line {line}") for line, text in enumerate("A\u007f")]  # the letter 60 on
    told: list[tuple[int, str]] = []
    ids = [llm.encode(each.turns[0], raw=True) for each in asked]
    damaged(backbone, float("nan"), ids[1][0])
    answers = dict(
        converse(llm, llm.decoder(2), asked, replace(NEW, max_new_tokens=3), rows=2, raw=True,
                 on_error=lambda index, error: told.append((index, str(error))))
    )  # fmt: skip
    assert len(answers) == 2
    assert [index for index, _ in told] == [1]
    assert told[0][1].startswith("line 1: After 1 tokens")


# -- engines, threads ------------------------------------------------------------------------------------------------

SHARED = [
    "prompt_lookup",
    "medusa",
    "hydra",
    "hydra++",
    "kangaroo",
    "layerskip",
    "hamburger",
    "del",
    "swift",
    "early exit",
    "lookup",
]


def shared_drafter(name: str, backbone: Backbone) -> Drafter:
    from test_hamburger import drafter_of as hamburger_of
    from test_hamburger import random_grafts
    from test_hydra import drafter_of as hydra_of
    from test_hydra import random_hydra
    from test_kangaroo import drafter_of as kangaroo_of
    from test_kangaroo import random_adapter
    from test_medusa import drafter_of as medusa_of
    from test_medusa import random_heads, some_paths

    made: dict[str, Callable[[], Drafter]] = {
        "plain": Plain,
        "prompt_lookup": lambda: PromptLookup(shortest=1),
        "medusa": lambda: medusa_of(backbone, random_heads(backbone, 3, 1, "tied", 32), some_paths(3, 4, 1)),
        "hydra": lambda: hydra_of(backbone, random_hydra(backbone)),
        "hydra++": lambda: hydra_of(backbone, random_hydra(backbone, plus=True)),
        "kangaroo": lambda: kangaroo_of(backbone, random_adapter(backbone)),
        "layerskip": lambda: drafters.build("layerskip", backbone, exit=2),
        "del": lambda: drafters.build("del", backbone, stride=1),
        "swift": lambda: drafters.build("swift", backbone, window=4, threshold=0.0),
        "hamburger": lambda: hamburger_of(backbone, random_grafts(backbone)),
        "early exit": lambda: EarlyExit(backbone, 1),
        "lookup": lambda: WithLookup(EarlyExit(backbone, 2)),
    }
    return shared(made[name]())


def spied(drafter: Drafter) -> list[Draft]:
    seen: list[Draft] = []
    made = drafter.draft

    def draft(rows: Sequence[Row]) -> Draft:
        seen.append(made(rows))
        return seen[-1]

    put(drafter, "draft", draft)
    return seen


@pytest.mark.parametrize("name", SHARED)
def test_engines_that_share_a_drafter_draft_as_if_alone(name: str) -> None:
    """Turn by turn on one drafter: the same answers, and the very same drafts as one after the other."""
    backbone = tiny(num_hidden_layers=4)
    requests = [([1, 2, 3, 4, 5] * 4, NEW), ([9] * 30, NEW)]
    truth = plainly(backbone, requests)
    drafter = shared_drafter(name, backbone)
    alone, together = [], []
    for request in requests:
        decoder = decoder_of(backbone, drafter)
        alone.append(spied(decoder.drafter))
        finish(decoder, [request], [0])
    decoders = [decoder_of(backbone, drafter) for _ in requests]
    for decoder, request in zip(decoders, requests, strict=True):
        together.append(spied(decoder.drafter))
        decoder.submit(*request, 0)
    outputs = [Output(), Output()]
    while any(decoder.busy for decoder in decoders):
        for decoder, output in zip(decoders, outputs, strict=True):
            for event in decoder.step() if decoder.busy else []:
                output.add(event)
    assert [output.ids for output in outputs] == [right.ids for right in truth]
    if name != "swift":  # engines search for its plan together
        for ours, theirs in zip(together, alone, strict=True):
            assert [(d.trees, d.tokens) for d in ours] == [(d.trees, d.tokens) for d in theirs]


@pytest.mark.parametrize("name", ["hydra++", "layerskip", "kangaroo", "hamburger", "swift", "lookup"])
def test_threads_may_share_a_model(name: str) -> None:
    """Two threads on one LLM, of the same and of different batch sizes: each gets what it would get alone."""
    backbone = tiny(num_hidden_layers=4)
    llm = LLM(backbone, None, shared_drafter(name, backbone))  # type: ignore[arg-type]
    asked: list[list[list[int]]] = [[[first, 2, 3] * 5, [first] * 9][: 1 + first % 2] for first in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "adapt": False}
    truth = [[plainly(backbone, [(ids, replace(NEW, max_new_tokens=24))])[0].ids for ids in each] for each in asked]
    found: dict[int, list[list[int]]] = {}
    errors: list[BaseException] = []

    def work(which: int) -> None:
        try:
            for _ in range(3):
                found[which] = [result.ids for result in llm.generate(asked[which], **options)]
                assert found[which] == truth[which]
        except BaseException as error:  # a thread's error has no other way out
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [found[which] for which in range(len(asked))] == truth


def test_requests_come_and_go_while_another_thread_steps() -> None:
    backbone = tiny()
    decoder = decoder_of(backbone, RandomTrees(64, 8), max_rows=2)
    request = ([1, 2, 3], NEW)
    (right,) = plainly(backbone, [request])
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            number = decoder.submit([5, 6, 7], replace(NEW, max_new_tokens=400))
            decoder.events([number])
            decoder.cancel(number)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(20):
            number, output = decoder.submit(*request), Output()
            while not output.finish_reason:
                for event in decoder.events([number]):
                    output.add(event)
            assert output.ids == right.ids
    finally:
        stop.set()
        thread.join()


# -- what is kept between calls -------------------------------------------------------------------------------------


def test_the_decoder_is_kept_where_the_same_is_asked() -> None:
    class Lossy(Plain):
        lossless = False

    for drafter in (Plain(), Lossy()):
        llm = LLM(tiny(), None, drafter)  # type: ignore[arg-type]
        for asked in ((1, None, True), (1, Typical(), True), (2, None, False)):
            assert llm.decoder(*asked) is llm.decoder(*asked)
        assert llm.decoder(1) is not llm.decoder(2)


def test_forgetting_gives_memory_back() -> None:
    backbone = tiny(max_position_embeddings=2048)
    decoder = decoder_of(backbone, Plain(), max_rows=4)
    finish(decoder, [([1] * 1000, NEW), ([2, 3], NEW)])
    long = decoder.cache.bytes
    c = backbone.config
    assert long < 2 * c.layers * c.kv_heads * c.head_dim * 4 * 1400, "one long prompt does not size the others"
    decoder.submit([4, 5], replace(NEW, max_new_tokens=100))
    decoder.step()
    decoder.forget()
    assert 0 < decoder.cache.bytes < long / 4
    drain(decoder, {number: Output() for number in range(3)})
    decoder.forget()
    assert decoder.cache.bytes == 0


@pytest.mark.parametrize("name", ["hydra++", "kangaroo", "lookup"])
def test_forgetting_reaches_what_drafters_keep(name: str) -> None:
    backbone = tiny(num_hidden_layers=4, max_position_embeddings=2048)
    decoder = decoder_of(backbone, shared_drafter(name, backbone), max_rows=2)
    finish(decoder, [([1, 2] * 500, NEW)])
    decoder.submit([4, 5, 6], replace(NEW, max_new_tokens=100))
    decoder.step()
    decoder.forget()
    drafter: Any = decoder.drafter
    if name == "lookup":
        assert list(drafter.lookup._indexes) == [decoder._rows[0].slot]
    else:
        own = drafter._prefix.cache if name == "hydra++" else drafter._own
        assert own.keys.shape[2] < 400
    drain(decoder, {0: Output(), 1: Output()})


def test_conversations_end_when_somebody_cancels_them() -> None:
    llm = LLM(tiny(), Letters(), Plain())  # type: ignore[arg-type]
    decoder = llm.decoder(1)
    asked = [Conversation(("a",), 0)]

    def cancel(_: int, event: Any) -> None:
        decoder.cancel(event.request)

    assert list(converse(llm, decoder, asked, replace(NEW, max_new_tokens=50), raw=True, on_event=cancel)) == []
    assert not decoder.busy


def test_a_seed_is_drawn_anew_unless_one_is_given() -> None:
    llm = LLM(tiny(), None, RandomTrees(64, 8))  # type: ignore[arg-type]
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True}
    drawn = [llm.generate([1, 2, 3], **options) for _ in range(3)]
    assert len({tuple(result.ids) for result in drawn}) == 3
    seeds = [result.statistics.seed for result in drawn]
    assert len(set(seeds)) == 3
    for result in drawn:  # what is reported brings the same answer again
        assert llm.generate([1, 2, 3], seed=result.statistics.seed, **options).ids == result.ids
    batch = llm.generate([[1, 2, 3], [1, 2, 3]], **options)
    assert batch[0].statistics.seed == batch[1].statistics.seed
    assert batch[0].ids != batch[1].ids
    zero = [llm.generate([1, 2, 3], seed=0, **options) for _ in range(2)]
    assert zero[0].ids == zero[1].ids
    assert zero[0].statistics.seed == 0
    assert llm.generate([1, 2, 3], max_new_tokens=2).statistics.seed is None  # nothing was drawn


def test_features_lost_to_an_error_are_not_reused() -> None:
    """A drafter that missed states of a row must not be told that its slot holds them."""

    class Fragile(Plain):
        taps = (1,)

        def __init__(self) -> None:
            self.calls = 0

        def observe(self, rows: Sequence[Row], features: Features) -> None:
            self.calls += 1
            if self.calls == 3:  # the prompt, the first step, the second
                raise RuntimeError("lost")

    backbone = tiny()
    decoder = decoder_of(backbone, Fragile())
    prompt = [1, 2, 3, 4, 5, 6]
    decoder.submit(prompt, NEW)
    decoder.step()
    with pytest.raises(RuntimeError, match="lost"):
        decoder.step()
    drain(decoder, {0: Output()})
    (again,) = finish(decoder, [(prompt, NEW)])
    assert again.statistics.reused_tokens == 0
    assert torch.isfinite(torch.tensor(again.statistics.seconds))
