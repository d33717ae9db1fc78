"""Drafting on the compiled backbone, each operation in one call of the kernels.

After a pass of the backbone the interpreter's own data has left the processor's caches, and every operation in Python
costs tenths of a millisecond. Legend: B rows, M states, R nodes that ran, d hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretell.backbone.base import Backbone, check_ids
from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.cpu.formats import draft_format
from foretell.backbone.cpu.library import call, table
from foretell.backbone.cpu.linear import ThreadedLinear
from foretell.backbone.kv_cache import KVCache
from foretell.drafting.cpu_heads import PackedHeads
from foretell.drafting.heads import DrafterHeads
from foretell.drafting.prefix_layer import PrefixLayer
from foretell.drafting.protocols import DraftedTrees, DraftRequest, LevelDrafting, LowerLayerDrafting
from foretell.errors import check
from foretell.loading.blocks import TYPES, Blocks
from foretell.loading.quantize import quantize

Integers = NDArray[np.int64]
Trees = list[tuple[list[int], list[int], list[float]]]


LARGEST = 127 * 65504
"""Number whose block has the largest scale in float16."""


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

    def linear(self, weight_NK: Tensor) -> ThreadedLinear:
        return self.backbone.linear(self._rounded(weight_NK), None)

    def own_layers(self, layers: Sequence[Mapping[str, Tensor]], norm_d: Tensor | None = None) -> Backbone:
        rounded = [{name: self._rounded(tensor) for name, tensor in layer.items()} for layer in layers]
        return self.backbone.own_layers(rounded, norm_d)

    def prefix_layer(self, tensors: Mapping[str, Tensor], fuse_dP: Tensor | None) -> CpuPrefixLayer:
        fuse = None if fuse_dP is None else self._rounded(fuse_dP)
        return CpuPrefixLayer(self.backbone, self.own_layers([tensors]), fuse)

    def _rounded(self, weight: Tensor) -> Tensor | Blocks:
        """Rounds a matrix to blocks of eight bits where these are multiplied faster; guesses need not be exact."""
        build, bf16 = self.backbone.build, self.backbone.dtype == torch.bfloat16
        if not bf16 or weight.dim() != 2 or draft_format(weight.shape[1], build, output=False).stored != "Q8_0":
            return weight
        sound = weight.is_floating_point() and weight.numel() and weight.abs().max() < LARGEST
        return quantize(weight, TYPES["Q8_0"]) if sound else weight  # else damaged, or too large for a scale


class CpuPrefixLayer(PrefixLayer):
    """`PrefixLayer` in one call of the kernels."""

    def __init__(self, backbone: CompiledBackbone, layer: Backbone, fuse_dP: Tensor | Blocks | None):
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
        inputs = [stream.contiguous() for stream in (states_Md, *others)]
        M, d, next_M = sum(counts), layer.config.hidden, torch.tensor(following, dtype=torch.int64)
        fits = all(stream.shape == (M, d) and stream.dtype == torch.float32 for stream in inputs)
        check(fits and min(counts) >= 0, f"A prefix layer reads float32 states [{M}, {d}].")
        if fuse:
            check(len(next_M) == M and fuse.inputs == len(inputs) * d, "A fused layer reads every stream and token.")
            check_ids(next_M, self._backbone.embedding.outputs)
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        cache, (cosine, sine) = layer.described(self.cache, rows, ends), layer.rotations(max(ends))
        sizes = np.array([rows, lengths, counts], dtype=np.int64)
        request = library.PrefixRequest(
            len(rows), *sizes, cosine, sine, fuse.matrix.about if fuse else None, len(others), table(inputs[1:]),
            next_M, self._backbone.embedding.about,
        )  # fmt: skip
        out_Md = torch.empty_like(inputs[0])
        call("prefix_layer", layer.build, layer.about, cache, request, inputs[0], M, out_Md, layer.bf16)
        return out_Md


class CpuLowerLayerDrafter:
    """See `protocols.LowerLayerDrafter`."""

    def __init__(self, backbone: CompiledBackbone, drafting: LowerLayerDrafting):
        head, adapter, config = drafting.head, drafting.adapter, backbone.config
        if not isinstance(head, PackedHeads) or not (adapter is None or isinstance(adapter, CompiledBackbone)):
            raise TypeError("Compiled layers need a compiled head and adapter.")
        self._backbone, self._adapter, reads = backbone, adapter, adapter or backbone
        about, kind = head.about, (backbone.build, backbone.bf16)
        check((head.build, head.bf16) == (reads.build, reads.bf16) == kind, "Its kernels and type are the model's.")
        check(about.layers == 0 and head.heads == 1, "The head is an output matrix alone.")
        check(about.hidden == config.hidden == reads.config.hidden, "Adapter and head have the model's width.")
        check(0 < drafting.width <= about.choices == len(drafting.vocabulary_V), "Guesses are some of the vocabulary.")
        check(not drafting.skip or adapter, "Only an adapter's sublayers can be skipped.")
        vocabulary_V = np.ascontiguousarray(drafting.vocabulary_V, dtype=np.int64)
        check_ids(torch.from_numpy(vocabulary_V), backbone.embedding.outputs)
        beside = backbone.own_adapters(drafting.beside) if drafting.beside else None
        check(not (beside and (adapter or beside.begin)), "A fast stream begins below all layers, without an adapter.")
        self._layers = beside.end if beside else 0
        self._about = library.LowerLayers(
            backbone.about, adapter.about if adapter else None,
            np.frombuffer(drafting.skip, dtype=np.uint8) if drafting.skip else None, reads.norm_weight,
            reads.config.eps, about, drafting.width, vocabulary_V,
            None if drafting.scale is None else np.array(drafting.scale, dtype=np.float32), backbone.embedding.about,
            *((beside.rank, *beside.tables) if beside else (0, None, None)),
        )  # fmt: skip

    def grow_through_layers(self, request: DraftRequest, cache: KVCache, own: KVCache | None) -> DraftedTrees:
        backbone, rows, count = self._backbone, len(request.slots), request.count
        lengths = [cache.lengths[slot] for slot in request.slots]
        states = [None if read is None else read.contiguous() for read in request.waiting] or [None] * rows
        waiting = [0 if read is None else len(read) for read in states]
        own_lengths = [own.lengths[slot] for slot in request.slots] if own else [0] * rows
        can_run = max(count + 1, min(request.room, 1 + request.beam * max(0, request.steps - 1)))  # nodes of a row
        ends = [length + can_run for length in lengths]
        own_ends = [length + new + can_run for length, new in zip(own_lengths, waiting, strict=True)]
        described = backbone.described(cache, request.slots, ends, request.layers)
        described_own = self._adapter.described(own, request.slots, own_ends) if self._adapter and own else None
        self._check(request, states, described_own is not None)
        d = backbone.config.hidden
        of_rows = (request.roots, request.budgets, request.slots, lengths, own_lengths, waiting)
        inputs, numbers = np.array(of_rows, dtype=np.int64), np.empty((2, rows), dtype=np.int64)
        nodes, probabilities = np.empty((3, rows, count + 1), dtype=np.int64), np.empty((rows, count + 1))
        hidden_Rd = torch.empty(rows * can_run, d)
        tapped = {tap: torch.empty_like(hidden_Rd) for tap in request.taps}
        described_request = library.DraftRequest(
            rows, request.layers, count, request.steps, request.room, request.beam, request.min_gain,
            np.array(request.thresholds) if request.thresholds else None, *inputs, table(states),
            *backbone.rotations(max(*ends, *own_ends)), described, described_own, *numbers, *nodes, probabilities,
            hidden_Rd, table([tapped.get(tap) for tap in range(request.layers + 1)]),
        )  # fmt: skip
        call("grow_through_layers", backbone.build, self._about, described_request, backbone.bf16)
        sizes, ran = numbers.tolist()
        positions, parents, tokens = nodes
        if own:
            read = [
                (slot, new)
                for slot, new, budget in zip(request.slots, waiting, request.budgets, strict=True)
                if budget > 1
            ]
            own.commit([slot for slot, _ in read], [range(new) for _, new in read])
        order = torch.from_numpy(np.concatenate([positions[b, :count] for b, count in enumerate(ran)]))
        return DraftedTrees(
            _trees(sizes, parents, tokens, probabilities), ran, hidden_Rd.index_select(0, order),
            {tap: streams.index_select(0, order) for tap, streams in tapped.items()},
        )  # fmt: skip

    def _check(self, request: DraftRequest, states: Sequence[Tensor | None], has_own: bool) -> None:
        """Refuses a request whose fields do not fit together."""
        rows, d = len(request.slots), self._backbone.config.hidden
        check_ids(torch.tensor(request.roots, dtype=torch.int64), self._backbone.embedding.outputs)
        fits = len(request.roots) == len(request.budgets) == len(states) == rows and request.count >= 0
        check(fits and len(request.thresholds) in (0, rows), "Every row has a root, a budget and a threshold, or none.")
        fits = request.layers > 0 and all(0 < tap <= request.layers for tap in request.taps)
        check(fits, f"Only layers 1 to {request.layers}, which run, can be tapped.")
        fits = not self._layers or (self._layers == request.layers and not request.taps)
        check(fits, "A fast stream runs beside its own layers, and nothing taps them.")
        check(has_own == (self._adapter is not None), "An adapter has a cache of its own.")
        fits = all(x is None or (x.shape[1:] == (d,) and x.dtype == torch.float32) for x in states)
        check(fits, f"An adapter reads float32 states of {d} numbers.")
        if request.thresholds:
            fits = request.steps <= request.count + 1
            check(fits, f"A chain of {request.count} nodes has no room for {request.steps} steps.")


class CpuGrower:
    """See `protocols.TreeGrower`."""

    def __init__(self, backbone: CompiledBackbone, drafting: LevelDrafting):
        self._backbone, d, hidden = backbone, drafting, backbone.config.hidden
        levels = [level for level in d.levels if isinstance(level, PackedHeads)]
        check(levels and len(levels) == len(d.levels), "Every level has a head of these kernels.")
        kind, self._shape = (backbone.build, backbone.bf16), (d.streams, hidden)
        for k, level in enumerate(levels):
            about, inputs = level.about, d.streams + k + 1
            check(
                level.heads == 1 and (level.build, level.bf16) == kind, "A level is one head, of the model's kernels."
            )
            check(
                (about.hidden, about.inputs) == (hidden, hidden * inputs),
                "A level reads its row's states and its path.",
            )
            check(0 < d.width <= about.choices == len(d.vocabulary_V), "Guesses are some of the vocabulary.")
        check(len(d.scales) in (0, len(levels)), "Every level is calibrated, or none.")
        vocabulary_V = np.ascontiguousarray(d.vocabulary_V, dtype=np.int64)
        check_ids(torch.from_numpy(vocabulary_V), backbone.embedding.outputs)
        scales = np.array(d.scales, dtype=np.float32).reshape(-1, 2) if d.scales else None
        self._about = library.LevelDrafting(
            len(levels), hidden, d.streams, d.width, table([level.about for level in levels]),
            backbone.embedding.about, vocabulary_V, scales,
        )  # fmt: skip

    def grow(
        self, roots: Sequence[int], states: Sequence[Tensor | None], count: int, beam: int, min_gain: float
    ) -> Trees:
        rows, newest = len(roots), torch.tensor(roots, dtype=torch.int64)
        check_ids(newest, self._backbone.embedding.outputs)
        check(len(states) == rows and count >= 0, "A tree grows from a root and the states of its row.")
        fits = all(x is None or (x.shape == self._shape and x.dtype == torch.float32) for x in states)
        check(fits, f"Heads read {self._shape} float32 states of a row.")
        parents, tokens = np.empty((2, rows, count + 1), dtype=np.int64)
        sizes, probabilities = np.empty(rows, dtype=np.int64), np.empty((rows, count + 1))
        request = library.LevelRequest(
            rows, count, beam, min_gain, table(states), newest, sizes, parents, tokens, probabilities
        )
        call("grow", self._backbone.build, self._about, request, self._backbone.bf16)
        return _trees(sizes.tolist(), parents, tokens, probabilities)


def _trees(sizes: Sequence[int], parents: Integers, tokens: Integers, probabilities: NDArray[np.float64]) -> Trees:
    """Returns the first nodes of each row, as lists."""
    return [
        (parents[b, :size].tolist(), tokens[b, :size].tolist(), probabilities[b, :size].tolist())
        for b, size in enumerate(sizes)
    ]
