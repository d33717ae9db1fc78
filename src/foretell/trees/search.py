"""Search for fixed trees by how often each path of guesses came true.

Calibration text gives, position by position, the rank that each head gave to the true token. A path of ranks
(i1, ..., ij) is accepted where head 1 ranked its token i1-th *and* ... head j its token ij-th, so its value is the
joint frequency of those ranks; no independence is assumed. A path never occurs more often than its own prefix, hence
taking the most frequent path again and again gives the best tree of every size at once, each nested in the next
(Medusa §3.3 and its appendix multiply accuracies instead).

Tokens per step of a tree are then found by replay: a step starts where the last one ended, which an average over
positions ignores, and no step goes beyond the end of an answer.

Legend: P positions, K heads.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Path = tuple[int, ...]
Ranks = NDArray[np.integer]
"""[P, K]: rank of the token at p + k + 2 among the guesses of head k (from 0) at p; MISSED if it is not among them,
ENDED after the end of the text."""

MISSED, ENDED = 1000, 1001


def nested(ranks: Sequence[Ranks], nodes: int) -> list[Path]:
    """Returns the `nodes` - 1 most frequent rank paths, most frequent first; any beginning of the list is a tree.

    Args:
        ranks: one array per text. All must have the same number of heads.
        nodes: size of the largest tree, root included.

    Returns:
        Fewer paths if no others ever came true.
    """
    all_PK = np.concatenate(list(map(np.asarray, ranks)))
    heap: list[tuple[int, int, Path, NDArray[np.integer]]] = []

    def push(path: Path, where: NDArray[np.integer]) -> None:
        """Adds the children of a path that came true at the positions `where`."""
        if len(path) == all_PK.shape[1]:
            return
        next_ranks = all_PK[where, len(path)]
        for rank, count in enumerate(np.bincount(next_ranks[next_ranks < MISSED], minlength=1).tolist()):
            if count:
                # a tie goes to the shallower path, then to the smaller ranks
                heapq.heappush(heap, (-count, len(path) + 1, (*path, rank), where[next_ranks == rank]))

    push((), np.arange(len(all_PK)))
    paths: list[Path] = []
    while heap and len(paths) < nodes - 1:
        _, _, path, where = heapq.heappop(heap)
        paths.append(path)
        push(path, where)
    return paths


def accepted_P(ranks: Ranks, paths: Sequence[Path]) -> NDArray[np.integer]:
    """Returns how many guesses of the tree are accepted at each position [P]."""
    deepest = np.zeros(len(ranks), dtype=np.int64)
    for path in paths:
        true = np.all(ranks[:, : len(path)] == np.array(path), axis=1)
        deepest = np.maximum(deepest, true * len(path))
    return deepest


def tree_tokens_per_step(ranks: Sequence[Ranks], paths: Sequence[Path]) -> float:
    """Returns tokens per step (bonus included) of decoding the texts with the tree of `paths`.

    A step whose features are those of position p has p + 1 for its root and emits p + 2 onward: a accepted guesses
    and the bonus, after which the features are those of p + a + 1. Each position stands for one token, and the last
    step of an answer emits no more than are left of it: the next answer begins with a step of its own.
    """
    steps = 0
    for ranks_PK in ranks:
        deepest = accepted_P(ranks_PK, paths).tolist()
        p = 0
        for end in _ends(ranks_PK):
            while p < end:
                steps += 1
                p = min(p + deepest[p] + 1, end)
    return sum(map(len, ranks)) / steps if steps else 0.0


def _ends(ranks: Ranks) -> list[int]:
    """End of each answer of a text: the second head has nothing to guess at the last position of an answer.

    The ranks of a single head do not show it: they count as one answer.
    """
    last = (ranks[:-1, 1:2] == ENDED).any(1)
    return [*(np.flatnonzero(last) + 1).tolist(), len(ranks)]
