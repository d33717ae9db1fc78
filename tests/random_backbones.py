"""Random models of any family and size, and ragged batches of random trees to run through them.

What the exactness tests share. A model is a `ModelConfig` and random weights, made without a checkpoint; `build`
turns it into a backbone for any kernel. `Batch` runs the same tokens in two ways: `together`, as the engine would,
and `alone`, one token at a time with nobody else in the call.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import DIMENSIONS, ROPES
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.eager.backbone import EagerBackbone
from foretell.backbone.eager.linear import MAX_ROWS
from foretell.contracts import Draft
from foretell.loading import ModelConfig
from foretell.loading.families import FAMILIES, model_config
from foretell.testing import random_weights
from foretell.trees import TokenTree, chain

FP32, BF16 = torch.float32, torch.bfloat16
SOAK = int(os.environ.get("FORETELL_SOAK", "1"))
"""Multiplies the examples of every property: FORETELL_SOAK=50 pytest for a long search."""


def examples(count: int) -> settings:
    return settings(max_examples=count * SOAK, deadline=None)


WAYS = [*library.BUILDS, "eager"]
COMPILED = [way for way in WAYS[WAYS.index(os.environ.get("FORETELL_KERNELS") or WAYS[0]) : -1] if library.find(way)]
KERNELS = [*COMPILED, "eager"]
"""Every way this processor can compute; with FORETELL_KERNELS, every way one that has no better build can."""


@contextmanager
def using(kernel: str) -> Iterator[None]:
    """The named compiled build inside ("": the best), the usual after; one thread for PyTorch: idle ones spin."""
    before = os.environ.get("FORETELL_KERNELS")
    if kernel in COMPILED:
        os.environ["FORETELL_KERNELS"] = kernel
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("FORETELL_KERNELS", None)
        if before is not None:
            os.environ["FORETELL_KERNELS"] = before


@cache
def rotation(rope: str, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Frequencies and scale of a rope; taken from a config of plain sizes, the only ones transformers accepts."""
    sizes = DIMENSIONS | {"head_dim": head_dim, "rope_parameters": dict(ROPES[rope])}
    config = model_config({"model_type": "llama", **sizes})
    return config.inv_freq, config.rope_scale


def check(kernel: str, count: int, property_: Any, *strategies: Any) -> None:
    """Runs a property over examples, as many as the kernel's speed allows."""
    with using(kernel):
        examples(max(3, count // {"eager": 5, "generic": 2}.get(kernel, 1)))(given(*strategies)(property_))()


@dataclass(frozen=True)
class Model:
    """A config as config.json would hold it, a rope of `ROPES`, and the seed of its weights."""

    raw: dict[str, Any]
    rope: str = "theta"
    seed: int = 0

    @property
    def config(self) -> ModelConfig:
        config = model_config(self.raw)
        inv_freq, scale = rotation(self.rope, config.head_dim)
        return replace(config, inv_freq=inv_freq, rope_scale=scale)

    def weights(self) -> dict[str, Tensor]:
        return random_weights(self.config, self.seed)

    def build(self, kernel: str = "", dtype: torch.dtype = FP32, threads: int = 1) -> Backbone:
        """A backbone; call it inside `using(kernel)`."""
        return build(self.config, self.weights(), kernel, dtype, threads)


def build(
    config: ModelConfig, weights: dict[str, Tensor], kernel: str = "", dtype: torch.dtype = FP32, threads: int = 1
) -> Backbone:
    backbone: Backbone
    if kernel != "eager" and COMPILED:
        backbone = CompiledBackbone(config, weights.__getitem__, dtype, threads)
    else:
        backbone = EagerBackbone(config, weights.__getitem__, dtype, torch.device("cpu"), threads)
        backbone.pad_rows(MAX_ROWS)  # what `assemble` does where the probe asks for it, as tiny shapes in fp32 make it
    backbone.read = weights.__getitem__
    return backbone


@st.composite
def models(draw: st.DrawFn, layers: int = 3, least: int = 1) -> Model:
    """Any family with every switch, odd widths from `least` on, shared key heads or not, all ropes, tied or not."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads, share = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8]))
    raw: dict[str, Any] = {
        "model_type": family,
        "hidden_size": draw(st.integers(least, 70) | st.sampled_from([32, 64, 96])),
        "intermediate_size": draw(st.integers(1, 100) | st.sampled_from([32, 64, 128])),
        "num_hidden_layers": draw(st.integers(1, layers)),
        "num_attention_heads": kv_heads * share,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([8, 16, 24, 32, 40, 64])),
        "vocab_size": draw(st.integers(2, 150) | st.sampled_from([32, 64])),
        "max_position_embeddings": 512,
        "tie_word_embeddings": draw(st.booleans()),
    }
    window = draw(st.sampled_from([1, 2, 5, 16, 31, 32, 33, 50]))
    if family == "llama":
        raw |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    elif family == "mistral":
        raw["sliding_window"] = draw(st.sampled_from([None, window]))
    else:
        raw |= {
            "use_sliding_window": draw(st.booleans()), "sliding_window": window,
            "max_window_layers": draw(st.integers(0, 2)),
        }  # fmt: skip
    return Model(raw, draw(st.sampled_from(sorted(ROPES))), draw(st.integers(0, 99)))


DTYPES = st.sampled_from([FP32, BF16])
LENGTHS = st.integers(0, 40) | st.sampled_from([1, 15, 16, 31, 32, 33, 63, 64, 65, 95, 96, 97])
"""Committed tokens; the edges of key blocks come up often."""


@st.composite
def trees(draw: st.DrawFn, most: int = 64) -> TokenTree:
    """Bushes, chains, combs: each node's parent is drawn near or far."""
    count = draw(st.integers(1, most) | st.sampled_from([1, 2, 17, 33, most]))
    reach = draw(st.sampled_from([1, 2, 4, most]))
    back = draw(st.lists(st.integers(1, reach), min_size=count - 1, max_size=count - 1))
    return TokenTree((-1, *(max(0, node - step) for node, step in enumerate(back, start=1))))


def drafts(most: int, vocab: int) -> st.SearchStrategy[Draft]:
    """One to three random trees of few different tokens; siblings may be alike."""

    def with_tokens(shapes: list[TokenTree]) -> st.SearchStrategy[Draft]:
        lists = [st.lists(st.integers(0, vocab - 1), min_size=len(t), max_size=len(t)) for t in shapes]
        return st.tuples(*lists).map(lambda tokens: Draft(shapes, list(tokens)))

    return st.lists(trees(most), min_size=1, max_size=3).flatmap(with_tokens)


@st.composite
def batches(draw: st.DrawFn, rows: int = 3, most: int = 24) -> "Batch":
    count = draw(st.integers(1, rows))
    lengths = draw(st.lists(LENGTHS, min_size=count, max_size=count))
    shapes = [draw(trees(most)) for _ in range(count)]
    slots = draw(st.permutations(range(count + 1)))[:count]
    return Batch(shapes, lengths, list(slots), draw(st.integers(0, 2**20)))


@dataclass
class Batch:
    """Rows of committed tokens, each extended by a tree; which tokens, the seed says.

    Attributes:
        slots: the cache row of each row.
    """

    trees: list[TokenTree]
    lengths: list[int]
    slots: list[int]
    seed: int = 0

    def tokens(self, vocab: int) -> tuple[list[Tensor], list[Tensor]]:
        """Ids of every row's committed tokens, and of every row's tree."""
        generator = torch.Generator().manual_seed(self.seed)
        prefixes = [torch.randint(vocab, (length,), generator=generator) for length in self.lengths]
        return prefixes, [torch.randint(vocab, (len(tree),), generator=generator) for tree in self.trees]

    def prefill(self, backbone: Backbone, chunk: int = 10**6) -> KVCache:
        """A cache that holds the committed tokens, read by all rows at once in chunks."""
        cache = backbone.new_cache(len(self.trees) + 1, max(self.nodes().ends))
        prefixes, _ = self.tokens(backbone.config.vocab)
        while rows := [b for b, slot in enumerate(self.slots) if cache.lengths[slot] < self.lengths[b]]:
            starts = [cache.lengths[self.slots[b]] for b in rows]
            parts = [prefixes[b][start : start + chunk] for b, start in zip(rows, starts, strict=True)]
            slots, counts = [self.slots[b] for b in rows], [len(part) for part in parts]
            run(backbone, torch.cat(parts), Nodes.chains(slots, starts, counts), cache)
            cache.commit(slots, [range(count) for count in counts])
        return cache

    def nodes(self) -> Nodes:
        return Nodes(self.trees, self.slots, self.lengths)

    def together(self, backbone: Backbone, chunk: int = 10**6) -> tuple[KVCache, list[Tensor]]:
        """All trees in one pass. Returns the cache and, row by row, the nodes' residual streams [N, d]."""
        cache = self.prefill(backbone, chunk)
        _, guesses = self.tokens(backbone.config.vocab)
        hidden = run(backbone, torch.cat(guesses), self.nodes(), cache)
        return cache, list(hidden.split([len(tree) for tree in self.trees]))

    def alone(self, backbone: Backbone, row: int) -> Iterator[tuple[list[int], KVCache, Tensor]]:
        """One row by itself, token by token: some paths of its tree, each with its cache and streams [path, d]."""
        prefixes, guesses = self.tokens(backbone.config.vocab)
        cache, _ = one_by_one(backbone, prefixes[row], len(self.trees[row]))
        for leaf in self.leaves(row):
            path = self.trees[row].path(leaf)
            cache.rollback(0, self.lengths[row])
            yield path, cache, extend_one_by_one(backbone, guesses[row][path], cache)

    def leaves(self, row: int, most: int = 3) -> list[int]:
        """A few leaves of a row's tree, the last ones among them."""
        leaves = self.trees[row].leaves
        return [*leaves[:: max(1, len(leaves) // most)][: most - 1], leaves[-1]]


def run(backbone: Backbone, tokens: Tensor, nodes: Nodes, cache: KVCache, **options: Any) -> Tensor:
    return backbone.run_layers(backbone.embed(tokens), nodes, cache, **options)[0]


def one_by_one(backbone: Backbone, tokens: Tensor, room: int = 0) -> tuple[KVCache, Tensor]:
    """The slow obvious way: every token alone. Returns its cache and all residual streams [T, d]."""
    cache = backbone.new_cache(1, len(tokens) + room)
    return cache, extend_one_by_one(backbone, tokens, cache)


def extend_one_by_one(backbone: Backbone, tokens: Tensor, cache: KVCache) -> Tensor:
    """Commits the tokens after those that row 0 holds; returns their streams [T, d]."""
    streams = [torch.empty(0, backbone.config.hidden)]
    for token in tokens.split(1) if len(tokens) else ():
        streams.append(run(backbone, token, Nodes([chain(0)], [0], [cache.lengths[0]]), cache))
        cache.commit([0], [[0]])
    return torch.cat(streams)


def prefilled(backbone: Backbone, tokens: Tensor | list[int]) -> tuple[KVCache, Tensor]:
    """All tokens in one call."""
    tokens = torch.as_tensor(tokens)
    cache = backbone.new_cache(1, len(tokens))
    hidden = run(backbone, tokens, Nodes.chains([0], [0], [len(tokens)]), cache)
    cache.commit([0], [range(len(tokens))])
    return cache, hidden


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; NaN equals nothing."""
    return a.shape == b.shape and bool((a == b).all())


def nodes_compute_what_they_do_alone(
    kernel: str, model: Model, dtype: torch.dtype, batch: Batch, chunk: int, threads: int
) -> None:
    """Asserts that each node of a batch of trees leaves the bits that it leaves token by token, in a row of its own."""
    backbone, single = model.build(kernel, dtype, threads), model.build(kernel, dtype, 1)
    cache, hidden = batch.together(backbone, chunk)
    logits = [backbone.logits(backbone.norm(states)) for states in hidden]
    for row, slot in enumerate(batch.slots):
        length = batch.lengths[row]
        for path, alone, streams in batch.alone(single, row):
            assert same(hidden[row][path], streams)
            assert same(logits[row][path[-1]], single.logits(single.norm(streams[-1:]))[0])
            seats = [*range(length), *(length + node for node in path)]
            keys, values = cache.room(slot)
            assert same(keys[:, :, seats], alone.read(0)[0])
            assert same(values[:, :, seats], alone.read(0)[1])
