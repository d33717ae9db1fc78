"""The fast backbone: packed weights, and one call into the compiled kernels for any range of layers.

Every weight matrix is packed once into panels (and its original dropped), query, key and value projections fused,
gate and up interleaved. A tied embedding is read back from the packed head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.backbone.base import Adapters, Backbone, Beside, LinearLayer
from foretell.backbone.cpu import library
from foretell.backbone.cpu.formats import Format, PackedMatrix, format_for
from foretell.backbone.cpu.library import call, table
from foretell.backbone.cpu.linear import PackedLinear, ThreadedLinear
from foretell.backbone.cpu.panel_file import PanelFile
from foretell.backbone.kv_cache import KVCache
from foretell.backbone.nodes import Nodes
from foretell.errors import check
from foretell.loading.blocks import Blocks, Joined
from foretell.loading.cache_dir import StageProgress
from foretell.loading.config import ModelConfig
from foretell.loading.tensors import SIZES, parts

Reader = Callable[[str], Tensor | Blocks]
"""Gives a weight by its Hugging Face name."""


class CompiledBackbone(Backbone):
    """The compiled backbone; `read` is called once per weight.

    Args:
        file: keeps the packed weights, or has kept them.
        progress: called with the fraction that is packed, layer by layer.

    Attributes:
        build: the kernels; bf16: 1 if `dtype` is bfloat16, else 0.
        about: the layers, as they are described to the kernels.
        norm_weight: of the final norm, float32 [d].
        embedding: a row per token; of a tied model the packed head.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Reader,
        dtype: torch.dtype,
        threads: int,
        build: library.Build | None = None,
        file: PanelFile | None = None,
        progress: StageProgress = lambda fraction: None,
    ):
        super().__init__(config, dtype, torch.device("cpu"), threads)
        check(self.supports(config), f"{config.heads} query heads over {config.kv_heads} are too many for the kernels.")
        self.build = build or library.default()
        self.kernels = self.build.name
        self.bf16 = int(dtype == torch.bfloat16)
        self._formats = set[str]()
        self._file = file
        layers = []
        for i in range(config.layers):
            layers.append(self._layer(i, read))
            progress((i + 1) / (config.layers + 1))
        self.norm_weight = _vector(_checked(read("model.norm.weight"), (config.hidden,)))
        self._head = self._packed(Joined.of(read("model.embed_tokens.weight" if config.tied else "lm_head.weight")))
        self.embedding = self._head.matrix
        if not config.tied:
            embedding = Joined.of(read("model.embed_tokens.weight"))
            self.embedding = PackedMatrix(embedding, self._format(embedding, packed=False), self.build, file=file)
        fits = self.embedding.inputs == self._head.inputs == config.hidden
        check(fits, "The embedding is as wide as the model.")
        check(config.head_dim == 2 * len(config.inv_freq), "Every pair of a head's numbers has a frequency.")
        self.quantized = ", ".join(sorted(self._formats))
        sizes = (getattr(config, size) for size in SIZES)
        self.about = library.Model(*sizes, threads, config.eps, table(layers))

    @staticmethod
    def supports(config: ModelConfig) -> bool:
        """The kernels put the query heads of one key head into one tile of sixteen rows."""
        return config.heads // config.kv_heads <= 16

    def _layer(self, index: int, read: Reader) -> library.Layer:
        c, fields = self.config, dict[str, Any](window=self.config.windows[index])
        for part, tensors in parts(c).items():
            names = {f"model.layers.{index}.{tensor.name}": tensor.shape(c) for tensor in tensors}
            weights = [_checked(read(f"{name}.weight"), shape) for name, shape in names.items()]
            if not tensors[0].is_matrix:
                fields[part] = _vector(weights[0])
                continue
            join: Callable[[list[Tensor]], Tensor] = _interleave if tensors[0].alternates else torch.cat
            bias = None
            if tensors[0].has_bias(c):
                bias = join([Blocks.of(read(f"{name}.bias")).floats(torch.float32) for name in names])
            linear = self._joined(weights, bias) if join is torch.cat else self._packed(Joined(weights, join), bias)
            fields[part], fields[f"{part}_bias"] = linear.matrix.about, linear.bias
        return library.Layer(*(fields.get(field[0]) for field in library.Layer._fields_))

    def _joined(self, weights: Sequence[Blocks], bias: Tensor | None) -> PackedLinear:
        """Packs weights whose outputs follow one another: each as it is stored, if full panels allow it."""
        groups = [list(group) for _, group in groupby(weights, key=lambda weight: weight.type)]
        if any(weight.shape[0] % 32 for weight in weights):
            groups = [list(weights)]
        first, *others = [Joined(group) for group in groups]
        rest = None
        for weight in reversed(others):
            rest = PackedMatrix(weight, self._format(weight), self.build, rest, self._file)
        return PackedLinear(first, bias, self.build, self._format(first), rest, self._file)

    def _packed(self, weight: Joined, bias: Tensor | None = None) -> PackedLinear:
        return PackedLinear(weight, bias, self.build, self._format(weight), file=self._file)

    def _format(self, weight: Joined, packed: bool = True) -> Format:
        format = format_for(weight, self.dtype, packed)
        if format.activations is None:
            self._formats.add(format.name)
        return format

    def embed(self, tokens_M: Tensor) -> Tensor:
        return self.embedding.rows(tokens_M)

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
        described = self.described(cache, nodes.rows, nodes.ends, end)
        # Copies and edits of streams happen in the kernels: PyTorch would wake a team of its own for them.
        input_Md, out_Md = hidden_Md.contiguous(), torch.empty_like(hidden_Md, memory_format=torch.contiguous_format)
        tapped = {tap: input_Md if tap == begin else torch.empty_like(out_Md) for tap in taps}
        pointers = table([tapped.get(tap) for tap in range(end + 1)]) if tapped else None
        adapted = None
        if beside:
            adapters, rows_N = self.own_adapters(beside.adapters), beside.rows_N.contiguous()
            adapted = library.Beside(len(rows_N), adapters.rank, rows_N, *adapters.tables)
        span = library.Span(begin, end, np.frombuffer(skip, dtype=np.uint8) if skip else None, pointers, adapted)
        call("layers", self.build, self.about, described, self._rows(nodes), span, input_Md, out_Md, self.bf16)
        return out_Md, tapped

    def attention(self, queries_MHD: Tensor, nodes: Nodes, cache: KVCache, repeats: int = 1) -> Tensor:
        """The attention of layer 0 alone, [M, H, D]: for tests against the slow twin, and for measurements."""
        queries_MHD = queries_MHD.contiguous()
        shape = (len(nodes), self.config.heads, self.config.head_dim)
        check(queries_MHD.shape == shape and queries_MHD.dtype == self.dtype, f"Queries are {self.dtype}, {shape}.")
        out_MHD = torch.empty_like(queries_MHD)
        described = self.described(cache, nodes.rows, nodes.ends, 1)
        call(
            "attention", self.build, self.about, described, self._rows(nodes), queries_MHD, out_MHD, repeats, self.bf16
        )  # fmt: skip
        return out_MHD

    def norm(self, hidden_Md: Tensor) -> Tensor:
        check(hidden_Md.shape[1:] == (self.config.hidden,), f"A state has {self.config.hidden} numbers.")
        check(hidden_Md.dtype == torch.float32, f"States are float32, not {hidden_Md.dtype}.", TypeError)
        hidden_Md = hidden_Md.contiguous()
        states_Md = torch.empty_like(hidden_Md)
        call("norm", self.build, hidden_Md, self.norm_weight, self.config.eps, *hidden_Md.shape, states_Md)
        return states_Md

    def logits(self, states_Md: Tensor) -> Tensor:
        return self._head(states_Md, self.threads)

    def argmax(self, states_Md: Tensor) -> Tensor:
        return self._head.argmax(states_Md, self.threads)

    def linear(self, weight_NK: Tensor | Blocks, bias_N: Tensor | None) -> ThreadedLinear:
        format = format_for(Joined.of(weight_NK), self.dtype)
        return ThreadedLinear(PackedLinear(weight_NK, bias_N, self.build, format), self.threads)

    def adapters(self, linears: Sequence[tuple[LinearLayer, LinearLayer]], begin: int = 0) -> PackedAdapters:
        return PackedAdapters(linears, begin, self)

    def own_adapters(self, adapters: Adapters) -> PackedAdapters:
        """Returns the same adapters; refuses those of another backbone, whose matrices may be of another shape."""
        if not isinstance(adapters, PackedAdapters) or adapters.backbone is not self:
            raise ValueError("Adapters are of the backbone that runs.")
        return adapters

    def _alike(self, config: ModelConfig, weights: Mapping[str, Tensor | Blocks]) -> CompiledBackbone:
        return CompiledBackbone(config, weights.__getitem__, self.dtype, self.threads, self.build)

    def head_rows(self, ids_N: Tensor) -> Tensor:
        return self._head.matrix.rows(ids_N).to(self.dtype)

    def described(
        self, cache: KVCache, rows: Sequence[int], ends: Sequence[int], layers: int | None = None
    ) -> library.Cache:
        """Returns the structure of a cache for the kernels, once it has room; see `check_room`."""
        self.check_room(cache, rows, ends, self.config.layers if layers is None else layers)
        layer, head = cache.keys.stride()[:2]
        return library.Cache(cache.keys, cache.values, layer, cache.starts, head)

    def _rows(self, nodes: Nodes) -> library.Rows:
        angles = self.rotations(nodes.last + 1)
        return library.Rows.of(len(nodes), len(nodes.trees), nodes.words, nodes.table_offsets, *angles)


class PackedAdapters(Adapters):
    """See `Adapters`.

    Attributes:
        backbone: whose layers they lie beside.
        rank: of all of them.
        tables: their first and their second matrices, layer by layer, as they are described to the kernels.
    """

    def __init__(self, linears: Sequence[tuple[LinearLayer, LinearLayer]], begin: int, backbone: CompiledBackbone):
        super().__init__(linears, begin)
        self.backbone, d, layers = backbone, backbone.config.hidden, backbone.config.layers
        packed = [linear.packed for pair in linears for linear in pair if isinstance(linear, ThreadedLinear)]
        own = all(each.build == backbone.build and each.matrix.activations in (None, backbone.dtype) for each in packed)
        check(own and len(packed) == 2 * len(linears), "Adapters are of the backbone's own kernels.")
        check(0 <= begin < self.end <= layers, f"Adapters lie beside some of the {layers} layers.")
        self.rank = packed[0].outputs
        for down, up in zip(packed[::2], packed[1::2], strict=True):
            fits = (down.inputs, down.outputs, up.inputs, up.outputs) == (d, self.rank, self.rank, d)
            check(
                fits and down.bias is up.bias is None, f"Adapters lead from {d} numbers to one rank and back, unbiased."
            )
        unused = library.Matrix(None, None, 0, 0, 0, None)
        self.tables = [
            table([*[unused] * begin, *(each.matrix.about for each in packed[which::2])]) for which in (0, 1)
        ]


def _checked(read: Tensor | Blocks, shape: tuple[int, ...]) -> Blocks:
    weight = Blocks.of(read)
    check(weight.shape == shape, f"A weight of shape {weight.shape} should have the shape {shape}.")
    return weight


def _vector(weight: Blocks) -> Tensor:
    return weight.floats().to(torch.float32, copy=True).contiguous()


def _interleave(gate_and_up: Sequence[Tensor]) -> Tensor:
    """32 rows of gate, their 32 rows of up, and so on: both halves of SiLU(gate)·up end on the same thread."""
    gate, up = gate_and_up
    padding = -gate.shape[0] % 32
    if padding:
        gate, up = (torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in (gate, up))
    pairs = torch.stack([gate.view(-1, 32, *gate.shape[1:]), up.view(-1, 32, *up.shape[1:])], dim=1)
    return pairs.flatten(0, 2)
