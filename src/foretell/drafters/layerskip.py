"""LayerSkip: a model that was trained to predict the next token after earlier layers drafts by exiting there.

Drafting runs the layers up to an exit, the final norm and the output head; verification goes on above the exit. Nothing
is added to the model, but its layers must have learnt to exit: continued training drops layers, later ones more often,
and predicts the next token from the streams after earlier layers through the same norm and head. LayerSkip, arXiv
2404.16710, §4.1 (dropout, early-exit loss) and §4.3 (self-speculation). The result is another model, `BASE+ADAPTER`,
and its own plain decoding is the reference for its exactness.

Differences: the last layer's loss is KL(p before ‖ p now), so that the text changes little; exits learn the backbone's
own distribution, over a draft vocabulary; only a set of candidate exits learns, and of them a few a step, drawn at
random where the paper takes turns.

As published, a draft is a chain of a fixed length; it may end where a token is less probable than a threshold, fixed or
adaptive (Draft & Verify), or be a tree that grows best first. Any model can draft so; untrained, it is rarely right.

Legend: B conversations, T tokens, P positions, d hidden width, V (draft) vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretell.backbone import Backbone, KVCache
from foretell.contracts import FINAL_NORM, Draft, Features, Row
from foretell.drafting.checkpoint import CheckpointOptions, Loaded
from foretell.drafting.early_exit import EarlyExitDrafter, trained_exits
from foretell.drafting.learning.finetune import ADAPTATIONS, trainable_model
from foretell.drafting.learning.heads import GuessingHeads, HeadTraining, draft_outputs
from foretell.drafting.learning.losses import targets, weighed
from foretell.drafting.learning.student import TrainableBackbone
from foretell.drafting.learning.trainable import HeadGuesses, TrainingBatch
from foretell.drafting.lower_layers import MAX_TREE_NODES, check_exit
from foretell.drafting.options import option
from foretell.drafting.threshold import AcceptanceTracker, Threshold
from foretell.drafting.tree_size import DEFAULT_NODES, TreeSize, tree_size
from foretell.errors import ForetellError, UsageError

SHAPES, CURRICULA = ("uniform", "cumulative"), ("rotational", "gradual")


def drop_rates(layers: int, max_rate: float) -> list[float]:
    """Returns p_max · D(l), D(l) = exp(l · ln 2 / (L - 1)) - 1: the first layer is never dropped (§4.1.1)."""
    return [max_rate * (math.exp(layer * math.log(2) / max(1, layers - 1)) - 1) for layer in range(layers)]


def exit_scales(layers: int, scale: float, shape: str = "cumulative") -> list[float]:
    """Returns e(l), the weight of the loss after layer l before normalization (§4.1.2).

    Cumulative, as published: scale · Σ_{i ≤ l} i, and of the last L - 1 + scale · Σ_{i ≤ L - 2} i. Uniform: scale,
    and 1 of the last.
    """
    if shape == "uniform":
        return [scale] * (layers - 1) + [1.0]
    sums = [scale * layer * (layer + 1) / 2 for layer in range(layers)]
    return [*sums[:-1], layers - 1 + (sums[-2] if layers > 1 else 0.0)]


class EarlyExitTraining(GuessingHeads):
    """A backbone in training to exit early.

    Args:
        model: a transformers model, with peft's adapters or without; folder: where it was read from.
        head_Vd, vocabulary_V, vocab_size: see `GuessingHeads`.
        training: see `LayerSkip.Training`.
        exits: layers that learn to guess the next token; exit: the one whose accuracy is reported.
        layers: of the backbone.
    """

    ahead = 1

    def __init__(
        self, model: nn.Module, folder: Path, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int,
        training: LayerSkip.Training, *, exits: Sequence[int], exit: int, layers: int,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, heads=1, output="shared")
        self.student, self.exits, self.exit = TrainableBackbone(model, folder), list(exits), exit
        self.taught = True  # it stays near what it was, whatever its exits learn from
        self.dropped = drop_rates(layers, training.dropout)
        self.scales = exit_scales(layers, training.scale, training.shape)
        self.curriculum, self.period, self.hold = training.curriculum, training.period, training.hold
        self._done = 0.0

    def begin(self, done: float) -> None:
        self._done = done

    def training_exits(self) -> list[int]:
        """Selects the exits trained in this step, from the step's seed, so that a resumed run selects the same."""
        if not self.training:
            return self.exits
        if self.curriculum == "rotational":
            turn = int(torch.randint(self.period, ()))
            return [exit for i, exit in enumerate(self.exits) if (i + turn) % self.period == 0]
        layers = len(self.scales)
        return [exit for exit in self.exits if self._done >= 0.5 * (layers - exit + 1) / layers]

    def shares(self, exits: Sequence[int]) -> list[float]:
        """Shares of the loss of each exit, and of the last layer at the end; they add up to 1."""
        scales = [self.scales[exit - 1] for exit in exits] + [self.scales[-1]]
        return [scale / sum(scales) for scale in scales]

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        targets_PK, sources_P = targets(batch, 1, self.ahead)
        if not len(sources_P):
            return {}
        exits, hold = self.training_exits(), self.hold if self.training else 1.0
        *shares, last = self.shares(exits)
        with_last = not exits or float(torch.rand(())) < hold
        taps = [*exits, FINAL_NORM] if with_last else exits
        states = self.student.states(batch.tokens_BT, taps, self.dropped if self.training else ())
        out: dict[str, Tensor] = {}
        for exit, share in zip(exits, shares, strict=True):
            x_Pd = self.student.normed(states[exit].flatten(0, 1)[sources_P]).float()
            (total,), means_K = self.mean_losses(batch, x_Pd[None], targets_PK, sources_P, x_Pd.new_full((1, 1), share))
            out[f"exit {exit}"] = means_K[0] + (total - total.detach())
        if with_last:
            kl = self.student.kl_to_original(replace(batch, states={FINAL_NORM: states[FINAL_NORM]}))
            out["backbone"] = weighed(kl, last / (hold if exits else 1.0))
        return out

    def measured(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], list[HeadGuesses]]:
        return self.losses(batch), self.guesses(batch)  # they read other exits

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        states = self.student.states(batch.tokens_BT, [self.exit])
        return self.student.normed(states[self.exit].flatten(0, 1)[sources_P]).float()[None]

    def save_backbone(self, base: str, out: Path) -> str:
        return self.student.save(base, out)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.stored({}), {"exits": self.exits, "exit": self.exit}


class LayerSkip(EarlyExitDrafter):
    """Drafts with the layers up to one exit.

    Args:
        ids_V, size, chain, steps: see `EarlyExitDrafter`.
        exit: layers that draft.
        tokens_per_step: tree size -> tokens per step on held-out text.
        threshold: a chain ends after a token less probable than this.
    """

    method = "layerskip"

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        exit: int = option(0, "Layers that draft; by default the checkpoint's, else a quarter of them.")
        chain: bool = option(False, "Draft chains, as in the paper, instead of trees.")
        steps: int = option(
            6, "How often the lower layers are run for a draft, at most.", low=0, high=MAX_TREE_NODES - 1
        )
        threshold: float = option(0.0, "A chain ends after a token less probable than this; 0 never.", low=0, high=1)
        adaptive: bool = option(False, "Let the threshold follow how many drafts are accepted, as in Draft & Verify.")

    @dataclass(frozen=True)
    class Training(HeadTraining):
        soft: float = option(
            1.0, "Share of the loss against the model's whole distribution instead of the written token.", low=0, high=1
        )
        exit: int = option(0, "The exit that drafts by default; else a quarter of the layers.")
        stride: int = option(2, "Exits are trained at every so many layers.", low=1)
        deepest: int = option(0, "The last layer trained to exit; by default half of them.")
        adapt: str = option("lora", "What of the model is trained: adapters, or all of it.", choices=ADAPTATIONS)
        rank: int = option(32, "Rank of the adapters; their scale α/r is 1/2.", low=1, high=1024)
        dropout: float = option(0.1, "p_max: drop rate of the last layer; earlier ones less.", low=0, high=0.9)
        scale: float = option(1.0, "Weight of an exit's loss beside the last layer's.", low=0, high=100)
        shape: str = option("uniform", "Weights over layers; the paper's is cumulative.", choices=SHAPES)
        curriculum: str = option(
            "rotational", "Which exits learn in a step: one in `period`, or ever earlier ones.", choices=CURRICULA
        )
        period: int = option(4, "Of the rotational curriculum.", low=1, high=1024)
        hold: float = option(
            0.25, "Share of the steps in which all layers run, and the last is held to its former output.",
            low=0.01, high=1,
        )  # fmt: skip

    def __init__(
        self, backbone: Backbone, ids_V: Tensor | None, exit: int, size: TreeSize,
        tokens_per_step: dict[int, float] | None = None, chain: bool = False, steps: int = 6,
        threshold: Threshold | None = None,
    ):  # fmt: skip
        super().__init__(backbone, ids_V, size, chain, steps)
        self.depth = self.exit = check_exit(exit, backbone)
        self.tokens_per_step, self.tracker = tokens_per_step or {}, AcceptanceTracker(threshold or Threshold(0.0))

    @classmethod
    def build(cls, backbone: Backbone, options: Options, loaded: Loaded | None = None) -> LayerSkip:
        """See `Drafter.build`, and `TrainableMethod.build` for `loaded`."""
        ids_V, arch, tokens_per_step = trained_exits(backbone, options.checkpoint, options.any_backbone, loaded)
        nodes = options.nodes or (DEFAULT_NODES if options.chain else 0)  # chains are bounded by `steps`
        size = tree_size(backbone, nodes, tokens_per_step, cls.method, cls.usual_cost, MAX_TREE_NODES)
        exit, threshold = options.exit or arch.get("exit"), Threshold(options.threshold, options.adaptive)
        return cls(
            backbone, ids_V, exit or max(1, backbone.config.layers // 4), size, tokens_per_step, options.chain,
            options.steps, threshold,
        )  # fmt: skip

    @classmethod
    def trainable(
        cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Path | None = None
    ) -> EarlyExitTraining:
        """Returns the backbone in `folder`, which is to learn; see `TrainableMethod`."""
        layers, stride = backbone.config.layers, training.stride
        if stride > layers - 1:
            raise UsageError(f"stride is {stride}; it must lie between 1 and {layers - 1} for this model.")
        exit = check_exit(training.exit or max(1, layers // 4 // stride * stride), backbone)
        deepest = check_exit(training.deepest or max(stride, layers // 2), backbone)
        if folder is None:
            raise ForetellError("LayerSkip changes the backbone, and needs the folder of its files.")
        return EarlyExitTraining(
            trainable_model(folder, training.adapt, training.rank, 0.0), folder,
            *draft_outputs(backbone, counts_V, training.draft_vocab), training,
            exits=sorted({exit, *range(stride, deepest + 1, stride)}), exit=exit, layers=layers,
        )  # fmt: skip

    def bind(self, cache: KVCache) -> None:
        super().bind(cache)
        self.tracker = self.tracker.attached()

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        self.tracker.record_outcome(rows, features)

    def draft(self, rows: Sequence[Row]) -> Draft:
        draft = self._drafted(rows, self.exit, [self.tracker.threshold.value] * len(rows))
        self.tracker.record_draft(rows, draft, self.steps)
        return draft
