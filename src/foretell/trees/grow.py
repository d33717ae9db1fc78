"""Trees grown at every step from what the heads say then: sure heads get a chain, unsure ones a bush.

A static tree gives every step the guesses that pay on average. Heads also say how probable each of their guesses is,
and a path is about as probable as the product of its guesses; of many candidate paths the most probable ones make the
tree (EAGLE-2, arXiv 2406.16858, grows its trees so, from a drafter that reads each guess before the next).

Legend: B rows, K heads, R ranks, C candidate paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from foretell.errors import UsageError
from foretell.trees.tree import TokenTree

TOP = -1
"""Where paths of one guess begin."""


class Candidates:
    """Rank paths, of which every tree is a part.

    Raises:
        UsageError: a path lacks its prefix.

    Attributes:
        guesses: (head, rank) of the last guess of each path, shallow paths first.
    """

    def __init__(self, paths: Sequence[Sequence[int]]):
        ordered = sorted((tuple(path) for path in paths), key=len)  # stable: of one depth, the order given
        self.guesses = [(len(path) - 1, path[-1]) for path in ordered]
        place = {path: i for i, path in enumerate(ordered)}
        self._parent: list[int] = []
        self._children: dict[int, list[int]] = {}
        for i, path in enumerate(ordered):
            if path[:-1] not in place and path[:-1]:
                raise UsageError(f"The tree path {list(path)} lacks its prefix {list(path[:-1])}; add it to the paths.")
            self._parent.append(place.get(path[:-1], TOP))
            self._children.setdefault(self._parent[-1], []).append(i)

    def __len__(self) -> int:
        return len(self.guesses)

    @property
    def heads(self) -> int:
        return self.guesses[-1][0] + 1 if self.guesses else 0

    @property
    def width(self) -> int:
        """Ranks that are looked at."""
        return max((rank for _, rank in self.guesses), default=-1) + 1

    def grow(self, said_BKR: NDArray[np.floating], nodes: int) -> list[tuple[TokenTree, list[int], list[float]]]:
        """The most probable paths.

        Args:
            said_BKR: log-probability of each head's guesses, best first.
            nodes: size of the trees, root included.

        Returns:
            Per row the tree, the candidate behind each node but the root, and how probable each node is given its
            parent.
        """
        return [self._grown(said_KR, min(nodes - 1, len(self))) for said_KR in said_BKR.tolist()]

    def _grown(self, said_KR: list[list[float]], count: int) -> tuple[TokenTree, list[int], list[float]]:
        """Best first: no path is more probable than its parent, so what the frontier lacks cannot come before it."""
        step = [min(0.0, said_KR[head][rank]) for head, rank in self.guesses]  # no number counts as certain
        frontier = [(-step[i], i) for i in self._children.get(TOP, [])]
        heapify(frontier)
        chosen: list[int] = []
        while len(chosen) < count:
            cost, best = heappop(frontier)
            chosen.append(best)
            for i in self._children.get(best, []):
                heappush(frontier, (cost - step[i], i))
        chosen.sort()  # parents come before children
        place = {TOP: 0} | {i: node for node, i in enumerate(chosen, start=1)}
        tree = TokenTree((-1, *(place[self._parent[i]] for i in chosen)))
        return tree, chosen, [1.0, *(math.exp(step[i]) for i in chosen)]
