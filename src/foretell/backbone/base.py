"""The frozen model, opened at its layers: what every backbone offers, however it computes.

A pass is embed -> run_layers -> norm -> logits (or argmax). `run_layers` takes any range of layers, a plan of
sublayers to skip and a set of states to tap, so that a method may draft with the lower layers, start verification
half-way up, or insert rows there. The residual stream is float32 whatever the weights are.

Legend: M nodes of the pass, d hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone.kv_cache import KVCache
from foretell.backbone.nodes import Nodes
from foretell.errors import UsageError, check
from foretell.loading.blocks import Blocks
from foretell.loading.config import ModelConfig
from foretell.loading.tensors import ATTENTION, LAYER, bare, layer_shapes, weight_shapes

SKIP_ATTENTION, SKIP_MLP = 1, 2
"""Bits of a skip plan: `bytes` with one entry per layer."""


class LinearLayer(Protocol):
    """A linear layer through a backbone's kernels: weights of any origin, packed once."""

    def __call__(self, x_MK: Tensor) -> Tensor:
        """Returns y [M, N] float32 = x Wᵀ + b."""
        ...

    def top(self, x_MK: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns the `count` greatest outputs of each row, greatest first: values [M, count], indices int64."""
        ...


class Adapters:
    """Adapters beside layers (`Backbone.adapters`): each adds up(SiLU(down(x))) to a stream behind its layer, x being
    the stream in front of it divided by its root mean square.

    Attributes:
        begin: the first layer that has one; linears: down [r, d] and up [d, r] of this layer and those above it.
    """

    def __init__(self, linears: Sequence[tuple[LinearLayer, LinearLayer]], begin: int):
        self.linears, self.begin = list(linears), begin

    @property
    def end(self) -> int:
        """The layers below this one have adapters, from `begin` on."""
        return self.begin + len(self.linears)

    def beside(self, layer: int, hidden_Nd: Tensor) -> Tensor:
        """Returns what a layer's adapter adds behind it, [N, d], given the streams in front of it."""
        down, up = self.linears[layer - self.begin]
        return up(F.silu(down(F.rms_norm(hidden_Nd, hidden_Nd.shape[-1:], eps=1e-6))))


class Beside(NamedTuple):
    """Rows of a pass that go through adapters: `rows_N`, int64, ascending."""

    adapters: Adapters
    rows_N: Tensor


def check_ids(ids_M: Tensor, count: int) -> None:
    """Refuses ids that are not rows of a table of `count`: past its end lies other memory.

    Raises:
        TypeError: they are not int64.
        IndexError: one lies outside [0, count).
    """
    check(ids_M.dtype == torch.int64, f"Ids are {ids_M.dtype}; they must be torch.int64.", TypeError)
    check(ids_M.dim() == 1, f"Ids have shape {tuple(ids_M.shape)}; they must be a vector.")
    if not len(ids_M):
        return
    low, high = map(int, ids_M.aminmax())
    if low < 0 or high >= count:
        raise IndexError(f"Id {low if low < 0 else high} is outside the table; ids lie between 0 and {count - 1}.")


class Backbone(ABC):
    """A loaded model.

    Attributes:
        config: the sizes and switches it was built from.
        dtype: type of activations, keys and values: torch.float32 or torch.bfloat16.
        kernels: name of what computes, for reports ("amx", "eager", ...).
        quantized: formats of the weights that are multiplied as they are stored ("q4_k, q6_k"); empty without any.

    Known only once the model is there, so `load.assemble` sets them (drafters' own layers keep the defaults):
        read: gives a weight as it is stored, by its Hugging Face name; None where there is no file to read it from.
        fingerprint: identifies the weights; trained drafters are bound to it.
        nondeterminism: None if the probe found the arithmetic canonical, else one sentence on what differs.
        probe_seconds: seconds that the probe took, at this load or when its verdict was stored (see `canonical.py`).
        costs: file of measured step costs on this machine, or None (see `step_costs.py`); set by `foretell.load`.
    """

    kernels: str = "eager"
    quantized: str = ""
    nondeterminism: str | None = None
    probe_seconds: float = 0.0
    fingerprint: str = ""
    costs: Path | None = None
    read: Callable[[str], Tensor | Blocks] | None = None

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, threads: int):
        self.config, self.dtype, self.device, self.threads = config, dtype, device, threads
        self._angles = (torch.empty(0, config.head_dim // 2, device=device),) * 2

    @property
    def arithmetic(self) -> str:
        """The types of its numbers, for reports."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}, weights as stored ({self.quantized})" if self.quantized else kind

    def new_cache(self, rows: int, slots: int) -> KVCache:
        c = self.config
        return KVCache(c.layers, rows, c.kv_heads, slots, c.head_dim, self.dtype, self.device)

    def rotation(self, positions_M: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine [M, D/2] float32, read from a table so that a position always gets the same bits."""
        last = int(positions_M.max()) + 1 if positions_M.device.type == "cpu" else self.config.max_positions
        cosine, sine = self.rotations(last)
        index_M = positions_M.to(self.device)
        return cosine.index_select(0, index_M), sine.index_select(0, index_M)  # indexing would wake PyTorch's team

    def rotations(self, positions: int) -> tuple[Tensor, Tensor]:
        """Returns the table: cosine and sine of at least so many positions."""
        table, scale = self._angles, self.config.rope_scale
        if positions > len(table[0]):
            every = torch.arange(max(positions, 2 * len(table[0]), 1024), dtype=torch.float32, device=self.device)
            angles = every[:, None] * torch.tensor(self.config.inv_freq, dtype=torch.float32, device=self.device)
            self._angles = table = (angles.cos() * scale, angles.sin() * scale)
        return table

    def check_room(self, cache: KVCache, rows: Sequence[int], ends: Sequence[int], layers: int) -> None:
        """Refuses a cache that has no room for the first `layers` in these rows, up to these slots."""
        cached, heads, _, width = cache.keys.shape
        same = (heads, width, cache.keys.dtype) == (self.config.kv_heads, self.config.head_dim, self.dtype)
        check(same and layers <= cached, "The cache was made for another model.")
        cache.check(rows, ends)

    def check_pass(
        self, hidden_Md: Tensor, nodes: Nodes, begin: int, end: int, skip: bytes | None, taps: Collection[int],
        beside: Beside | None,
    ) -> None:  # fmt: skip
        """Refuses what does not fit the nodes or the layers of a pass."""
        layers, shape = self.config.layers, (len(nodes), self.config.hidden)
        check(0 <= begin <= end <= layers, f"Layers {begin} to {end} were requested; the model has {layers}.")
        check(hidden_Md.shape == shape, f"States have shape {tuple(hidden_Md.shape)}; the nodes need {shape}.")
        check(hidden_Md.dtype == torch.float32, f"States are float32, not {hidden_Md.dtype}.", TypeError)
        check(not skip or len(skip) >= end, "A skip plan has a byte for every layer.")
        check(all(begin <= tap <= end for tap in taps), f"Only layers {begin} to {end} can be tapped in this pass.")
        if beside:
            adapters, rows_N = beside
            fits = adapters.begin <= begin and end <= adapters.end
            check(fits, f"Adapters lie beside layers {adapters.begin} to {adapters.end}, not {begin} to {end}.")
            fits = rows_N.dtype == torch.int64 and rows_N.is_cpu and rows_N.dim() == 1
            fits = fits and bool(((rows_N >= 0) & (rows_N < len(nodes))).all() and (rows_N.diff() > 0).all())
            check(fits, "The rows with adapters are those of the pass, ascending.")

    def pad_rows(self, rows: int) -> bool:
        """Pads every linear call to at least `rows` rows; False if that is not how this backbone stays exact."""
        return False

    @abstractmethod
    def embed(self, tokens_M: Tensor) -> Tensor:
        """Returns the residual stream [M, d] float32 of token ids [M] int64.

        Raises:
            IndexError: an id is not in the vocabulary.
        """

    @abstractmethod
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
        """Runs layers [begin, end) and writes the nodes' keys and values to their slots.

        Args:
            hidden_Md: residual stream after `begin` layers; left as it is.
            skip: sublayers to leave out, one byte of SKIP_ bits per layer; a skipped attention writes no keys.
            taps: layers l in begin..end: the stream after l layers is returned too.
            beside: rows that go through adapters beside these layers.

        Returns:
            The stream after `end` layers [M, d] float32, and the tapped ones.
        """

    @abstractmethod
    def norm(self, hidden_Md: Tensor) -> Tensor:
        """Returns the states [M, d] after the final norm, which the output head reads."""

    @abstractmethod
    def logits(self, states_Md: Tensor) -> Tensor:
        """Returns the logits [M, V] float32 of normed states."""

    @abstractmethod
    def linear(self, weight_NK: Tensor | Blocks, bias_N: Tensor | None) -> LinearLayer:
        """Returns a linear layer of a drafter, computed by this backbone's kernels.

        The weight is cast to the backbone's type and packed once.
        """

    def adapters(self, linears: Sequence[tuple[LinearLayer, LinearLayer]], begin: int = 0) -> Adapters:
        """Returns adapters beside this backbone's layers, of linear layers of its kernels; see `Adapters`."""
        return Adapters(linears, begin)

    def own_layers(self, layers: Sequence[Mapping[str, Tensor | Blocks]], norm_d: Tensor | None = None) -> Backbone:
        """Returns layers of this backbone's shape and kernels with other weights, as a backbone of these layers.

        Args:
            layers: of each the tensors by their names in a checkpoint, without "model.layers.0.". No biases, no norms
                within heads. Without those of the MLP it is attention alone, and `run_layers` has to `skip` the MLP.
            norm_d: weight of a final norm of their own.
        """
        c = self.config
        mlp = any(name.startswith("mlp.") for name in layers[0])
        shapes = layer_shapes(bare(c), LAYER if mlp else ATTENTION)
        norm_d = torch.ones(c.hidden) if norm_d is None else norm_d
        fits = all({name: tuple(tensor.shape) for name, tensor in layer.items()} == shapes for layer in layers)
        if not fits or norm_d.shape != (c.hidden,):
            raise UsageError("The drafter's own layer has not this model's shape; train a drafter for this model.")
        windows = (0,) * len(layers)
        config = replace(bare(c), layers=len(layers), vocab=32, tied=True, windows=windows, mlp=c.mlp if mlp else 32)
        weights: dict[str, Tensor | Blocks] = {
            f"model.layers.{index}.{name}": tensor
            for index, layer in enumerate(layers)
            for name, tensor in layer.items()
        }
        weights["model.norm.weight"] = norm_d
        for name, shape in weight_shapes(config).items():  # the rest is not used, but must exist, and is small
            weights.setdefault(name, torch.zeros(shape))
        return self._alike(config, weights)

    @abstractmethod
    def _alike(self, config: ModelConfig, weights: Mapping[str, Tensor | Blocks]) -> Backbone:
        """Returns another model with this backbone's type, threads and kernels."""

    @abstractmethod
    def head_rows(self, ids_N: Tensor) -> Tensor:
        """Returns rows of the output matrix [N, d] in the backbone's type, which a draft head starts from or uses."""

    def argmax(self, states_Md: Tensor) -> Tensor:
        """Returns the first most probable token [M] int64 of normed states; -1 where a logit is not finite."""
        logits_MV = self.logits(states_Md)
        return logits_MV.argmax(-1).masked_fill_(~logits_MV.isfinite().all(-1), -1)

    def forward(self, tokens_M: Tensor, nodes: Nodes, cache: KVCache) -> Tensor:
        """Returns the normed states [M, d] of a pass through all layers."""
        return self.norm(self.run_layers(self.embed(tokens_M), nodes, cache)[0])
