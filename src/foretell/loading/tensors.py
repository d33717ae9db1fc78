"""The tensors of a model: one table of a layer's, with their shapes and what is fused with what.

A row gives a tensor's name in a checkpoint, the numbers of `ModelConfig` that are its shape, and the part of a layer it
belongs to: the tensors of one part are multiplied together. Loading checks a folder against it, both backbones build
their layers from it (the compiled one also the structure that describes a layer to its kernels), and so do drafters
with a layer of their own. It lies in `loading`, the lowest floor that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from foretell.loading.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """One row of the table.

    Attributes:
        name: in a checkpoint, between "model.layers.0." and ".weight".
        part: what it is fused into; a part of one tensor is that tensor.
        sizes: names of the numbers in `ModelConfig` that are its shape: (outputs, inputs), or (width,) of a norm.
        bias: the switch in `ModelConfig` that says whether there is a ".bias" [outputs] too.
        only_if: the switch that says whether there is such a tensor at all.
        alternates: fused with its rows between those of its part's others, as what is multiplied pairwise lies side
            by side, where a backbone's layout gains by it.
    """

    name: str
    part: str
    sizes: tuple[str, ...]
    bias: str = ""
    only_if: str = ""
    alternates: bool = False

    @property
    def is_matrix(self) -> bool:
        return len(self.sizes) == 2

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(getattr(config, size) for size in self.sizes)

    def has_bias(self, config: ModelConfig) -> bool:
        return bool(self.bias) and getattr(config, self.bias)

    def exists(self, config: ModelConfig) -> bool:
        return not self.only_if or getattr(config, self.only_if)


ATTENTION = (
    LayerTensor("input_layernorm", "attention_norm", ("hidden",)),
    LayerTensor("self_attn.q_proj", "qkv", ("q_width", "hidden"), bias="attention_bias"),
    LayerTensor("self_attn.k_proj", "qkv", ("kv_width", "hidden"), bias="attention_bias"),
    LayerTensor("self_attn.v_proj", "qkv", ("kv_width", "hidden"), bias="attention_bias"),
    LayerTensor("self_attn.q_norm", "query_norm", ("head_dim",), only_if="qk_norm"),
    LayerTensor("self_attn.k_norm", "key_norm", ("head_dim",), only_if="qk_norm"),
    LayerTensor("self_attn.o_proj", "out", ("hidden", "q_width"), bias="out_bias"),
)
MLP = (
    LayerTensor("post_attention_layernorm", "mlp_norm", ("hidden",)),
    LayerTensor("mlp.gate_proj", "gate_up", ("mlp", "hidden"), bias="mlp_bias", alternates=True),
    LayerTensor("mlp.up_proj", "gate_up", ("mlp", "hidden"), bias="mlp_bias", alternates=True),
    LayerTensor("mlp.down_proj", "down", ("hidden", "mlp"), bias="mlp_bias"),
)
LAYER = ATTENTION + MLP
SIZES = ("hidden", "heads", "kv_heads", "head_dim", "mlp")
"""Numbers of `ModelConfig` that compiled kernels are given."""


def parts(config: ModelConfig | None = None) -> dict[str, list[LayerTensor]]:
    """Returns the parts of a layer in order, each with the tensors fused into it; with a config, those that exist."""
    found: dict[str, list[LayerTensor]] = {}
    for tensor in LAYER:
        if config is None or tensor.exists(config):
            found.setdefault(tensor.part, []).append(tensor)
    return found


def layer_shapes(config: ModelConfig, tensors: tuple[LayerTensor, ...] = LAYER) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of one layer, biases too, by its name behind "model.layers.0."."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in sorted(tensors, key=lambda tensor: not tensor.is_matrix):  # seeds of random weights go by this order
        if tensor.exists(config):
            shapes[f"{tensor.name}.weight"] = tensor.shape(config)
        if tensor.has_bias(config):
            shapes[f"{tensor.name}.bias"] = tensor.shape(config)[:1]
    return shapes


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a model by its Hugging Face name; a tied `lm_head.weight` is not listed."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, config.hidden)}
    for layer in range(config.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(config).items()}
    shapes["model.norm.weight"] = (config.hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, config.hidden)
    return shapes


def bare(config: ModelConfig) -> ModelConfig:
    """Returns the config of a layer that a drafter adds: this model's sizes, no biases, no norms within heads."""
    return replace(config, attention_bias=False, out_bias=False, mlp_bias=False, qk_norm=False)
