"""Medusa-2: backbone and heads learn together, so that the text becomes easier to foretell and stays what it was.

The backbone gets low-rank adapters (LoRA, arXiv 2106.09685) or learns whole. The loss is KL(p before ‖ p now) of the
backbone plus λ0 times the loss of Medusa's heads (Medusa, arXiv 2401.10774, §3.2 and §3.3). Its teacher is the same
network with the adapters off; what it said was kept with the features, so that no second pass is needed. The heads
learn alone at first, or λ0 rises as a sine; they learn faster than the backbone, biases included.

What comes out is another model: `BASE+ADAPTER` (`backbone.adapters`), with heads of its own. They draft as Medusa's
do, and the changed model's plain decoding is the reference for what they may not change.

Legend: B conversations, T tokens, P positions, d hidden width, V vocabulary, m teacher tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foretell.backbone import Backbone
from foretell.backbone.adaptation import WAYS, causal, learning, save
from foretell.contracts import FINAL
from foretell.drafters.learning import CHUNK, Guessed, TrainingBatch, weighed
from foretell.drafters.medusa import Medusa, MedusaHeads
from foretell.drafters.parts import check_options, draft_vocabulary, spread
from foretell.errors import ForetellError, UsageError, check_numbers

RISE = 0.03
"""Share of the training in which the backbone's rate rises."""
LEAST = 1e-6
"""Probability of all tokens besides the teacher's, at least: its logarithm is taken."""


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
        self.folder, self._frozen = folder, (model,)  # out of the module's sight: most of it does not learn
        learns = [p for p in model.parameters() if p.requires_grad]
        self.backbone = nn.ParameterList(learns)
        self.weight, self.schedule, self.slower, self.warm = weight, schedule, slower, warm
        self._done = 0.0

    @property
    def model(self) -> nn.Module:
        return self._frozen[0]

    def _apply(self, fn: Any, recurse: bool = True) -> JointHeads:
        self.model._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> JointHeads:
        self.model.train(mode)
        return super().train(mode)

    # -- learning ---------------------------------------------------------------------------------------------------

    def begin(self, done: float) -> None:
        self._done = done

    def groups(self) -> list[tuple[list[nn.Parameter], Callable[[float], float]]]:
        theirs = set(map(id, self.backbone))
        heads = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return [(heads, lambda done: 1.0), (list(self.backbone), self.backbone_rate)]

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
        bf16 = torch.autocast(batch.tokens_BT.device.type, torch.bfloat16)
        with bf16:
            hidden = causal(self.model).model(input_ids=batch.tokens_BT, output_hidden_states=True, use_cache=False)
        hidden = hidden.hidden_states
        states = {tap: hidden[-1 if tap == FINAL else tap] for tap in self.taps}
        return TrainingBatch(batch.tokens_BT, batch.supervised_BT, states, batch.teacher_ids_BTm, batch.teacher_p_BTm)

    def _held(self, batch: TrainingBatch) -> Tensor:
        """KL(before ‖ now) per written token, over the teacher's tokens and all others as one."""
        before_BT = torch.zeros_like(batch.supervised_BT)
        before_BT[:, :-1] = batch.supervised_BT[:, 1:]
        told = (batch.teacher_ids_BTm[before_BT], batch.teacher_p_BTm[before_BT])
        weight_Vd: Tensor = causal(self.model).get_output_embeddings().weight
        return divergence(batch.states[FINAL][before_BT], weight_Vd, *told) / before_BT.sum()

    # -- what comes out ---------------------------------------------------------------------------------------------

    def save_backbone(self, base: str, out: Path) -> str:
        return save(self.model, self.folder, base, out)


class _Divergence(torch.autograd.Function):
    """Gradients are made while a chunk's logits are at hand, as those of `learning.soft_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
        assert not ctx.needs_input_grad[1]  # neither adapters nor a model that learns whole change the output matrix
        p_Pm = p_Pm.float() / p_Pm.float().sum(-1, keepdim=True).clamp(min=1.0)  # rounded, they may add up to more
        rest_p_P = (1 - p_Pm.sum(-1)).clamp(min=LEAST)
        weight, grad_Pd, total = weight_Vd.bfloat16(), torch.empty_like(x_Pd), x_Pd.new_zeros((), dtype=torch.float32)
        for at in range(0, len(x_Pd), CHUNK):
            x, ids, p, rest_p = (each[at : at + CHUNK] for each in (x_Pd, ids_Pm, p_Pm, rest_p_P))
            # the teacher's tokens are multiplied in float32, as the teacher's own were; the others may be rounded
            top = (x.float()[:, None] * weight_Vd[ids].float()).sum(-1)
            logits = (x.bfloat16() @ weight.T).float().scatter_(-1, ids, -torch.inf)
            most = logits.amax(-1, keepdim=True)
            shares = logits.sub_(most).exp_()  # in place: a chunk's logits are 100 MB
            sums = shares.sum(-1)
            rest = most[:, 0] + sums.log()
            whole = torch.logaddexp(top.logsumexp(-1), rest)
            total += (torch.xlogy(p, p) - p * (top - whole[:, None])).sum()
            total += (rest_p * (rest_p.log() - (rest - whole))).sum()
            mass = p.sum(-1) + rest_p
            of_rest = (rest - whole).exp() * mass - rest_p  # slope of the loss in `rest`, shared as it is shared
            slope = shares.mul_((of_rest / sums)[:, None])
            slope.scatter_(-1, ids, (top - whole[:, None]).exp() * mass[:, None] - p)
            grad_Pd[at : at + CHUNK] = slope.bfloat16() @ weight
        ctx.save_for_backward(grad_Pd)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None, None


def divergence(x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
    """KL(p ‖ softmax(x Wᵀ)) over the teacher's m tokens and all others as one, summed over positions.

    Args:
        ids_Pm, p_Pm: the teacher's tokens, all different, and their probabilities.
    """
    return _Divergence.apply(x_Pd, weight_Vd, ids_Pm, p_Pm)


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
