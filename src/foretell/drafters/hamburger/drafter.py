"""HAMburger: macro steps that write several tokens from one state, verified or trusted.

A macro step runs the model once and writes the next token as ever; a micro-step decoder, four blocks that read the
model's states after a quarter, half, three quarters and all of its layers, writes up to three more, and a stop head
says when to end. In the next macro step these tokens enter the model together, smashed into one vector, one key and
one value. HAMburger, arXiv 2505.20438.

`mode=fused` is the paper's: nothing is verified, and the text loses by it. In `mode=verified`, which is ours, the cache
stays as it is, and the micro-step decoder drafts for the usual verification: lossless for the model that it runs on.
Trees grow best first, a level of them for each micro step.

Legend: B rows, K levels, F frontier nodes of all rows, M nodes, d hidden width, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import Draft, Drafter, Features, Row
from foretell.drafters.hamburger.grafts import FusedGrafts, MicroDecoder, shapes
from foretell.drafters.hamburger.learning import (
    HAMburgerTraining,
    MacroSteps,
    MicroDrafts,
    features_of,
    merger_heads,
)
from foretell.drafting.checkpoint import (
    CheckpointOptions,
    Loaded,
    check_shapes,
    damage_named,
    find,
    output_shape,
    read_scales,
)
from foretell.drafting.kernels import kernels_for
from foretell.drafting.learning.finetune import trainable_model
from foretell.drafting.learning.heads import draft_outputs
from foretell.drafting.lower_layers import MAX_TREE_NODES, EarlyExitTrees, guesses_of
from foretell.drafting.options import option
from foretell.drafting.tree_size import no_guesses, size_for, tree_size
from foretell.errors import ForetellError, UsageError
from foretell.trees.calibration import Floats

MODES = ("verified", "fused")
BEAM, WIDTH = 8, 10
"""Nodes of a level that are expanded, at most, and guesses of each."""
MIN_GAIN = 0.2
"""Tokens that a level must be expected to gain: it costs some tenth of a step of two tokens."""


class HAMburger(Drafter):
    """Drafts with the micro-step decoder.

    Args:
        loaded: the checkpoint, as the modules of `learning` gave it.
    """

    method, usual_cost = "hamburger", 0.5
    Training: ClassVar[type[HAMburgerTraining]] = HAMburgerTraining

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        mode: str = option(
            "verified",
            "Verify what micro steps write, or trust it and fuse it, as in the paper (lossy).",
            choices=MODES,
        )
        confidence: float = option(
            0.9, "Fused: micro steps go on while the probability that they should is at least this, above 0.", high=1
        )

    def __init__(self, backbone: Backbone, options: Options, loaded: Loaded):
        found, tensors = loaded
        arch, d = found.arch, backbone.config.hidden
        expected = shapes(arch, d, "merger.q.weight" in tensors)
        check_shapes(tensors, expected | output_shape(arch, d, len(tensors["vocabulary"])))
        self.parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
        self.taps, self.most, self._backbone = features_of(backbone.config.layers), arch["most"], backbone
        if options.mode == "fused":
            self.lossless, self.fused = False, _fused(backbone, options, loaded, self.taps)
            return  # it never drafts
        self.tokens_per_step, self._scales = found.tokens_per_step, read_scales(found.calibration, arch["heads"])
        self.size = tree_size(
            backbone, options.nodes, found.tokens_per_step, self.method, self.usual_cost, MAX_TREE_NODES
        )
        self._micro, self._blocks = MicroDecoder(backbone, tensors, arch["blocks"], guesses=True), arch["blocks"]
        self._vocabulary_V = tensors["vocabulary"].long().numpy()
        shared = arch["output"] == "shared"
        output_Vd = backbone.head_rows(tensors["vocabulary"].long()) if shared else tensors["head"][0]
        self._head = kernels_for(backbone).heads([], [output_Vd])
        self._width = min(WIDTH, len(self._vocabulary_V))
        self._cache = self._micro.new_cache()
        self._newest: dict[int, tuple[list[Tensor], int]] = {}  # slot -> streams, and the place of the newest in them
        self._features_RFd: Tensor | None = None  # of the rows whose first level is drafted next

    @classmethod
    def build(cls, backbone: Backbone, options: Options, loaded: Loaded | None = None) -> HAMburger:
        """See `Drafter.build`, and `TrainableMethod.build` for `loaded`."""
        loaded = loaded or find(cls.method, backbone, options.checkpoint, options.any_backbone)
        with damage_named(options.checkpoint or f"The {cls.method} drafter that ships with foretell"):
            return cls(backbone, options, loaded)

    @classmethod
    def trainable(
        cls, backbone: Backbone, training: HAMburgerTraining, counts_V: Tensor, folder: Path | None = None
    ) -> MicroDrafts:
        """Returns fresh grafts, with the model in `folder` where it is to learn; see `TrainableMethod`."""
        outputs = draft_outputs(backbone, counts_V, training.draft_vocab)
        if training.adapt == "none":
            return MicroDrafts(*outputs, training, backbone=backbone)
        if folder is None:
            raise ForetellError("HAMburger changes the backbone, and needs the folder of its files.")
        model = trainable_model(folder, training.adapt, training.rank, 0.0)
        return MacroSteps(model, folder, *outputs, replace(training, output="shared"), backbone=backbone)

    @property
    def max_nodes(self) -> int:
        return MAX_TREE_NODES

    def bind(self, cache: KVCache) -> None:
        self._cache, self._newest = self._micro.new_cache(), {}

    def forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._newest.pop(slot, None)
        self._cache.release([slot for slot in slots if slot < self._cache.rows])
        self._cache.trim()

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._newest.pop(row.slot, None)
        self._cache.reserve({row.slot: len(self.taps) + MAX_TREE_NODES for row in rows})

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        streams, end = [features.taps[tap] for tap in self.taps], 0
        for row, count in zip(rows, features.counts, strict=True):
            end += count
            self._newest[row.slot] = streams, end - 1

    def draft(self, rows: Sequence[Row]) -> Draft:
        count = min(size_for(self.size, rows), MAX_TREE_NODES) - 1
        if not count:
            return no_guesses(rows)
        trees = EarlyExitTrees(self._backbone, self._cache, rows, skip=bytes(self._blocks), run=self._run)
        for row, tree in zip(rows, trees.trees, strict=True):
            if row.slot not in self._newest:  # after a prompt of one token
                tree.frontier = []
        slots = [rows[i].slot for i in trees.active_rows]
        for slot in slots:
            self._cache.rollback(slot, 0)
        if slots:
            newest = [[stream_Nd[at] for stream_Nd in streams] for streams, at in map(self._newest.__getitem__, slots)]
            self._features_RFd = torch.stack([torch.stack(states) for states in newest])
        return trees.grow(self._blocks, self._guesses, count, self.most - 1, beam=BEAM, min_gain=MIN_GAIN)

    def _run(self, embedded_Fd: Tensor, nodes: Nodes, layers: int) -> Tensor:
        features_RFd, self._features_RFd = self._features_RFd, None
        if features_RFd is None:
            return self._micro.run(embedded_Fd, nodes, self._cache)
        return self._micro.begin(self._cache, nodes.rows, features_RFd, embedded_Fd)

    def _guesses(self, hidden_Fd: Tensor, nodes: Nodes) -> tuple[Floats, list[list[int]]]:
        level = max(0, int(nodes.positions.max()) - len(self.taps))  # roots are run with their features before them
        scale = self._scales[level] if self._scales else None
        return guesses_of(self._head, hidden_Fd, self._width, self._vocabulary_V, scale)


def _fused(
    backbone: Backbone, options: HAMburger.Options, loaded: Loaded, taps: tuple[int, ...]
) -> FusedGrafts:  # fmt: skip
    """Returns the grafts for fused decoding; refuses those of a model that never learnt to read segments."""
    found, tensors = loaded
    if not 0 < options.confidence <= 1:
        raise UsageError(f"confidence is {options.confidence}; it must lie above 0, and be at most 1.")
    if options.nodes:
        raise UsageError(
            f"Fused decoding drafts no trees; leave `nodes={options.nodes}` out, or set `mode='verified'`."
        )
    if "merger.q.weight" not in tensors:
        raise UsageError(
            f"{options.checkpoint or 'The drafter that ships'} was trained on a frozen model, which cannot read fused "
            "tokens; train one with `adapt='lora'`, or decode with `mode='verified'`."
        )
    micro = MicroDecoder(backbone, tensors, found.arch["blocks"], guesses=False)
    heads = merger_heads(backbone.config.hidden)
    return FusedGrafts(backbone, found.arch, tensors, taps, micro, heads, options.confidence)
