"""Medusa-2: backbone and heads learn together, so that the text becomes easier to foretell and stays what it was.

The backbone gets low-rank adapters (LoRA, arXiv 2106.09685) or learns whole. The loss is KL(p before ‖ p now) of the
backbone plus λ0 times the loss of Medusa's heads (Medusa, arXiv 2401.10774, §3.2 and §3.3). Its teacher is the same
network with the adapters off; what it said was kept with the features, so that no second pass is needed. The heads
learn alone at first, or λ0 rises as a sine; they learn faster than the backbone, biases included.

What comes out is another model: `BASE+ADAPTER` (`loading.lora`), with heads of its own. They draft as Medusa's
do, and the changed model's plain decoding is the reference for what they may not change.

Legend: B conversations, T tokens, P positions, d hidden width, V vocabulary, m teacher tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretell.backbone import Backbone
from foretell.drafters.medusa import Medusa, MedusaHeads
from foretell.drafting.learning.finetune import WAYS, learning
from foretell.drafting.learning.heads import Guessed, TrainingBatch, draft_outputs, evenly_spread, weighed
from foretell.drafting.learning.student import TrainableBackbone
from foretell.drafting.options import option
from foretell.errors import ForetellError

RISE = 0.03
"""Share of the training in which the backbone's rate rises."""


class JointHeads(MedusaHeads):
    """Heads and the backbone under them.

    The state that a trainer keeps holds what learns: heads, and adapters or the whole backbone.

    Args:
        model: a transformers model, with peft's adapters or whole; folder: where it lay.
        head_Vd, vocabulary_V, vocab_size, rest: see `MedusaHeads`.
        training: see `Medusa2.Training`.
    """

    def __init__(
        self, model: nn.Module, folder: Path, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int,
        training: Medusa2.Training, **rest: Any,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, **rest)
        self.student = TrainableBackbone(model, folder)
        self.weight, self.schedule = training.weight, training.schedule
        self.slower, self.warm = training.slower, training.warm
        self._done = 0.0

    @property
    def model(self) -> nn.Module:
        return self.student.model

    @property
    def backbone(self) -> list[nn.Parameter]:
        """What of the backbone learns."""
        return list(self.student.learns)

    # -- learning ---------------------------------------------------------------------------------------------------

    def begin(self, done: float) -> None:
        self._done = done

    def groups(self) -> list[tuple[list[nn.Parameter], Callable[[float], float]]]:
        theirs = set(map(id, self.backbone))
        heads = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return [(heads, lambda done: 1.0), (self.backbone, self.backbone_rate)]

    def backbone_rate(self, done: float) -> float:
        """Learning rate of the backbone relative to the heads': its moments are empty when it begins, so it rises."""
        return self.slower * min(1.0, max(0.0, (done - self.warm) / RISE + 0.1))

    @property
    def alone(self) -> bool:
        """Whether the heads still learn alone."""
        return self._done < self.warm

    def heads_weight(self) -> float:
        """λ0 as it is now; relative to the backbone's loss, so it is 1 while there is none."""
        if self.alone:
            return 1.0
        rise = math.sin(math.pi / 2 * self._done) if self.schedule == "sine" else 1.0
        return self.weight * rise

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        if not (self.training and self.alone):  # else the states are those that were stored
            batch = self._through(batch)
        terms = {name: weighed(term, self.heads_weight()) for name, term in super().losses(batch).items()}
        if terms and not (self.training and self.alone):
            terms["backbone"] = self._held(batch)
        return terms

    def guesses(self, batch: TrainingBatch) -> list[Guessed]:
        with torch.no_grad():
            return super().guesses(self._through(batch))

    def _through(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with the states that the backbone computes now. Padding stands behind all that is attended to."""
        return replace(batch, states=self.student.states(batch.tokens_BT, self.taps))

    def _held(self, batch: TrainingBatch) -> Tensor:
        return self.student.held(batch)

    # -- what comes out ---------------------------------------------------------------------------------------------

    def save_backbone(self, base: str, out: Path) -> str:
        return self.student.save(base, out)


class Medusa2(Medusa):
    """Drafts as Medusa does, for a backbone that has learnt with its heads."""

    method = "medusa2"

    @dataclass(frozen=True)
    class Training(Medusa.Training):
        adapt: str = option("lora", "What of the model learns: adapters, or all of it.", choices=WAYS)
        rank: int = option(16, "Of the adapters; their scale α/r is 1/2, as in the paper.", low=1, high=1024)
        weight: float = option(0.2, "λ0, weight of the heads' loss beside the model's.", low=0, high=100)
        schedule: str = option("constant", "Of λ0: sine rises to it.", choices=("constant", "sine"))
        slower: float = option(0.25, "Learning rate of the model relative to the heads'.", low=0, high=100)
        warm: float = option(0.1, "Share of the training in which the heads learn alone.", low=0, high=1)
        dropout: float = option(0.0, "Of what adapters read.", low=0, high=0.9)

    @classmethod
    def trainable(  # type: ignore[override]  # each method has a Training of its own
        cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Path | None = None
    ) -> JointHeads:
        """Returns fresh heads over the backbone in `folder`; see `TrainableMethod`."""
        if folder is None:
            raise ForetellError("Medusa-2 changes the backbone, and needs the folder that it lies in.")
        return JointHeads(
            learning(folder, training.adapt, training.rank, training.dropout), folder,
            *draft_outputs(backbone, counts_V, training.draft_vocab), training,
            taps=evenly_spread(training.taps, backbone), embed=backbone.embed if training.root else None,
        )  # fmt: skip
