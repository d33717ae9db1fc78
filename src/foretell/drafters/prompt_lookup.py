"""Prompt lookup: guesses what followed the last words the last times they occurred.

The newest tokens are looked up in prompt and output; the tokens after earlier occurrences of the longest matches are
candidates. The probability that a guess comes true depends on how many tokens before it match (each guess further
along a candidate matches one more) and on how many better candidates differ from it: both were counted once, in texts
that a model wrote, and the odds of all are corrected while decoding. The most probable guesses of a batch make its
trees: as many as pay at the step costs of this machine.

It needs no parameters and no training; it wins where the answer quotes the question (summaries, edits, code). Prompt
lookup: Saxena 2023; chains as in transformers' `prompt_lookup_num_tokens`, here the best of several in one tree.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from foretell.backbone.step_costs import step_costs
from foretell.contracts import Draft, Drafter, Features, Insertion, Row
from foretell.drafting.options import option
from foretell.drafting.tree_size import left_by_sampling
from foretell.errors import UsageError
from foretell.trees import Guesses, TokenTree
from foretell.trees.tree import ROOT, merged

if TYPE_CHECKING:
    from foretell.backbone import Backbone, KVCache, Nodes

Prices = Callable[[int, int], Sequence[float]]
"""(rows, context) -> cost of a step with 0, 1, 2, ... guesses, over all rows."""
NODES = 16
"""The largest tree by default."""

FOLLOWS: tuple[tuple[float, ...], ...] = (
    (0.23, 0.13, 0.09, 0.05),
    (0.55, 0.17, 0.09, 0.06),
    (0.63, 0.16, 0.09, 0.05),
    (0.78, 0.22, 0.12, 0.06),
    (0.84, 0.23, 0.12, 0.09),
    (0.88, 0.24, 0.14, 0.10),
    (0.90, 0.27, 0.10, 0.04),
    (0.92, 0.25, 0.13, 0.10),
    (0.92, 0.26, 0.09, 0.03),
    (0.94, 0.24, 0.08, 0.03),
    (0.94, 0.22, 0.11, 0.05),
    (0.96, 0.25, 0.07, 0.05),
)
"""[tokens that match - 1][better candidates]: how often a guess came true (the last of a row or column stands for all
beyond). Counted by tools/lookup_table.py in conversations that SmolLM2-135M-Instruct wrote, token by token the most
probable one."""
LEARNT = 0.05
"""By how much the log-odds of guesses follow a guess that came true, or not: more than a hundred of them tell."""
LEAST_SHARE, MOST_LEARNT = 0.1, 100.0
"""Share of the table's odds that sampling leaves at least, and the largest factor that is learnt, either way."""


@dataclass
class _Index:
    """Positions at which each n-gram of a row ended, for every n looked up; grows with the row."""

    longest: int
    shortest: int
    seen: int = 0
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def extend(self, tokens: list[int]) -> None:
        """Indexes the n-grams that end before the last token: the last one has no continuation yet."""
        for end in range(self.seen + 1, len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self.ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self.seen = max(self.seen, len(tokens) - 1)

    def continuations(self, tokens: list[int], count: int, least: float = 0.0, odds: float = 1.0) -> dict[int, int]:
        """Up to `count` positions to copy from -> length of the match there: longer matches first, then later ones.

        Tokens before the longest n-gram are compared as well, as far as `FOLLOWS` tells matches apart. Matches after
        which even the best guess is less probable than `least`, at these `odds` (see `follows`), are left out.
        """
        positions: dict[int, int] = {}
        for n in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            longest = len(FOLLOWS) if n == self.longest else n  # of these matches
            if follows(longest, 0, odds) < least:
                break
            for end in reversed(self.ends.get(tuple(tokens[-n:]), ())):
                positions.setdefault(end, n)
                if len(positions) == count:
                    break
            if len(positions) == count:
                break
        for end, n in positions.items():
            while n >= self.longest and n < min(end, len(FOLLOWS)) and tokens[end - n - 1] == tokens[-n - 1]:
                n += 1
            positions[end] = n
        return dict(sorted(positions.items(), key=lambda pair: -pair[1]))


class PromptLookup(Drafter):
    """The most probable continuations by lookup, as a tree.

    Args:
        longest, shortest: lengths of the n-grams looked up.
        candidates: occurrences looked at.
        nodes: the largest tree, root included.
        min_probability: a guess less probable than this is left out.
        prices: of guesses; those that do not pay are left out. Without prices all stay. With them, what guesses are
            worth follows how often they come true: text that is sampled, or penalized for repetition, copies less.
    """

    @dataclass(frozen=True)
    class Options:
        longest: int = option(4, "Longest n-gram looked up.", low=1, high=16)
        shortest: int = option(1, "Shortest n-gram looked up.", low=1, high=16)
        candidates: int = option(8, "Earlier occurrences looked at.", low=1, high=64)
        nodes: int = option(0, "Largest tree, root included; by default what pays here, 16 at most.", low=0, high=256)
        min_probability: float = option(
            0.02, "A guess less probable than this is not drafted.", low=1e-9, high=1, former="least"
        )

    def __init__(
        self, longest: int = 4, shortest: int = 1, candidates: int = 8, nodes: int = NODES,
        min_probability: float = 0.02, prices: Prices | None = None,
    ):  # fmt: skip
        if not 1 <= shortest <= longest <= 16:
            raise UsageError(f"Prompt lookup needs 1 <= shortest <= longest <= 16, not {shortest} and {longest}.")
        if not (1 <= candidates <= 64 and 2 <= nodes <= 256 and 0 < min_probability <= 1):
            raise UsageError(
                f"Prompt lookup takes candidates in 1..64, nodes in 2..256 and min_probability above 0 up to 1, not "
                f"{candidates}, {nodes}, {min_probability}."
            )
        self.longest, self.shortest = longest, shortest
        self.candidates, self.nodes, self.min_probability, self.prices = candidates, nodes, min_probability, prices
        self._indexes: dict[int, _Index] = {}
        # of plain greedy rows, of others; engines share them, as they share the costs of steps
        self._odds = {True: 1.0, False: 1.0}
        self._expected: dict[int, tuple[int, int, float]] = {}  # slot -> a place, the best guess for it, probability

    @classmethod
    def build(cls, backbone: Backbone, options: Options) -> PromptLookup:
        """See `Drafter.build`."""
        return cls(
            options.longest, options.shortest, options.candidates, options.nodes or NODES, options.min_probability,
            None if options.nodes else prices_of(backbone),
        )  # fmt: skip

    @property
    def max_nodes(self) -> int:
        return self.nodes

    def bind(self, cache: KVCache) -> None:
        self._indexes, self._expected = {}, {}

    def forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._indexes.pop(slot, None)

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._indexes[row.slot] = _Index(self.longest, self.shortest)
            self._expected.pop(row.slot, None)

    def draft(self, rows: Sequence[Row]) -> Draft:
        found = self.all_guesses(rows)
        return Draft([g.tree for g in found], [g.tokens for g in found], [g.probabilities for g in found])

    def all_guesses(self, rows: Sequence[Row]) -> list[Guesses]:
        """Guesses for each row. With prices, the batch's most probable ones: as many as earn most tokens per cost."""
        if not self.prices:
            return [self.guesses(row) for row in rows]
        prices = self.prices(len(rows), max(len(row.tokens) for row in rows))
        least = least_paying(len(rows), tuple(prices))
        found = [self.guesses(row, least) for row in rows]
        if all(guesses.tree is ROOT for guesses in found):  # as in most steps, which must cost no more than plain ones
            return found
        pooled = [(value, row) for row, guesses in enumerate(found) for value in guesses.path_probabilities()[1:]]
        pooled.sort(key=lambda pair: -pair[0])  # of equals the first row's, and a row's own stay in their order
        kept = Counter(row for _, row in pooled[: most_paying(len(rows), [value for value, _ in pooled], prices)])
        return [guesses.first(1 + kept[row]) for row, guesses in enumerate(found)]

    def guesses(self, row: Row, least: float = 0.0) -> Guesses:
        """Returns the most probable continuations of a row: the likeliest open guess is taken next, again and again.

        Those less probable than `least` are left out.
        """
        least, odds = max(least, self.min_probability), self._learnt_odds(row)
        index, tokens = self._indexes[row.slot], row.tokens
        index.extend(tokens)
        parents, ids, probabilities = [-1], [tokens[-1]], [1.0]
        # (-value, order, node it follows, token, probability given that node, [(position, tokens that match)])
        heap: list[tuple[float, int, int, int, float, list[tuple[int, int]]]] = []
        order = 0

        def open_after(node: int, value: float, positions: list[tuple[int, int]]) -> None:
            """Adds the guesses that follow a node at the positions that lead to it."""
            nonlocal order
            following: dict[int, list[tuple[int, int]]] = {}
            for position, match in positions:
                if position < len(tokens):
                    following.setdefault(tokens[position], []).append((position, match))
            for better, (token, where) in enumerate(following.items()):
                p = follows(where[0][1], better, odds)
                if node == better == 0:
                    self._expected[row.slot] = len(tokens), token, p
                if value * p >= least:
                    further = [(position + 1, match + 1) for position, match in where]
                    heapq.heappush(heap, (-value * p, order, node, token, p, further))
                    order += 1

        # guesses that would pay if they came true as often as usual are watched, so that odds can rise again
        open_after(0, 1.0, list(index.continuations(tokens, self.candidates, least, max(1.0, odds)).items()))
        while heap and len(parents) < self.nodes:
            value, _, parent, token, p, positions = heapq.heappop(heap)
            parents.append(parent)
            ids.append(token)
            probabilities.append(p)
            open_after(len(parents) - 1, -value, positions)
        return Guesses(TokenTree(tuple(parents)) if len(parents) > 1 else ROOT, ids, probabilities)

    def _learnt_odds(self, row: Row) -> float:
        """Returns how the odds of such a row's guesses relate to the table's, after the guess that was watched.

        Of sampled text they are lower from the start, by the share that sampling leaves of heads' guesses; what is
        learnt is how they differ from that.
        """
        kind, tokens = row.params.plain_greedy, row.tokens
        place, guess, p = self._expected.pop(row.slot, (0, 0, 0.0))
        if not self.prices:
            return 1.0
        if 0 < place < len(tokens):
            learnt = self._odds[kind] * math.exp(LEARNT * ((tokens[place] == guess) - p))
            self._odds[kind] = min(MOST_LEARNT, max(1 / MOST_LEARNT, learnt))
        return self._odds[kind] * max(LEAST_SHARE, left_by_sampling(row.params))


def follows(match: int, better: int, odds: float = 1.0) -> float:
    """Probability of a guess with `match` matching tokens before it and `better` better guesses that differ.

    Args:
        odds: factor of the odds of all guesses.
    """
    row = FOLLOWS[min(match, len(FOLLOWS)) - 1]
    p = row[min(better, len(row) - 1)]
    return p * odds / (1 - p + p * odds)


def most_paying(rows: int, values: Sequence[float], prices: Sequence[float]) -> int:
    """Returns how many of a batch's guesses, most probable first, give the most tokens per cost of a step."""
    tokens = list(accumulate(values, initial=rows))  # of a step: a guess's token as often as its path comes true
    return max(range(min(len(tokens), len(prices))), key=lambda guesses: tokens[guesses] / prices[guesses])


@lru_cache
def least_paying(rows: int, prices: tuple[float, ...]) -> float:
    """Returns a probability below which no guess pays, even at the least price of one: plain steps are cheaper."""
    cheapest = min((more - less for less, more in pairwise(prices)), default=0.0)
    return cheapest * rows / prices[0]


def prices_of(backbone: Backbone) -> Prices | None:
    """Step costs of this machine, measured now if they are not known; None if they cannot be (see `step_costs`)."""
    costs = step_costs(backbone)
    if costs is None:
        return None

    @lru_cache
    def of(rows: int, context: int, learnt: int) -> tuple[float, ...]:
        of_a_row = range(1, NODES + 1)
        known = [costs.of(rows, context, nodes) for nodes in of_a_row]
        return tuple(np.interp(np.arange(rows, rows * NODES + 1) / rows, of_a_row, known).tolist())

    return lambda rows, context: of(rows, context // 64 * 64, costs.learnt)


def with_lookup(drafter: Drafter, prices: Prices | None = None) -> Drafter:
    """The drafter with candidates of prompt lookup merged into its trees; prompt lookup itself is unchanged."""
    return drafter if isinstance(drafter, PromptLookup) else WithLookup(drafter, prices=prices)


class WithLookup(Drafter):
    """Any drafter with candidates of prompt lookup merged into its trees: heads rarely guess what the text repeats.

    The tree keeps its size, and the most probable guesses of both fill it; with prices, which bound the candidates of
    lookup by themselves, it is as large as the larger of the two. If the inner drafter gives no probabilities, lookup
    takes up to half of the tree, in the place of the inner drafter's last guesses.
    """

    def __init__(self, inner: Drafter, **lookup: Any):
        if inner.fused:
            raise UsageError(
                "Fused decoding verifies no guesses, so prompt lookup cannot add any; leave one of both out."
            )
        if inner.trust is not None:
            raise UsageError("A drafter whose guesses are accepted unverified takes none of lookup's; leave it out.")
        self.inner, self.lookup = inner, PromptLookup(**lookup)
        self._cache: KVCache | None = None
        self.taps, self.cuts, self.depth, self.lossless = inner.taps, inner.cuts, inner.depth, inner.lossless
        self.adapters, self.parameters, self.tokens_per_step = inner.adapters, inner.parameters, inner.tokens_per_step
        self.method, self.usual_cost, self.node_cost = inner.method, inner.usual_cost, inner.node_cost

    @property
    def max_nodes(self) -> int:
        return max(self.inner.max_nodes, self.lookup.nodes)

    @property
    def extra_nodes(self) -> int:
        return self.inner.extra_nodes

    def bind(self, cache: KVCache) -> None:
        self._cache = cache
        self.inner, self.lookup = self.inner.attached(cache), self.lookup.attached(cache)

    def forget(self, slots: Sequence[int]) -> None:
        self.inner.forget(slots)
        self.lookup.forget(slots)

    def reusable_tokens(self, slot: int, tokens: int) -> int:
        return self.inner.reusable_tokens(slot, tokens)

    def reset(self, rows: Sequence[Row]) -> None:
        self.inner.reset(rows)
        self.lookup.reset(rows)

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        self.inner.observe(rows, features)

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Nodes, draft: Draft) -> Insertion | None:
        return self.inner.at_cut(layer, hidden_Md, nodes, draft)

    def draft(self, rows: Sequence[Row]) -> Draft:
        draft, looked_up_by_row = self.inner.draft(rows), self.lookup.all_guesses(rows)
        if all(looked_up.tree is ROOT for looked_up in looked_up_by_row):
            return draft
        found, kept = list[Guesses](), list[list[int]]()
        for i, looked_up in enumerate(looked_up_by_row):
            probabilities = draft.probabilities[i] if draft.probabilities else None
            ran = max(1, draft.resume.ran[i]) if draft.resume else 1
            both, remaining = self._merged(draft.trees[i], draft.tokens[i], probabilities, looked_up, ran)
            found.append(both)
            kept.append(remaining if draft.resume and draft.resume.ran[i] else [])
        resume = draft.resume
        if resume:
            assert self._cache is not None, "the engine binds its cache first"
            self._cache.gather([row.slot for row in rows], kept, resume.layer)
            resume = resume.kept(kept)
        merged_probabilities = [g.probabilities for g in found]
        return Draft([g.tree for g in found], [g.tokens for g in found], merged_probabilities, resume, draft.held)

    def _merged(
        self, tree: TokenTree, tokens: list[int], probabilities: list[float] | None, found: Guesses, ran: int
    ) -> tuple[Guesses, list[int]]:
        """Returns the union, and which of the first `ran` nodes are still in it; these come first."""
        size = len(tree) if len(tree) > 1 else self.lookup.nodes
        if probabilities is None:
            other = min(len(found.tokens) - 1, size // 2)
            kept = TokenTree(tree.parents[: size - other])
            # of probability 1, so that all of them stay, in their order
            inner = Guesses(kept, tokens[: len(kept)], [1.0] * len(kept))
            looked_up = Guesses(
                TokenTree(found.tree.parents[: other + 1]), found.tokens[: other + 1], [1.0] * (other + 1)
            )
            return merged(inner, looked_up, size, ran)
        if self.lookup.prices:
            size = max(len(tree), len(found.tokens))
        return merged(Guesses(tree, tokens, probabilities), found, size, ran)
