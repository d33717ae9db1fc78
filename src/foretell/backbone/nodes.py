"""Who takes part in one pass: the nodes of every row's tree, flattened without padding.

A slot and a position are different things: node i of a tree lies at slot length + i of its row's cache, but stands
at position length + depth, and its keys are the committed prefix followed by its ancestors. A prompt is a chain.

Legend: M nodes taking part, B rows of the batch, T keys of the longest path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.trees import TokenTree, chain


@lru_cache(maxsize=1024)
def _shape(tree: TokenTree) -> tuple[np.ndarray, np.ndarray]:
    """Parents and depths [N] int32 of a tree."""
    return np.array(tree.parents, dtype=np.int32), np.array(tree.depths, dtype=np.int32)


class Nodes:
    """The M nodes of one pass over B rows.

    Args:
        trees: one per row.
        cache_rows: which cache row each tree extends.
        lengths: committed slots of those rows: where their trees begin.
        first: per row the first node to run; earlier nodes have already left their keys and values in the cache.
        positions: [M] int64, if they are not length + depth.
    """

    def __init__(
        self,
        trees: Sequence[TokenTree],
        cache_rows: Sequence[int],
        lengths: Sequence[int],
        first: Sequence[int] | None = None,
        positions: Tensor | None = None,
    ):
        self._on: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.trees, self.first = list(trees), list(first or [0] * len(trees))
        shapes = [_shape(tree) for tree in trees]
        self.cache_rows = np.array(cache_rows, dtype=np.int32)
        self.lengths = np.array(lengths, dtype=np.int32)
        self.offsets = np.zeros(len(trees) + 1, dtype=np.int32)
        np.cumsum([len(tree) for tree in trees], out=self.offsets[1:])
        self.parents = np.concatenate([parents for parents, _ in shapes])
        self.counts = [len(tree) - start for tree, start in zip(trees, self.first, strict=True)]
        self.sequence = np.repeat(np.arange(len(trees), dtype=np.int32), self.counts)
        self.node = np.concatenate(
            [np.arange(f, len(t), dtype=np.int32) for t, f in zip(trees, self.first, strict=True)]
        )
        depth = np.concatenate([depths[f:] for (_, depths), f in zip(shapes, self.first, strict=True)])
        self.totals = self.lengths[self.sequence] + depth + 1  # keys on each node's path
        self.positions = (
            torch.from_numpy(self.totals.astype(np.int64) - 1) if positions is None else positions.to(torch.int64)
        )

    @classmethod
    def chains(cls, cache_rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> Nodes:
        """`counts[b]` tokens in a row after the committed ones: a chunk of a prompt."""
        return cls([chain(count - 1) for count in counts], cache_rows, lengths)

    def extended(self, parents: Sequence[Sequence[int]]) -> tuple[Nodes, Tensor]:
        """Appends nodes to each tree, given their parents within it.

        Returns:
            The new nodes, and where the old ones stand among them, int64 [M].
        """
        trees = [TokenTree((*tree.parents, *more)) for tree, more in zip(self.trees, parents, strict=True)]
        nodes = Nodes(trees, self.cache_rows, self.lengths, self.first)  # type: ignore[arg-type]
        kept = [np.arange(start, start + count) for start, count in zip(nodes.starts(), self.counts, strict=True)]
        return nodes, torch.from_numpy(np.concatenate(kept))

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def ends(self) -> list[int]:
        """Slots that each row's cache needs for this pass."""
        return [int(length) + len(tree) for length, tree in zip(self.lengths, self.trees, strict=True)]

    @cached_property
    def slots_M(self) -> Tensor:
        """Where each node's own key and value go, int64 [M]."""
        return torch.from_numpy((self.lengths[self.sequence] + self.node).astype(np.int64))

    @cached_property
    def cache_rows_M(self) -> Tensor:
        return torch.from_numpy(self.cache_rows[self.sequence].astype(np.int64))

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

    def on(self, device: torch.device, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """`cache_rows_M`, `slots_M` and `paths_MT`, padded to whole blocks, on a device: copied once a pass."""
        if (device, block) not in self._on:
            paths_MT = F.pad(self.paths_MT, (0, -self.paths_MT.shape[1] % block), value=-1)
            self._on[device, block] = self.cache_rows_M.to(device), self.slots_M.to(device), paths_MT.to(device)
        return self._on[device, block]

    def starts(self) -> list[int]:
        """Index among the M nodes of each row's first."""
        return np.cumsum([0, *self.counts[:-1]]).tolist()
