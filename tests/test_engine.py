"""The promise: with any drafter and any tree, what comes out is what plain decoding writes.

Plain decoding of one request alone, by the same engine, is the truth. Every toy drafter must reproduce its ids,
its log-probabilities (hence the logits behind them) and leave the same bits in the cache: in float32 and bfloat16,
for every family, alone and in batches whose rows join and leave, greedy and sampled, with penalties and stops.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from decoding import (
    Output,
    answers,
    assert_same,
    decoder_of,
    finish,
    held_like_a_fresh_prefill,
    plainly,
    put,
    shared,
    watched,
)
from hypothesis import strategies as st
from random_backbones import BF16, DTYPES, FP32, KERNELS, Model, check, models, using
from tiny_models import DIMENSIONS, VARIANTS
from toy_drafters import Answers, Checker, EarlyExit, Inserter, Oracle, RandomTrees

from foretell import drafters
from foretell.api import LLM
from foretell.backbone import Backbone, Nodes
from foretell.contracts import Draft, Drafter, Insertion
from foretell.conversations import Conversation, converse
from foretell.drafters.plain import Plain
from foretell.drafters.prompt_lookup import PromptLookup, WithLookup
from foretell.engine import SpeculativeDecoder, run
from foretell.errors import UsageError
from foretell.requests import Decoder, Request, SamplingParams
from foretell.trees import TokenTree, chain
from foretell.verify import Typical

LLAMA = {"model_type": "llama", **DIMENSIONS, "max_position_embeddings": 512}


def tiny(dtype: torch.dtype = FP32, **changes: Any) -> Backbone:
    return Model(LLAMA | changes).build(dtype=dtype)


def mixed_requests(seed: int = 0, vocab: int = 64) -> list[tuple[list[int], SamplingParams]]:
    """One of everything: greedy, sampled, truncated, penalised, with and without log-probabilities."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    phrase = prompt(5)
    return [
        (phrase * 3, SamplingParams(max_new_tokens=24)),
        (prompt(1), SamplingParams(max_new_tokens=20, logprobs=3)),
        (prompt(2), SamplingParams(max_new_tokens=9, temperature=1.0, seed=7, logprobs=0)),
        (prompt(40), SamplingParams(
            max_new_tokens=30, temperature=0.8, top_p=0.9, top_k=20, min_p=0.02, logprobs=2, seed=0,
        )),
        (phrase * 2, SamplingParams(
            max_new_tokens=20, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, ignore_eos=True,
            logit_bias={3: 2.0, 5: -9.0}, logprobs=1,
        )),
        (prompt(17), SamplingParams(
            max_new_tokens=20, temperature=1.5, seed=1, repetition_penalty=0.8, frequency_penalty=1,
        )),
        (prompt(33), SamplingParams(max_new_tokens=1)),
    ]  # fmt: skip


def toys(backbone: Backbone, answers: Answers) -> dict[str, Callable[[], Drafter]]:
    vocab, layers = backbone.config.vocab, backbone.config.layers
    return {
        "plain": Plain,
        "prompt lookup": lambda: PromptLookup(shortest=1),
        "random": lambda: RandomTrees(vocab),
        "right paths": lambda: RandomTrees(vocab, 20, answers=answers),
        "oracle": lambda: Oracle(answers, vocab),
        "adversary": lambda: Oracle(answers, vocab, shift=1),
        "early exit": lambda: EarlyExit(backbone, 1),
        "exit before the last layer": lambda: EarlyExit(backbone, layers - 1),
        "insertion": lambda: Inserter(backbone, 1),
        "insertion above all layers": lambda: Inserter(backbone, layers),
        "taps": lambda: Checker(RandomTrees(vocab, 12, answers=answers), backbone),
        "taps beside insertion": lambda: Checker(Inserter(backbone, 1), backbone),
    }


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_toy_writes_what_plain_decoding_writes(variant: str, dtype: torch.dtype) -> None:
    """Every toy meets every variant in both types, alone in one and in a batch in the other."""
    which = list(VARIANTS).index(variant) + (dtype == BF16)
    backbone = tiny(dtype, **VARIANTS[variant])
    requests = mixed_requests()
    truth = plainly(backbone, requests)
    for i, (name, make) in enumerate(toys(backbone, answers(requests, truth)).items()):
        drafter = make()
        decoder = decoder_of(backbone, drafter, max_rows=1 if (i + which) % 2 else 3)
        assert isinstance(decoder, Decoder)
        assert decoder.lossless
        assert_same(finish(decoder, requests), truth, name)
        assert held_like_a_fresh_prefill(decoder) > 0
        assert not isinstance(drafter, Checker) or drafter.checked > 300


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_kernel_keeps_the_promise(kernel: str, dtype: torch.dtype) -> None:
    with using(kernel):
        backbone = Model(LLAMA, seed=1).build(kernel, dtype)
        requests = mixed_requests(1)[:: 3 if kernel == "eager" else 1]
        truth = plainly(backbone, requests)
        decoder = decoder_of(backbone, RandomTrees(64, answers=answers(requests, truth)), max_rows=4)
        assert_same(finish(decoder, requests), truth)
        assert held_like_a_fresh_prefill(decoder) > 0


def test_any_model_keeps_the_promise() -> None:
    """Random sizes, families and ropes; every row of the batch a request of another kind."""

    def equals_plain(model: Model, dtype: torch.dtype, seed: int, max_rows: int) -> None:
        backbone = model.build(dtype=dtype)
        vocab = backbone.config.vocab
        requests = [
            (ids, replace(params, max_new_tokens=min(params.max_new_tokens, 12), logit_bias={}, logprobs=1))
            for ids, params in mixed_requests(seed, vocab)
        ]
        truth = plainly(backbone, requests)
        drafter = RandomTrees(vocab, 30, seed, answers(requests, truth))
        decoder = decoder_of(backbone, drafter, max_rows=max_rows)
        assert_same(finish(decoder, requests), truth)
        assert held_like_a_fresh_prefill(decoder) > 0

    check("", 15, equals_plain, models(), DTYPES, st.integers(0, 99), st.integers(1, 5))


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_that_nobody_wrote_is_never_read(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and results begin as whatever memory holds: here NaN, which any use would carry on to the logits."""
    backbone_of = Model(LLAMA | {"sliding_window": 9, "model_type": "mistral"})
    with using(kernel):
        for dtype in (FP32, BF16):
            backbone, requests = backbone_of.build(kernel, dtype), mixed_requests()[:: 3 if kernel == "eager" else 1]
            truth = plainly(backbone, requests)
            with monkeypatch.context() as patch:
                for name in ("empty", "empty_like"):
                    patch.setattr(torch, name, poisoned(getattr(torch, name)))
                assert torch.empty(2).isnan().all()
                for name in ("right paths", "early exit", "insertion"):
                    drafter = toys(backbone, answers(requests, truth))[name]()
                    assert_same(finish(decoder_of(backbone, drafter, max_rows=3), requests), truth, name)


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **options: Any) -> torch.Tensor:
        tensor = make(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return made


def test_long_prompts_are_read_in_chunks_beside_decoding_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell.engine.batch.PREFILL_NODES", 16)
    backbone, rng = tiny(BF16), random.Random(0)
    lengths = [1, 16, 17, 18, 100, 2, 33]
    requests = [([rng.randrange(64) for _ in range(n)], SamplingParams(max_new_tokens=12, logprobs=1)) for n in lengths]
    truth = plainly(backbone, requests)
    drafter = Checker(RandomTrees(64, answers=answers(requests, truth)), backbone)
    assert_same(finish(decoder_of(backbone, drafter, max_rows=3), requests), truth)


@pytest.mark.slow
def test_a_cache_that_grows_between_requests_keeps_what_it_holds() -> None:
    backbone = tiny(num_hidden_layers=2, max_position_embeddings=2048)
    requests = [
        ([1, 2, 3], SamplingParams(max_new_tokens=1300, temperature=2.0, ignore_eos=True)),
        ([4], SamplingParams()),
    ]
    truth = plainly(backbone, requests)
    for drafter in (EarlyExit(backbone, 1), Oracle(answers(requests, truth), 64, 60)):
        decoder = decoder_of(backbone, drafter, max_rows=2)
        before = finish(decoder, requests[1:], [1]) and decoder.cache.bytes
        assert_same(finish(decoder, requests), truth)
        assert decoder.cache.bytes > before
        assert held_like_a_fresh_prefill(decoder) > 1300


def test_keys_not_company_fix_the_noise() -> None:
    """The same request draws the same tokens in any order; another key or seed draws others."""
    backbone = tiny()
    params = SamplingParams(max_new_tokens=20, temperature=1.5)
    request, other = ([5, 6, 7], params), ([5, 6, 7], replace(params, seed=1))
    first, second, reseeded = finish(decoder_of(backbone, Plain(), max_rows=3), [request, request, other])
    turned = finish(decoder_of(backbone, Plain(), max_rows=3), [other, request, request], [2, 1, 0])
    assert [out.ids for out in turned] == [reseeded.ids, second.ids, first.ids]
    assert len({tuple(out.ids) for out in (first, second, reseeded)}) == 3


# -- how much is accepted -------------------------------------------------------------------------------------------


def test_an_oracle_gets_all_of_every_tree_and_an_adversary_nothing() -> None:
    backbone = tiny(BF16)
    requests = [([1, 2, 3], SamplingParams(max_new_tokens=36, ignore_eos=True))]
    truth = plainly(backbone, requests)
    for shift, steps in ((0, 6), (1, 36)):  # 5 guesses and a bonus a step, or the bonus alone
        drafter = Oracle(answers(requests, truth), 64, 5, shift)
        (output,) = finish(decoder_of(backbone, drafter), requests)
        assert output.ids == truth[0].ids
        assert output.statistics.steps == steps


def test_statistics_of_a_known_run() -> None:
    backbone = tiny()
    requests = [([1, 2, 3], SamplingParams(max_new_tokens=10, ignore_eos=True))]
    recorded = answers(requests, plainly(backbone, requests))
    (output,) = finish(decoder_of(backbone, Oracle(recorded, 64, 3)), requests)
    s = output.statistics
    # steps of 4, 4 and 2 tokens: near the end the tree is cut to what the budget lets a step emit
    assert (s.steps, s.plain_steps, s.drafted, s.accepted) == (3, 0, 7, 7)
    assert s.by_depth == [(3, 3), (2, 2), (2, 2)]
    assert (s.prompt_tokens, s.new_tokens, s.reused_tokens) == (3, 10, 0)
    assert s.acceptance_length == 10 / 3
    assert output.drafted == [True, True, True, False] * 2 + [True, False]
    assert 0 < s.prefill_seconds < s.prefill_seconds + s.draft_seconds + s.verify_seconds < s.seconds
    assert s.draft_seconds > 0
    assert s.verify_seconds > 0
    assert s.tokens_per_second == 10 / s.seconds


# -- ends -----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose token i is two letters, so that stop strings begin and end inside tokens."""

    def encode_raw(self, text: str) -> list[int]:
        return [ord(letter) % 64 for letter in text]

    special: ClassVar[dict[str, int]] = {}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) for i in ids)

    def follow(self, prompt: Sequence[int]) -> "Letters":
        return self

    def push(self, token: int) -> str:
        return self.decode([token])

    def pending(self) -> str:
        return ""


PROMPT = [7, 8, 9, 10]


@pytest.mark.parametrize("place", range(0, 14))
def test_an_end_inside_an_accepted_path_ends_there(place: int) -> None:
    """Whatever ends the output, and wherever on a drafted path it falls."""
    free = tiny(eos_token_id=None)
    ids = plainly(free, [(PROMPT, SamplingParams(max_new_tokens=20))])[0].ids
    last = ids[place]
    text = Letters().decode(ids)
    ending = tiny(eos_token_id=[63, last])
    open_ended = SamplingParams(max_new_tokens=20)
    for backbone, params in (
        (free, replace(open_ended, max_new_tokens=place + 1)),
        (free, replace(open_ended, stop_ids=(last,))),
        (ending, open_ended),
        (ending, replace(open_ended, ignore_eos=True)),
        (free, replace(open_ended, stop=("#", text[2 * place + 1 : 2 * place + 4]))),
    ):
        requests = [(PROMPT, params)]
        truth = plainly(backbone, requests, Letters())
        whole = {tuple(PROMPT): ids}
        for drafter in (
            Oracle(whole, 64),
            Oracle(whole, 64, 40),
            RandomTrees(64, answers=whole),
            EarlyExit(backbone, 1),
        ):
            decoder = decoder_of(backbone, drafter, Letters())
            (output,) = finish(decoder, requests)
            assert_same([output], truth)
            assert len(output.ids) <= params.max_new_tokens
            held_like_a_fresh_prefill(decoder)
            turn = [(PROMPT + output.ids + [3, 4], SamplingParams(max_new_tokens=4))]
            (longer,) = finish(decoder, turn)  # over what an early end left behind
            assert_same([longer], plainly(backbone, turn, Letters()))
            assert longer.statistics.reused_tokens > 0


def test_why_and_where_an_output_ends() -> None:
    free = tiny(eos_token_id=None)
    (whole,) = plainly(free, [(PROMPT, SamplingParams(max_new_tokens=20))], Letters())
    assert whole.finish_reason == "length"
    place = next(i for i in range(3, 20) if whole.ids.index(whole.ids[i]) == i)
    last = whole.ids[place]
    for backbone, params, expected in (
        (free, SamplingParams(stop_ids=(last,)), whole.ids[: place + 1]),
        (tiny(eos_token_id=last), SamplingParams(), whole.ids[: place + 1]),
        (tiny(eos_token_id=last), SamplingParams(ignore_eos=True, max_new_tokens=20), whole.ids),
    ):
        (output,) = finish(decoder_of(backbone, Oracle({tuple(PROMPT): whole.ids}, 64), Letters()), [(PROMPT, params)])
        assert output.ids == expected
        assert output.finish_reason == ("length" if len(expected) == 20 else "stop")
        assert output.text == whole.text[: 2 * (len(expected) - (len(expected) < 20))]  # an end token is no text
    stop = whole.text[9:12]  # begins inside one token and ends with the next
    (output,) = finish(decoder_of(free, Plain(), Letters()), [(PROMPT, SamplingParams(stop=(stop,)))])
    assert output.finish_reason == "stop"
    assert output.text == whole.text[: whole.text.index(stop)]


@pytest.mark.parametrize("new", [1, 2, 5, 20])
def test_decoding_up_to_the_last_position_of_the_context(new: int) -> None:
    backbone = tiny(max_position_embeddings=40)
    requests = [(list(range(40 - new)), SamplingParams(max_new_tokens=new, ignore_eos=True))]
    truth = plainly(backbone, requests)
    assert len(truth[0].ids) == new
    for name, make in toys(backbone, answers(requests, truth)).items():
        assert_same(finish(decoder_of(backbone, make()), requests), truth, name)


# -- rows that leave early, caches that are taken over --------------------------------------------------------------


def test_cancelled_requests_leave_the_others_and_the_cache_as_they_were() -> None:
    backbone, requests = tiny(BF16), mixed_requests()
    truth = plainly(backbone, requests)
    for after in (0, 1, 3):
        drafter = Checker(RandomTrees(64, 10, answers=answers(requests, truth)), backbone)
        decoder = decoder_of(backbone, drafter, max_rows=2)
        numbers = [decoder.submit(ids, params) for ids, params in requests]
        outputs = {number: Output() for number in numbers}
        cancelled = {numbers[1], numbers[5]}  # one of them running from the second step on, one waiting
        for step in range(10**6):
            if step == after:
                for number in (*cancelled, 12345):
                    decoder.cancel(number)
            if not decoder.busy:
                break
            for event in decoder.step():
                assert step < after or event.request not in cancelled
                outputs[event.request].add(event)
        for number in numbers:
            ids, right = outputs[number].ids, truth[number].ids
            assert ids == right if number not in cancelled else ids == right[: len(ids)]
        assert held_like_a_fresh_prefill(decoder) > 0
        keys = sorted(cancelled)
        assert_same(finish(decoder, [requests[k] for k in keys], keys), [truth[k] for k in keys])
        decoder.cancel(numbers[0])  # long finished
        assert not decoder.busy


def test_the_next_turn_takes_over_the_cache_of_the_last() -> None:
    backbone, rng = tiny(BF16), random.Random(3)
    for make in (Plain, lambda: RandomTrees(64), lambda: EarlyExit(backbone, 1), lambda: Inserter(backbone, 1)):
        decoder = decoder_of(backbone, make(), max_rows=2)
        talks: list[list[int]] = [[rng.randrange(64) for _ in range(9)] for _ in range(2)]
        for turn in range(4):
            requests = [(talk, SamplingParams(max_new_tokens=11, logprobs=1, temperature=1.0)) for talk in talks]
            outputs = finish(decoder, requests)
            assert_same(outputs, plainly(backbone, requests))
            for talk, output in zip(talks, outputs, strict=True):
                reused = output.statistics.reused_tokens
                # all but the four new tokens and, unless a guess came last, the newest of before
                assert reused in ((0,) if turn == 0 else (len(talk) - 5, len(talk) - 4))
                talk += output.ids + [rng.randrange(64) for _ in range(4)]


@pytest.mark.parametrize("cut", [0, 1, 2, 6, 30])
def test_a_prompt_may_share_any_beginning_with_an_earlier_one(cut: int) -> None:
    backbone = tiny()
    decoder = decoder_of(backbone, Checker(RandomTrees(64, 8), backbone))
    first = list(range(10, 40))
    finish(decoder, [(first, SamplingParams(max_new_tokens=5))])
    second = ([1 if i == cut else token for i, token in enumerate(first)], SamplingParams(max_new_tokens=9))
    (output,) = finish(decoder, [second])
    assert_same([output], plainly(backbone, [second]))
    assert output.statistics.reused_tokens == min(cut, 28)  # the last two tokens always run again


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], {}, "prompt is empty"),
        ([64], {}, "token 64.*between 0 and 63"),
        ([5, -1], {}, "token -1.*between 0 and 63"),
        ([1] * 500, {"max_new_tokens": 13}, "500 tokens and 13 new.*512.*at most 12"),
        ([1], {"stop_ids": (64,)}, r"stop_ids.*0\.\.63"),
        ([1], {"logit_bias": {-1: 1.0}}, r"logit_bias.*0\.\.63"),
    ],
)
def test_requests_that_cannot_work_are_refused_at_the_door(prompt: Any, params: Any, sentence: str) -> None:
    decoder = decoder_of(tiny(), Plain())
    with pytest.raises(UsageError, match=sentence):
        decoder.submit(prompt, SamplingParams(**params))
    assert not decoder.busy


def test_what_a_caller_mistypes_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="Unknown sampling option 'max_tokens': did you mean 'max_new_tokens'"):
        SamplingParams.of(max_tokens=5)
    assert SamplingParams.of(max_new_tokens=5) == SamplingParams(max_new_tokens=5)
    llm = LLM(tiny(), cast(Any, None), Plain())
    for prompts in (3, None, [[1, 2], 3]):
        with pytest.raises(UsageError, match="A prompt is text, a conversation or token ids, not "):
            llm.generate(cast(Any, prompts))
    for prompts in (b"hi", [[1, 2], b"hi"], [bytearray(b"hi")], [memoryview(b"hi")]):  # bytes are numbers too
        with pytest.raises(UsageError, match="A prompt is text, a conversation or token ids, not .*[bm]"):
            llm.generate(cast(Any, prompts))
    for prompts in ([1, "a"], [[1, 2], [1, True]], [[1.0]], [["a"]], [[1, {"role": "user", "content": "hi"}]]):
        with pytest.raises(UsageError, match=r"The prompt holds .*, which is no token id; give text, or nothing but"):
            llm.generate(cast(Any, prompts))
    for prompts in ([{"role": "user", "content": "hi"}, "a"], [[{"role": "user", "content": "hi"}, 3]]):
        with pytest.raises(UsageError, match=r"The conversation holds ('a'|3), which is no message; write {"):
            llm.generate(cast(Any, prompts))
    assert llm.encode(cast(Any, np.arange(3).tolist())) == llm.encode(cast(Any, [*np.arange(3)])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"stop": None}, "stop is None"),
        ({"stop": ["text", ""]}, "stop is .*; it must be a non-empty string, or a sequence of them"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": {"text"}}, "stop is {'text'}"),
        ({"stop_ids": ("a",)}, "stop_ids"),
        ({"logit_bias": {"3": 1.0}}, "must map token ids"),
        ({"logit_bias": {3: 1e39}}, "between -1000 and 1000"),
        ({"logprobs": 2.5}, "logprobs is 2.5"),
    ],
)
def test_values_of_the_wrong_kind_are_named(params: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        SamplingParams(**params)


def test_odd_but_lawful_values_work() -> None:
    backbone = tiny()
    for params in (
        {"temperature": 1e-308},
        {"logprobs": 100},
        {"logit_bias": {3: 1000}},
        {"min_p": 1.0, "temperature": 1},
    ):
        (output,) = plainly(backbone, [([1, 2, 3], SamplingParams(max_new_tokens=6, **params))])  # type: ignore[arg-type]
        assert len(output.ids) == 6
        assert all(len(each.top) == min(64, params.get("logprobs", 0)) for each in output.logprobs)
    assert output.ids == plainly(backbone, [([1, 2, 3], SamplingParams(max_new_tokens=6))])[0].ids


class Broken(RandomTrees):
    """Drafts what it must not."""

    def __init__(self, draft: Draft):
        super().__init__(64)
        self.broken = draft

    def draft(self, rows: Any) -> Draft:
        return self.broken


@pytest.mark.parametrize(
    ("draft", "sentence"),
    [
        (Draft([chain(1)], [[9, 3]]), "the first must be the row's newest, 3"),
        (Draft([chain(1)], [[3, 64]]), "must lie in 0..63"),
        (Draft([chain(1)], [[3, -1]]), "must lie in 0..63"),
        (Draft([chain(99)], [[3] * 100]), "a tree of 100 nodes; its max_nodes allows 76"),
        (Draft([], []), "0 trees for 1 rows"),
    ],
)
def test_a_draft_that_breaks_the_contract_is_refused(draft: Draft, sentence: str) -> None:
    decoder = decoder_of(tiny(), Broken(draft))
    with pytest.raises(UsageError, match=sentence):
        finish(decoder, [([1, 2, 3], SamplingParams(max_new_tokens=9))])


def test_rows_beyond_those_that_were_announced_are_refused() -> None:
    """The cache may have no slots for them."""

    class Surprising(Inserter):
        extra_nodes = 1

    backbone = tiny()
    with pytest.raises(UsageError, match=r"inserted 2 rows behind a tree; its extra_nodes allows 1\."):
        finish(decoder_of(backbone, Surprising(backbone, 1)), [([1, 2, 3], SamplingParams(max_new_tokens=9))])


def test_inserted_rows_without_streams_are_refused() -> None:
    class Short(Inserter):
        def at_cut(self, layer: int, hidden_Md: torch.Tensor, nodes: Nodes, draft: Draft) -> Insertion:
            whole = super().at_cut(layer, hidden_Md, nodes, draft)
            return Insertion(whole.parents, whole.streams_Nd[:-1])

    backbone = tiny()
    width = backbone.config.hidden
    with pytest.raises(ValueError, match=rf"^Inserted rows need streams \(2, {width}\)\.$"):
        finish(decoder_of(backbone, Short(backbone, 1)), [([1, 2, 3], SamplingParams(max_new_tokens=9))])


def test_a_lossy_drafter_is_not_governed_by_the_clock() -> None:
    class Lossy(RandomTrees):
        lossless = False

    assert not decoder_of(tiny(), Lossy(64), adapt=True).governor.enabled
    assert not decoder_of(tiny(), RandomTrees(64), adapt=True, rule=Typical()).governor.enabled
    assert decoder_of(tiny(), RandomTrees(64), adapt=True).governor.enabled


def test_rows_of_typical_acceptance_are_greedy_ones_to_drafters() -> None:
    """Whether its temperature is named in the request or not: trees, and so texts, are the same."""
    drafter, seen = watched(RandomTrees(64)), set[float]()
    draft = drafter.draft

    def spy(rows: Any) -> Draft:
        seen.update(row.params.temperature for row in rows)
        return draft(rows)

    put(drafter, "draft", spy)
    rule = Typical(temperature=0.7)
    asked = [SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=temperature) for temperature in (0.0, 0.7)]
    finish(decoder_of(tiny(), drafter, rule=rule), [([3, 1, 4], params) for params in asked])
    assert seen == {0.0}


def test_results_say_whether_they_are_exact() -> None:
    backbone, request = tiny(), [([1, 2, 3], SamplingParams(max_new_tokens=5))]
    assert finish(decoder_of(backbone, RandomTrees(64)), request)[0].statistics.exact
    assert not finish(decoder_of(backbone, RandomTrees(64), rule=Typical()), request)[0].statistics.exact
    backbone.nondeterminism = "depends on the weather"
    assert not finish(decoder_of(backbone, RandomTrees(64)), request)[0].statistics.exact


def test_streams_of_one_model_may_take_turns_and_be_left_unfinished() -> None:
    backbone = tiny()
    llm = LLM(backbone, None, RandomTrees(64, 8))  # type: ignore[arg-type]
    prompts = [[1, 2, 3], [4, 5], [6]]
    truth = [plainly(backbone, [(ids, SamplingParams(max_new_tokens=20, ignore_eos=True))])[0].ids for ids in prompts]

    def stream(ids: list[int]) -> Any:
        return run(llm.decoder(), [Request(ids, SamplingParams(max_new_tokens=20, ignore_eos=True), 0)])

    first, second = stream(prompts[0]), stream(prompts[1])
    got: list[list[int]] = [[], [], []]
    got[0] += next(first)[1].tokens
    got[1] += next(second)[1].tokens  # the first one's events wait for it
    got[2] += [token for _, event in stream(prompts[2]) for token in event.tokens]
    for i, each in enumerate((first, second)):
        got[i] += [token for _, event in each for token in event.tokens]
    assert got == truth
    left = stream(prompts[0])
    next(left)
    assert [t for _, event in stream(prompts[1]) for t in event.tokens] == truth[1]
    left.close()
    assert not llm.decoder().busy


@pytest.mark.parametrize("name", ["early exit", "kangaroo", "layerskip", "del", "swift"])
def test_engines_may_share_a_drafter_that_runs_layers(name: str) -> None:
    """Each finds its own cache bound when it is its turn."""
    from test_kangaroo import drafter_of as kangaroo_of
    from test_kangaroo import random_adapter

    backbone = tiny(num_hidden_layers=4)
    drafter = {
        "early exit": lambda: EarlyExit(backbone, 1),
        "kangaroo": lambda: shared(kangaroo_of(backbone, random_adapter(backbone))),
        "layerskip": lambda: drafters.build("layerskip", backbone, exit=2),
        "del": lambda: drafters.build("del", backbone, stride=1),
        "swift": lambda: drafters.build("swift", backbone, window=4, threshold=0.0),
    }[name]()
    requests = mixed_requests()[:5]
    truth = plainly(backbone, requests)
    one, other = (SpeculativeDecoder(backbone, drafter, adapt=False, max_rows=rows) for rows in (1, 2))
    told: list[tuple[SpeculativeDecoder, dict[int, tuple[int, Output]]]] = []
    for decoder, mine in ((one, (0, 3)), (other, (1, 2, 4))):
        told.append((decoder, {decoder.submit(*requests[i], i): (i, Output()) for i in mine}))
    while one.busy or other.busy:
        for decoder, outputs in told:
            for event in decoder.step() if decoder.busy else []:
                outputs[event.request][1].add(event)
    for _, outputs in told:
        assert_same([output for _, output in outputs.values()], [truth[i] for i, _ in outputs.values()])


def test_lookup_joins_drafts_that_say_nothing_of_their_worth() -> None:
    backbone = tiny(num_hidden_layers=4)
    requests = mixed_requests()
    truth = plainly(backbone, requests)
    drafter = WithLookup(EarlyExit(backbone, 2))
    decoder = decoder_of(backbone, drafter, max_rows=3)
    assert_same(finish(decoder, requests), truth)
    assert held_like_a_fresh_prefill(decoder) > 0


def test_conversations_beside_an_open_stream_get_their_own_events() -> None:
    backbone = tiny()
    llm = LLM(backbone, Letters(), RandomTrees(64, 8))  # type: ignore[arg-type]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    decoder, talks = llm.decoder(2), [Conversation((text,), line) for line, text in enumerate("ab")]
    truth = [
        replies[0].ids for _, replies in sorted(converse(llm, decoder, talks, params, raw=True), key=lambda x: x[0])
    ]
    stream = run(decoder, [Request([1, 2, 3], params, 0)])
    streamed = [*next(stream)[1].tokens]
    beside = dict(converse(llm, decoder, talks, params, rows=2, raw=True))
    assert [beside[i][0].ids for i in range(2)] == truth
    streamed += [token for _, event in stream for token in event.tokens]
    assert streamed == plainly(backbone, [([1, 2, 3], params)])[0].ids
    assert not decoder.busy


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one row, not 0"):
        SpeculativeDecoder(tiny(), Plain(), max_rows=0)


# -- typical acceptance ---------------------------------------------------------------------------------------------


def test_typical_acceptance_is_marked_lossy_and_takes_what_its_thresholds_allow() -> None:
    backbone = tiny()
    request = ([1, 2, 3], SamplingParams(max_new_tokens=24, ignore_eos=True))
    chains = Oracle({(1, 2, 3): list(range(24))}, 64, 3)
    for rule, length in ((Typical(0, 0), 4), (Typical(2, 10**9), 1)):
        decoder = decoder_of(backbone, chains, rule=rule)
        assert not decoder.lossless
        (output,) = finish(decoder, [request])
        assert output.statistics.acceptance_length == length
        assert held_like_a_fresh_prefill(decoder) == 26
    assert output.ids == plainly(backbone, [request])[0].ids  # nothing accepted: the argmax every time


def test_typical_acceptance_at_a_low_temperature_is_greedy() -> None:
    backbone = tiny()
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    requests = [(ids, replace(params, **greedy)) for ids, params in mixed_requests()]
    truth = plainly(backbone, requests)
    drafter = RandomTrees(64, 20, answers=answers(requests, truth))
    outputs = finish(decoder_of(backbone, drafter, max_rows=3, rule=Typical(temperature=1e-4)), requests)
    assert [out.ids for out in outputs] == [out.ids for out in truth]
    assert [out.logprobs for out in outputs] == [out.logprobs for out in truth]


def test_a_draft_must_match_its_trees() -> None:
    with pytest.raises(UsageError, match="2 tokens for a tree of 3 nodes"):
        Draft([TokenTree((-1, 0, 0))], [[1, 2]])
