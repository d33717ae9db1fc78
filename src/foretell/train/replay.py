"""Decoding replayed: the drafter itself, over text whose backbone states are known.

Verification keeps exactly those guesses that the backbone's own text continues with. So the tokens per step on text
that the backbone wrote can be measured without running the backbone, except for layers that drafting itself runs (all
of them, where it inserts rows into the verifying pass): the drafter observes the states of what was committed, drafts,
and observes how far its tree was accepted, as in decoding. All of the drafter runs: levels, grown trees, merged lookup,
its own caches.

Legend: T tokens of a conversation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foretell.backbone import KVCache, Nodes
from foretell.contracts import Drafter, Features
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.engine.passes import Pass, run_pass
from foretell.requests import SamplingParams, Statistics
from foretell.train.features import Batches


@dataclass
class ReplayedRow:
    """A row as drafters see it; `tokens` grows."""

    tokens: list[int]
    prompt_length: int
    budget: int
    slot: int = 0
    reused: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)


def replay(
    drafter: Drafter,
    features: Batches,
    conversations: Iterable[int],
    progress: Callable[[int], None] = lambda done: None,
    batches: Mapping[int, TrainingBatch] | None = None,
    new_tokens: int = 0,
) -> list[Statistics]:
    """Decodes the answers of some conversations again.

    Args:
        features: of conversations that the drafter's backbone wrote.
        conversations: indices of `features.data`.
        progress: called with the number of conversations that are done.
        batches: batches of one conversation each, by its index, where they were made before.
        new_tokens: under which limit the answers were written, for drafts near an end; by default, each one's length.

    Returns:
        What the engine would count of each conversation: steps, tokens, guesses and depths, but no seconds.
    """
    longest = max(len(talk.tokens) for talk in features.data)
    room = longest + drafter.max_nodes + drafter.extra_nodes
    cache, found = features.backbone.new_cache(1, room), list[Statistics]()
    drafter.bind(cache)
    for done, index in enumerate(conversations, start=1):
        batch = (batches or {}).get(index) or features.batch([index])
        found.append(_replay(drafter, features, cache, index, batch.to(features.backbone.device), new_tokens))
        progress(done)
    return found


def tokens_per_step_by_size(
    drafter: Any,
    features: Batches,
    conversations: Sequence[int],
    sizes: Sequence[int],
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[int, float]:
    """Tokens per step with trees of each size; see `replay`. The drafter itself is left unchanged."""
    found: dict[int, float] = {}
    batches = {index: features.batch([index]) for index in conversations}
    steps = len(sizes) * len(conversations)
    for number, size in enumerate(sizes):

        def of_size(done: int, before: int = number * len(conversations)) -> None:
            progress((before + done) / steps)

        drafts = replay(sized(drafter, size), features, conversations, of_size, batches)
        found[size] = round(sum(each.new_tokens for each in drafts) / max(1, sum(each.steps for each in drafts)), 4)
    return found


def sized(drafter: Any, nodes: int) -> Any:
    """A drafter that shares the weights of `drafter` and always drafts trees of `nodes` nodes, root included."""
    own = copy.copy(drafter)
    own.size = lambda rows, context, *_: nodes
    return own


def _replay(
    drafter: Drafter, features: Batches, cache: KVCache, conversation: int, batch: TrainingBatch, new_tokens: int
) -> Statistics:
    """Takes the steps of one conversation and counts them."""
    backbone, text, row = features.backbone, features.data[conversation], ReplayedRow([], 0, 0)
    cache.rollback(0, 0)
    drafter.reset([row])
    found = Statistics()
    seen = 0  # tokens whose states the drafter has observed: all but the newest
    # layers whose keys and values are needed: what it attends to while it drafts, or what its inserted rows attend to
    depth = backbone.config.layers if drafter.cuts else drafter.depth

    def observe(end: int, paths: list[list[int]], passed: Pass | None = None) -> None:
        nonlocal seen
        taps = {tap: batch.states[tap][0, seen:end].float() for tap in drafter.taps}
        row.tokens += text.tokens[len(row.tokens) : end + 1]
        if passed:
            cache.commit([0], paths)
        elif end > seen and depth:
            nodes = Nodes.chains([0], [seen], [end - seen])
            backbone.run_layers(backbone.embed(torch.tensor(row.tokens[seen:end])), nodes, cache, 0, depth)
            cache.commit([0], [range(end - seen)])
        if end > seen:
            drafter.observe([row], Features([end - seen], taps, passed.inserted if passed else None, paths))
        seen = end

    for start, end in text.answers:
        if start == 0:
            continue  # no prompt to begin from
        row.prompt_length = start
        observe(start - 1, [])  # the last token of a prompt is the root of the first tree
        while seen + 1 < end:
            row.budget = max(end, start + new_tokens) - seen - 1
            draft = drafter.draft([row])
            draft.cut_below(0, row.budget - 1)
            passed = run_pass(backbone, drafter, cache, [row], draft) if drafter.cuts else None
            tree, tokens, node, path = draft.trees[0], draft.tokens[0], 0, [0]
            while seen + len(path) < end:
                next_token = text.tokens[seen + len(path)]
                right = [child for child in tree.children[node] if tokens[child] == next_token]
                if not right:
                    break
                node = right[0]
                path.append(node)
            emitted = min(len(path), end - seen - 1)  # no bonus follows the last token
            observe(seen + emitted, [path[:emitted]], passed)
            found.count(tree.height, len(tree) - 1, emitted, accepted=min(len(path) - 1, emitted))
    return found
