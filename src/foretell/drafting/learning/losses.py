"""The loss of draft heads, chunk by chunk: all logits at once would take gigabytes.

Legend: P positions, d hidden width, V (draft) vocabulary, m target tokens, B conversations, T tokens, K heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foretell.drafting.learning.number_types import number_type
from foretell.drafting.learning.trainable import TrainingBatch

CHUNK = 512
"""Positions whose logits exist at once."""


class _SoftCrossEntropy(torch.autograd.Function):
    """Gradients are computed with each chunk's logits."""

    @staticmethod
    def forward(ctx: Any, x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
        dtype = number_type(x_Pd.device)
        weight = weight_Vd.to(dtype)
        grad_x = torch.empty_like(x_Pd)
        grad_weight = torch.zeros_like(weight_Vd) if ctx.needs_input_grad[1] else None
        total = x_Pd.new_zeros(())
        for at in range(0, len(x_Pd), CHUNK):
            x, ids, p = (t[at : at + CHUNK] for t in (x_Pd.to(dtype), ids_Pm, p_Pm))
            log_q = (x @ weight.T).float().log_softmax(-1)
            total -= (p * log_q.gather(-1, ids)).sum()
            slope = log_q.exp_().mul_(p.sum(-1, keepdim=True)).scatter_add_(-1, ids, -p).to(dtype)
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
    """Returns -Σ p · log softmax(x Wᵀ)[ids], summed over positions in float32; multiplied as `products` says.

    Args:
        ids_Pm, p_Pm: target tokens and their probabilities. The id of a zero probability is ignored; if they add up to
            less than one, the rest of the target has no loss.
    """
    return _SoftCrossEntropy.apply(x_Pd, weight_Vd, ids_Pm, p_Pm)


def weighed(term: Tensor, weight: float) -> Tensor:
    """Returns the same value with `weight` times its gradient, so that logs do not depend on the weight."""
    return term.detach() + weight * (term - term.detach())


def targets(batch: TrainingBatch, heads: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Returns the positions at which the first head, which guesses the token `ahead` of it, has a target.

    Returns:
        Targets [P, K], -1 where the token is missing or not supervised; positions in the flattened batch [P].
    """
    tokens_BT, supervised_BT = batch.tokens_BT, batch.supervised_BT
    targets_BTK = torch.full((*tokens_BT.shape, heads), -1, device=tokens_BT.device)
    for k in range(heads):
        shift = k + ahead
        if shift < tokens_BT.shape[1]:
            targets_BTK[:, :-shift, k] = torch.where(supervised_BT[:, shift:], tokens_BT[:, shift:], -1)
    sources = (targets_BTK[..., 0] >= 0).flatten().nonzero()[:, 0]
    return targets_BTK.flatten(0, 1)[sources], sources
