"""The loss of draft heads, chunk by chunk: all logits at once would take gigabytes.

Legend: P positions, d hidden width, V (draft) vocabulary, m target tokens, B conversations, T tokens, K heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foretell.drafting.learning.number_types import number_type
from foretell.drafting.learning.trainable import TrainingBatch

LOGITS = {"cpu": 2048 * 12288, "cuda": 8192 * 12288}
"""Logits that exist at once, 100 or 400 MB in float32. With fewer, a processor would add up the gradient of the output
matrix more often, and much of a GPU would be idle."""
MIN_CHUNK = 64
"""Positions whose logits exist at once, at least, however many outputs there are."""
ROWS = 64
"""Positions of which a processor takes the softmax at once, so that their logits stay in its caches."""

SMOOTHING = 0.5
"""The α of D-PACE, as published."""


def chunk_size(outputs: int, device: torch.device) -> int:
    """Positions whose logits, `outputs` each, exist at once on this device."""
    return max(MIN_CHUNK, LOGITS[device.type] // outputs)


def whole_p(ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
    """Returns at the first mention of a token all that a position gives it, and 0 at later mentions."""
    same_Pmm = ids_Pm[:, :, None] == ids_Pm[:, None]
    return (same_Pmm * p_Pm[:, None]).sum(-1) * ~same_Pmm.tril(-1).any(-1)


def _losses(q_PV: Tensor, ids_Pm: Tensor, p_Pm: Tensor, acceptance: float) -> Tensor:
    """The loss at each position, [P]; see `draft_loss`."""
    q_Pm = q_PV.gather(-1, ids_Pm)
    loss_P = (acceptance - 1) * (p_Pm * q_Pm.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(-1)
    if acceptance:
        loss_P -= acceptance * torch.minimum(whole_p(ids_Pm, p_Pm), q_Pm).sum(-1)
    return loss_P


def _slope(q_PV: Tensor, ids_Pm: Tensor, p_Pm: Tensor, scale_P: Tensor, acceptance: float) -> Tensor:
    """The gradient of scale · loss in the logits, [P, V], in the place of the probabilities q.

    In the logit of token v it is q_v Σ a - a_v. Of the cross-entropy, a is p; of -Σ min(p, q), a is q where q < p, else
    0.
    """
    pull_Pm = p_Pm
    if acceptance:
        q_Pm = q_PV.gather(-1, ids_Pm)
        pull_Pm = (1 - acceptance) * p_Pm + acceptance * q_Pm * (q_Pm < whole_p(ids_Pm, p_Pm))
    pull_Pm = pull_Pm * scale_P[:, None]
    return q_PV.mul_(pull_Pm.sum(-1, keepdim=True)).scatter_add_(-1, ids_Pm, -pull_Pm)


class _DraftLoss(torch.autograd.Function):
    """Gradients are computed with each chunk's logits, if the module `learns`; inside, autograd is always disabled."""

    @staticmethod
    def forward(
        ctx: Any, x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor, scale_P: Tensor, acceptance: float,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype, chunk = number_type(x_Pd.device), chunk_size(len(weight_Vd), x_Pd.device)
        rounded_Pd, weight = x_Pd.to(dtype), weight_Vd.to(dtype)
        losses_P = torch.empty_like(scale_P)
        grad_x = torch.empty_like(x_Pd) if learns else None
        grad_weight = torch.zeros_like(weight_Vd) if learns and ctx.needs_input_grad[1] else None
        for at in range(0, len(x_Pd), chunk):
            x = rounded_Pd[at : at + chunk]
            logits = x @ weight.T
            rows = len(x) if x.is_cuda else ROWS
            for begin in range(0, len(x), rows):
                part = slice(at + begin, at + min(begin + rows, len(x)))
                q_PV = torch.softmax(logits[begin : begin + rows], -1, dtype=torch.float32)
                losses_P[part] = _losses(q_PV, ids_Pm[part], p_Pm[part], acceptance)
                if grad_x is not None:  # the slope takes the place of the logits
                    logits[begin : begin + rows] = _slope(q_PV, ids_Pm[part], p_Pm[part], scale_P[part], acceptance)
            if grad_x is not None:
                grad_x[at : at + chunk] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.T @ x
        ctx.save_for_backward(*(each for each in (grad_x, grad_weight) if each is not None))
        ctx.mark_non_differentiable(losses_P)
        return (losses_P * scale_P).sum(), losses_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *rest = ctx.saved_tensors
        return grads[0] * grad_x, grads[0] * rest[0] if rest else None, None, None, None, None, None


def draft_loss(
    x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor, scale_P: Tensor, acceptance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns Σ scale · loss, and the loss at each position without gradient, [P].

    The loss is -((1 - acceptance) Σ p · log q + acceptance Σ min(p, q)), q = softmax(x Wᵀ), in float32; multiplied as
    `number_types` says. Σ min(p, q) is the probability that a guess drawn from q is accepted where the target is p
    (arXiv 2602.23881); at `acceptance` 1 its gradient alone remains.

    Args:
        ids_Pm, p_Pm: target tokens and their probabilities. The id of a zero probability is ignored, and of a token
            named twice the probabilities are added; if they add up to less than one, the rest of the target has no
            loss and is never accepted.
        scale_P: how much each position counts; it has no gradient.
    """
    return _DraftLoss.apply(x_Pd, weight_Vd, ids_Pm, p_Pm, scale_P, acceptance, torch.is_grad_enabled())


@torch.no_grad()
def probabilities(x_Pd: Tensor, weight_Vd: Tensor, index_P: Tensor) -> Tensor:
    """Returns softmax(x Wᵀ) of one token at each position; 0 where its index is -1."""
    dtype, chunk = number_type(x_Pd.device), chunk_size(len(weight_Vd), x_Pd.device)
    rounded_Pd, weight, at_P1 = x_Pd.to(dtype), weight_Vd.to(dtype), index_P.clamp(min=0)[:, None]
    found = [
        torch.log_softmax(rounded_Pd[at : at + chunk] @ weight.T, -1, dtype=torch.float32).gather(
            -1, at_P1[at : at + chunk]
        )
        for at in range(0, len(x_Pd), chunk)
    ]
    return torch.cat(found)[:, 0].exp() * (index_P >= 0)


def dynamic_weights(p_PK: Tensor, live_PK: Tensor) -> Tensor:
    """Returns the weights of D-PACE (arXiv 2605.18810) for the loss of each head at each position, [P, K].

    The expected number of accepted guesses is Σ_j Π_{i ≤ j} p_i; the weight of head k is its slope in log p_k, which is
    Σ_{j ≥ k} Π_{i ≤ j} p_i. Each p is drawn towards 1 (`SMOOTHING`), so that a head behind a bad guess learns too.

    Args:
        p_PK: probabilities that the heads give the written tokens.
        live_PK: where a head has a token to guess; elsewhere it is left out of sums and products.
    """
    smoothed_PK = torch.where(live_PK, SMOOTHING + (1 - SMOOTHING) * p_PK, 1.0)
    accepted_PK = smoothed_PK.cumprod(1) * live_PK
    return accepted_PK.flip(1).cumsum(1).flip(1) * live_PK


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
