"""The target's own token after every node of a draft: what verification compares the guesses with.

Legend: N nodes of one row's tree, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import overload

import numpy as np
from torch import Tensor

from foretell.contracts import Draft, Row
from foretell.errors import UsageError
from foretell.trees import TokenTree
from foretell.verify.logit_edits import process
from foretell.verify.sampling import sample, uniform

DAMAGED = -1
"""In the place of a token: the logits after the node are not all finite numbers (under typical acceptance: no token is
possible, or one is infinitely probable)."""


def by_row(draft: Draft, tokens_M: Sequence[int]) -> list[Sequence[int]]:
    """Splits the tokens of all nodes, row after row, into those of each row."""
    return [tokens_M[a:b] for a, b in pairwise(accumulate(map(len, draft.trees), initial=0))]


def targets(draft: Draft, rows: Sequence[Row], keys: Sequence[int], logits: Sequence[Tensor]) -> list[Sequence[int]]:
    """The target's token after every node, under each row's own sampling parameters.

    Rows that take the argmax of unedited logits get those of all nodes from one pass over their logits. In the others
    a node costs several passes over V in float64 (penalties of its path, distribution, cumulative sum), and the walk
    reaches few nodes of a tree: their tokens are computed when they are read. Nothing depends on what was read before.

    Args:
        keys: with the seed and the position they fix each row's noise.
        logits: of each row's nodes, [N, V].

    Raises:
        UsageError: a row samples without a seed.
    """
    return [
        _argmax(logits_NV) if row.params.plain_greedy else _OnDemand(tree, tokens, row, key, logits_NV)
        for tree, tokens, row, key, logits_NV in zip(draft.trees, draft.tokens, rows, keys, logits, strict=True)
    ]


def _argmax(logits_NV: Tensor) -> list[int]:
    """The first of the greatest logits of each node, or `DAMAGED`."""
    if logits_NV.device.type != "cpu":
        tokens: list[int] = logits_NV.argmax(-1).masked_fill_(~logits_NV.isfinite().all(-1), DAMAGED).tolist()
        return tokens
    logits = _host(logits_NV)  # NumPy stays on this thread, see native.cpp
    finite_N = np.isfinite(logits.max(1)) & np.isfinite(logits.min(1))  # a NaN would be both
    return [int(token) for token in np.where(finite_N, logits.argmax(1), DAMAGED)]


class _OnDemand(Sequence[int]):
    """One row's tokens where penalties or sampling make each of them expensive: computed when it is read."""

    def __init__(self, tree: TokenTree, tokens: Sequence[int], row: Row, key: int, logits_NV: Tensor):
        if row.params.temperature and row.params.seed is None:
            raise UsageError("Sampling needs a seed; SamplingParams.seeded() draws one.")
        self._tree, self._tokens, self._row, self._key, self._logits_NV = tree, tokens, row, key, logits_NV

    def __len__(self) -> int:
        return len(self._tree)

    @overload
    def __getitem__(self, node: int) -> int: ...
    @overload
    def __getitem__(self, node: slice) -> list[int]: ...
    def __getitem__(self, node: int | slice) -> int | list[int]:
        if isinstance(node, slice):
            return [self[each] for each in range(*node.indices(len(self)))]
        params, logits_V = self._row.params, self._logits_NV[node]
        if not np.isfinite(_host(logits_V)).all():
            return DAMAGED
        logits_V = process(logits_V, params, self._history(node), self._row.prompt_length)
        if params.temperature == 0:
            return int(_host(logits_V).argmax())  # the first of equals
        position = len(self._row.tokens) + self._tree.depths[node]
        assert params.seed is not None
        return sample(logits_V, params, uniform(params.seed, self._key, position))

    def _history(self, node: int) -> list[int]:
        """The row's tokens and the guesses on the node's path, for penalties."""
        if not self._row.params.edits_logits:
            return []
        return self._row.tokens + [self._tokens[n] for n in self._tree.path(node)[1:]]


def _host(logits: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """float32 on the host; a view where they are that already."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = logits.detach().float().cpu().numpy()
    return array
