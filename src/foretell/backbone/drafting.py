"""Drafters' own parts on the compiled backbone, each in one call of the kernels.

After a pass of the backbone the interpreter's own data has left the caches, and every call of it costs tenths of a
millisecond. Legend: B rows, M states, R nodes that ran, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_uint64

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretell.backbone import kernels
from foretell.backbone.base import Backbone
from foretell.backbone.cache import KVCache
from foretell.backbone.compiled import CompiledBackbone
from foretell.backbone.kernels import PackedHeads, ThreadedLinear, address
from foretell.backbone.linear import Asked, Climbed, LowerDrafting
from foretell.backbone.prefix import PrefixLayer


class CompiledPrefix(PrefixLayer):
    """In one call of the kernels."""

    def __init__(self, backbone: CompiledBackbone, layer: Backbone, fuse_dP: Tensor | None):
        super().__init__(backbone, layer, fuse_dP)
        self._embedding, self._packed = backbone.embedding

    def _run(
        self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int], states_Md: Tensor,
        others: Sequence[Tensor], following: Sequence[int],
    ) -> Tensor:  # fmt: skip
        layer, fuse = self.layer, self._fuse
        assert isinstance(layer, CompiledBackbone)
        assert fuse is None or isinstance(fuse, ThreadedLinear)
        parts = [each.contiguous() for each in (states_Md, *others)]
        assert all(each.shape == (sum(counts), layer.config.hidden) and each.dtype == torch.float32 for each in parts)
        wide = fuse.packed.inputs if fuse else 0
        assert not wide or (len(following) == sum(counts) and wide == len(parts) * layer.config.hidden)
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        self.cache.check(rows, ends)
        cosine, sine = layer._rotations(max(ends))
        words = np.array([*rows, *lengths, *counts, *following, *map(address, parts[1:])], dtype=np.int64)
        B, at = len(rows), words.ctypes.data
        committed = kernels.Committed(
            B, at, at + 8 * B, at + 16 * B, address(cosine), address(sine),
            address(fuse.packed.packed) if fuse else 0, len(others), at + 8 * (3 * B + len(following)), at + 24 * B,
            address(self._embedding), self._packed,
        )  # fmt: skip
        out_Md = torch.empty_like(parts[0])
        kernels.require().foretell_observe(
            layer.build.handle, byref(layer._model), byref(layer._cache(self.cache)), byref(committed),
            address(parts[0]), len(out_Md), address(out_Md), layer._bf16,
        )  # fmt: skip
        return out_Md


class CompiledClimber:
    """See `linear.TreeClimber`."""

    def __init__(self, backbone: CompiledBackbone, drafting: LowerDrafting):
        head, adapter = drafting.head, drafting.adapter
        assert isinstance(head, PackedHeads)
        assert adapter is None or isinstance(adapter, CompiledBackbone)
        self._backbone, self._adapter, reads = backbone, adapter, adapter or backbone
        self._vocabulary_V = np.ascontiguousarray(drafting.vocabulary_V, dtype=np.int64)
        self._scale = None if drafting.scale is None else np.array(drafting.scale, dtype=np.float32)
        self._skip = None if drafting.skip is None else np.frombuffer(drafting.skip, dtype=np.uint8)
        table, packed = backbone.embedding
        self._kept = drafting, table
        self._described = kernels.Lower(
            addressof(backbone._model), addressof(adapter._model) if adapter else 0,
            0 if self._skip is None else self._skip.ctypes.data, address(reads._norm), reads.config.eps,
            addressof(head._described), drafting.width, self._vocabulary_V.ctypes.data,
            0 if self._scale is None else self._scale.ctypes.data, address(table), packed,
        )  # fmt: skip
        assert head._described.layers == 0 and head._heads == 1 and head._described.hidden == backbone.config.hidden
        assert 0 < drafting.width <= head._described.choices == len(self._vocabulary_V)

    def climb(self, asked: Asked, cache: KVCache, own: KVCache | None) -> Climbed:
        backbone, rows, count = self._backbone, len(asked.slots), asked.count
        lengths = [cache.lengths[slot] for slot in asked.slots]
        waiting = [0 if each is None else len(each) for each in asked.waiting] or [0] * rows
        ours = [own.lengths[slot] for slot in asked.slots] if own else [0] * rows
        ran = max(count + 1, min(asked.room, 1 + asked.beam * max(0, asked.steps - 1)))  # at most, of a row
        cache.check(asked.slots, [length + ran for length in lengths])
        if own:
            own.check(asked.slots, [length + new + ran for length, new in zip(ours, waiting, strict=True)])
        last = max(max(lengths), max(length + new for length, new in zip(ours, waiting, strict=True))) + ran
        assert 0 < asked.layers <= backbone.config.layers and all(0 < tap <= asked.layers for tap in asked.taps)
        d = backbone.config.hidden
        states = [None if each is None else each.contiguous() for each in asked.waiting] or [None] * rows
        assert all(each is None or (each.shape[1] == d and each.dtype == torch.float32) for each in states)
        cosine, sine = backbone._rotations(last)
        each_row = (asked.roots, asked.budgets, asked.slots, lengths, ours, waiting, list(map(address, states)))
        told, numbers = np.array(each_row, dtype=np.int64), np.empty((2, rows), dtype=np.int64)
        places, given = np.empty((3, rows, count + 1), dtype=np.int64), np.empty((rows, count + 1))
        hidden_Rd = torch.empty(rows * ran, d)
        tapped = {tap: torch.empty_like(hidden_Rd) for tap in asked.taps}
        pointers = (c_uint64 * (asked.layers + 1))()
        for tap, tensor in tapped.items():
            pointers[tap] = address(tensor)
        thresholds = np.array(asked.thresholds)
        caches = backbone._cache(cache), backbone._cache(own or cache)
        wanted = kernels.Climb(
            rows, asked.layers, count, asked.steps, asked.room, asked.beam, asked.least,
            thresholds.ctypes.data if len(thresholds) else 0, *_lines(told), address(cosine), address(sine),
            addressof(caches[0]), addressof(caches[1]), *_lines(numbers), *_lines(places), given.ctypes.data,
            address(hidden_Rd), addressof(pointers),
        )  # fmt: skip
        kernels.require().foretell_climb(backbone.build.handle, byref(self._described), byref(wanted), backbone._bf16)
        sizes, kept = numbers.tolist()
        at, parents, tokens = places
        if own:
            read = [
                (slot, new) for slot, new, budget in zip(asked.slots, waiting, asked.budgets, strict=True) if budget > 1
            ]
            own.commit([slot for slot, _ in read], [range(new) for _, new in read])
        order = torch.from_numpy(np.concatenate([at[b, :count] for b, count in enumerate(kept)]))

        return Climbed(
            [
                (parents[b, :size].tolist(), tokens[b, :size].tolist(), given[b, :size].tolist())
                for b, size in enumerate(sizes)
            ],
            kept, hidden_Rd.index_select(0, order),
            {tap: streams.index_select(0, order) for tap, streams in tapped.items()},
        )  # fmt: skip


def _lines(table: NDArray[np.int64]) -> list[int]:
    """Where each line of a table begins."""
    return [table.ctypes.data + table.strides[0] * i for i in range(len(table))]
