"""A backbone that is trained with its drafter: its present states, and its divergence from the original.

The teacher is the original network; its probabilities are stored with the features, so that no second pass is needed.

Legend: B conversations, T tokens, P positions, d hidden width, V vocabulary, m teacher tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.finetune import causal, save
from foretell.drafting.learning.losses import chunk_size
from foretell.drafting.learning.number_types import number_type
from foretell.drafting.learning.trainable import TrainingBatch

MIN_PROBABILITY = 1e-6
"""Lower bound of the probability of all tokens but the teacher's, whose logarithm is taken."""


class TrainableBackbone(nn.Module):
    """The trainable part of a backbone.

    Args:
        model: a transformers model, with peft's adapters or without; folder: where it was read from.
    """

    def __init__(self, model: nn.Module, folder: Path):
        super().__init__()
        self.folder, self._model = folder, (model,)  # not a submodule: most of its parameters are frozen
        self.learns = nn.ParameterList([p for p in model.parameters() if p.requires_grad])

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def _apply(self, fn: Any, recurse: bool = True) -> TrainableBackbone:
        self.model._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> TrainableBackbone:
        self.model.train(mode)
        return super().train(mode)

    def states(self, tokens_BT: Tensor, taps: Sequence[int], dropped: Sequence[float] = ()) -> dict[int, Tensor]:
        """Returns its present states, tap -> [B, T, d]; padding comes last and is not attended to.

        Layers above the highest tap are not run.

        Args:
            dropped: per layer the probability that a conversation skips it.
        """
        return self._states({"input_ids": tokens_BT}, taps, dropped)

    def states_of(
        self, input_BCd: Tensor, position_BC: Tensor, there_BC: Tensor, taps: Sequence[int]
    ) -> dict[int, Tensor]:
        """The same of inputs that are no tokens, or do not stand one after the other.

        Args:
            there_BC: false on padding. It is given to transformers, which takes positions with gaps for several texts.
        """
        given = {"inputs_embeds": input_BCd, "position_ids": position_BC, "attention_mask": there_BC.long()}
        return self._states(given, taps)

    def _states(
        self, given: dict[str, Tensor], taps: Sequence[int], dropped: Sequence[float] = ()
    ) -> dict[int, Tensor]:
        seen: dict[int, Tensor] = {}

        def after(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], out_BTd: Tensor) -> Tensor:
                if dropped and dropped[layer]:
                    stays_B = torch.rand(len(out_BTd), device=out_BTd.device) >= dropped[layer]
                    out_BTd = torch.where(stays_B[:, None, None], out_BTd, inputs[0])
                seen[layer + 1] = out_BTd
                return out_BTd

            return hook

        model = causal(self.model).model
        every = model.config.num_hidden_layers
        hooks = [each.register_forward_hook(after(layer)) for layer, each in enumerate(model.layers)]
        try:
            model.config.num_hidden_layers = every if FINAL_NORM in taps else max(taps)  # as many as transformers runs
            device = next(iter(given.values())).device
            with torch.autocast(device.type, torch.bfloat16, enabled=number_type(device) == torch.bfloat16):
                final_BTd = model(**given, use_cache=False).last_hidden_state
        finally:
            model.config.num_hidden_layers = every
            for hook in hooks:
                hook.remove()
        return {tap: final_BTd if tap == FINAL_NORM else seen[tap] for tap in taps}

    def normed(self, stream_BTd: Tensor) -> Tensor:
        """A stream after the final norm, as the output head reads it."""
        return causal(self.model).model.norm(stream_BTd)

    def kl_to_original(self, batch: TrainingBatch) -> Tensor:
        """KL(before ‖ now) per written token, over the teacher's tokens and all others as one.

        Args:
            batch: with the present states of FINAL_NORM.
        """
        before_BT = torch.zeros_like(batch.supervised_BT)
        before_BT[:, :-1] = batch.supervised_BT[:, 1:]
        teacher = (batch.teacher_ids_BTm[before_BT], batch.teacher_p_BTm[before_BT])
        weight_Vd: Tensor = causal(self.model).get_output_embeddings().weight
        return divergence(batch.states[FINAL_NORM][before_BT], weight_Vd, *teacher) / before_BT.sum()

    def save(self, base: str, out: Path) -> str:
        """Writes the fine-tuned model `base`; returns the name of the result."""
        return save(self.model, self.folder, base, out)


class _Divergence(torch.autograd.Function):
    """Gradients are computed with each chunk's logits, as in `losses.draft_loss`."""

    @staticmethod
    def forward(ctx: Any, x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor, learns: bool) -> Tensor:
        assert not ctx.needs_input_grad[1]  # the output matrix is frozen
        p_Pm = p_Pm.float() / p_Pm.float().sum(-1, keepdim=True).clamp(min=1.0)  # rounded, they may add up to more
        rest_p_P = (1 - p_Pm.sum(-1)).clamp(min=MIN_PROBABILITY)
        dtype = number_type(x_Pd.device)
        weight, grad_Pd, total = weight_Vd.to(dtype), torch.empty_like(x_Pd), x_Pd.new_zeros((), dtype=torch.float32)
        chunk = chunk_size(len(weight_Vd), x_Pd.device)
        for at in range(0, len(x_Pd), chunk):
            x, ids, p, rest_p = (each[at : at + chunk] for each in (x_Pd, ids_Pm, p_Pm, rest_p_P))
            # the teacher's tokens are multiplied in float32, as they were stored; the others may be rounded
            top = (x.float()[:, None] * weight_Vd[ids].float()).sum(-1)
            logits = (x.to(dtype) @ weight.T).float().scatter_(-1, ids, -torch.inf)
            largest = logits.amax(-1, keepdim=True)
            shares = logits.sub_(largest).exp_()  # in place: a chunk's logits are large (`losses.LOGITS`)
            sums = shares.sum(-1)
            rest = largest[:, 0] + sums.log()
            total_logits = torch.logaddexp(top.logsumexp(-1), rest)
            total += (torch.xlogy(p, p) - p * (top - total_logits[:, None])).sum()
            total += (rest_p * (rest_p.log() - (rest - total_logits))).sum()
            if not learns:
                continue
            mass = p.sum(-1) + rest_p
            of_rest = (rest - total_logits).exp() * mass - rest_p  # slope of the loss in `rest`, spread by share
            slope = shares.mul_((of_rest / sums)[:, None])
            slope.scatter_(-1, ids, (top - total_logits[:, None]).exp() * mass[:, None] - p)
            grad_Pd[at : at + chunk] = slope.to(dtype) @ weight
        ctx.save_for_backward(grad_Pd)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None, None, None


def divergence(x_Pd: Tensor, weight_Vd: Tensor, ids_Pm: Tensor, p_Pm: Tensor) -> Tensor:
    """KL(p ‖ softmax(x Wᵀ)) over the teacher's m tokens and all others as one, summed over positions.

    Args:
        ids_Pm, p_Pm: the teacher's tokens, all different, and their probabilities.
    """
    return _Divergence.apply(x_Pd, weight_Vd, ids_Pm, p_Pm, torch.is_grad_enabled())
