"""The key/value cache: rows of slots that only its methods change.

All rows share one pool of slots; each has a stretch of it of its own size, so that one long prompt does not size the
others. A pass writes the nodes of a tree behind a row's committed slots. `commit` moves the accepted path to the front
of them, in order, and the rest is forgotten by not being counted; `rollback` forgets more. Because every layer's
arithmetic is canonical (see `native/kernels.inc`), a committed slot holds bit for bit what a fresh prefill of the
same tokens would have written.

Shapes: keys and values [L layers, G key/value heads, S slots of the pool, D head width].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.errors import ForetellError, check

STRETCH = 64
"""Slots that a row's room is a multiple of."""


class KVCache:
    """Room for some rows of slots, which grows only in `reserve`, never inside a pass.

    Args:
        rows, slots: rows to begin with, and how many slots each of them has room for.

    Attributes:
        lengths: committed slots of each row; capacity: slots it has room for.
        starts: where each row's room begins in the pool, in numbers (slots times D), int64: the kernels read it.
    """

    def __init__(
        self, layers: int, rows: int, kv_heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.lengths: list[int] = []
        self.capacity: list[int] = []
        self.starts = np.zeros(0, dtype=np.int64)
        self.keys, self.values = _room((layers, kv_heads, 0, head_dim), dtype, device)
        self._add_rows(rows)
        if slots:
            self.reserve(dict.fromkeys(range(rows), slots))

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def reserve(self, wanted: Mapping[int, int]) -> None:
        """Makes room for at least so many slots in some rows, keeping what is committed.

        Raises:
            ForetellError: there is not enough memory; the cache is as it was.
        """
        self._add_rows(max(wanted, default=-1) + 1 - self.rows)
        short = {row: slots for row, slots in wanted.items() if slots > self.capacity[row]}
        if not short:
            return
        # a row that grows token by token must not be copied every time
        grown = {row: max(slots, min(2 * self.capacity[row], slots + 1024)) for row, slots in short.items()}
        capacity = [-(-grown.get(row, old) // STRETCH) * STRETCH for row, old in enumerate(self.capacity)]
        (row, *others) = grown
        if others or not self._move(row, capacity[row]):
            try:
                self._rebuild(capacity)
            except ForetellError:  # old and new lie side by side while it copies: first without what was given back
                if not self.trim():
                    raise
                self._rebuild(capacity)

    def release(self, rows: Sequence[int]) -> None:
        """Empties rows and gives their room to others; the pool keeps its size until it is trimmed."""
        for row in rows:
            self.lengths[row] = self.capacity[row] = 0

    def trim(self) -> bool:
        """Gives memory back that no row has reserved, if there is any, and room to copy the rest."""
        if sum(self.capacity) == self.keys.shape[2]:
            return False
        with suppress(ForetellError):
            self._rebuild(list(self.capacity))
            return True
        return False

    def commit(self, rows: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Keeps, in each row, the nodes of a path (root first) of the tree that the last pass wrote there."""
        self.gather(rows, paths)
        for row, path in zip(rows, paths, strict=True):
            self.lengths[row] += len(path)

    def gather(self, rows: Sequence[int], nodes: Sequence[Sequence[int]], layers: int | None = None) -> None:
        """Moves nodes of the trees behind the committed slots to the front of them, of the first `layers`."""
        moved: list[tuple[int, int]] = []
        for row, path in zip(rows, nodes, strict=True):
            begin = self.start(row) + self.lengths[row]
            moved += [(begin + node, begin + i) for i, node in enumerate(path) if node != i]
        if not moved:
            return
        source, target = np.array(moved).T
        for tensor in (self.keys, self.values):
            slots = _bits(tensor)[:layers]
            slots[:, :, target] = slots[:, :, source]

    def rollback(self, row: int, length: int) -> None:
        """Forgets all but the first `length` committed slots."""
        if not 0 <= length <= self.lengths[row]:
            raise ForetellError(
                f"Cannot roll a cache row back to {length} slots: it holds {self.lengths[row]}; choose 0 up to that."
            )
        self.lengths[row] = length

    def copy(self, other: KVCache, row: int, length: int) -> None:
        """Begins row 0 anew with the first `length` committed slots of another cache's row."""
        self.lengths[0] = 0
        self.reserve({0: length})
        here, there = self.start(0), other.start(row)
        for target, source in ((self.keys, other.keys), (self.values, other.values)):
            _bits(target)[:, :, here : here + length] = _bits(source)[:, :, there : there + length]
        self.lengths[0] = length

    def start(self, row: int) -> int:
        """Returns the first slot of a row in the pool."""
        return int(self.starts[row]) // self.keys.shape[3]

    def room(self, row: int) -> tuple[Tensor, Tensor]:
        """Returns views of all slots of a row, written or not: keys and values, each [L, G, capacity, D]."""
        begin, end = self.start(row), self.start(row) + self.capacity[row]
        return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Returns committed keys and values of a row, each [L, G, length, D]."""
        keys, values = self.room(row)
        return keys[:, :, : self.lengths[row]], values[:, :, : self.lengths[row]]

    def check(self, rows: Sequence[int], ends: Sequence[int]) -> None:
        """Refuses rows that are not in the cache, and slots past a row's room, before a pass writes there."""
        fits = len(rows) == len(ends) and all(0 <= row < self.rows for row in rows)
        check(fits, f"A row is not in the cache, which has {self.rows}.", IndexError)
        for row, end in zip(rows, ends, strict=True):
            check(
                end <= self.capacity[row], f"Cache row {row} has {self.capacity[row]} slots, not {end}; reserve more."
            )

    def _add_rows(self, count: int) -> None:
        if count > 0:
            self.lengths += [0] * count
            self.capacity += [0] * count
            self.starts = np.concatenate([self.starts, np.zeros(count, dtype=np.int64)])

    def _move(self, row: int, capacity: int) -> bool:
        """Moves a row to a gap in the pool that is large enough; returns False if there is none."""
        taken = sorted((self.start(i), self.capacity[i]) for i in range(self.rows) if self.capacity[i])
        begin = 0
        for start, slots in (*taken, (self.keys.shape[2], 0)):
            if start - begin >= capacity:
                break
            begin = start + slots
        else:
            return False
        old, length = self.start(row), self.lengths[row]
        for tensor in (self.keys, self.values):
            pool = _bits(tensor)
            pool[:, :, begin : begin + length] = pool[:, :, old : old + length]
        self.starts[row], self.capacity[row] = begin * self.keys.shape[3], capacity
        return True

    def _rebuild(self, capacity: list[int]) -> None:
        """Replaces the pool by a new one: rows one after another, with their committed slots."""
        layers, heads, _, width = self.keys.shape
        begins = [0, *np.cumsum(capacity, dtype=np.int64).tolist()]
        # Unwritten slots are never read, so they need no zeros, and pages stay untouched until they are used.
        keys, values = _room((layers, heads, begins[-1], width), self.keys.dtype, self.keys.device)
        for row, length in enumerate(self.lengths):
            old, new = self.start(row), begins[row]
            for before, after in ((self.keys, keys), (self.values, values)) if length else ():
                _bits(after)[:, :, new : new + length] = _bits(before)[:, :, old : old + length]
        starts = np.array(begins[:-1], dtype=np.int64) * width
        self.keys, self.values, self.capacity, self.starts = keys, values, capacity, starts  # all or, on errors, none


def _bits(tensor: Tensor) -> Any:
    """Returns a NumPy view where possible: PyTorch would wake its own team, which then spins on the kernels' cores."""
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy() if tensor.is_cpu else tensor


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocates keys and values.

    Raises:
        ForetellError: there is not enough memory.
    """
    try:
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        gigabytes = 2 * torch.Size(shape).numel() * dtype.itemsize / 1e9
        raise ForetellError(
            f"A cache of {shape[2]} tokens takes {gigabytes:.1f} GB, more than there is; use a smaller batch or fewer "
            "tokens."
        ) from error
