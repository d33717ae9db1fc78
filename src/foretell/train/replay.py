"""Decoding replayed: the drafter itself, over text whose backbone states are known.

Verification keeps exactly those guesses that the backbone's own text goes on with. So what a drafter earns on text that
the backbone wrote needs no pass of the backbone, but for layers that drafting itself runs: the drafter is shown the
states of what was committed, drafts, and is told how far it came, as in decoding. Everything of it runs: levels, grown
trees, merged lookup, its own caches.

Legend: T tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from foretell.backbone import KVCache, Nodes
from foretell.contracts import Drafter, Features
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.requests import SamplingParams
from foretell.train.features import Batches


@dataclass
class Replayed:
    """A row as drafters see it; `tokens` grows."""

    tokens: list[int]
    prompt_length: int
    budget: int
    slot: int = 0
    reused: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass
class Replay:
    """What the steps earned."""

    steps: int = 0
    tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


def replay(
    drafter: Drafter,
    stored: Batches,
    conversations: Iterable[int],
    progress: Callable[[int], None] = lambda done: None,
    known: Mapping[int, TrainingBatch] | None = None,
) -> Replay:
    """Decodes the answers of some conversations once more.

    Args:
        stored: their states, for a backbone whose text they are.
        conversations: indices of `stored.data`.
        progress: called with how many conversations are done.
        known: batches of these conversations, one each, where they were made already.
    """
    longest = max(len(each.tokens) for each in stored.data)
    cache, found = stored.backbone.new_cache(1, longest + drafter.max_nodes), Replay()
    drafter.bind(cache)
    for done, index in enumerate(conversations, start=1):
        batch = (known or {}).get(index) or stored.batch([index])
        for emitted in _steps(drafter, stored, cache, index, batch.to(stored.backbone.device)):
            found.steps += 1
            found.tokens += emitted
        progress(done)
    return found


def by_size(
    drafter: Any, stored: Batches, conversations: Sequence[int], sizes: Sequence[int], progress: Callable[[float], None]
) -> dict[int, float]:
    """Tokens per step with trees of each size; `drafter.size` is the drafter's rule for it."""
    found: dict[int, float] = {}
    rule, known = drafter.size, {index: stored.batch([index]) for index in conversations}
    try:
        for number, size in enumerate(sizes):
            drafter.size = partial(_always, size)
            found[size] = round(replay(drafter, stored, conversations, known=known).tokens_per_step, 4)
            progress((number + 1) / len(sizes))
    finally:
        drafter.size = rule
    return found


def _always(size: int, rows: int, context: int) -> int:
    return size


def _steps(drafter: Drafter, stored: Batches, cache: KVCache, conversation: int, batch: TrainingBatch) -> Iterator[int]:
    """How many tokens each step over a conversation emits."""
    backbone, text, row = stored.backbone, stored.data[conversation], Replayed([], 0, 0)
    cache.rollback(0, 0)
    drafter.reset([row])
    seen = 0  # tokens whose states the drafter knows: those before the newest

    def show(end: int, paths: list[list[int]]) -> None:
        nonlocal seen
        taps = {tap: batch.states[tap][0, seen:end].float() for tap in drafter.taps}
        row.tokens += text.tokens[len(row.tokens) : end + 1]
        if end > seen and drafter.depth:  # the keys that it attends to while it drafts
            nodes = Nodes.chains([0], [seen], [end - seen])
            backbone.run_layers(backbone.embed(torch.tensor(row.tokens[seen:end])), nodes, cache, 0, drafter.depth)
            cache.commit([0], [range(end - seen)])
        if end > seen:
            drafter.observe([row], Features([end - seen], taps, paths=paths))
        seen = end

    for start, end in text.answers:
        if start == 0:
            continue  # there is no prompt to begin from
        row.prompt_length = start
        show(start - 1, [])  # a prompt's last token is the root of the first tree
        while seen + 1 < end:
            row.budget = end - seen - 1
            draft = drafter.draft([row])
            tree, tokens, node, path = draft.trees[0], draft.tokens[0], 0, [0]
            while seen + len(path) < end:
                comes = text.tokens[seen + len(path)]
                following = [child for child in tree.children[node] if tokens[child] == comes]
                if not following:
                    break
                node = following[0]
                path.append(node)
            emitted = min(len(path), end - seen - 1)  # after the text's end comes no bonus
            show(seen + emitted, [path[:emitted]])
            yield emitted
