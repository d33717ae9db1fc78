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


class WaitingStates:
    """The waiting states of each row, in the order of their tokens; few are copied before they are read."""

    def __init__(self) -> None:
        # row -> (streams of a step, the row's first state there, how many, how many wait with these)
        self._rows: dict[int, list[tuple[Sequence[Tensor] | Tensor, int, int, int]]] = {}

    def add(self, row: int, streams_SNd: Sequence[Tensor], begin: int, count: int) -> bool:
        """Adds newly committed states, `count` of each stream from `begin` on; returns whether too many wait now."""
        waiting = self.count(row) + count
        steps = self._rows.setdefault(row, [])
        steps.append((streams_SNd, begin, count, waiting))
        if len(steps) == STEPS:
            self._rows[row] = [(self.of(row), 0, waiting, waiting)]
        first_Nd = streams_SNd[0]
        return waiting * len(streams_SNd) * first_Nd.shape[-1] * first_Nd.element_size() >= MOST_BYTES

    def count(self, row: int) -> int:
        steps = self._rows.get(row)
        return steps[-1][-1] if steps else 0

    def of(self, row: int) -> Tensor:
        """Returns a copy of a row's states [S, M, d]; it must have some."""
        steps = self._rows[row]
        streams = range(len(steps[0][0]))
        return torch.stack([torch.cat([step[i][begin : begin + n] for step, begin, n, _ in steps]) for i in streams])

    def keep(self, row: int, count: int) -> None:
        """Keeps the first `count` states of a row."""
        if count >= self.count(row):
            return
        self._rows[row] = [(self.of(row)[:, :count], 0, count, count)] if count else []
