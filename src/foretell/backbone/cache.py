"""The key/value cache: rows of slots that nobody but its verbs touches.

A pass writes the nodes of a tree behind a row's committed slots. `commit` moves the accepted path to the front of
them, in order, and the rest is forgotten by not being counted; `rollback` forgets more. Because every layer's
arithmetic is canonical (see `native/kernels.inc`), a committed slot holds bit for bit what a fresh prefill of the
same tokens would have written.

Shapes: keys and values [L layers, R rows, G key/value heads, S slots, D head width].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.errors import ForetellError


class KVCache:
    """Preallocated room for R rows of S slots; both grow when asked to, never inside a pass."""

    def __init__(
        self, layers: int, rows: int, kv_heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        # Unwritten slots are never read, so they need no zeros, and pages stay untouched until they are used.
        shape = (layers, rows, kv_heads, slots, head_dim)
        self.keys, self.values = _room(shape, dtype, device)
        self.lengths = [0] * rows
        self._free = list(range(rows))[::-1]

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def allocate(self) -> int:
        """Takes an empty row."""
        if not self._free:
            raise ForetellError(f"All {self.rows} cache rows are taken; free one or make the cache larger.")
        row = self._free.pop()
        self.lengths[row] = 0
        return row

    def free(self, row: int) -> None:
        self.lengths[row] = 0
        self._free.append(row)

    def reserve(self, slots: int, rows: int = 0) -> None:
        """Makes room for at least `slots` slots and `rows` rows, keeping what is committed."""
        if slots <= self.slots and rows <= self.rows:
            return
        used, old_rows = max(self.lengths), self.rows
        layers, _, heads, old_slots, width = self.keys.shape
        if slots > old_slots:
            slots = max(slots, min(2 * old_slots, slots + 1024))  # growing token by token must not copy every time
        shape = (layers, max(rows, old_rows), heads, max(slots, old_slots), width)
        keys, values = _room(shape, self.keys.dtype, self.keys.device)
        for old, new in ((self.keys, keys), (self.values, values)):
            new[:, :old_rows, :, :used] = old[:, :, :, :used]
        self.keys, self.values = keys, values  # both or, after an error, neither
        self.lengths += [0] * (shape[1] - old_rows)
        self._free = list(range(old_rows, shape[1]))[::-1] + self._free

    def commit(self, rows: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Keeps, in each row, the nodes of a path (root first) of the tree that the last pass wrote there."""
        self.gather(rows, paths)
        for row, path in zip(rows, paths, strict=True):
            self.lengths[row] += len(path)

    def gather(self, rows: Sequence[int], nodes: Sequence[Sequence[int]], layers: int | None = None) -> None:
        """Moves nodes of the trees behind the committed slots to the front of them, of the first `layers`."""
        moved: list[tuple[int, int, int]] = []
        for row, path in zip(rows, nodes, strict=True):
            length = self.lengths[row]
            moved += [(row, length + node, length + i) for i, node in enumerate(path) if node != i]
        if not moved:
            return
        at, source, target = np.array(moved).T
        for tensor in (self.keys, self.values):
            held = _bits(tensor)[:layers]
            held[:, at, :, target] = held[:, at, :, source]

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
        self.reserve(length, rows=1)
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            _bits(ours)[:, 0, :, :length] = _bits(theirs)[:, row, :, :length]
        self.lengths[0] = length

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values of a row, each [L, G, length, D]."""
        return self.keys[:, row, :, : self.lengths[row]], self.values[:, row, :, : self.lengths[row]]


def _bits(tensor: Tensor) -> Any:
    """Through NumPy where it can be: PyTorch would wake a team of its own, which then spins on our cores."""
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy() if tensor.is_cpu else tensor


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values.

    Raises:
        ForetellError: there is not enough memory.
    """
    try:
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        gigabytes = 2 * torch.Size(shape).numel() * dtype.itemsize / 1e9
        raise ForetellError(
            f"A cache of {shape[1]} rows of {shape[3]} tokens takes {gigabytes:.1f} GB, more than there is; "
            "use a smaller batch or fewer tokens."
        ) from error
