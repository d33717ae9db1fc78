"""The sizes and switches that a model is built from, the same for every family.

`families.py` reads a Hugging Face config once, with its defaults, its renamed keys and its nested rope
settings, and keeps here only what a forward pass needs. Later code never branches on the family.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer: pre-norm, RoPE, grouped-query attention, gated SiLU MLP.

    Attributes:
        family: the row of `families.FAMILIES` it was read with.
        inv_freq: one float32 frequency per pair of head dimensions, every static scaling already applied.
        rope_scale: the factor on cos and sin (YaRN's attention scaling; 1 for the others).
        attention_bias: whether the q, k and v projections have a bias.
        out_bias: whether the attention output projection has one.
        mlp_bias: whether the gate, up and down projections have one.
        qk_norm: whether every head's query and key pass an RMSNorm of width `head_dim` before RoPE.
        windows: per layer, how many positions a query sees, itself included; 0 means all before it.
        eos_ids: any of these ends a generation.
        dtype: the float type the checkpoint was saved in, by its torch name.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    eps: float
    tied: bool
    max_positions: int
    inv_freq: tuple[float, ...]
    rope_scale: float
    attention_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    eos_ids: tuple[int, ...]
    dtype: str

    @property
    def q_width(self) -> int:
        """Columns of all query heads together; not always `hidden` (Qwen3, some Mistrals)."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim
