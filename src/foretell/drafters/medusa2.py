"""Medusa-2: backbone and heads learn together, so that the text becomes easier to predict and changes little.

The backbone gets low-rank adapters (LoRA, arXiv 2106.09685) or learns whole. The loss is KL(p before ‖ p now) of the
backbone plus λ0 times the loss of Medusa's heads (Medusa, arXiv 2401.10774, §3.2 and §3.3). The teacher is the
same network with the adapters off; its probabilities are stored with the features, so that no second pass is needed.
The heads learn alone at first, or λ0 rises as a sine; they learn faster than the backbone, biases included.

The result is another model, `BASE+ADAPTER` (`loading.lora`), with heads of its own. They draft as Medusa's do, and
plain decoding of the changed model is the reference for their exactness.

Legend: B conversations, T tokens, P positions, d hidden width, V vocabulary, m teacher tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foretell.backbone import Backbone
from foretell.drafters.medusa import Medusa, MedusaHeads
from foretell.drafting.learning.finetune import ADAPTATIONS, trainable_model
from foretell.drafting.learning.heads import draft_outputs, evenly_spread
from foretell.drafting.learning.losses import weighed
from foretell.drafting.learning.student import TrainableBackbone
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.options import option
from foretell.errors import ForetellError

RISE = 0.03
"""Share of the training in which the backbone's learning rate rises."""


class JointHeads(MedusaHeads):
    """Heads and the backbone under them.

    The trainer's state holds all trainable parameters: heads, and adapters or the whole backbone.

    Args:
        model: a transformers model, with peft's adapters or without; folder: where it was read from.
        head_Vd, vocabulary_V, vocab_size, rest: see `MedusaHeads`.
        training: see `Medusa2.Training`.
    """

    def __init__(
        self, model: nn.Module, folder: Path, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int,
        training: Medusa2.Training, **rest: Any,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, **rest)
        self.student = TrainableBackbone(model, folder)
        self.taught = True  # it stays near what it was, whatever its heads learn from
        self.weight, self.schedule = training.weight, training.schedule
        self.slower, self.warm = training.slower, training.warm
        self._done = 0.0

    @property
    def model(self) -> nn.Module:
        return self.student.model

    @property
    def backbone(self) -> list[nn.Parameter]:
        """Trainable parameters of the backbone."""
        return list(self.student.learns)

    # -- learning ---------------------------------------------------------------------------------------------------

    def begin(self, done: float) -> None:
        self._done = done

    def groups(self) -> list[tuple[list[nn.Parameter], Callable[[float], float]]]:
        of_backbone = set(map(id, self.backbone))
        heads = [p for p in self.parameters() if p.requires_grad and id(p) not in of_backbone]
        return [(heads, lambda done: 1.0), (self.backbone, self.backbone_rate)]

    def backbone_rate(self, done: float) -> float:
        """Learning rate of the backbone relative to the heads'; it rises, for the optimizer's moments start empty."""
        return self.slower * min(1.0, max(0.0, (done - self.warm) / RISE + 0.1))

    @property
    def alone(self) -> bool:
        """True while only the heads are trained."""
        return self._done < self.warm

    def heads_weight(self) -> float:
        """λ0 now, relative to the backbone's loss; 1 while there is none."""
        if self.alone:
            return 1.0
        rise = math.sin(math.pi / 2 * self._done) if self.schedule == "sine" else 1.0
        return self.weight * rise

    def prepared(self, batch: TrainingBatch) -> TrainingBatch:
        if self.training and self.alone:
            return batch  # the stored states hold
        # padding comes last and is not attended to
        return replace(batch, states=self.student.states(batch.tokens_BT, self.taps))

    def losses_at(
        self, batch: TrainingBatch, x_KPd: Tensor, targets_PK: Tensor, sources_P: Tensor
    ) -> dict[str, Tensor]:
        found = super().losses_at(batch, x_KPd, targets_PK, sources_P)
        terms = {name: weighed(term, self.heads_weight()) for name, term in found.items()}
        if not (self.training and self.alone):
            terms["backbone"] = self.student.kl_to_original(batch)
        return terms

    # -- the result -------------------------------------------------------------------------------------------------

    def save_backbone(self, base: str, out: Path) -> str:
        return self.student.save(base, out)


class Medusa2(Medusa):
    """Drafts as Medusa does, for a backbone that was trained with its heads."""

    method = "medusa2"

    @dataclass(frozen=True)
    class Training(Medusa.Training):
        adapt: str = option("lora", "What of the model is trained: adapters, or all of it.", choices=ADAPTATIONS)
        rank: int = option(16, "Rank of the adapters; their scale α/r is 1/2, as in the paper.", low=1, high=1024)
        weight: float = option(0.2, "λ0, weight of the heads' loss beside the model's.", low=0, high=100)
        schedule: str = option("constant", "Schedule of λ0; sine rises to it.", choices=("constant", "sine"))
        slower: float = option(0.25, "Learning rate of the model relative to the heads'.", low=0, high=100)
        warm: float = option(0.1, "Share of the training in which only the heads are trained.", low=0, high=1)
        dropout: float = option(0.0, "Dropout on the inputs of adapters.", low=0, high=0.9)

    @classmethod
    def trainable(  # type: ignore[override]  # each method has a Training of its own
        cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Path | None = None
    ) -> JointHeads:
        """Returns fresh heads over the backbone in `folder`; see `TrainableMethod`."""
        if folder is None:
            raise ForetellError("Medusa-2 changes the backbone, and needs the folder of its files.")
        return JointHeads(
            trainable_model(folder, training.adapt, training.rank, training.dropout), folder,
            *draft_outputs(backbone, counts_V, training.draft_vocab), training,
            taps=evenly_spread(training.taps, backbone), embed=backbone.embed if training.root else None,
        )  # fmt: skip
