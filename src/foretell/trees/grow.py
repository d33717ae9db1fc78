"""Trees grown at every step from what the heads say then: sure heads get a chain, unsure ones a bush.

A static tree gives every step the guesses that pay on average. Heads also say how probable each of their guesses is,
and a path is about as probable as the product of its guesses; of many candidate paths the most probable ones make the
tree (EAGLE-2, arXiv 2406.16858, grows its trees so, from a drafter that reads each guess before the next).

Legend: B rows, K heads, R ranks, C candidate paths, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foretell.errors import UsageError
from foretell.trees.tree import TokenTree


class Candidates:
    """Rank paths, of which every tree is a part.

    Raises:
        UsageError: a path lacks its prefix.

    Attributes:
        depth_C, rank_C: head and rank of the last guess of each path, shallow paths first.
    """

    def __init__(self, paths: Sequence[Sequence[int]]):
        ordered = sorted((tuple(path) for path in paths), key=len)  # stable: of one depth, the order given
        place = {(): 0} | {path: i for i, path in enumerate(ordered, start=1)}
        self.depth_C = np.array([len(path) - 1 for path in ordered], dtype=np.int64)
        self.rank_C = np.array([path[-1] for path in ordered], dtype=np.int64)
        for path in ordered:
            if path[:-1] not in place:
                raise UsageError(f"The tree path {list(path)} lacks its prefix {list(path[:-1])}; add it to the paths.")
        self._parent_C = np.array([place[path[:-1]] for path in ordered], dtype=np.int64)
        ends = np.searchsorted(self.depth_C, np.arange(1, self.heads + 1)).tolist()
        self._levels = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def __len__(self) -> int:
        return len(self.depth_C)

    @property
    def heads(self) -> int:
        return int(self.depth_C[-1]) + 1 if len(self.depth_C) else 0

    @property
    def width(self) -> int:
        """Ranks that are looked at."""
        return int(self.rank_C.max(initial=-1)) + 1

    def grow(
        self, said_BKR: NDArray[np.floating], nodes: int
    ) -> list[tuple[TokenTree, NDArray[np.int64], list[float]]]:
        """The most probable paths.

        Args:
            said_BKR: log-probability of each head's guesses, best first.
            nodes: size of the trees, root included.

        Returns:
            Per row the tree, the candidate behind each node but the root, and how probable each node is given its
            parent.
        """
        step_BC = np.fmin(said_BKR[:, self.depth_C, self.rank_C], 0)  # no number counts as certain: trees stay trees
        value_BC = np.zeros((len(step_BC), len(self) + 1), dtype=step_BC.dtype)  # the root first
        for level in self._levels:
            value_BC[:, 1:][:, level] = value_BC[:, self._parent_C[level]] + step_BC[:, level]
        count = min(nodes - 1, len(self))
        # no path is more probable than its parent, which comes first among equals
        chosen_BN = np.sort(np.argsort(-value_BC[:, 1:], axis=1, kind="stable")[:, :count], axis=1)
        given_BN = np.exp(np.take_along_axis(step_BC, chosen_BN, 1))
        trees = []
        for chosen_N, given_N in zip(chosen_BN, given_BN, strict=True):
            place = np.zeros(len(self) + 1, dtype=np.int64)
            place[chosen_N + 1] = np.arange(1, count + 1)
            trees.append(
                (TokenTree((-1, *place[self._parent_C[chosen_N]].tolist())), chosen_N, [1.0, *given_N.tolist()])
            )
        return trees
