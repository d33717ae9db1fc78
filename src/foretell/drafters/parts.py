"""What trained drafters share: the batch they learn from, what a trainer asks of them, and the loss of a draft head.

A drafter learns from conversations that the backbone itself wrote. The trainer knows no method: it hands a batch to
`Trainable.losses` and adds up the terms that come back.

Legend: B conversations, T tokens of the longest, d hidden width, P positions, V (draft) vocabulary, m most probable
tokens kept of the backbone's own distribution.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foretell.backbone import Backbone
from foretell.backbone.costs import StepCosts
from foretell.errors import UsageError

CHUNK = 512
"""Positions whose logits exist at once."""
DEFAULT_NODES = 16


@dataclass
class TrainingBatch:
    """Conversations side by side, padded on the right.

    Attributes:
        tokens_BT: int64; padding is 0.
        supervised_BT: bool; tokens the model wrote, the only ones worth guessing. False on padding.
        states: tap -> [B, T, d], what the backbone computed at each token.
        teacher_ids_BTm, teacher_p_BTm: the backbone's most probable tokens *after* each position whose next token
            is supervised, and their probabilities (elsewhere zeros); the rest of its distribution is left out.
    """

    tokens_BT: Tensor
    supervised_BT: Tensor
    states: dict[int, Tensor]
    teacher_ids_BTm: Tensor
    teacher_p_BTm: Tensor

    def to(self, device: torch.device) -> TrainingBatch:
        states = {tap: tensor.to(device) for tap, tensor in self.states.items()}
        rest = (self.tokens_BT, self.supervised_BT, self.teacher_ids_BTm, self.teacher_p_BTm)
        tokens, supervised, ids, p = (tensor.to(device) for tensor in rest)
        return TrainingBatch(tokens, supervised, states, ids, p)


class Trainable(nn.Module):
    """The learning form of a drafter: an `nn.Module` with its own loss, made by its method's `trainable`.

    Attributes:
        taps: backbone states that `losses` reads.
    """

    taps: tuple[int, ...] = ()

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Named terms, each a scalar; the trainer minimises their sum. {} where nothing is supervised."""

    @abstractmethod
    def ranks(self, batch: TrainingBatch) -> list[Tensor]:
        """Per conversation [P, K] int64 as in `trees.search`: ranks of what came, over the written part."""

    @abstractmethod
    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors to save, and the numbers that the drafter needs besides to make its module of them."""


class Method(Protocol):
    """What a drafter class adds when it can be trained."""

    @classmethod
    def trainable(cls, backbone: Any, counts_V: Tensor, **options: Any) -> Trainable:
        """A fresh module. `counts_V`: how often each token was written in the data, for draft vocabularies."""
        ...


def tree_size(backbone: Backbone, nodes: int, tokens_per_step: dict[int, float]) -> Callable[[int, int], int]:
    """How large a tree to draft for (rows, context): `nodes` if given, else what pays most by the costs measured
    on this machine and the `tokens_per_step` of each size, else 16 (one tile of the kernels).
    """
    if nodes:
        if not 2 <= nodes <= 256:
            raise UsageError(f"A tree has 2 to 256 nodes, not {nodes}.")
        return lambda rows, context: nodes
    costs = StepCosts.load(backbone.costs) if backbone.costs else None
    if costs is None or not tokens_per_step:
        return lambda rows, context: DEFAULT_NODES

    @cache
    def best(rows: int, context: int) -> int:
        return costs.best_size(rows, context, tokens_per_step)

    return lambda rows, context: best(rows, context // 64 * 64)


def draft_vocabulary(counts_V: Tensor, size: int) -> Tensor:
    """The `size` most frequent tokens, ascending [V'] int64 (all of them for 0); ties go to the smaller id."""
    if not size or size >= len(counts_V):
        return torch.arange(len(counts_V))
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


def places(vocabulary_V: Tensor, whole: int) -> Tensor:
    """[whole] int64: where each token stands in a draft vocabulary, -1 where it does not."""
    place = torch.full((whole,), -1)
    place[vocabulary_V] = torch.arange(len(vocabulary_V))
    return place


class _SoftCrossEntropy(torch.autograd.Function):
    """Gradients are made while a chunk's logits are at hand; all logits at once would be gigabytes."""

    @staticmethod
    def forward(ctx: Any, x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
        weight = weight_Vd.bfloat16()
        grad_x = torch.empty_like(x_Pd)
        grad_weight = torch.zeros_like(weight_Vd) if ctx.needs_input_grad[1] else None
        total = x_Pd.new_zeros(())
        for at in range(0, len(x_Pd), CHUNK):
            x, ids, p = (t[at : at + CHUNK] for t in (x_Pd.bfloat16(), ids_Pm, p_Pm))
            logits = (x @ weight.T).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            mass = p.sum(-1, keepdim=True)
            total += (mass * normaliser).sum() - (p * logits.gather(-1, ids)).sum()
            slope = logits.sub_(normaliser).exp_().mul_(mass).scatter_add_(-1, ids, -p).bfloat16()
            grad_x[at : at + CHUNK] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ x
        ctx.save_for_backward(grad_x, *(() if grad_weight is None else (grad_weight,)))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *rest = ctx.saved_tensors
        return grads[0] * grad_x, grads[0] * rest[0] if rest else None, None, None


def soft_cross_entropy(x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
    """-Σ p · log softmax(x Wᵀ)[ids], summed over positions; products in bfloat16, sums in float32.

    Args:
        ids_Pm, p_Pm: target tokens and their probabilities; a zero probability makes its id irrelevant, and what is
            missing to one is a part of the target that is not taught.
    """
    return _SoftCrossEntropy.apply(x_Pd, weight_Vd, ids_Pm, p_Pm)
