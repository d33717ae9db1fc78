"""M2R2: beside the lower layers runs a fast stream, which is to know early what the last layer will say.

Over layers 0 to E a token has two streams. The slow one is the model's own, and writes the keys and values that
verification goes on from. The fast one begins as the same embedding, passes the same layers, and attends to the slow
keys and values, those of its own position included, but writes none; adapters of its own draw it ahead. After layer E
the output head reads the fast stream, over a draft vocabulary. One pass runs both, so that weights are read once.
M2R2, "Mixture of Multi-Rate Residuals", arXiv 2502.02040: slow and rate-accelerated residual streams, accelerator
adapters, shared key/value caches, lossless self-speculation.

What the paper says of adapters, rates, exits and losses could not be read. Ours: one exit; p' = layer(p) + U·SiLU(V·p̂),
p̂ = p divided by its root mean square and U zero at first, so that the fast stream begins as the slow one; the loss of
other draft heads against the model's distribution, and `alignment` · (1 - cos) between the stream after layer i and the
model's after layer min(L, round(L·i / E)). Trees grow as Kangaroo's do: M2R2 has its adapter beside the layers, where
Kangaroo has it behind them.

With `trust` decoding is lossy: where the fast stream is sure, the text leaves the model at layer E. That token's upper
layers are run all the same, with those of the next nodes: later tokens attend to them. The paper decides by attention
across the depths of the fast stream (ARLA); here the calibrated probability of the guess decides.

Legend: B conversations, T tokens, L layers, E of them that draft, F frontier nodes of all rows, P positions, d hidden
width, r rank, V draft vocabulary, R guesses of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.backbone import Backbone, Beside, KVCache, Nodes
from foretell.contracts import Draft, Drafter, Row
from foretell.drafting.checkpoint import (
    CheckpointOptions,
    Loaded,
    check_shapes,
    damage_named,
    find,
    output_shape,
    read_scales,
)
from foretell.drafting.kernels import adapters_of, kernels_for
from foretell.drafting.learning.frozen_layers import FrozenLayers, beside
from foretell.drafting.learning.heads import GuessingHeads, HeadTraining, draft_outputs
from foretell.drafting.learning.losses import weighed
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.lower_layers import MAX_TREE_NODES, EarlyExitTrees, check_exit, grow_in_one_call, guesses_of
from foretell.drafting.options import option, stored_options
from foretell.drafting.protocols import LowerLayerDrafting
from foretell.drafting.tree_size import DEFAULT_NODES, TreeSize, no_guesses, size_for, tree_size
from foretell.errors import UsageError
from foretell.trees.calibration import Floats

BEAM, WIDTH = 8, 10
"""Nodes of a level that are expanded, at most, and guesses of each."""
OVERHEAD = 0.08
"""Cost of adapters, output matrix and calls in a level, as a share of a step."""


class FastStream(GuessingHeads):
    """The adapters in training: at position p the fast stream guesses token p + 1, as the output head does.

    Args:
        head_Vd, vocabulary_V, vocab_size: see `GuessingHeads`.
        training: see `M2R2.Training`.
        exit: layers that draft.
        backbone: its lower layers are run, frozen.
    """

    ahead = 1

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, training: M2R2.Training, *, exit: int,
        backbone: Backbone,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, heads=1, output=training.output)
        d, layers = head_Vd.shape[1], backbone.config.layers
        self.options, self.exit = training, exit
        self.down_Erd = nn.Parameter(torch.randn(exit, training.rank, d) / d**0.5)
        self.up_Edr = nn.Parameter(torch.zeros(exit, d, training.rank))
        # of each layer's fast stream the one that it is drawn to
        self.ahead_of = [min(layers, round(layers * (i + 1) / exit)) for i in range(exit)] if training.alignment else []
        self.taps = tuple(sorted({0, *self.ahead_of}))
        self._backbone = backbone
        self._streams: list[Tensor] = []

    @cached_property
    def frozen(self) -> FrozenLayers:
        """The layers that draft."""
        return FrozenLayers(self._backbone, end=self.exit)

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        self._streams = self.streams(batch.states[0].float())
        stream_BTd = self.frozen.norm(self._streams[-1], self.frozen.final_norm_d).float()
        return stream_BTd.flatten(0, 1)[sources_P][None]

    def streams(self, embedded_BTd: Tensor) -> list[Tensor]:
        """The fast streams after each layer, [B, T, d]."""
        frozen = self.frozen
        angles = frozen.angles(embedded_BTd.shape[1])
        slow_BTd, fast_BTd, found = embedded_BTd.clone(), embedded_BTd.clone(), list[Tensor]()
        for index in range(self.exit):
            added_BTd = beside(fast_BTd, self.down_Erd[index], self.up_Edr[index])
            q = frozen.queries(index, fast_BTd, *angles)
            k, v = frozen.run_layer(index, slow_BTd, *angles)
            fast_BTd = frozen.finished(index, fast_BTd, frozen.attended(index, q, k, v)) + added_BTd
            found.append(fast_BTd)
        return found

    def losses_at(
        self, batch: TrainingBatch, x_KPd: Tensor, targets_PK: Tensor, sources_P: Tensor
    ) -> dict[str, Tensor]:
        terms = super().losses_at(batch, x_KPd, targets_PK, sources_P)
        if self.ahead_of:
            written_BT = batch.supervised_BT
            apart = [
                1 - F.cosine_similarity(fast_BTd[written_BT], batch.states[layer][written_BT].float(), dim=-1).mean()
                for fast_BTd, layer in zip(self._streams, self.ahead_of, strict=True)
            ]
            terms["alignment"] = weighed(torch.stack(apart).mean(), self.options.alignment)
        self._streams = []
        return terms

    @torch.no_grad()
    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if arch["exit"] != self.exit or arch["rank"] != self.options.rank:
            raise UsageError(f"It is made with other options; train with `exit={arch['exit']}`, `rank={arch['rank']}`.")
        self.down_Erd.copy_(tensors["down"])
        self.up_Edr.copy_(tensors["up"])
        self.start_outputs(tensors)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = self.stored({"down": self.down_Erd, "up": self.up_Edr})
        return tensors, {"heads": 1, "exit": self.exit} | stored_options(self.options)


class M2R2(Drafter):
    """Drafts with the fast stream.

    Args:
        arch, tensors: as `FastStream.checkpoint` gave them.
        size: nodes of a tree, root included; 1 drafts nothing.
        tokens_per_step: tree size -> tokens per step on held-out text.
        chain: whether drafts are chains, as in the paper.
        steps: γ, most tokens of a chain and levels of a tree.
        threshold: a chain ends after a token less probable than this.
        scales: calibration of the fast stream, used when trees grow.
        trust: see `Drafter`.
    """

    method, usual_cost = "m2r2", 0.35

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        chain: bool = option(False, "Draft chains instead of trees.")
        steps: int = option(
            6, "How often the lower layers are run for a draft, at most.", low=0, high=MAX_TREE_NODES - 1
        )
        threshold: float = option(0.0, "A chain ends after a token less probable than this; 0 never.", low=0, high=1)
        trust: float | None = option(
            None, "Lossy: accept guesses more probable than this unverified (greedy decoding).", low=0, high=1
        )

    @dataclass(frozen=True)
    class Training(HeadTraining):
        soft: float = option(
            1.0, "Share of the loss against the model's whole distribution instead of the written token.", low=0, high=1
        )
        exit: int = option(0, "Layers that draft; by default a tenth of them.")
        rank: int = option(256, "Rank of each layer's adapter.", low=1, high=4096, stored=True)
        alignment: float = option(
            0.0, "Weight of the distance to later layers in the loss; 0 leaves it out.", low=0, high=100
        )
        output: str = option(
            "shared", "Output matrix: the model's own, or a trained copy.", choices=("shared", "tied"), stored=True
        )

    def __init__(
        self, backbone: Backbone, arch: dict[str, Any], tensors: dict[str, Tensor], size: TreeSize,
        tokens_per_step: dict[int, float] | None = None, chain: bool = False, steps: int = 6, threshold: float = 0.0,
        scales: Sequence[Sequence[float]] = (), trust: float | None = None,
    ):  # fmt: skip
        d, rank, exit = backbone.config.hidden, arch["rank"], check_exit(arch["exit"], backbone)
        shapes: dict[str, tuple[int, ...]] = {"down": (exit, rank, d), "up": (exit, d, rank)}
        check_shapes(tensors, shapes | output_shape(arch, d, len(tensors["vocabulary"])))
        self.depth, self.exit, self._backbone, self.size = exit, exit, backbone, size
        self.tokens_per_step, self._scales = tokens_per_step or {}, read_scales(scales, 1)
        self.chain, self.steps, self.threshold = chain, steps, threshold
        self.trust, self.lossless = trust, trust is None
        uncalibrated = chain and trust is None  # as in the paper, whose threshold is of the probability as it stands
        self._scale = None if uncalibrated or not self._scales else self._scales[0]
        self._vocabulary_V = tensors["vocabulary"].long().numpy()
        shared = arch["output"] == "shared"
        output_Vd = backbone.head_rows(tensors["vocabulary"].long()) if shared else tensors["head"][0]
        self._head = kernels_for(backbone).heads([], [output_Vd])
        self._adapters = adapters_of(backbone, tensors["down"], tensors["up"])
        self._width = 1 if chain else min(WIDTH, len(self._vocabulary_V))
        self._one_call = kernels_for(backbone).lower_layers(LowerLayerDrafting(
            self._head, self._width, self._vocabulary_V, self._scale, beside=self._adapters
        ))  # fmt: skip
        self._min_gain = 2 * (exit / backbone.config.layers + OVERHEAD)  # at two tokens per step
        self.parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
        self._cache: KVCache | None = None
        self._fast_Fd: Tensor | None = None

    @classmethod
    def build(cls, backbone: Backbone, options: Options, loaded: Loaded | None = None) -> M2R2:
        """See `Drafter.build`, and `TrainableMethod.build` for `loaded`."""
        found, tensors = loaded or find(cls.method, backbone, options.checkpoint, options.any_backbone)
        nodes = options.nodes or (DEFAULT_NODES if options.chain else 0)  # chains have their steps
        size = tree_size(backbone, nodes, found.tokens_per_step, cls.method, cls.usual_cost, MAX_TREE_NODES)
        with damage_named(options.checkpoint or f"The {cls.method} drafter that ships with foretell"):
            return cls(
                backbone, found.arch, tensors, size, found.tokens_per_step, options.chain, options.steps,
                options.threshold, found.calibration, options.trust,
            )  # fmt: skip

    @classmethod
    def trainable(
        cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Path | None = None
    ) -> FastStream:
        """Returns fresh adapters; see `TrainableMethod`."""
        exit = check_exit(training.exit or max(1, round(backbone.config.layers / 10)), backbone)
        outputs = draft_outputs(backbone, counts_V, training.draft_vocab)
        return FastStream(*outputs, training, exit=exit, backbone=backbone)

    @property
    def max_nodes(self) -> int:
        return MAX_TREE_NODES

    def bind(self, cache: KVCache) -> None:
        self._cache, self._fast_Fd = cache, None

    def draft(self, rows: Sequence[Row]) -> Draft:
        assert self._cache is not None, "the engine binds its cache first"
        count, how = self.steps, dict[str, Any](thresholds=[self.threshold] * len(rows))
        if not self.chain:
            count, how = min(size_for(self.size, rows), MAX_TREE_NODES) - 1, {"beam": BEAM, "min_gain": self._min_gain}
            if not count:
                return no_guesses(rows)
        if self._one_call:
            return grow_in_one_call(self._one_call, self._cache, rows, self.exit, count, self.steps, **how)
        trees = EarlyExitTrees(self._backbone, self._cache, rows, run=self._run)
        return trees.grow(self.exit, self._guesses, count, self.steps, **how)

    def _run(self, embedded_Fd: Tensor, nodes: Nodes, layers: int) -> Tensor:
        """Runs both streams through the layers; returns the slow one and keeps the fast one."""
        assert self._cache is not None, "the engine binds its cache first"
        both = Nodes(nodes.trees, nodes.rows, nodes.lengths.tolist(), nodes.first, shadows=True)
        slow_F, fast_F = (torch.from_numpy(np.flatnonzero(both.shadow == which)) for which in (0, 1))
        hidden_Rd = embedded_Fd.new_empty(len(both), embedded_Fd.shape[1])
        hidden_Rd[slow_F] = hidden_Rd[fast_F] = embedded_Fd
        through = Beside(self._adapters, fast_F)
        hidden_Rd, _ = self._backbone.run_layers(hidden_Rd, both, self._cache, 0, layers, beside=through)
        self._fast_Fd = hidden_Rd[fast_F]
        return hidden_Rd[slow_F]

    def _guesses(self, hidden_Fd: Tensor, nodes: Nodes) -> tuple[Floats, list[list[int]]]:
        """Log-probabilities and tokens of the guesses after nodes that have passed the layers, best first."""
        assert self._fast_Fd is not None, "the layers were run"
        return guesses_of(self._head, self._backbone.norm(self._fast_Fd), self._width, self._vocabulary_V, self._scale)
