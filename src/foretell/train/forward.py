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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone import Backbone
from foretell.contracts import FINAL_NORM
from foretell.drafting.learning.number_types import TYPES, measured
from foretell.loading.blocks import Blocks
from foretell.loading.tensors import LAYER

BLOCK = 64
"""Logits whose maximum is compared first."""
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Logits that exist at once."""


class Forward:
    """States and next-token probabilities of conversations; weights are read from the backbone's files.

    Args:
        backbone: a loaded one, whose `read` gives its weights: a GPU holds them a second time. They are cast for each
            product, which costs a hundredth of it.
        number_type: of the products where the weights are bfloat16, by its name in `number_types`; by default the
            faster one on this device. Float32 weights are multiplied in float32.
    """

    def __init__(self, backbone: Backbone, number_type: str = ""):
        self.backbone, self.config, self.device = backbone, backbone.config, backbone.device
        self.dtype = torch.float32
        if backbone.dtype == torch.bfloat16:
            self.dtype = TYPES[number_type or measured(self.device.type).fastest]
        self._layers = [self._read_layer(index) for index in range(self.config.layers)]
        self._final_norm_d = self._vector("model.norm.weight")
        self._embedding_Vd = self._matrix("model.embed_tokens.weight")
        self._head_Vd = self._embedding_Vd if self.config.tied else self._matrix("lm_head.weight")

    def _matrix(self, name: str) -> Tensor:
        """A weight in the backbone's number type; on a CPU it may lie in a file that is mapped into memory."""
        return self._read(name, self.backbone.dtype)

    def _vector(self, name: str) -> Tensor:
        return self._read(name, torch.float32)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        assert self.backbone.read is not None, "a backbone that was loaded"
        return Blocks.of(self.backbone.read(name)).floats(dtype, self.device)

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for tensor in LAYER:
            if tensor.exists(self.config):
                read = self._matrix if tensor.is_matrix else self._vector
                found[tensor.name] = read(f"model.layers.{index}.{tensor.name}.weight")
            if tensor.has_bias(self.config):
                found[f"{tensor.name}.bias"] = self._matrix(f"model.layers.{index}.{tensor.name}.bias")
        return found

    @torch.no_grad()
    def states(self, tokens_BT: Tensor, taps: Collection[int]) -> dict[int, Tensor]:
        """Returns the states at each tap, [B, T, d] in the number type of the products; padding comes last."""
        cosine_TD, sine_TD = (table[: tokens_BT.shape[1]] for table in self.backbone.rotations(tokens_BT.shape[1]))
        rotation = torch.cat([cosine_TD, cosine_TD], -1), torch.cat([-sine_TD, sine_TD], -1)
        highest = self.config.layers if FINAL_NORM in taps else max(taps, default=0)
        hidden_BTd = self._embedding_Vd[tokens_BT.to(self.device)].float()
        found = {0: hidden_BTd.to(self.dtype, copy=True)} if 0 in taps else {}
        with attention_on(self.device):
            for index in range(highest):
                self._run_layer(index, hidden_BTd, rotation)
                if index + 1 in taps:
                    found[index + 1] = hidden_BTd.to(self.dtype, copy=True)  # it changes in place
        if FINAL_NORM in taps:
            found[FINAL_NORM] = self._norm(hidden_BTd, self._final_norm_d)
        return found

    def _run_layer(self, index: int, hidden_BTd: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        """Adds a layer to the streams, in place."""
        c, layer = self.config, self._layers[index]

        def linear(name: str, x: Tensor) -> Tensor:
            bias = layer.get(f"{name}.bias")
            return F.linear(x, layer[name].to(self.dtype), None if bias is None else bias.to(self.dtype))

        x_BTd = self._norm(hidden_BTd, layer["input_layernorm"])
        q, k, v = (linear(f"self_attn.{name}_proj", x_BTd).unflatten(-1, (-1, c.head_dim)) for name in "qkv")
        if c.qk_norm:
            q, k = self._norm(q, layer["self_attn.q_norm"]), self._norm(k, layer["self_attn.k_norm"])
        mixed_BHTD = F.scaled_dot_product_attention(
            self._rotated(q, rotation).transpose(1, 2), self._rotated(k, rotation).transpose(1, 2), v.transpose(1, 2),
            **_mask(c.windows[index], x_BTd.shape[1], self.device), enable_gqa=c.heads != c.kv_heads,
        )  # fmt: skip
        hidden_BTd += linear("self_attn.o_proj", mixed_BHTD.transpose(1, 2).flatten(2))
        x_BTd = self._norm(hidden_BTd, layer["post_attention_layernorm"])
        gated = F.silu(linear("mlp.gate_proj", x_BTd), inplace=True).mul_(linear("mlp.up_proj", x_BTd))
        hidden_BTd += linear("mlp.down_proj", gated)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], weight, self.config.eps).to(self.dtype)

    def _rotated(self, x_BTHD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Turns feature i with feature i + D/2 by the position's angle."""
        cosine_TD, sine_TD = (angles_TD[:, None] for angles_TD in rotation)
        return torch.addcmul(x_BTHD * cosine_TD, x_BTHD.roll(x_BTHD.shape[-1] // 2, -1), sine_TD).to(self.dtype)

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


def _mask(window: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """The arguments of attention to the last `window` positions, or to all before (0)."""
    if not 0 < window < tokens:
        return {"is_causal": True}
    ones_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return {"attn_mask": ones_TT.tril() & ~ones_TT.tril(-window)}


@contextmanager
def attention_on(device: torch.device) -> Iterator[None]:
    """Attention for batches of many lengths: on a GPU not cuDNN's, which makes a plan for every new one."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield
