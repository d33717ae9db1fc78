"""The promise on a real model: SmolLM2-135M-Instruct, its own words, its own rounding.

Random weights forgive much; here attention is peaked, logits are close and one wrong bit grows through thirty
layers. Ids, log-probabilities, tapped states and caches of every drafter must be those of plain decoding, bit for
bit; and plain decoding in float32 must choose what transformers would.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from decoding import Output, Request, answers, assert_same, decoder_of, finish, held_like_a_fresh_prefill, plainly
from random_backbones import KERNELS
from toy_drafters import Checker, EarlyExit, Inserter, Oracle, RandomTrees

from foretell import drafters
from foretell.backbone import Backbone, assemble
from foretell.contracts import Drafter
from foretell.drafters.prompt_lookup import PromptLookup
from foretell.drafting.checkpoint import SHIPPED
from foretell.loading import Tokenizer
from foretell.loading.resolve import resolve
from foretell.recommendation import recommend
from foretell.requests import SamplingParams

pytestmark = pytest.mark.real

QUESTIONS = [
    "Why is the sky blue?",
    "Repeat this list three times: apples, pears, plums, cherries, apples, pears.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate to French: The cat sleeps on the warm windowsill while it rains outside, and nobody minds.",
]


@cache
def backbone_of(folder: Path, dtype: str, kernel: str | None = None) -> Backbone:
    return assemble(folder, dtype=dtype, kernel=kernel)


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(folder)
    return [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def requests(folder: Path, temperature: float, new: int = 16) -> list[Request]:
    """Budgets differ, so that rows leave a batch at different times.

    Few tokens: one wrong bit shows at once, in log-probabilities and in the cache.
    """
    return [
        (
            ids,
            SamplingParams(max_new_tokens=max(1, new - 4 * i), temperature=temperature, top_p=0.95, seed=i, logprobs=2),
        )
        for i, ids in enumerate(prompts(folder))
    ]


@cache
def truth(folder: Path, dtype: str, temperature: float) -> list[Output]:
    return plainly(backbone_of(folder, dtype), requests(folder, temperature))


TOYS: dict[str, Callable[[Backbone, dict[tuple[int, ...], list[int]]], Drafter]] = {
    "prompt lookup": lambda backbone, right: PromptLookup(),
    "random": lambda backbone, right: Checker(RandomTrees(backbone.config.vocab, 20), backbone, always=False),
    "right paths": lambda backbone, right: Checker(RandomTrees(49152, 20, answers=right), backbone, always=False),
    "early exit": lambda backbone, right: EarlyExit(backbone, 10),
    "insertion": lambda backbone, right: Inserter(backbone, 20),
}
MADE_FOR = {
    made["method"]: made["backbone"]
    for made in (json.loads(config.read_text()) for config in sorted(SHIPPED.glob("*/config.json")))
}
"""What comes with foretell, and the model that it drafts for."""
for method in MADE_FOR:
    TOYS[method] = lambda backbone, right, name=method: drafters.build(name, backbone, nodes=8)
    TOYS[f"{method}, lookup"] = lambda backbone, right, name=method: drafters.build(
        name, backbone, nodes=12, lookup=True
    )
TOYS |= {
    "kangaroo, chain": lambda backbone, right: drafters.build("kangaroo", backbone, chain=True, threshold=0.3),
    "layerskip, untrained": lambda backbone, right: drafters.build("layerskip", backbone, exit=6, nodes=16),
    "del, untrained": lambda backbone, right: drafters.build("del", backbone, stride=8, steps=6, lookup=True),
    "swift": lambda backbone, right: drafters.build("swift", backbone, window=8, threshold=0.3, nodes=24),
}


def folder_for(method: str) -> Path:
    """Of the model that it drafts for; toys know the demo model."""
    return resolve(MADE_FOR.get(method.removesuffix(", lookup"), "smollm2-135m")).path


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("toy", TOYS)
def test_every_bit_is_that_of_plain_decoding(toy: str, dtype: str) -> None:
    """Methods in each number type greedy and sampled, alone and in a batch, with lookup and without; toys by turns."""
    temperature = float((dtype == "bf16") == toy.endswith(", lookup"))
    folder = folder_for(toy)
    backbone, right, asked = (
        backbone_of(folder, dtype),
        truth(folder, dtype, temperature),
        requests(folder, temperature),
    )
    drafter = TOYS[toy](backbone, answers(asked, right))
    method = toy.removesuffix(", lookup")
    alone = (list(TOYS).index(method) // 2 + (dtype == "bf16") + (toy != method)) % 2
    decoder = decoder_of(backbone, drafter, max_rows=1 if alone else 4)
    assert_same(finish(decoder, asked), right)
    assert held_like_a_fresh_prefill(decoder) > 50
    if isinstance(drafter, Checker):
        for row in drafter.rows.values():
            drafter.check(row)
        assert drafter.checked > 50


@pytest.mark.parametrize(("dtype", "temperature"), [("bf16", 0.0), ("fp32", 1.0)])
def test_large_trees_change_no_bit(demo_folder: Path, dtype: str, temperature: float) -> None:
    """A published tree of 64 nodes, and random ones as large: few steps, for without wide tiles each is a long one."""
    backbone = backbone_of(demo_folder, dtype)
    asked = requests(demo_folder, temperature, 12)[:2]
    right = plainly(backbone, asked)
    published = drafters.build("medusa", backbone, tree="vicuna_7b_stage2", grown=False)
    for drafter in (published, RandomTrees(49152, 52, answers=answers(asked, right))):
        decoder = decoder_of(backbone, drafter, max_rows=2)
        assert_same(finish(decoder, asked), right)
        assert held_like_a_fresh_prefill(decoder) > 50


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS[1:])  # the best is what the other tests run
def test_every_kernel_keeps_the_promise(demo_folder: Path, dtype: str, kernel: str) -> None:
    """Slow kernels write less: a step of 24 nodes takes some of them ten seconds."""
    backbone = backbone_of(demo_folder, dtype, kernel)
    assert backbone.kernels == kernel
    assert backbone.nondeterminism is None
    rows, tokens, most = (1, 6, 6) if kernel in ("generic", "eager") else (2, 10, 16)
    ask = [(ids, SamplingParams(max_new_tokens=tokens, logprobs=1)) for ids in prompts(demo_folder)[:rows]]
    right = plainly(backbone, ask)
    decoder = decoder_of(backbone, RandomTrees(49152, most, answers=answers(ask, right)), max_rows=rows)
    assert_same(finish(decoder, ask), right)
    assert held_like_a_fresh_prefill(decoder) > 20


@pytest.mark.parametrize("method", MADE_FOR)
def test_the_heads_that_come_with_foretell_foretell(method: str) -> None:
    folder = folder_for(method)
    backbone = backbone_of(folder, "bf16")
    asked = [(ids, SamplingParams(max_new_tokens=40)) for ids in prompts(folder)]
    assert MADE_FOR[recommend(backbone).name] == MADE_FOR[method]
    outputs = finish(decoder_of(backbone, drafters.build(method, backbone, nodes=16)), asked)
    tokens, steps = (sum(getattr(out.statistics, name) for out in outputs) for name in ("new_tokens", "steps"))
    all_guess = drafters.drafter_class(method).node_cost == 1  # else over half of the 16 are inserted, and no guesses
    assert tokens / steps > (1.6 if all_guess else 1.4)  # without heads 1


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_an_oracle_is_accepted_whole(demo_folder: Path, dtype: str) -> None:
    """A chain deeper than a key block: nothing is lost on the way."""
    backbone, asked = backbone_of(demo_folder, dtype), requests(demo_folder, 0.0, 64)[:1]
    right = plainly(backbone, asked)
    (output,) = finish(decoder_of(backbone, Oracle(answers(asked, right), 49152, 50)), asked)
    assert_same([output], right)
    assert output.statistics.steps == 2


def test_float32_chooses_what_transformers_chooses(demo_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()
    right = truth(demo_folder, "fp32", 0.0)
    for (prompt, _), output in list(zip(requests(demo_folder, 0.0), right, strict=True))[:3]:
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + output.ids])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)
        for step, (token, ours) in enumerate(zip(output.ids, output.logprobs, strict=True)):
            best, second = logits[step].topk(2).values.tolist()
            assert token == logits[step].argmax() or best - second < 1e-3
            assert abs(ours.logprob - float(log_p[step, token])) < 1e-3
