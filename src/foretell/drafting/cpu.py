"""Drafters' own parts on the compiled backbone, each in one call of the kernels.

After a pass of the backbone the interpreter's own data has left the caches, and every call of it costs tenths of a
millisecond. Legend: B rows, M states, R nodes that ran, d hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretell.backbone.base import Backbone, check_ids
from foretell.backbone.cache import KVCache
from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.cpu.library import call, table
from foretell.backbone.cpu.linear import ThreadedLinear
from foretell.drafting.cpu_heads import PackedHeads
from foretell.drafting.heads import DrafterHeads
from foretell.drafting.prefix_layer import PrefixLayer
from foretell.drafting.protocols import DraftedTrees, DraftRequest, LevelDrafting, LowerLayerDrafting
from foretell.errors import check

Integers = NDArray[np.int64]
Trees = list[tuple[list[int], list[int], list[float]]]


class CpuKernels:
    """See `protocols.DraftKernels`."""

    def __init__(self, backbone: CompiledBackbone):
        self.backbone = backbone

    def heads(
        self, blocks: Sequence[Sequence[tuple[Tensor, Tensor]]], outputs: Sequence[Tensor] | DrafterHeads,
        linear: bool = False,
    ) -> PackedHeads:  # fmt: skip
        b = self.backbone
        return PackedHeads(blocks, outputs, linear, b.dtype, b.threads, b.build)

    def grower(self, drafting: LevelDrafting) -> CpuGrower:
        return CpuGrower(self.backbone, drafting)

    def lower_layers(self, drafting: LowerLayerDrafting) -> CpuLowerLayerDrafter:
        return CpuLowerLayerDrafter(self.backbone, drafting)

    def prefix_layer(self, tensors: Mapping[str, Tensor], fuse_dP: Tensor | None) -> CpuPrefixLayer:
        return CpuPrefixLayer(self.backbone, self.backbone.layer(tensors), fuse_dP)


class CpuPrefixLayer(PrefixLayer):
    """In one call of the kernels."""

    def __init__(self, backbone: CompiledBackbone, layer: Backbone, fuse_dP: Tensor | None):
        super().__init__(backbone, layer, fuse_dP)
        if not isinstance(layer, CompiledBackbone):
            raise TypeError("A compiled prefix layer needs a compiled layer.")
        self._backbone, self._layer = backbone, layer
        self._fused_linear = self._fuse.packed if isinstance(self._fuse, ThreadedLinear) else None
        d = layer.config.hidden
        alike = backbone.config.hidden == d and (backbone.build, backbone.dtype) == (layer.build, layer.dtype)
        check(alike, "A prefix layer is computed as its model is.")
        if self._fused_linear:
            check(self._fused_linear.outputs == d and self._fused_linear.inputs % d == 0, "Fusing gives one state.")

    def _run(
        self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int], states_Md: Tensor,
        others: Sequence[Tensor], following: Sequence[int],
    ) -> Tensor:  # fmt: skip
        layer, fuse = self._layer, self._fused_linear
        parts = [each.contiguous() for each in (states_Md, *others)]
        M, d, next_M = sum(counts), layer.config.hidden, torch.tensor(following, dtype=torch.int64)
        fits = all(each.shape == (M, d) and each.dtype == torch.float32 for each in parts)
        check(fits and min(counts) >= 0, f"A prefix layer reads float32 states [{M}, {d}].")
        if fuse:
            check(len(next_M) == M and fuse.inputs == len(parts) * d, "A fused layer reads every stream and token.")
            check_ids(next_M, self._backbone.embedding.outputs)
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        cache, (cosine, sine) = layer.described(self.cache, rows, ends), layer.rotations(max(ends))
        told = np.array([rows, lengths, counts], dtype=np.int64)
        committed = library.Committed(
            len(rows), *told, cosine, sine, fuse.matrix.about if fuse else None, len(others), table(parts[1:]), next_M,
            self._backbone.embedding.about,
        )  # fmt: skip
        out_Md = torch.empty_like(parts[0])
        call("observe", layer.build, layer.about, cache, committed, parts[0], M, out_Md, layer.bf16)
        return out_Md


class CpuLowerLayerDrafter:
    """See `protocols.LowerLayerDrafter`."""

    def __init__(self, backbone: CompiledBackbone, drafting: LowerLayerDrafting):
        head, adapter, config = drafting.head, drafting.adapter, backbone.config
        if not isinstance(head, PackedHeads) or not (adapter is None or isinstance(adapter, CompiledBackbone)):
            raise TypeError("What drafts behind compiled layers is compiled too.")
        self._backbone, self._adapter, reads = backbone, adapter, adapter or backbone
        about, kind = head.about, (backbone.build, backbone.bf16)
        check((head.build, head.bf16) == (reads.build, reads.bf16) == kind, "Its kernels and type are the model's.")
        check(about.layers == 0 and head.heads == 1, "The head is an output matrix alone.")
        check(about.hidden == config.hidden == reads.config.hidden, "It reads what the model's layers end in.")
        check(0 < drafting.width <= about.choices == len(drafting.vocabulary_V), "Guesses are some of the vocabulary.")
        check(not drafting.skip or adapter, "Sublayers of an adapter are skipped, where there is one.")
        vocabulary_V = np.ascontiguousarray(drafting.vocabulary_V, dtype=np.int64)
        check_ids(torch.from_numpy(vocabulary_V), backbone.embedding.outputs)
        self._about = library.Lower(
            backbone.about, adapter.about if adapter else None,
            np.frombuffer(drafting.skip, dtype=np.uint8) if drafting.skip else None, reads.norm_weight,
            reads.config.eps, about, drafting.width, vocabulary_V,
            None if drafting.scale is None else np.array(drafting.scale, dtype=np.float32), backbone.embedding.about,
        )  # fmt: skip

    def climb(self, asked: DraftRequest, cache: KVCache, own: KVCache | None) -> DraftedTrees:
        backbone, rows, count = self._backbone, len(asked.slots), asked.count
        lengths = [cache.lengths[slot] for slot in asked.slots]
        states = [None if each is None else each.contiguous() for each in asked.waiting] or [None] * rows
        waiting = [0 if each is None else len(each) for each in states]
        ours = [own.lengths[slot] for slot in asked.slots] if own else [0] * rows
        ran = max(count + 1, min(asked.room, 1 + asked.beam * max(0, asked.steps - 1)))  # at most, of a row
        ends = [length + ran for length in lengths]
        own_ends = [length + new + ran for length, new in zip(ours, waiting, strict=True)]
        described = backbone.described(cache, asked.slots, ends, asked.layers)
        described_own = self._adapter.described(own, asked.slots, own_ends) if self._adapter and own else None
        self._check(asked, states, described_own is not None)
        d = backbone.config.hidden
        each_row = (asked.roots, asked.budgets, asked.slots, lengths, ours, waiting)
        told, numbers = np.array(each_row, dtype=np.int64), np.empty((2, rows), dtype=np.int64)
        places, given = np.empty((3, rows, count + 1), dtype=np.int64), np.empty((rows, count + 1))
        hidden_Rd = torch.empty(rows * ran, d)
        tapped = {tap: torch.empty_like(hidden_Rd) for tap in asked.taps}
        wanted = library.Climb(
            rows, asked.layers, count, asked.steps, asked.room, asked.beam, asked.least,
            np.array(asked.thresholds) if asked.thresholds else None, *told, table(states),
            *backbone.rotations(max(*ends, *own_ends)), described, described_own, *numbers, *places, given, hidden_Rd,
            table([tapped.get(tap) for tap in range(asked.layers + 1)]),
        )  # fmt: skip
        call("climb", backbone.build, self._about, wanted, backbone.bf16)
        sizes, kept = numbers.tolist()
        at, parents, tokens = places
        if own:
            read = [
                (slot, new) for slot, new, budget in zip(asked.slots, waiting, asked.budgets, strict=True) if budget > 1
            ]
            own.commit([slot for slot, _ in read], [range(new) for _, new in read])
        order = torch.from_numpy(np.concatenate([at[b, :count] for b, count in enumerate(kept)]))
        return DraftedTrees(
            _trees(sizes, parents, tokens, given), kept, hidden_Rd.index_select(0, order),
            {tap: streams.index_select(0, order) for tap, streams in tapped.items()},
        )  # fmt: skip

    def _check(self, asked: DraftRequest, states: Sequence[Tensor | None], has_own: bool) -> None:
        """Refuses a draft whose parts do not fit together."""
        rows, d = len(asked.slots), self._backbone.config.hidden
        check_ids(torch.tensor(asked.roots, dtype=torch.int64), self._backbone.embedding.outputs)
        fits = len(asked.roots) == len(asked.budgets) == len(states) == rows and asked.count >= 0
        check(fits and len(asked.thresholds) in (0, rows), "Every row has a root, a budget and a threshold, or none.")
        fits = asked.layers > 0 and all(0 < tap <= asked.layers for tap in asked.taps)
        check(fits, f"Only layers 1 to {asked.layers}, which run, can be tapped.")
        check(has_own == (self._adapter is not None), "An adapter has a cache of its own.")
        fits = all(each is None or (each.shape[1:] == (d,) and each.dtype == torch.float32) for each in states)
        check(fits, f"An adapter reads float32 states of {d} numbers.")
        if asked.thresholds:
            fits = asked.steps <= asked.count + 1
            check(fits, f"A chain of {asked.count} nodes has no room for {asked.steps} steps.")


class CpuGrower:
    """See `protocols.TreeGrower`."""

    def __init__(self, backbone: CompiledBackbone, drafting: LevelDrafting):
        self._backbone, d, hidden = backbone, drafting, backbone.config.hidden
        levels = [level for level in d.levels if isinstance(level, PackedHeads)]
        check(levels and len(levels) == len(d.levels), "Every level has a head of these kernels.")
        kind, self._shape = (backbone.build, backbone.bf16), (d.streams, hidden)
        for k, level in enumerate(levels):
            about, parts = level.about, d.streams + d.grounded * (k + 1) + d.chained * (k > 0)
            check(
                level.heads == 1 and (level.build, level.bf16) == kind, "A level is one head, of the model's kernels."
            )
            check((about.hidden, about.inputs) == (hidden, hidden * parts), "A level reads a row and a path.")
            check(0 < d.width <= about.choices == len(d.vocabulary_V), "Guesses are some of the vocabulary.")
        check(len(d.scales) in (0, len(levels)), "Every level is believed so far, or none.")
        vocabulary_V = np.ascontiguousarray(d.vocabulary_V, dtype=np.int64)
        check_ids(torch.from_numpy(vocabulary_V), backbone.embedding.outputs)
        scales = np.array(d.scales, dtype=np.float32).reshape(-1, 2) if d.scales else None
        self._about = library.Drafting(
            len(levels), hidden, d.streams, d.width, d.grounded, d.chained, table([level.about for level in levels]),
            backbone.embedding.about, vocabulary_V, scales,
        )  # fmt: skip

    def grow(self, roots: Sequence[int], states: Sequence[Tensor | None], count: int, beam: int, least: float) -> Trees:
        rows, newest = len(roots), torch.tensor(roots, dtype=torch.int64)
        check_ids(newest, self._backbone.embedding.outputs)
        check(len(states) == rows and count >= 0, "A tree grows from a root and the states of its row.")
        fits = all(each is None or (each.shape == self._shape and each.dtype == torch.float32) for each in states)
        check(fits, f"Heads read {self._shape} float32 states of a row.")
        parents, tokens = np.empty((2, rows, count + 1), dtype=np.int64)
        sizes, given = np.empty(rows, dtype=np.int64), np.empty((rows, count + 1))
        wanted = library.Wanted(rows, count, beam, least, table(states), newest, sizes, parents, tokens, given)
        call("grow", self._backbone.build, self._about, wanted, self._backbone.bf16)
        return _trees(sizes.tolist(), parents, tokens, given)


def _trees(sizes: Sequence[int], parents: Integers, tokens: Integers, given: NDArray[np.float64]) -> Trees:
    """The first nodes of each row, as lists."""
    return [
        (parents[b, :size].tolist(), tokens[b, :size].tolist(), given[b, :size].tolist())
        for b, size in enumerate(sizes)
    ]
