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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foretell.backbone import Backbone
from foretell.drafters.medusa import Medusa, MedusaHeads
from foretell.drafting.learning.finetune import WAYS, learning
from foretell.drafting.learning.heads import Guessed, TrainingBatch, weighed
from foretell.drafting.learning.student import TrainableBackbone
from foretell.drafting.options import check_options, draft_vocabulary, spread
from foretell.errors import ForetellError, UsageError, check_numbers

RISE = 0.03
"""Share of the training in which the backbone's rate rises."""


class JointHeads(MedusaHeads):
    """Heads and the backbone under them.

    The state that a trainer keeps holds what learns: heads, and adapters or the whole backbone.

    Args:
        model: a transformers model, with peft's adapters or whole; folder: where it lay.
        head_Vd, vocabulary_V, whole, rest: see `MedusaHeads`.
        weight: λ0, of the heads' loss; schedule: constant, or a sine's first quarter.
        slower: learning rate of the backbone relative to the heads'.
        warm: share of the training in which the heads learn alone.
    """

    def __init__(
        self, model: nn.Module, folder: Path, head_Vd: Tensor, vocabulary_V: Tensor, whole: int, *, weight: float,
        schedule: str, slower: float, warm: float, **rest: Any,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, whole, **rest)
        self.student = TrainableBackbone(model, folder)
        self.weight, self.schedule, self.slower, self.warm = weight, schedule, slower, warm
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

    @classmethod
    def trainable(
        cls, backbone: Backbone, counts_V: Tensor, folder: Path | None = None, *, heads: int = 4, layers: int = 2,
        output: str = "tied", draft_vocab: int = 8192, soft: float = 0.5, taps: int = 2, root: bool = True,
        adapt: str = "lora", rank: int = 16, weight: float = 0.2, schedule: str = "constant", slower: float = 0.25,
        warm: float = 0.1, dropout: float = 0.0,
    ) -> JointHeads:  # fmt: skip
        """Fresh heads over the backbone in `folder`; see `learning.Method`.

        Args:
            heads, layers, output, draft_vocab, soft, taps, root: as Medusa's.
            adapt: what of the backbone learns: lora, or full.
            rank: of the adapters; their scale α/r is 1/2, as in the paper.
            weight: λ0, of the heads' loss; schedule: constant or sine.
            slower: learning rate of the backbone relative to the heads'.
            warm: share of the training in which the heads learn alone.
            dropout: of what adapters read; a pass or two over the data need none.
        """
        check_options(backbone, output, heads=heads, layers=layers, soft=soft, draft_vocab=draft_vocab, taps=taps)
        for name, value, allowed in (("adapt", adapt, WAYS), ("schedule", schedule, ("constant", "sine"))):
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}; it must be {' or '.join(allowed)}.")
        numbers = SimpleNamespace(rank=rank, weight=weight, slower=slower, warm=warm, dropout=dropout)
        ranges = [("rank", 1, 1024), ("weight", 0, 100), ("slower", 0, 100), ("warm", 0, 1), ("dropout", 0, 0.9)]
        check_numbers(numbers, ranges, whole=("rank",))
        if folder is None:
            raise ForetellError("Medusa-2 changes the backbone, and needs the folder that it lies in.")
        vocabulary_V = draft_vocabulary(counts_V, draft_vocab)
        return JointHeads(
            learning(folder, adapt, rank, dropout), folder, backbone.head_rows(vocabulary_V).cpu(), vocabulary_V,
            len(counts_V), heads=heads, layers=layers, output=output, soft=soft, taps=spread(taps, backbone),
            embed=backbone.embed if root else None, weight=weight, schedule=schedule, slower=slower, warm=warm,
        )  # fmt: skip
