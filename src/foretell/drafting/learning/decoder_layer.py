"""A drafter's own decoder layer in training.

Legend: B conversations, T tokens, H heads, D width of a head, d hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.drafting.learning.number_types import number_type, product
from foretell.loading.config import ModelConfig
from foretell.loading.tensors import ATTENTION, LAYER, bare, layer_shapes


class DecoderLayer(nn.Module):
    """A decoder layer of the backbone's shape; it starts as the identity.

    Its tensors have the names that `Backbone.own_layers` reads. Float32, multiplied as `number_types` says.

    Args:
        rotation: of the backbone: positions -> cosine and sine.
        mlp: false leaves attention alone.
    """

    def __init__(self, config: ModelConfig, rotation: Callable[[Tensor], tuple[Tensor, Tensor]], mlp: bool = True):
        super().__init__()
        self.config, self.rotation, self.mlp = config, rotation, mlp
        weights: dict[str, Tensor] = {}
        for full_name, shape in layer_shapes(bare(config), LAYER if mlp else ATTENTION).items():
            name = full_name.removesuffix(".weight")
            weights[name] = torch.randn(shape) / math.sqrt(shape[-1]) if len(shape) > 1 else torch.ones(shape)
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                weights[name].zero_()  # adds nothing at first
        self.weights = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in weights.items()})

    def named(self) -> dict[str, Tensor]:
        return {f"{name.replace('/', '.')}.weight": weight for name, weight in self.weights.items()}

    def forward(self, h_BTd: Tensor) -> Tensor:
        c = self.config
        x_BTd = self._norm("input_layernorm", h_BTd)
        q, k, v = (
            self._linear(f"self_attn/{name}_proj", x_BTd).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        cosine_TD, sine_TD = self.rotation(torch.arange(h_BTd.shape[1]))
        # on a processor the gradient of attention takes four times as long in bfloat16
        dtype = number_type(h_BTd.device) if h_BTd.is_cuda else torch.float32
        mixed = F.scaled_dot_product_attention(
            _rotated(q, cosine_TD, sine_TD).to(dtype), _rotated(k, cosine_TD, sine_TD).to(dtype), v.to(dtype),
            is_causal=True, enable_gqa=c.heads != c.kv_heads,
        )  # fmt: skip
        h_BTd = h_BTd + self._linear("self_attn/o_proj", mixed.transpose(1, 2).flatten(2))
        if not self.mlp:
            return h_BTd
        x_BTd = self._norm("post_attention_layernorm", h_BTd)
        gated = F.silu(self._linear("mlp/gate_proj", x_BTd)) * self._linear("mlp/up_proj", x_BTd)
        return h_BTd + self._linear("mlp/down_proj", gated)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return product(x, self.weights[name])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.config.eps)


def _rotated(x_BHTD: Tensor, cosine_TD: Tensor, sine_TD: Tensor) -> Tensor:
    one, other = x_BHTD.chunk(2, -1)
    cosine, sine = cosine_TD.to(x_BHTD), sine_TD.to(x_BHTD)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)
