"""Trees grown at every step from what the heads say then: sure heads get a chain, unsure ones a bush.

A static tree gives every step the guesses that pay on average. Heads also say how probable each of their guesses is,
and a path is about as probable as the product of its guesses; of many candidate paths the most probable ones make the
tree (EAGLE-2, arXiv 2406.16858, grows its trees so, from a drafter that reads each guess before the next).

Legend: B rows, K heads, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

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

    def grow(self, said_BKR: NDArray[np.floating], nodes: int) -> list[Grown]:
        """Each row's tree of the most probable paths.

        Args:
            said_BKR: log-probability of each head's guesses, best first.
            nodes: size of the trees, root included.
        """
        return [self._grown(said_KR, min(nodes - 1, len(self))) for said_KR in said_BKR.tolist()]

    def _grown(self, said_KR: list[list[float]], count: int) -> Grown:
        """Best first: no path is more probable than its parent, so what the frontier lacks cannot come before it."""
        said = [0.0, *(min(0.0, said_KR[head][rank]) for head, rank in self._guesses)]  # no number counts as certain
        children = self._tree.children
        frontier = [(-said[node], node) for node in children[0]]
        heapify(frontier)
        chosen: list[int] = []
        while len(chosen) < count:
            cost, best = heappop(frontier)
            chosen.append(best)
            for node in children[best]:
                heappush(frontier, (cost - said[node], node))
        chosen.sort()  # parents come before children
        place = {node: i for i, node in enumerate([0, *chosen])}
        tree = TokenTree((-1, *(place[self._tree.parents[node]] for node in chosen)))
        return tree, [self._guesses[node - 1] for node in chosen], [1.0, *(math.exp(said[node]) for node in chosen)]
