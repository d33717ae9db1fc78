"""Committed states that a drafter has not read yet: while steps are plain they pile up, and cost next to nothing.

Legend: S streams (states of several layers), N states of all rows of a step, M waiting states of a row, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_BYTES = 8 << 20
"""Bytes of a row's waiting states after which they are read, though no draft needs them."""
STEPS = 64
"""Steps whose states may wait as they are; then they are copied: a step's tensors hold the other rows' states too."""

Part = tuple[Sequence[Tensor] | Tensor, int, int]
"""States of a row: streams [S, N, d] that hold them, the first one's place there, and how many."""


class WaitingStates:
    """The waiting states of each row, in the order of their tokens; few are copied before they are read."""

    def __init__(self) -> None:
        self._copied: dict[int, list[Part]] = {}  # row -> blocks of its own
        self._steps: dict[int, list[Part]] = {}  # row -> its share of the steps since
        self._counts: dict[int, int] = {}

    def add(self, row: int, streams_SNd: Sequence[Tensor], begin: int, count: int) -> bool:
        """Adds newly committed states, `count` of each stream from `begin` on; returns whether too many wait now."""
        self._counts[row] = waiting = self.count(row) + count
        steps = self._steps.setdefault(row, [])
        steps.append((streams_SNd, begin, count))
        if len(steps) == STEPS:
            block_SMd = _joined(steps)
            self._copied.setdefault(row, []).append((block_SMd, 0, block_SMd.shape[1]))
            self._steps[row] = []
        first_Nd = streams_SNd[0]
        return waiting * len(streams_SNd) * first_Nd.shape[-1] * first_Nd.element_size() >= MOST_BYTES

    def count(self, row: int) -> int:
        return self._counts.get(row, 0)

    def of(self, row: int) -> Tensor:
        """Returns a copy of a row's states [S, M, d]; it must have some."""
        return _joined([*self._copied.get(row, ()), *self._steps.get(row, ())])

    def keep(self, row: int, count: int) -> None:
        """Keeps the first `count` states of a row."""
        if count >= self.count(row):
            return
        self._copied[row] = [(self.of(row)[:, :count], 0, count)] if count else []
        self._steps[row], self._counts[row] = [], count


def _joined(parts: Sequence[Part]) -> Tensor:
    streams = range(len(parts[0][0]))
    return torch.stack([torch.cat([part[i][begin : begin + n] for part, begin, n in parts]) for i in streams])
