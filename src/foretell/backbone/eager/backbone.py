"""The readable backbone: the same step as the compiled kernels in plain PyTorch.

It is the slow twin that the kernels are tested against, the fallback where they were not compiled, and the path on
a GPU. Its attention is canonical by construction: every query row gathers its own keys in path order, products are
summed over the head width, and sums over keys run in blocks of 64 and then block by block, so that neither the
number of rows nor the length of another row's path can change a bit.

Legend: M nodes, H query heads, G key/value heads, D head width, T keys of the longest path, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone.base import SKIP_ATTENTION, SKIP_MLP, Backbone, Beside, check_ids
from foretell.backbone.eager.linear import Linear
from foretell.backbone.kv_cache import KVCache
from foretell.backbone.nodes import Nodes
from foretell.loading.blocks import Blocks
from foretell.loading.config import ModelConfig
from foretell.loading.tensors import parts

BLOCK = 64
MAX_PRODUCTS = 1 << 20
"""Rows are processed in chunks whose gathered products stay below this many numbers."""


@dataclass(kw_only=True)
class EagerLayer:
    """The parts of `loading.tensors.LAYER`."""

    attention_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int

    @property
    def linears(self) -> list[Linear]:
        return [part for part in vars(self).values() if isinstance(part, Linear)]


class EagerBackbone(Backbone):
    """See `Backbone`. `read` is called once per weight."""

    def __init__(
        self,
        config: ModelConfig,
        read: Callable[[str], Tensor | Blocks],
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
        *,
        packed: bool = True,
    ):
        super().__init__(config, dtype, device, threads)
        self.kernels = "eager"
        self._read, self._packed = read, packed
        self.layers = [self._layer(i) for i in range(config.layers)]
        self._final_norm = self._vector("model.norm")
        self._embedding = self._matrix("model.embed_tokens")
        self._head = Linear(self._embedding if config.tied else self._matrix("lm_head"), packed=packed)
        del self._read

    def _matrix(self, name: str) -> Tensor:
        return self._floats(f"{name}.weight", self.dtype)

    def _vector(self, name: str) -> Tensor:
        return self._floats(f"{name}.weight", torch.float32)

    def _floats(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return Blocks.of(self._read(name)).floats(dtype, self.device)

    def _fused(self, names: list[str], biased: bool) -> Linear:
        bias = torch.cat([self._floats(f"{name}.bias") for name in names]) if biased else None
        return Linear(torch.cat([self._matrix(name) for name in names]), bias, packed=self._packed)

    def _layer(self, index: int) -> EagerLayer:
        c, fields = self.config, dict[str, Any](window=self.config.windows[index])
        for part, tensors in parts(c).items():
            names = [f"model.layers.{index}.{tensor.name}" for tensor in tensors]
            if tensors[0].is_matrix:
                fields[part] = self._fused(names, tensors[0].has_bias(c))
            else:
                fields[part] = self._vector(names[0])
        return EagerLayer(**fields)

    def pad_rows(self, rows: int) -> bool:
        for layer in self.layers:
            for linear in layer.linears:
                linear.min_rows = rows
        self._head.min_rows = rows
        return True

    def _alike(self, config: ModelConfig, weights: Mapping[str, Tensor | Blocks]) -> EagerBackbone:
        return EagerBackbone(config, weights.__getitem__, self.dtype, self.device, self.threads, packed=self._packed)

    def embed(self, tokens_M: Tensor) -> Tensor:
        check_ids(tokens_M, len(self._embedding))
        return self._embedding[tokens_M.to(self.device)].float()

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
        beside: Beside | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        end = self.config.layers if end is None else end
        self.check_pass(hidden_Md, nodes, begin, end, skip, taps, beside)
        self.check_room(cache, nodes.rows, nodes.ends, end)
        rotation = self.rotation(torch.from_numpy(nodes.positions).long())
        starts_M = self._starts(nodes, cache)
        tapped = {begin: hidden_Md} if begin in taps else {}
        rows_N = beside.rows_N.to(self.device) if beside else None
        for index in range(begin, end):
            layer, plan = self.layers[index], skip[index] if skip else 0
            added_Nd = beside.adapters.beside(index, hidden_Md[rows_N]) if beside else None
            if not plan & SKIP_ATTENTION:
                hidden_Md = hidden_Md + self._attention(layer, index, hidden_Md, nodes, cache, starts_M, rotation)
            if not plan & SKIP_MLP:
                normed_Md = rms_norm(hidden_Md, layer.mlp_norm, self.config.eps)
                gate_MF, up_MF = layer.gate_up(normed_Md).chunk(2, dim=-1)
                hidden_Md = hidden_Md + layer.down(F.silu(gate_MF) * up_MF)
            if rows_N is not None and added_Nd is not None:
                hidden_Md = hidden_Md.index_add(0, rows_N, added_Nd)
            if index + 1 in taps:
                tapped[index + 1] = hidden_Md
        return hidden_Md, tapped

    def _attention(
        self,
        layer: EagerLayer,
        index: int,
        hidden_Md: Tensor,
        nodes: Nodes,
        cache: KVCache,
        starts_M: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:
        c = self.config
        normed_Md = rms_norm(hidden_Md, layer.attention_norm, c.eps)
        queries, keys, values = layer.qkv(normed_Md).split([c.q_width, c.kv_width, c.kv_width], dim=-1)
        queries_MHD = queries.unflatten(-1, (c.heads, c.head_dim))
        keys_MGD = keys.unflatten(-1, (c.kv_heads, c.head_dim))
        if layer.query_norm is not None and layer.key_norm is not None:
            queries_MHD = rms_norm(queries_MHD, layer.query_norm, c.eps)
            keys_MGD = rms_norm(keys_MGD, layer.key_norm, c.eps)
        queries_MHD, keys_MGD = rotate(queries_MHD, *rotation), rotate(keys_MGD, *rotation)
        slots_M, paths_MT = nodes.on(self.device, BLOCK)
        values_MGD = values.unflatten(-1, (c.kv_heads, c.head_dim))
        at, writers = starts_M + slots_M, nodes.writers
        cache.keys[index][:, at[writers]] = keys_MGD[writers].to(self.dtype).transpose(0, 1)
        cache.values[index][:, at[writers]] = values_MGD[writers].to(self.dtype).transpose(0, 1)
        mixed_MHD = attend(
            queries_MHD.to(self.dtype), cache.keys[index], cache.values[index], starts_M, paths_MT, layer.window
        )
        return layer.out(mixed_MHD.flatten(1))

    def _starts(self, nodes: Nodes, cache: KVCache) -> Tensor:
        """Returns the first slot in the pool of each node's cache row, [M]."""
        return torch.from_numpy(cache.starts[nodes.cache_rows[nodes.sequence]] // cache.keys.shape[3]).to(self.device)

    def norm(self, hidden_Md: Tensor) -> Tensor:
        return rms_norm(hidden_Md, self._final_norm, self.config.eps)

    def logits(self, states_Md: Tensor) -> Tensor:
        return self._head(states_Md)

    def linear(self, weight_NK: Tensor | Blocks, bias_N: Tensor | None) -> Linear:
        bias_N = None if bias_N is None else bias_N.to(self.device)
        return Linear(Blocks.of(weight_NK).floats().to(self.device, self.dtype), bias_N, packed=self._packed)

    def head_rows(self, ids_N: Tensor) -> Tensor:
        check_ids(ids_N, self.config.vocab)
        if self.config.tied:
            return self._embedding[ids_N.to(self.device)]
        unit_dd = torch.eye(self.config.hidden, device=self.device)  # a packed matrix shows itself only in products
        return self._head(unit_dd)[:, ids_N.to(self.device)].T.to(self.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x_MHD: Tensor, cosine_M: Tensor, sine_M: Tensor) -> Tensor:
    """Rotary embedding: turns feature i with feature i + D/2 by the position's angle."""
    a, b = x_MHD.chunk(2, dim=-1)
    cosine, sine = cosine_M[:, None], sine_M[:, None]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def attend(
    queries_MHD: Tensor, keys_GSD: Tensor, values_GSD: Tensor, starts_M: Tensor, paths_MT: Tensor, window: int
) -> Tensor:
    """Each row attends to its own path: softmax(q·k/√D)·v over the last `window` keys (0: all), [M, H, D] float32.

    Args:
        keys_GSD, values_GSD: of one layer, the pool of all rows.
        starts_M: first slot in the pool of each row's cache row.
        paths_MT: see `Nodes.paths_MT`; padded to full blocks.
    """
    chunk = max(1, MAX_PRODUCTS // (paths_MT.shape[1] * queries_MHD[0].numel()))
    pieces = [
        _attend(
            queries_MHD[i : i + chunk], keys_GSD, values_GSD, starts_M[i : i + chunk], paths_MT[i : i + chunk], window
        )
        for i in range(0, len(starts_M), chunk)
    ]
    return torch.cat(pieces)


def _attend(
    queries_MHD: Tensor, keys_GSD: Tensor, values_GSD: Tensor, starts_M: Tensor, paths_MT: Tensor, window: int
) -> Tensor:
    D, G = queries_MHD.shape[-1], keys_GSD.shape[0]
    queries_MGCD = queries_MHD.float().unflatten(1, (G, -1))  # C query heads share a key head
    slots_MT, valid_MT = starts_M[:, None] + paths_MT.clamp(min=0), paths_MT >= 0
    if window:
        distance_MT = valid_MT.sum(1, keepdim=True) - 1 - torch.arange(paths_MT.shape[1], device=paths_MT.device)
        valid_MT = valid_MT & (distance_MT < window)
    keys_MTGD = keys_GSD.transpose(0, 1)[slots_MT].contiguous().float()
    scores_MTGC = (queries_MGCD[:, None] * keys_MTGD[:, :, :, None]).sum(-1) * D**-0.5
    scores_MTGC = scores_MTGC.masked_fill(~valid_MT[..., None, None], float("-inf"))
    weights_MTGC = (scores_MTGC - scores_MTGC.amax(1, keepdim=True)).exp()
    total_MGC = _sum_keys(weights_MTGC.double()).float()
    values_MTGD = values_GSD.transpose(0, 1)[slots_MT].contiguous().float().masked_fill(~valid_MT[..., None, None], 0)
    weights_MTGC = weights_MTGC.to(keys_GSD.dtype).float()
    mixed_MGCD = _sum_keys(weights_MTGC[..., None] * values_MTGD[:, :, :, None])
    return (mixed_MGCD / total_MGC[..., None]).flatten(1, 2)


def _sum_keys(x: Tensor) -> Tensor:
    """Sum over keys (dimension 1) in an order that does not depend on how many there are: inside blocks, then on."""
    return x.unflatten(1, (-1, BLOCK)).sum(2).cumsum(1)[:, -1]
