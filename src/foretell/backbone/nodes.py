"""Nodes of one pass: those of every row's tree, flattened without padding.

A slot and a position are different things: node i of a tree lies at slot length + i of its row's cache, but stands
at position length + depth, and its keys are the committed prefix followed by its ancestors. A prompt is a chain.

Legend: M nodes taking part, B rows of the batch, T keys of the longest path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from foretell.errors import check
from foretell.trees import TokenTree
from foretell.trees import chain as chain_of


class Nodes:
    """The M nodes of one pass over B rows.

    Args:
        trees: one per row.
        cache_rows: which cache row each tree extends.
        lengths: committed slots of those rows: where their trees begin.
        first: per row the first node to run; earlier nodes have already left their keys and values in the cache.
        positions: [M] int64, if they are not length + depth.
        shadows: gives every node that runs a second row, behind those of its tree, which reads what the node reads, the
            node's own key and value included, and writes none.

    Attributes:
        words: sequence, node, cache_rows, lengths, offsets, parents, positions and shadow as the kernels read them
            (`Rows` of native/common.h), int32, one after the other; `table_offsets` says where each begins.
        rows: cache row of each tree; ends: slots that it needs for this pass.
        counts: rows of the pass for each tree; last: the greatest position.
    """

    def __init__(
        self,
        trees: Sequence[TokenTree],
        cache_rows: Sequence[int],
        lengths: Sequence[int],
        first: Sequence[int] | None = None,
        positions: Tensor | None = None,
        shadows: bool = False,
    ):
        self._on: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
        self.trees, self.rows, self.first = list(trees), list(cache_rows), list(first or [0] * len(trees))
        self._turns = 2 if shadows else 1
        ran = [len(tree) - start for tree, start in zip(trees, self.first, strict=True)]
        self.counts = [self._turns * count for count in ran]
        self.ends = [length + len(tree) for length, tree in zip(lengths, trees, strict=True)]
        check(min(lengths, default=0) >= 0, "Lengths count committed slots, from 0 on.")
        within = all(0 <= start <= len(tree) for tree, start in zip(trees, self.first, strict=True))
        check(within, "The first node to run is one of its tree.")
        position = positions.tolist() if positions is not None else [p + length for p, length in self._depths(lengths)]
        tables = (
            [b for b, count in enumerate(self.counts) for _ in range(count)],
            [
                node
                for tree, start in zip(trees, self.first, strict=True)
                for _ in range(self._turns)
                for node in range(start, len(tree))
            ],
            cache_rows, lengths, [0, *accumulate(map(len, trees))],
            [parent for tree in trees for parent in tree.parents], position,
            [turn for count in ran for turn in range(self._turns) for _ in range(count)],
        )  # fmt: skip
        # One array, filled once: after a pass the interpreter's own data has left the caches, and every call costs.
        self.words = np.array(list(chain.from_iterable(tables)), dtype=np.int32)
        self.last = max(position, default=0)
        placed = positions is None or (len(position) == sum(self.counts) and min(position, default=0) >= 0)
        check(placed, "Every node has a position, from 0 on.")
        self.table_offsets = [0, *accumulate(map(len, tables))]
        split = (self.words[a:b] for a, b in pairwise(self.table_offsets))
        (
            self.sequence, self.node, self.cache_rows, self.lengths, self.offsets, self.parents, self.positions,
            self.shadow,
        ) = split  # fmt: skip

    def _depths(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yields the depth of each row's node and the length of its cache row."""
        for tree, start, length in zip(self.trees, self.first, lengths, strict=True):
            for _ in range(self._turns):
                for depth in tree.depths[start:] if start else tree.depths:
                    yield depth, length

    @classmethod
    def chains(cls, cache_rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> Nodes:
        """Returns chains of `counts[b]` tokens after the committed ones: a chunk of a prompt each."""
        return cls([chain_of(count - 1) for count in counts], cache_rows, lengths)

    def extended(self, parents: Sequence[Sequence[int]]) -> Nodes:
        """Returns these nodes and, behind those of each tree, new ones, given their parents within it."""
        check(self._turns == 1, "Nodes with shadows cannot be extended.")
        trees = [TokenTree((*tree.parents, *more)) for tree, more in zip(self.trees, parents, strict=True)]
        return Nodes(trees, self.rows, self.lengths.tolist(), self.first)

    def parted(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Indices, int64, of the first `counts[b]` nodes that run of each tree, and of the others."""
        if len(self.trees) == 1:
            every = torch.arange(len(self))
            return every[: counts[0]], every[counts[0] :]
        first_M = np.concatenate([np.arange(ran) < count for ran, count in zip(self.counts, counts, strict=True)])
        return torch.from_numpy(np.flatnonzero(first_M)), torch.from_numpy(np.flatnonzero(~first_M))

    def __len__(self) -> int:
        return len(self.sequence)

    @cached_property
    def totals(self) -> NDArray[np.int32]:
        """Keys on each node's path, [M]."""
        return np.array([depth + length + 1 for depth, length in self._depths(self.lengths.tolist())], dtype=np.int32)

    @cached_property
    def slots_M(self) -> Tensor:
        """Slot of each node's own key and value, int64 [M]."""
        return torch.from_numpy((self.lengths[self.sequence] + self.node).astype(np.int64))

    @cached_property
    def writers(self) -> Tensor | slice:
        """Selects the rows that write keys and values."""
        return torch.from_numpy(np.flatnonzero(self.shadow == 0)) if self._turns > 1 else slice(None)

    @cached_property
    def paths_MT(self) -> Tensor:
        """Slots of each node's keys in path order, int64 [M, T]; past a path's end stands -1."""
        paths = np.full((len(self), int(self.totals.max())), -1, dtype=np.int64)
        for m, (b, i) in enumerate(zip(self.sequence, self.node, strict=True)):
            length, total = self.lengths[b], self.totals[m]
            paths[m, :length] = np.arange(length)
            parents, node = self.parents[self.offsets[b] : self.offsets[b + 1]], i
            for t in range(total - 1, length - 1, -1):
                paths[m, t] = length + node
                node = parents[node]
        return torch.from_numpy(paths)

    def on(self, device: torch.device, block: int) -> tuple[Tensor, Tensor]:
        """Returns `slots_M` and `paths_MT`, padded to full blocks, on a device: copied once a pass."""
        if (device, block) not in self._on:
            paths_MT = F.pad(self.paths_MT, (0, -self.paths_MT.shape[1] % block), value=-1)
            self._on[device, block] = self.slots_M.to(device), paths_MT.to(device)
        return self._on[device, block]

    def starts(self) -> list[int]:
        """Returns the index among the M nodes of each row's first."""
        return [0, *accumulate(self.counts[:-1])]
