"""Committed states that a drafter has not read yet: while steps are plain they pile up, and cost next to nothing.

Legend: S streams (states of several layers), M newly committed states, d hidden width.
"""

from __future__ import annotations

from torch import Tensor

MOST_BYTES = 8 << 20
"""Of a row; then they are read, though no draft needs them."""
FIRST = 64
"""States that a row has room for at first."""


class WaitingStates:
    """The waiting states of each row, in the order of their tokens."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Tensor, int]] = {}  # row -> room [S, ..., d], and how many states are in it

    def add(self, row: int, states_SMd: Tensor) -> bool:
        """Adds newly committed states; returns whether a row has more than shall wait."""
        count, more = self.count(row), states_SMd.shape[1]
        room = self._rows[row][0] if row in self._rows else states_SMd[:, :0]
        if count + more > room.shape[1]:
            streams, _, width = states_SMd.shape
            larger = states_SMd.new_empty(streams, max(FIRST, 2 * room.shape[1], count + more), width)
            larger[:, :count] = room[:, :count]
            room = larger
        room[:, count : count + more] = states_SMd
        self._rows[row] = room, count + more
        return (count + more) * states_SMd[:, :1].nbytes >= MOST_BYTES

    def count(self, row: int) -> int:
        return self._rows[row][1] if row in self._rows else 0

    def of(self, row: int) -> Tensor:
        """Returns the states of a row that has some [S, M, d]; they hold until more are added."""
        room, count = self._rows[row]
        return room[:, :count]

    def keep(self, row: int, count: int) -> None:
        """Keeps the first `count` states of a row."""
        if row in self._rows:
            room, before = self._rows[row]
            self._rows[row] = room, min(before, count)

    def forget(self, row: int) -> None:
        """Drops the states of a row, and frees their memory."""
        self._rows.pop(row, None)
