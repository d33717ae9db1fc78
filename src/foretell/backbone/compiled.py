"""The fast backbone: packed weights, and one call into the compiled kernels for any range of layers.

Every weight matrix is packed once into panels (and its original dropped), query, key and value projections fused,
gate and up interleaved. A tied embedding is read back from the packed head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from ctypes import addressof, byref, c_uint64

import torch
from torch import Tensor

from foretell.backbone import kernels
from foretell.backbone.base import Backbone
from foretell.backbone.cache import KVCache
from foretell.backbone.config import ModelConfig
from foretell.backbone.kernels import PackedGrower, PackedHeads, PackedLinear, ThreadedLinear, address
from foretell.backbone.linear import DrafterHeads, LevelDrafting, LowerDrafting, TreeClimber
from foretell.backbone.nodes import Nodes
from foretell.backbone.prefix import PrefixLayer

Reader = Callable[[str], Tensor]
"""Gives a weight by its Hugging Face name."""


class CompiledBackbone(Backbone):
    """See `Backbone`. `read` is called once per weight."""

    def __init__(
        self, config: ModelConfig, read: Reader, dtype: torch.dtype, threads: int, build: kernels.Build | None = None
    ):
        super().__init__(config, dtype, torch.device("cpu"), threads)
        self.build = build or kernels.default()
        self.kernels = self.build.name
        self._bf16 = int(dtype == torch.bfloat16)
        self._kept: list[Tensor | PackedLinear] = []  # what the structures below point to
        self._layers = (kernels.Layer * config.layers)()
        for index, layer in enumerate(self._layers):
            self._fill(layer, f"model.layers.{index}.", read)
            layer.window = config.windows[index]
        self._norm = self._vector(read("model.norm.weight"))
        self._head = self._packed(read("model.embed_tokens.weight" if config.tied else "lm_head.weight"))
        self._embedding = None if config.tied else read("model.embed_tokens.weight").to(dtype)
        self._model = kernels.Model(
            config.hidden, config.heads, config.kv_heads, config.head_dim, config.mlp, threads, config.eps, self._layers
        )

    @staticmethod
    def supports(config: ModelConfig) -> bool:
        """The kernels put the query heads of one key head into one tile of sixteen rows."""
        return config.heads // config.kv_heads <= 16

    def _vector(self, weight: Tensor, padded: int = 0) -> Tensor:
        vector = torch.zeros(max(padded, weight.numel()))
        vector[: weight.numel()] = weight
        self._kept.append(vector)
        return vector

    def _fill(self, layer: kernels.Layer, prefix: str, read: Reader) -> None:
        c = self.config

        def linear(field: str, weight: Tensor, bias: Tensor | None) -> None:
            packed = self._packed(weight, bias)
            self._kept.append(packed)
            setattr(layer, field, address(packed.packed))
            setattr(layer, f"{field}_bias", address(packed.bias))

        def read_all(names: list[str], biased: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            weights = [read(f"{prefix}{name}.weight") for name in names]
            return weights, [read(f"{prefix}{name}.bias").float() for name in names] if biased else None

        weights, biases = read_all([f"self_attn.{x}_proj" for x in "qkv"], c.attention_bias)
        linear("qkv", torch.cat(weights), None if biases is None else torch.cat(biases))
        weights, biases = read_all(["self_attn.o_proj"], c.out_bias)
        linear("out", weights[0], None if biases is None else biases[0])
        weights, biases = read_all(["mlp.gate_proj", "mlp.up_proj"], c.mlp_bias)
        linear("gate_up", _interleave(*weights), None if biases is None else _interleave(*biases))
        weights, biases = read_all(["mlp.down_proj"], c.mlp_bias)
        linear("down", weights[0], None if biases is None else biases[0])
        layer.attention_norm = address(self._vector(read(f"{prefix}input_layernorm.weight")))
        layer.mlp_norm = address(self._vector(read(f"{prefix}post_attention_layernorm.weight")))
        if c.qk_norm:
            layer.query_norm = address(self._vector(read(f"{prefix}self_attn.q_norm.weight")))
            layer.key_norm = address(self._vector(read(f"{prefix}self_attn.k_norm.weight")))

    def _packed(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        return PackedLinear(weight.to(self.dtype), bias, self.build)

    def embed(self, tokens_M: Tensor) -> Tensor:
        if self._embedding is None:
            return self._head.rows(tokens_M)
        return self._embedding.index_select(0, tokens_M).float()

    def run_layers(
        self,
        hidden_Md: Tensor,
        nodes: Nodes,
        cache: KVCache,
        begin: int = 0,
        end: int | None = None,
        *,
        skip: bytes | None = None,
        taps: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        end = self.config.layers if end is None else end
        cache.check(nodes.rows, nodes.ends)
        assert hidden_Md.shape == (len(nodes), self.config.hidden), "one state per node"
        assert hidden_Md.dtype == torch.float32
        # Copies and edits of whole streams happen in the kernels: PyTorch would wake a team of its own for them.
        input_Md, out_Md = hidden_Md.contiguous(), torch.empty_like(hidden_Md)
        tapped = {tap: input_Md if tap == begin else torch.empty_like(out_Md) for tap in taps}
        pointers = (c_uint64 * (self.config.layers + 1))()
        for tap, tensor in tapped.items():
            pointers[tap] = address(tensor) if tap > begin else 0
        skipping = torch.frombuffer(bytearray(skip), dtype=torch.uint8) if skip else None
        span = kernels.Span(begin, end, address(skipping), addressof(pointers))
        rows, _alive = self._rows(nodes)
        kernels.require().foretell_layers(
            self.build.handle, byref(self._model), byref(self._cache(cache)), byref(rows), byref(span),
            address(input_Md), address(out_Md), self._bf16,
        )  # fmt: skip
        return out_Md, tapped

    def attention(self, queries_MHD: Tensor, nodes: Nodes, cache: KVCache, repeats: int = 1) -> Tensor:
        """The attention of layer 0 alone, [M, H, D]: for tests against the slow twin, and for measurements."""
        queries_MHD = queries_MHD.contiguous()
        out_MHD = torch.empty_like(queries_MHD)
        rows, _alive = self._rows(nodes)
        kernels.require().foretell_attention(
            self.build.handle, byref(self._model), byref(self._cache(cache)), byref(rows), address(queries_MHD),
            address(out_MHD), repeats, self._bf16,
        )  # fmt: skip
        return out_MHD

    def norm(self, hidden_Md: Tensor) -> Tensor:
        hidden_Md = hidden_Md.contiguous()
        states_Md = torch.empty_like(hidden_Md)
        kernels.require().foretell_norm(
            self.build.handle, address(hidden_Md), address(self._norm), self.config.eps, *hidden_Md.shape,
            address(states_Md),
        )  # fmt: skip
        return states_Md

    def logits(self, states_Md: Tensor) -> Tensor:
        return self._head(states_Md, self.threads)

    def argmax(self, states_Md: Tensor) -> Tensor:
        return self._head.argmax(states_Md, self.threads)

    def linear(self, weight_NK: Tensor, bias_N: Tensor | None) -> ThreadedLinear:
        return ThreadedLinear(self._packed(weight_NK, bias_N), self.threads)

    def heads(
        self, blocks: Sequence[Sequence[tuple[Tensor, Tensor]]], outputs: Sequence[Tensor] | DrafterHeads,
        linear: bool = False,
    ) -> PackedHeads:  # fmt: skip
        return PackedHeads(blocks, outputs, linear, self.dtype, self.threads, self.build)

    def grower(self, drafting: LevelDrafting) -> PackedGrower:
        return PackedGrower(drafting, self._head if self._embedding is None else self._embedding, self.build)

    def climber(self, drafting: LowerDrafting) -> TreeClimber:
        from foretell.backbone.drafting import CompiledClimber

        return CompiledClimber(self, drafting)

    def prefix(self, tensors: Mapping[str, Tensor], fuse_dP: Tensor | None) -> PrefixLayer:
        from foretell.backbone.drafting import CompiledPrefix

        return CompiledPrefix(self, self.layer(tensors), fuse_dP)

    def _alike(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> CompiledBackbone:
        return CompiledBackbone(config, weights.__getitem__, self.dtype, self.threads, self.build)

    def head_rows(self, ids_N: Tensor) -> Tensor:
        return self._head.rows(ids_N).to(self.dtype)

    @property
    def embedding(self) -> tuple[Tensor, bool]:
        """A row a token, and whether they are packed."""
        return (self._head.packed, True) if self._embedding is None else (self._embedding, False)

    def _rows(self, nodes: Nodes) -> tuple[kernels.Rows, tuple[Tensor, Tensor]]:
        tables = self._rotations(nodes.last + 1)
        words = nodes.words.ctypes.data
        pointers = [words + 4 * place for place in nodes.places[:-1]]
        rows = kernels.Rows(len(nodes), len(nodes.trees), *pointers, *map(address, tables))
        return rows, tables  # the structure does not keep them alive

    @staticmethod
    def _cache(cache: KVCache) -> kernels.Cache:
        layer, head = cache.keys.stride()[:2]
        return kernels.Cache(address(cache.keys), address(cache.values), layer, cache.starts.ctypes.data, head)


def _interleave(gate: Tensor, up: Tensor) -> Tensor:
    """32 rows of gate, their 32 rows of up, and so on: both halves of SiLU(gate)·up end on the same thread."""
    padding = -gate.shape[0] % 32
    if padding:
        gate, up = (torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in (gate, up))
    pairs = torch.stack([gate.view(-1, 32, *gate.shape[1:]), up.view(-1, 32, *up.shape[1:])], dim=1)
    return pairs.flatten(0, 2)
