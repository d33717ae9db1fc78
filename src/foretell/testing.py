"""Whether a drafter changes what a model writes: random tiny models decode with it and without it.

    def test_mine_is_exact():
        check_drafter(Mine, length=3)

Needs no files and takes seconds, so that it fits into the tests of whoever writes a drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foretell import drafters
from foretell.backbone import Backbone
from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.eager.backbone import EagerBackbone
from foretell.backbone.eager.linear import MAX_ROWS
from foretell.contracts import Drafter
from foretell.drafters.prompt_lookup import with_lookup
from foretell.engine import SpeculativeDecoder, run
from foretell.errors import UsageError
from foretell.loading import ModelConfig
from foretell.loading.families import model_config
from foretell.loading.tensors import weight_shapes
from foretell.requests import Request, SamplingParams

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
}
"""Configs of small models of several families, with what differs between them switched on."""
DTYPES = (torch.float32, torch.bfloat16)

Make = Callable[[Backbone], Drafter]


def check_drafter(drafter: str | type[Drafter] | Make, models: Sequence[str] = tuple(MODELS), **options: Any) -> int:
    """Decodes the same requests with and without a drafter, alone and merged with prompt lookup, and compares.

    Models of several families and both number types; one row and three; more requests than rows, so that slots are
    reused; prompts of one token and up; prompts that begin alike; greedy and sampled.

    Args:
        drafter: a name, "mine.py:Class", a class, or a function from a backbone to a drafter.
        models: names from `MODELS`.
        options: of the drafter.

    Returns:
        How many tokens were compared.

    Raises:
        AssertionError: naming the first request that differs.
        UsageError: the drafter calls itself lossy, or cannot be made.
    """
    compared = 0
    for name in models:
        for dtype in DTYPES:
            backbone = random_backbone(MODELS[name], dtype)
            made = _make(drafter, backbone, options)
            if not made.lossless:
                raise UsageError("The drafter has lossless = False, so its output need not be the model's own.")
            truth = _answers(backbone, drafters.build("plain", backbone), 1)
            for rows in (1, 3):
                for each in (made, with_lookup(made)):
                    found = _answers(backbone, each, rows)
                    where = f"{name} in {str(dtype)[6:]}, {rows} rows{', with lookup' * (each is not made)}"
                    for index, (ours, right) in enumerate(zip(found, truth, strict=True)):
                        assert ours == right, _difference(ours, right, f"request {index} of {where}")
                    compared += sum(map(len, found))
    return compared


def random_backbone(raw: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Backbone:
    """Returns a model with random weights; compiled kernels where there are some.

    Args:
        raw: what its config.json would hold; sizes that it leaves out are small.
    """
    config = model_config({**SIZES, **raw})
    weights = random_weights(config, seed)
    if library.find():
        return CompiledBackbone(config, weights.__getitem__, dtype, 1)
    eager = EagerBackbone(config, weights.__getitem__, dtype, torch.device("cpu"), 1)
    eager.pad_rows(MAX_ROWS)  # with so many rows in every call, their number changes no bit
    return eager


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Matrices that keep a vector's length, so that no layer drowns another; biases and norms are random too."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        weight = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.2 * weight
        elif "embed" in name or name.endswith("bias"):
            weights[name] = 0.5 * weight
        else:
            weights[name] = weight * shape[-1] ** -0.5
    return weights


def _make(drafter: str | type[Drafter] | Make, backbone: Backbone, options: dict[str, Any]) -> Drafter:
    if isinstance(drafter, str | type):
        return drafters.build(drafter, backbone, **options)
    return drafter(backbone)


def _requests(vocab: int) -> list[Request]:
    """Prompts of 1 to 40 tokens, some of which begin alike and some of which repeat themselves."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(vocab, (40,), generator=generator).tolist()
    prompts = [text[:12], [text[3]], text[:20], text, text[:7] * 3, [*text[:12], *text[30:]], text[:2]]
    return [
        Request(
            prompt,
            SamplingParams(max_new_tokens=12 + 5 * i, temperature=float(i % 2), seed=i, ignore_eos=True),
            key=i,
        )
        for i, prompt in enumerate(prompts)
    ]


def _answers(backbone: Backbone, drafter: Drafter, rows: int) -> list[list[int]]:
    """Decodes each request twice; the second time reuses the caches of the first."""
    requests = _requests(backbone.config.vocab)
    decoder = SpeculativeDecoder(backbone, drafter, max_rows=rows, adapt=False)
    out: list[list[int]] = []
    for _ in range(2):
        answers: list[list[int]] = [[] for _ in requests]
        for index, event in run(decoder, requests):
            assert not event.error, event.error
            answers[index] += event.tokens
        out += answers
    return out


def _difference(ours: list[int], right: list[int], where: str) -> str:
    at = next((i for i, (one, other) in enumerate(zip(ours, right, strict=False)) if one != other), len(right))
    return (
        f"{where}: token {at} is {ours[at : at + 1] or 'missing'}, but without the drafter {right[at : at + 1]}; a "
        "lossless drafter changes no token, so it must have changed the cache, a row or the model."
    )
