"""Draft heads: residual blocks and an output matrix each, one linear after the other.

Heads that belong together run side by side. `cpu_heads.PackedHeads` computes the same in one call of the kernels.

Legend: B rows, S states that a row's heads read, K heads, N stored states, d hidden width, V outputs, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone.base import LinearLayer


class DrafterHeads(Protocol):
    def top(self, store_Nd: Tensor, which_BS: Sequence[Sequence[int]], count: int) -> tuple[Tensor, Tensor]:
        """Returns the `count` most probable outputs of each head, best first: log-probabilities [B, K, count], indices.

        Args:
            store_Nd: float32, contiguous; a row of the batch reads some of its N rows (`side_by_side`).
            which_BS: indices of the S rows that each reads.
        """
        ...


def normed(inputs: Tensor) -> Tensor:
    """Returns each [..., d] divided by its root mean square, as heads read all inputs but the first."""
    return F.rms_norm(inputs, inputs.shape[-1:], eps=1e-6)


def side_by_side(inputs_PSd: Tensor) -> Tensor:
    """Returns the input of heads, [P, S·d]: the first state as it is, the others divided by their root mean square."""
    return torch.cat([inputs_PSd[:, 0], normed(inputs_PSd[:, 1:]).flatten(1)], 1)


class StackedHeads:
    """Heads side by side (see `protocols.DraftKernels.heads`), one linear after the other."""

    def __init__(
        self,
        linear: Callable[[Tensor, Tensor | None], LinearLayer],
        blocks: Sequence[Sequence[tuple[Tensor, Tensor]]],
        outputs: Sequence[Tensor] | DrafterHeads,
        last_linear: bool = False,
    ):
        self._activations: list[Callable[[Tensor], Tensor]] = [F.silu] * len(blocks)
        if last_linear and blocks:
            self._activations[-1] = lambda x: x
        self._blocks = [[linear(weight, bias) for weight, bias in layer] for layer in blocks]
        if isinstance(outputs, Sequence):
            self._outputs = [linear(weight, None) for weight in outputs]
        else:
            assert isinstance(outputs, StackedHeads)
            self._outputs = outputs._outputs
        self._heads = len(self._blocks[0]) if blocks else len(self._outputs)

    def top(self, store_Nd: Tensor, which_BS: Sequence[Sequence[int]], count: int) -> tuple[Tensor, Tensor]:
        which = torch.tensor(which_BS, device=store_Nd.device)
        states_BSd = store_Nd.index_select(0, which.flatten()).unflatten(0, which.shape)
        inputs, d = [side_by_side(states_BSd)] * self._heads, store_Nd.shape[1]
        for layer, activation in zip(self._blocks, self._activations, strict=True):
            inputs = [x[:, :d] + activation(block(x)) for block, x in zip(layer, inputs, strict=True)]
        outputs = self._outputs if len(self._outputs) > 1 else self._outputs * len(inputs)
        logits_BKV = torch.stack([output(x) for output, x in zip(outputs, inputs, strict=True)], 1)
        values, indices = logits_BKV.log_softmax(-1).topk(count)
        return values, indices
