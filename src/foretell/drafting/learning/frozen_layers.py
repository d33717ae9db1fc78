"""The backbone's layers in plain PyTorch, frozen: gradients pass through them to what runs through them.

They are read from the backbone's files; decoding's own are packed for its kernels. Streams are float32, and weights are
cast for each product to the number type of the training.

Legend: B conversations, T tokens of the longest, M rows in any arrangement, H query heads, G key/value heads, D head
width, d hidden width, F MLP width, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone import Backbone
from foretell.drafting.heads import normed
from foretell.drafting.learning.number_types import number_type, product
from foretell.loading.blocks import Blocks
from foretell.loading.tensors import LAYER


class FrozenLayers:
    """Layers of a loaded backbone; their weights are cast for each product, which costs a hundredth of it.

    Args:
        backbone: its `read` gives the weights: a GPU holds them a second time, a processor maps them.
        begin, end: the layers that are needed; by default all.
        dtype: of the products; by default what `number_types` says, and float32 for float32 weights.
    """

    def __init__(
        self, backbone: Backbone, begin: int = 0, end: int | None = None, dtype: torch.dtype | None = None
    ):  # fmt: skip
        self.backbone, self.config, self.device = backbone, backbone.config, backbone.device
        self._dtype = torch.float32 if backbone.dtype == torch.float32 else dtype
        self.layers = {
            index: self._read_layer(index) for index in range(begin, backbone.config.layers if end is None else end)
        }
        self.final_norm_d = self.vector("model.norm.weight")

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the products."""
        return self._dtype or number_type(self.device)

    def matrix(self, name: str) -> Tensor:
        """A weight in the backbone's number type; on a CPU it may lie in a file that is mapped into memory."""
        return self._read(name, self.backbone.dtype)

    def vector(self, name: str) -> Tensor:
        return self._read(name, torch.float32)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        assert self.backbone.read is not None, "a backbone that was loaded"
        return Blocks.of(self.backbone.read(name)).floats(dtype, self.device)

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for tensor in LAYER:
            if tensor.exists(self.config):
                read = self.matrix if tensor.is_matrix else self.vector
                found[tensor.name] = read(f"model.layers.{index}.{tensor.name}.weight")
            if tensor.has_bias(self.config):
                found[f"{tensor.name}.bias"] = self.matrix(f"model.layers.{index}.{tensor.name}.bias")
        return found

    def linear(self, index: int, name: str, x_MK: Tensor) -> Tensor:
        """One of a layer's products."""
        layer = self.layers[index]
        bias = layer.get(f"{name}.bias")
        return F.linear(x_MK, layer[name].to(self.dtype), None if bias is None else bias.to(self.dtype))

    def norm(self, hidden_Md: Tensor, weight_d: Tensor) -> Tensor:
        return F.rms_norm(hidden_Md.float(), hidden_Md.shape[-1:], weight_d, self.config.eps).to(self.dtype)

    def run_layer(self, index: int, hidden_BTd: Tensor, cosine_TD: Tensor, sine_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Runs a layer over conversations, each token of which attends to those before it, without gradients.

        The streams change in place.

        Returns:
            The layer's keys and values [B, T, G, D].
        """
        with torch.no_grad():
            q, k, v = self.projected(index, hidden_BTd, cosine_TD, sine_TD)
            self.finished(index, hidden_BTd, self.attended(index, q, k, v), inplace=True)
        return k, v

    def attended(self, index: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        """Mixes, for each token, the values up to its own by its query, [B, T, H·D]."""
        window, tokens = self.config.windows[index], q_BTHD.shape[1]
        if q_BTHD.requires_grad and q_BTHD.is_cpu:  # the gradient of attention takes four times as long in bfloat16
            q_BTHD, k_BTGD, v_BTGD = q_BTHD.float(), k_BTGD.float(), v_BTGD.float()
        q, k, v = (each.transpose(1, 2) for each in (q_BTHD, k_BTGD, v_BTGD))
        mixed_BHTD = F.scaled_dot_product_attention(
            q, k, v, **_mask(window, tokens, self.device), enable_gqa=q.shape[1] != k.shape[1]
        )
        return mixed_BHTD.transpose(1, 2).flatten(2).to(self.dtype)

    def projected(
        self, index: int, hidden_Md: Tensor, cosine_M: Tensor, sine_M: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [.., H, D], keys and values [.., G, D] of a layer, the first two turned by their positions.

        Args:
            cosine_M, sine_M: as `angles` gives them, [.., D].
        """
        x_Md = self.norm(hidden_Md, self.layers[index]["input_layernorm"])
        q, k = (self._turned(self._heads(index, name, x_Md), cosine_M, sine_M) for name in "qk")
        return q, k, self._heads(index, "v", x_Md)

    def queries(self, index: int, hidden_Md: Tensor, cosine_M: Tensor, sine_M: Tensor) -> Tensor:
        """The first of what `projected` returns."""
        x_Md = self.norm(hidden_Md, self.layers[index]["input_layernorm"])
        return self._turned(self._heads(index, "q", x_Md), cosine_M, sine_M)

    def _heads(self, index: int, name: str, x_Md: Tensor) -> Tensor:
        """One of the three projections, head by head, normed where the family does that."""
        x_MHD = self.linear(index, f"self_attn.{name}_proj", x_Md).unflatten(-1, (-1, self.config.head_dim))
        if self.config.qk_norm and name != "v":
            x_MHD = self.norm(x_MHD, self.layers[index][f"self_attn.{name}_norm"])
        return x_MHD

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the first positions [positions, D], the sine signed as `projected` reads it."""
        cosine, sine = (table[:positions] for table in self.backbone.rotations(positions))
        return torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)

    def _turned(self, x_MHD: Tensor, cosine_M: Tensor, sine_M: Tensor) -> Tensor:
        """Turns feature i with feature i + D/2 by the position's angle."""
        cosine_MD, sine_MD = cosine_M[..., None, :], sine_M[..., None, :]
        return torch.addcmul(x_MHD * cosine_MD, x_MHD.roll(x_MHD.shape[-1] // 2, -1), sine_MD).to(self.dtype)

    def finished(self, index: int, hidden_Md: Tensor, mixed_MK: Tensor, inplace: bool = False) -> Tensor:
        """The stream after a layer whose attention gave `mixed_MK` [.., H·D].

        Args:
            inplace: changes the stream, as no gradient allows; a large batch need not be copied at every layer.
        """
        hidden_Md = _sum(hidden_Md, self.linear(index, "self_attn.o_proj", mixed_MK), inplace)
        x_Md = self.norm(hidden_Md, self.layers[index]["post_attention_layernorm"])
        gate_MF, up_MF = (self.linear(index, f"mlp.{name}_proj", x_Md) for name in ("gate", "up"))
        active_MF = F.silu(gate_MF, inplace=True).mul_(up_MF) if inplace else F.silu(gate_MF) * up_MF
        return _sum(hidden_Md, self.linear(index, "mlp.down_proj", active_MF), inplace)


def beside(hidden_Md: Tensor, down_rd: Tensor, up_dr: Tensor) -> Tensor:
    """Returns what an adapter beside a layer adds behind it, [.., d], given the stream in front of it."""
    return product(F.silu(product(normed(hidden_Md), down_rd)), up_dr)


def _sum(x: Tensor, y: Tensor, inplace: bool) -> Tensor:
    return x.add_(y) if inplace else x + y


def _mask(window: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """The arguments of attention to the last `window` positions, or to all before (0)."""
    if not 0 < window < tokens:
        return {"is_causal": True}
    ones_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return {"attn_mask": ones_TT.tril() & ~ones_TT.tril(-window)}
