"""Decoding replayed: the drafter itself, over text whose backbone states are known.

Verification keeps exactly those guesses that the backbone's own text goes on with. So what a drafter earns on text that
the backbone wrote needs no pass of the backbone: the drafter is shown the states of what was committed, drafts, and is
told how far it came, as in decoding. Everything of it runs: levels, grown trees, merged lookup, its own caches.

Legend: T tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from foretell.contracts import Drafter, Features, SamplingParams
from foretell.train.features import Features as Stored


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
    """What the steps earned; the first token of an answer comes from the prompt's pass, and is not counted."""

    steps: int = 0
    tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


def replay(
    drafter: Drafter,
    stored: Stored,
    conversations: Iterable[int],
    progress: Callable[[int], None] = lambda done: None,
) -> Replay:
    """Decodes the answers of some conversations once more.

    Args:
        stored: their states, for a backbone whose text they are.
        conversations: indices of `stored.data`.
        progress: told how many conversations are done.
    """
    drafter.bind(stored.backbone.new_cache(1, max(len(each.tokens) for each in stored.data)))
    found = Replay()
    for done, index in enumerate(conversations, start=1):
        for emitted in _steps(drafter, stored, index):
            found.steps += 1
            found.tokens += emitted
        progress(done)
    return found


def by_size(
    drafter: Any, stored: Stored, conversations: Sequence[int], sizes: Sequence[int], progress: Callable[[float], None]
) -> dict[int, float]:
    """Tokens per step with trees of each size; `drafter.size` is the drafter's rule for it."""
    found: dict[int, float] = {}
    rule = drafter.size
    try:
        for number, size in enumerate(sizes):
            drafter.size = partial(_always, size)
            before, all_of_them = number * len(conversations), len(sizes) * len(conversations)
            told = lambda done, b=before, a=all_of_them: progress((b + done) / a)  # noqa: E731
            found[size] = round(replay(drafter, stored, conversations, told).tokens_per_step, 4)
    finally:
        drafter.size = rule
    return found


def _always(size: int, rows: int, context: int) -> int:
    return size


def _steps(drafter: Drafter, stored: Stored, index: int) -> Iterator[int]:
    """How many tokens each step over a conversation emits."""
    told, batch = stored.data[index], stored.batch([index])
    row = Replayed([], 0, 0)
    drafter.reset([row])
    seen = 0  # tokens whose states the drafter knows: those before the newest

    def show(end: int) -> None:
        nonlocal seen
        taps = {tap: batch.states[tap][0, seen:end].float() for tap in drafter.taps}
        row.tokens += told.tokens[len(row.tokens) : end + 1]
        drafter.observe([row], Features([end - seen], taps))
        seen = end

    for start, end in told.answers:
        if start == 0:
            continue  # there is no prompt to begin from
        row.prompt_length = start
        show(start)
        while seen + 1 < end:
            row.budget = end - seen - 1
            draft = drafter.draft([row])
            tree, tokens, node, accepted = draft.trees[0], draft.tokens[0], 0, 0
            while seen + 1 + accepted < end:
                comes = told.tokens[seen + 1 + accepted]
                following = [child for child in tree.children[node] if tokens[child] == comes]
                if not following:
                    break
                node, accepted = following[0], accepted + 1
            emitted = min(accepted + 1, end - seen - 1)  # after the text's end comes no bonus
            show(seen + emitted)
            yield emitted
