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

Part = tuple[Sequence[Tensor] | Tensor, int, int, int]
"""States of a row: streams [S, N, d] with them, the first one's place there, how many, how many wait with these."""


class WaitingStates:
    """The waiting states of each row, in the order of their tokens; each is copied once at most before it is read."""

    def __init__(self) -> None:
        # row -> parts, and how many of the first are copies; changed in one operation, so that an interrupt finds all
        self._rows: dict[int, tuple[list[Part], int]] = {}

    def add(self, row: int, streams_SNd: Sequence[Tensor], begin: int, count: int) -> bool:
        """Adds newly committed states, `count` of each stream from `begin` on; returns whether too many wait now."""
        waiting = self.count(row) + count
        parts, copies = self._rows.setdefault(row, ([], 0))
        parts.append((streams_SNd, begin, count, waiting))
        if len(parts) - copies >= STEPS:
            block_SMd = _joined(parts[copies:])
            self._rows[row] = [*parts[:copies], (block_SMd, 0, block_SMd.shape[1], waiting)], copies + 1
        first_Nd = streams_SNd[0]
        return waiting * len(streams_SNd) * first_Nd.shape[-1] * first_Nd.element_size() >= MOST_BYTES

    def count(self, row: int) -> int:
        parts, _ = self._rows.get(row, ([], 0))
        return parts[-1][-1] if parts else 0

    def of(self, row: int) -> Tensor:
        """Returns a copy of a row's states [S, M, d]; it must have some."""
        return _joined(self._rows[row][0])

    def keep(self, row: int, count: int) -> None:
        """Keeps the first `count` states of a row."""
        if count >= self.count(row):
            return
        self._rows[row] = ([(self.of(row)[:, :count].clone(), 0, count, count)], 1) if count else ([], 0)


def _joined(parts: Sequence[Part]) -> Tensor:
    streams = range(len(parts[0][0]))
    return torch.stack([torch.cat([part[i][begin : begin + n] for part, begin, n, _ in parts]) for i in streams])
