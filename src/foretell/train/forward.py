"""The backbone's forward pass as training needs it: whole conversations side by side, in plain PyTorch.

Decoding must give a token the same bits whoever else is in the batch, and pays for that with attention over gathered
paths. Training needs no bits: the states of a conversation may differ in the last places from those of decoding, by
less than the number type rounds. So conversations are padded on the right and attend by
`scaled_dot_product_attention`, with products in the number type of the training.

Legend: B conversations, T tokens of the longest, H query heads, G key/value heads, D head width, d hidden width,
P positions, V vocabulary, m most probable tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone import Backbone
from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.frozen_layers import FrozenLayers
from foretell.drafting.learning.number_types import TYPES, measured

BLOCK = 64
"""Logits whose maximum is compared first."""
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Logits that exist at once."""


class Forward(FrozenLayers):
    """States and next-token probabilities of conversations.

    Args:
        backbone: a loaded one.
        number_type: of the products where the weights are bfloat16, by its name in `number_types`; by default the
            faster one on this device. Float32 weights are multiplied in float32.
    """

    def __init__(self, backbone: Backbone, number_type: str = ""):
        bf16 = backbone.dtype == torch.bfloat16
        super().__init__(
            backbone, dtype=TYPES[number_type or measured(backbone.device.type).fastest] if bf16 else torch.float32
        )
        self._embedding_Vd = self.matrix("model.embed_tokens.weight")
        self._head_Vd = self._embedding_Vd if self.config.tied else self.matrix("lm_head.weight")

    @torch.no_grad()
    def states(self, tokens_BT: Tensor, taps: Collection[int]) -> dict[int, Tensor]:
        """Returns the states at each tap, [B, T, d] in the number type of the products; padding comes last."""
        angles = self.angles(tokens_BT.shape[1])
        highest = self.config.layers if FINAL_NORM in taps else max(taps, default=0)
        hidden_BTd = self._embedding_Vd[tokens_BT.to(self.device)].float()
        found = {0: hidden_BTd.to(self.dtype, copy=True)} if 0 in taps else {}
        with attention_on(self.device):
            for index in range(highest):
                self.run_layer(index, hidden_BTd, *angles)
                if index + 1 in taps:
                    found[index + 1] = hidden_BTd.to(self.dtype, copy=True)  # it changes in place
        if FINAL_NORM in taps:
            found[FINAL_NORM] = self.norm(hidden_BTd, self.final_norm_d)
        return found

    @torch.no_grad()
    def most_probable_next(self, states_Pd: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """The most probable next tokens [P, m] int64, best first, and their probabilities [P, m] float32.

        Args:
            states_Pd: of FINAL_NORM.
        """
        head_Vd = self._head_Vd.to(self.dtype)
        ids_Pm = states_Pd.new_zeros(len(states_Pd), m, dtype=torch.int64)
        p_Pm = states_Pd.new_zeros(len(states_Pd), m, dtype=torch.float32)
        rows = max(1, LOGITS[self.device.type] // len(head_Vd))
        for at in range(0, len(states_Pd), rows):
            x_Pd = states_Pd[at : at + rows].to(self.dtype)
            logits_PV = F.linear(x_Pd, head_Vd)
            rounded, ids = most_probable(logits_PV, m)
            # what is stored is multiplied in float32: a large logit is rounded by more than a few per cent
            values, order = torch.einsum("pd,pmd->pm", x_Pd.float(), head_Vd[ids].float()).sort(-1, descending=True)
            best, rounded = values[:, :1], rounded.float()
            shares = (values - best).exp()
            others = logits_PV.float().sub_(best).exp_().sum(-1, keepdim=True) - (rounded - best).exp().sum(-1, True)
            ids_Pm[at : at + rows] = ids.gather(-1, order)
            p_Pm[at : at + rows] = shares / (shares.sum(-1, keepdim=True) + others.clamp_min(0))
        return ids_Pm, p_Pm


def most_probable(logits_PV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same as `topk`, several times faster: the largest values lie in the `count` blocks of the largest maxima."""
    missing = -logits_PV.shape[1] % BLOCK
    padded_PV = F.pad(logits_PV, (0, missing), value=-torch.inf) if missing else logits_PV  # padding copies all logits
    blocks_PCK = padded_PV.unflatten(1, (-1, BLOCK))
    if blocks_PCK.shape[1] <= count:
        return logits_PV.topk(count)
    chosen_Pm = blocks_PCK.amax(-1).topk(count).indices
    candidates_PmK = blocks_PCK.gather(1, chosen_Pm[..., None].expand(-1, -1, BLOCK))
    values_Pm, index_Pm = candidates_PmK.flatten(1).topk(count)
    return values_Pm, chosen_Pm.gather(1, index_Pm // BLOCK) * BLOCK + index_Pm % BLOCK


@contextmanager
def attention_on(device: torch.device) -> Iterator[None]:
    """Attention for batches of many lengths: on a GPU not cuDNN's, which makes a plan for every new one."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield
