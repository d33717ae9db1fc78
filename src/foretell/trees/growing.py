"""Grows a tree at every step from the heads' probabilities: deep where they are confident, wide where they are not.

A static tree gives every step the guesses that pay on average. Heads also give a probability for each guess, and a path
is about as probable as the product of its guesses: of many candidate paths, the most probable ones make the tree
(EAGLE-2, arXiv 2406.16858, grows its trees so, from a drafter that reads each guess before the next).

Legend: B rows, K heads, R ranks, F frontier nodes of a tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from foretell.trees.calibration import Floats, Scale, calibrated
from foretell.trees.tree import TokenTree, from_paths

RankedTree = tuple[TokenTree, list[tuple[int, int]], list[float]]
"""A tree, (head, rank) of each node but the root, and the probability of each node given its parent."""


def reachable(paths: Sequence[tuple[int, ...]], nodes: int) -> list[tuple[int, ...]]:
    """Returns those that may be among the `nodes - 1` most probable: prefixes and likelier siblings come before them.

    Heads need not be asked for more guesses than these name.
    """
    known = set(paths)

    def before(path: tuple[int, ...]) -> int:
        """Paths that are at least as probable, itself included."""
        return sum((*path[:depth], rank) in known for depth, last in enumerate(path) for rank in range(last + 1))

    return [path for path in paths if before(path) < nodes]


class Candidates:
    """Rank paths from which every tree is chosen.

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
        """Ranks of a head that occur in the paths."""
        return max((rank for _, rank in self._guesses), default=-1) + 1

    def grow(self, log_probs_BKR: Floats, nodes: int, scales: Sequence[Scale] = ()) -> list[RankedTree]:
        """Returns each row's tree of the most probable paths.

        Args:
            log_probs_BKR: log-probability of each head's guesses, best first.
            nodes: size of the trees, root included.
            scales: calibration of each head; empty leaves probabilities unchanged.
        """
        if scales:
            log_probs_BKR = np.stack([calibrated(log_probs_BKR[:, k], scale) for k, scale in enumerate(scales)], 1)
        return [self._most_probable(log_probs_KR, min(nodes - 1, len(self))) for log_probs_KR in log_probs_BKR.tolist()]

    def _most_probable(self, log_probs_KR: list[list[float]], count: int) -> RankedTree:
        """Takes the best node of the frontier `count` times: no path is more probable than its parent."""
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
        index = {node: i for i, node in enumerate([0, *chosen])}
        tree = TokenTree((-1, *(index[self._tree.parents[node]] for node in chosen)))
        return (
            tree,
            [self._guesses[node - 1] for node in chosen],
            [1.0, *(math.exp(log_probs[node]) for node in chosen)],
        )


def _at_most_certain(log_prob: float) -> float:
    """Bounds a log-probability by 0; NaN counts as impossible, as in `calibration`."""
    return min(0.0, log_prob) if log_prob == log_prob else -math.inf


@dataclass
class GrowingTree:
    """A tree that is drafted level by level; node 0 is the root.

    Attributes:
        tokens: of each node; cond_probs: of each node given its parent; path_log_probs: of each node's path.
        frontier: nodes that the next level expands.
        min_log_prob: of the least probable node that would be kept now; guesses below it need not be added.
    """

    tokens: list[int]
    frontier: list[int]
    min_log_prob: float = -math.inf
    parents: list[int] = field(default_factory=lambda: [-1])
    cond_probs: list[float] = field(default_factory=lambda: [1.0])
    path_log_probs: list[float] = field(default_factory=lambda: [0.0])

    def add(self, parent: int, token: int, log_prob: float) -> None:
        log_prob = _at_most_certain(log_prob)
        self.parents.append(parent)
        self.tokens.append(token)
        self.cond_probs.append(math.exp(log_prob))
        self.path_log_probs.append(self.path_log_probs[parent] + log_prob)

    def extend(self, log_probs_FR: Floats, tokens_FR: Sequence[Sequence[int]], count: int) -> None:
        """Adds those guesses after the frontier that may be among the `count` best nodes."""
        above_F = np.array([self.path_log_probs[node] for node in self.frontier])
        paths = (above_F[:, None] + log_probs_FR).ravel()
        order = np.argsort(-paths, kind="stable")[:count]
        for i in np.sort(order[paths[order] > self.min_log_prob]).tolist():
            index, rank = divmod(i, log_probs_FR.shape[1])
            self.add(self.frontier[index], tokens_FR[index][rank], float(log_probs_FR[index, rank]))

    def fill(
        self, shape: TokenTree, ordered: Sequence[tuple[int, ...]], log_probs_FR: Floats,
        tokens_FR: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        """Adds the guesses that a tree of rank paths (`from_paths`) has after the frontier; they are the next one.

        Its paths come level by level, so nodes have the same numbers in both trees.
        """
        since = len(self.parents)
        for index, node in enumerate(self.frontier):
            for child in shape.children[node]:
                rank = ordered[child][-1]
                self.add(node, tokens_FR[index][rank], float(log_probs_FR[index, rank]))
        self.frontier = list(range(since, len(self.parents)))

    def best(self, count: int) -> list[int]:
        """The most probable nodes without the root. No node is less probable than its child, and of equals the older
        comes first: together with the root they are a tree."""
        return sorted(range(1, len(self.parents)), key=lambda node: -self.path_log_probs[node])[:count]

    def select_frontier(self, count: int, since: int, beam: int, min_gain: float) -> None:
        """Selects the next frontier: of the `count` best nodes those from `since` on, at most `beam` of them.

        It is empty if the expected gain is below `min_gain` tokens: guesses after these nodes are no more probable than
        they are, and displace other nodes.
        """
        best = self.best(count)
        self.min_log_prob = self.path_log_probs[best[-1]] if best and len(best) == count else -math.inf
        self.frontier = [node for node in best if node >= since][:beam]
        displaced = len(self.frontier) * math.exp(self.min_log_prob)
        if sum(math.exp(self.path_log_probs[node]) for node in self.frontier) - displaced < min_gain:
            self.frontier = []

    def cut(self, nodes: Iterable[int]) -> tuple[TokenTree, list[int], list[float]]:
        """Returns the root and these nodes: tree, tokens, and the probability of each given its parent."""
        kept = [0, *sorted(nodes)]
        index = {node: i for i, node in enumerate(kept)}
        tree = TokenTree((-1, *(index[self.parents[node]] for node in kept[1:])))
        return tree, [self.tokens[node] for node in kept], [self.cond_probs[node] for node in kept]
