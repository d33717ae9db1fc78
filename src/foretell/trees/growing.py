"""Trees grown at every step from what the heads say then: sure heads get a chain, unsure ones a bush.

A static tree gives every step the guesses that pay on average. Heads also say how probable each of their guesses is,
and a path is about as probable as the product of its guesses; of many candidate paths the most probable ones make the
tree (EAGLE-2, arXiv 2406.16858, grows its trees so, from a drafter that reads each guess before the next).

Legend: B rows, K heads, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from foretell.trees.calibration import Floats, Scale, calibrated
from foretell.trees.tree import TokenTree, from_paths

Grown = tuple[TokenTree, list[tuple[int, int]], list[float]]
"""A tree, (head, rank) of each node but the root, and how probable each node is given its parent."""


class Candidates:
    """Rank paths, of which every tree is a part.

    Raises:
        UsageError: a path lacks its prefix, or holds a negative rank.
    """

    def __init__(self, paths: Sequence[Sequence[int]]):
        self._tree, ordered = from_paths(paths)
        self._guesses = [(len(path) - 1, path[-1]) for path in ordered[1:]]

    def __len__(self) -> int:
        return len(self._guesses)

    @property
    def heads(self) -> int:
        return self._tree.height

    @property
    def width(self) -> int:
        """Ranks that are looked at."""
        return max((rank for _, rank in self._guesses), default=-1) + 1

    def grow(self, log_probs_BKR: Floats, nodes: int, scales: Sequence[Scale] = ()) -> list[Grown]:
        """Each row's tree of the most probable paths.

        Args:
            log_probs_BKR: log-probability of each head's guesses, best first.
            nodes: size of the trees, root included.
            scales: how far each head is believed.
        """
        if scales:
            log_probs_BKR = np.stack([calibrated(log_probs_BKR[:, k], scale) for k, scale in enumerate(scales)], 1)
        return [self._grown(log_probs_KR, min(nodes - 1, len(self))) for log_probs_KR in log_probs_BKR.tolist()]

    def _grown(self, log_probs_KR: list[list[float]], count: int) -> Grown:
        """Best first: no path is more probable than its parent, so what the frontier lacks cannot come before it."""
        log_probs = [0.0, *(_at_most_certain(log_probs_KR[head][rank]) for head, rank in self._guesses)]
        children = self._tree.children
        frontier = [(-log_probs[node], node) for node in children[0]]
        heapify(frontier)
        chosen: list[int] = []
        while len(chosen) < count:
            cost, best = heappop(frontier)
            chosen.append(best)
            for node in children[best]:
                heappush(frontier, (cost - log_probs[node], node))
        chosen.sort()  # parents come before children
        place = {node: i for i, node in enumerate([0, *chosen])}
        tree = TokenTree((-1, *(place[self._tree.parents[node]] for node in chosen)))
        return (
            tree,
            [self._guesses[node - 1] for node in chosen],
            [1.0, *(math.exp(log_probs[node]) for node in chosen)],
        )


def _at_most_certain(log_probs: float) -> float:
    """What is no number counts as hopeless, as in `calibration`."""
    return min(0.0, log_probs) if log_probs == log_probs else -math.inf


@dataclass
class Growing:
    """A tree that is drafted level by level, each guess from what stands before it; node 0 is the root.

    Attributes:
        tokens: of each node; given: how probable it is given its parent; values: log-probability of its path.
        asked: nodes whose guesses the next level makes.
        floor: value of the least probable node that would be taken now; who is below need not be added.
    """

    tokens: list[int]
    asked: list[int]
    floor: float = -math.inf
    parents: list[int] = field(default_factory=lambda: [-1])
    given: list[float] = field(default_factory=lambda: [1.0])
    values: list[float] = field(default_factory=lambda: [0.0])

    def add(self, parent: int, token: int, log_probs: float) -> None:
        log_probs = _at_most_certain(log_probs)
        self.parents.append(parent)
        self.tokens.append(token)
        self.given.append(math.exp(log_probs))
        self.values.append(self.values[parent] + log_probs)

    def extend(self, log_probs_AR: Floats, tokens_AR: Sequence[Sequence[int]], count: int) -> None:
        """Adds the guesses behind `asked` that might be among the `count` best nodes."""
        values = (np.array([self.values[node] for node in self.asked])[:, None] + log_probs_AR).ravel()
        order = np.argsort(-values, kind="stable")[:count]
        for i in np.sort(order[values[order] > self.floor]).tolist():
            place, rank = divmod(i, log_probs_AR.shape[1])
            self.add(self.asked[place], tokens_AR[place][rank], float(log_probs_AR[place, rank]))

    def fill(
        self,
        shape: TokenTree,
        ordered: Sequence[tuple[int, ...]],
        log_probs_AR: Floats,
        tokens_AR: Sequence[Sequence[int]],
    ) -> None:
        """Adds what a tree of rank paths (`from_paths`) wants behind `asked`, and asks what was added.

        Its paths come level by level, so that nodes have the same numbers here and there.
        """
        since = len(self.parents)
        for place, node in enumerate(self.asked):
            for child in shape.children[node]:
                rank = ordered[child][-1]
                self.add(node, tokens_AR[place][rank], float(log_probs_AR[place, rank]))
        self.asked = list(range(since, len(self.parents)))

    def best(self, count: int) -> list[int]:
        """The most probable nodes, without the root. None is less probable than its child, and of equals the older
        come first: so they are a tree."""
        return sorted(range(1, len(self.parents)), key=lambda node: -self.values[node])[:count]

    def select_frontier(self, count: int, since: int, most: int, least: float) -> None:
        """Chooses whom to ask next: of the `count` best nodes those from `since` on, `most` of them; nobody where that
        can hardly gain anything: guesses behind them are no more probable, and have to push others out."""
        best = self.best(count)
        self.floor = self.values[best[-1]] if best and len(best) == count else -math.inf
        self.asked = [node for node in best if node >= since][:most]
        displaced = len(self.asked) * math.exp(self.floor)
        if sum(math.exp(self.values[node]) for node in self.asked) - displaced < least:
            self.asked = []

    def cut(self, nodes: Iterable[int]) -> tuple[TokenTree, list[int], list[float]]:
        """The root and these nodes: tree, tokens and how probable each is given its parent."""
        kept = [0, *sorted(nodes)]
        place = {node: i for i, node in enumerate(kept)}
        tree = TokenTree((-1, *(place[self.parents[node]] for node in kept[1:])))
        return tree, [self.tokens[node] for node in kept], [self.given[node] for node in kept]
