"""The promise: with any drafter and any tree, what comes out is what plain decoding writes.

Plain decoding of one request alone, by the same engine, is the truth. Every toy drafter must reproduce its ids,
its log-probabilities (hence the logits behind them) and leave the same bits in the cache: in float32 and bfloat16,
for every family, alone and in batches whose rows join and leave, greedy and sampled, with penalties and stops.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from random_backbones import BF16, FP32, KERNELS, Model, using
from tiny_models import DIMENSIONS, VARIANTS
from toy_drafters import Checker, EarlyExit, Inserter, Oracle, RandomTrees, held_like_a_fresh_prefill

from foretell.backbone import Backbone
from foretell.contracts import Decoder, Draft, Drafter, Event, SamplingParams, Statistics, TokenLogprob
from foretell.drafters.plain import Plain
from foretell.drafters.prompt_lookup import PromptLookup
from foretell.engine import SpeculativeDecoder
from foretell.engine.governor import MARGIN, PATIENCE, TRIAL, Governor
from foretell.errors import UsageError
from foretell.trees import TokenTree
from foretell.verify import Typical

Request = tuple[list[int], SamplingParams]
LLAMA = {"model_type": "llama", **DIMENSIONS, "max_position_embeddings": 512}


def tiny(dtype: torch.dtype = FP32, **changes: Any) -> Backbone:
    return Model(LLAMA | changes).build(dtype=dtype)


@dataclass
class Output:
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    drafted: list[bool] = field(default_factory=list)
    finish_reason: str | None = None
    statistics: Statistics = field(default_factory=Statistics)

    def add(self, event: Event) -> None:
        assert self.finish_reason is None, "an event after the last"
        self.ids += event.tokens
        self.logprobs += event.logprobs
        self.text += event.text
        self.drafted += event.drafted
        assert "".join(text for text, _ in event.pieces) == event.text
        self.finish_reason, self.statistics = event.finish_reason, event.statistics or self.statistics


def finish(decoder: SpeculativeDecoder, requests: Sequence[Request], keys: Sequence[int] = ()) -> list[Output]:
    """Submits all, steps until all are done; `keys` fix the noise (by default the order of the requests)."""
    keys = keys or range(len(requests))
    numbers = [decoder.submit(ids, params, key) for (ids, params), key in zip(requests, keys, strict=True)]
    outputs = {number: Output() for number in numbers}
    while decoder.busy:
        for event in decoder.step():
            outputs[event.request].add(event)
    return list(outputs.values())


def plainly(backbone: Backbone, requests: Sequence[Request], tokenizer: Any = None) -> list[Output]:
    """The truth: one request at a time, one token at a time, each in a cache of its own."""
    return [
        finish(SpeculativeDecoder(backbone, Plain(), tokenizer), [request], [key])[0]
        for key, request in enumerate(requests)
    ]


def answers(requests: Sequence[Request], truth: Sequence[Output]) -> dict[tuple[int, ...], list[int]]:
    return {tuple(ids): output.ids for (ids, _), output in zip(requests, truth, strict=True)}


def assert_same(ours: Sequence[Output], truth: Sequence[Output]) -> None:
    for mine, right in zip(ours, truth, strict=True):
        assert mine.ids == right.ids
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


def mixed_requests(seed: int = 0, vocab: int = 64) -> list[Request]:
    """One of everything: greedy, sampled, truncated, penalised, with and without log-probabilities."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    phrase = prompt(5)
    return [
        (phrase * 3, SamplingParams(max_new_tokens=24)),
        (prompt(1), SamplingParams(max_new_tokens=20, logprobs=3)),
        (prompt(2), SamplingParams(max_new_tokens=9, temperature=1.0, seed=7, logprobs=0)),
        (prompt(40), SamplingParams(max_new_tokens=30, temperature=0.8, top_p=0.9, top_k=20, min_p=0.02, logprobs=2)),
        (phrase * 2, SamplingParams(
            max_new_tokens=20, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, ignore_eos=True,
            logit_bias={3: 2.0, 5: -9.0}, logprobs=1,
        )),
        (prompt(17), SamplingParams(max_new_tokens=20, temperature=1.5, seed=1, repetition_penalty=0.8, frequency_penalty=1)),
        (prompt(33), SamplingParams(max_new_tokens=1)),
    ]  # fmt: skip


def toys(backbone: Backbone, answers: dict[tuple[int, ...], list[int]]) -> dict[str, Callable[[], Drafter]]:
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
    }


def decoder_of(backbone: Backbone, drafter: Drafter, tokenizer: Any = None, **options: Any) -> SpeculativeDecoder:
    """Always speculating: what the governor decides depends on the clock."""
    decoder = SpeculativeDecoder(backbone, drafter, tokenizer, **({"adapt": False} | options))
    if isinstance(drafter, EarlyExit):
        drafter.cache = decoder.cache
    return decoder


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_toy_writes_what_plain_decoding_writes(variant: str, dtype: torch.dtype) -> None:
    backbone = tiny(dtype, **VARIANTS[variant])
    requests = mixed_requests()
    truth = plainly(backbone, requests)
    for name, make in toys(backbone, answers(requests, truth)).items():
        for max_rows in (1, 3):
            drafter = make()
            decoder = decoder_of(backbone, drafter, max_rows=max_rows)
            assert isinstance(decoder, Decoder)
            assert decoder.lossless
            assert_same(finish(decoder, requests), truth), name
            assert held_like_a_fresh_prefill(decoder) > 0
            assert not isinstance(drafter, Checker) or drafter.checked > 300


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_kernel_keeps_the_promise(kernel: str, dtype: torch.dtype) -> None:
    with using(kernel):
        backbone = Model(LLAMA, seed=1).build(kernel, dtype)
        requests = mixed_requests(1)
        truth = plainly(backbone, requests)
        decoder = decoder_of(backbone, RandomTrees(64, answers=answers(requests, truth)), max_rows=4)
        assert_same(finish(decoder, requests), truth)
        assert held_like_a_fresh_prefill(decoder) > 0
