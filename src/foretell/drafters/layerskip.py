"""LayerSkip: a model that learnt to say what it will say before its last layer drafts by leaving early.

Drafting runs the layers up to an exit, the final norm and the output head; verification goes on above the exit. Nothing
is added to the model, but it has to be one whose layers can exit: continued training drops layers, the later the more
often, and has the streams after earlier layers say the next token through the same norm and head. LayerSkip, arXiv
2404.16710, §4.1 (dropout, early-exit loss) and §4.3 (self-speculation). What comes out is another model,
`BASE+ADAPTER`, and its own plain decoding is the reference for its drafts.

Differences: the last layer's loss is KL(p before ‖ p now), so that the text stays what it was; exits learn what the
backbone would have said, over a draft vocabulary; only a set of candidate exits learns, and of them a few a step, drawn
anew each time where the paper takes turns.

As published, a draft is a chain of a fixed length; it may end where a token is less probable than a threshold, fixed or
adaptive (Draft & Verify), or be a tree that grows best first. Any model drafts so; without training, rarely right.

Legend: B conversations, T tokens, P positions, d hidden width, V (draft) vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foretell.backbone import Backbone, KVCache
from foretell.contracts import FINAL_NORM, Draft, Features, Row
from foretell.drafting.early_exit import EarlyExitDrafter, candidates
from foretell.drafting.learning.finetune import WAYS, learning
from foretell.drafting.learning.heads import GuessingHeads, TrainingBatch, targets, weighed
from foretell.drafting.learning.student import TrainableBackbone
from foretell.drafting.lower_layers import MAX_TREE_NODES, AcceptanceTracker, Threshold
from foretell.drafting.options import DEFAULT_NODES, check_exit, check_options, draft_vocabulary, tree_size
from foretell.errors import ForetellError, UsageError, check_numbers

SHAPES, CURRICULA = ("uniform", "cumulative"), ("rotational", "gradual")


def drop_rates(layers: int, most: float) -> list[float]:
    """p_max · D(l), D(l) = exp(l · ln 2 / (L - 1)) - 1: the first layer always stays (§4.1.1)."""
    return [most * (math.exp(layer * math.log(2) / max(1, layers - 1)) - 1) for layer in range(layers)]


def exit_scales(layers: int, scale: float, shape: str = "cumulative") -> list[float]:
    """e(l), how much the loss after layer l counts before shares are taken (§4.1.2).

    Cumulative, as published: scale · Σ_{i ≤ l} i, and of the last L - 1 + scale · Σ_{i ≤ L - 2} i. Uniform: scale,
    and 1 of the last.
    """
    if shape == "uniform":
        return [scale] * (layers - 1) + [1.0]
    sums = [scale * layer * (layer + 1) / 2 for layer in range(layers)]
    return [*sums[:-1], layers - 1 + (sums[-2] if layers > 1 else 0.0)]


class EarlyExitTraining(GuessingHeads):
    """A backbone that learns to exit.

    Args:
        model: a transformers model, with peft's adapters or whole; folder: where it lay.
        head_Vd, vocabulary_V, whole, soft: see `GuessingHeads`.
        exits: layers after which it shall say the next token; exit: the one whose accuracy is reported.
        dropout: p_max of the last layer.
        scale, shape: see `exit_scales`.
        curriculum: rotational, one exit in `period` learns in a step, or gradual, from the last to the first.
        hold: share of the steps in which the last layer is held to what it said, by so much more; in the others layers
            above the exits need not be run.
    """

    ahead = 1

    def __init__(
        self, model: nn.Module, folder: Path, head_Vd: Tensor, vocabulary_V: Tensor, whole: int, *, soft: float,
        exits: Sequence[int], exit: int, layers: int, dropout: float, scale: float, shape: str, curriculum: str,
        period: int, hold: float,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, whole, heads=1, output="shared", soft=soft)
        self.student, self.exits, self.exit = TrainableBackbone(model, folder), list(exits), exit
        self.dropped, self.scales = drop_rates(layers, dropout), exit_scales(layers, scale, shape)
        self.curriculum, self.period, self.hold, self._done = curriculum, period, hold, 0.0

    def begin(self, done: float) -> None:
        self._done = done

    def taught(self) -> list[int]:
        """Exits that learn in this step; what is drawn follows from the step, so that a resumed run sees the same."""
        if not self.training:
            return self.exits
        if self.curriculum == "rotational":
            turn = int(torch.randint(self.period, ()))
            return [exit for i, exit in enumerate(self.exits) if (i + turn) % self.period == 0]
        layers = len(self.scales)
        return [exit for exit in self.exits if self._done >= 0.5 * (layers - exit + 1) / layers]

    def shares(self, exits: Sequence[int]) -> list[float]:
        """What each of the exits, and then the last layer, counts in the loss: they add up to 1."""
        scales = [self.scales[exit - 1] for exit in exits] + [self.scales[-1]]
        return [scale / sum(scales) for scale in scales]

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        targets_PK, sources_P = targets(batch, 1, self.ahead)
        if not len(sources_P):
            return {}
        exits, hold = self.taught(), self.hold if self.training else 1.0
        *shares, last = self.shares(exits)
        holding = not exits or float(torch.rand(())) < hold
        taps = [*exits, FINAL_NORM] if holding else exits
        states = self.student.states(batch.tokens_BT, taps, self.dropped if self.training else ())
        out: dict[str, Tensor] = {}
        for exit, share in zip(exits, shares, strict=True):
            x_Pd = self.student.normed(states[exit].flatten(0, 1)[sources_P]).float()
            out[f"exit {exit}"] = weighed(self.term(batch, x_Pd, 0, targets_PK[:, 0], sources_P), share)
        if holding:
            held = self.student.held(replace(batch, states={FINAL_NORM: states[FINAL_NORM]}))
            out["backbone"] = weighed(held, last / (hold if exits else 1.0))
        return out

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
        threshold: a chain ends behind a token less probable.
    """

    method = "layerskip"

    def __init__(
        self, backbone: Backbone, ids_V: Tensor | None, exit: int, size: Callable[[int, int], int],
        tokens_per_step: dict[int, float] | None = None, chain: bool = False, steps: int = 6,
        threshold: Threshold | None = None,
    ):  # fmt: skip
        super().__init__(backbone, ids_V, size, chain, steps)
        self.depth = self.exit = check_exit(exit, backbone)
        self.tokens_per_step, self.tracker = tokens_per_step or {}, AcceptanceTracker(threshold or Threshold(0.0))

    @classmethod
    def build(
        cls, backbone: Backbone, checkpoint: str = "", exit: int = 0, nodes: int = 0, chain: bool = False,
        steps: int = 6, threshold: float = 0.0, adaptive: bool = False, any_backbone: bool = False,
    ) -> LayerSkip:  # fmt: skip
        """See `Drafter.build`.

        Args:
            checkpoint: folder that `foretell train layerskip` wrote: its draft vocabulary and exit; by default those
                that came with foretell for this backbone, else the whole vocabulary.
            exit: layers that draft; by default the checkpoint's, else a quarter of them.
            nodes: tree size; by default what pays most by what steps cost here.
            chain: draft chains, as in the paper, instead of trees.
            steps: how often the lower layers are run for a draft, at most.
            threshold: a chain ends behind a token less probable than this; 0 never.
            adaptive: let that follow how many drafts are accepted, as Draft & Verify does.
            any_backbone: accept a checkpoint of another model of the same sizes.
        """
        options = SimpleNamespace(threshold=threshold, steps=steps)
        check_numbers(options, [("threshold", 0, 1), ("steps", 0, MAX_TREE_NODES - 1)], whole=("steps",))
        ids_V, arch, tokens_per_step = candidates(backbone, checkpoint, any_backbone)
        nodes = nodes or (DEFAULT_NODES if chain else 0)  # chains have their steps
        size = tree_size(backbone, nodes, tokens_per_step, cls.method, cls.usual_cost, MAX_TREE_NODES)
        exit = exit or arch.get("exit") or max(1, backbone.config.layers // 4)
        return cls(backbone, ids_V, exit, size, tokens_per_step, chain, steps, Threshold(threshold, adaptive))

    @classmethod
    def trainable(
        cls, backbone: Backbone, counts_V: Tensor, folder: Path | None = None, *, exit: int = 0, stride: int = 2,
        deepest: int = 0, draft_vocab: int = 8192, soft: float = 1.0, adapt: str = "lora", rank: int = 32,
        dropout: float = 0.1, scale: float = 1.0, shape: str = "uniform", curriculum: str = "rotational",
        period: int = 4, hold: float = 0.25,
    ) -> EarlyExitTraining:  # fmt: skip
        """The backbone in `folder`, that is to learn; see `learning.Method`.

        Args:
            exit: the one whose accuracy is reported and that drafts by default; else a quarter of the layers.
            stride, deepest: every so many layers up to this one (half of them by default) become exits.
            draft_vocab: how many of the most frequent tokens exits choose from; 0 for all, as in the paper.
            soft: share of the exits' loss that is against the backbone's distribution instead of the written token.
            adapt: what of the backbone learns: lora, or full.
            rank: of the adapters; their scale α/r is 1/2.
            dropout: how often the last layer is dropped, p_max; others less.
            scale, shape: what exits count beside the last layer: uniform, or cumulative as in the paper.
            curriculum: rotational or gradual.
            period: rotational: one exit in so many learns in a step.
            hold: share of the steps in which all layers are run, and the last is held to what it said.
        """
        layers = backbone.config.layers
        check_options(backbone, "shared", soft=soft, draft_vocab=draft_vocab)
        for name, value, allowed in (
            ("adapt", adapt, WAYS),
            ("shape", shape, SHAPES),
            ("curriculum", curriculum, CURRICULA),
        ):
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}; it must be {' or '.join(allowed)}.")
        numbers = SimpleNamespace(rank=rank, dropout=dropout, scale=scale, period=period, stride=stride, hold=hold)
        ranges = [
            ("rank", 1, 1024),
            ("dropout", 0, 0.9),
            ("scale", 0, 100),
            ("period", 1, 1024),
            ("stride", 1, layers - 1),
            ("hold", 0.01, 1),
        ]
        check_numbers(numbers, ranges, whole=("rank", "period", "stride"))
        exit = check_exit(exit or max(1, layers // 4 // stride * stride), backbone)
        deepest = check_exit(deepest or max(stride, layers // 2), backbone)
        exits = sorted({exit, *range(stride, deepest + 1, stride)})
        if folder is None:
            raise ForetellError("LayerSkip changes the backbone, and needs the folder that it lies in.")
        vocabulary_V = draft_vocabulary(counts_V, draft_vocab)
        return EarlyExitTraining(
            learning(folder, adapt, rank, 0.0), folder, backbone.head_rows(vocabulary_V).cpu(), vocabulary_V,
            len(counts_V), soft=soft, exits=exits, exit=exit, layers=layers, dropout=dropout, scale=scale, shape=shape,
            curriculum=curriculum, period=period, hold=hold,
        )  # fmt: skip

    def bind(self, cache: KVCache) -> None:
        super().bind(cache)
        self.tracker = self.tracker.attached()

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        self.tracker.observed(rows, features)

    def draft(self, rows: Sequence[Row]) -> Draft:
        draft = self._drafted(rows, self.exit, [self.tracker.threshold.value] * len(rows))
        self.tracker.drafted(rows, draft, self.steps)
        return draft
