"""HAMburger's grafts at work: what merges the tokens of a segment, and what writes those of a macro step.

The micro-step decoder is a small model of its own: it reads a macro step's four features as a text of four tokens, and
the step's tokens after them. Its keys and values are forgotten with the step. All products go through the backbone's
kernels, and a segment's attention is computed by itself: where kernels are compiled, no row depends on the others.

Legend: B rows, G segments, S tokens of a segment, F features, M nodes, d hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import MicroSteps
from foretell.drafting.kernels import kernels_for


def shapes(arch: Mapping[str, int], d: int, fused: bool) -> dict[str, tuple[int, ...]]:
    """Expected shape of each tensor in a checkpoint but those of the blocks, which are checked where they are made."""
    wide = d + d // 2
    found: dict[str, tuple[int, ...]] = {}
    if fused:
        found = {"merger.pos_Sp": (arch["most"], d // 2)}
        for name, inputs in (("q", d), ("k", wide), ("v", wide), ("out", d)):
            found |= {f"merger.{name}.weight": (d, inputs), f"merger.{name}.bias": (d,)}
        for name, outputs in (("first", d), ("second", d), ("third", 1)):
            found |= {f"stop.{name}.weight": (outputs, d), f"stop.{name}.bias": (outputs,)}
    return found


class MicroDecoder:
    """The blocks that write a macro step.

    Args:
        tensors: of a checkpoint; blocks: how many it has.
        guesses: what it writes is verified, so that its matrices may be rounded to eight bits.
    """

    def __init__(self, backbone: Backbone, tensors: Mapping[str, Tensor], blocks: int, guesses: bool):
        layers = [
            {name.removeprefix(f"micro.{index}."): tensor for name, tensor in tensors.items()
             if name.startswith(f"micro.{index}.")}
            for index in range(blocks)
        ]  # fmt: skip
        self.blocks = (kernels_for(backbone) if guesses else backbone).own_layers(layers)

    def new_cache(self, rows: int = 0, slots: int = 0) -> KVCache:
        return self.blocks.new_cache(rows, slots)

    def begin(self, cache: KVCache, rows: Sequence[int], features_RFd: Tensor, embedded_Rd: Tensor) -> Tensor:
        """Begins macro steps in empty rows of the cache: reads their features, and commits them, and first tokens.

        Returns:
            What the output head reads after the first token, [R, d]; that is the root of a tree.
        """
        count, features = len(rows), features_RFd.shape[1]
        nodes = Nodes.chains(rows, [0] * count, [features + 1] * count)
        input_Md = torch.cat([features_RFd, embedded_Rd[:, None]], 1).flatten(0, 1)
        out_Md = self.run(input_Md, nodes, cache)
        cache.commit(rows, [range(features)] * count)
        return out_Md.unflatten(0, (count, -1))[:, -1].contiguous()

    def run(self, embedded_Md: Tensor, nodes: Nodes, cache: KVCache) -> Tensor:
        """Returns what the output head reads after these tokens, [M, d]."""
        return self.blocks.run_layers(embedded_Md, nodes, cache)[0]


class FusedGrafts:
    """Grafts for fused decoding; see `contracts.Fused`.

    Args:
        arch, tensors: of a checkpoint of the model with its grafts.
        taps: see `learning.features_of`.
        heads: of the merger.
        micro: their micro-step decoder.
    """

    def __init__(
        self, backbone: Backbone, arch: Mapping[str, int], tensors: Mapping[str, Tensor], taps: tuple[int, ...],
        micro: MicroDecoder, heads: int, confidence: float,
    ):  # fmt: skip
        self.taps, self.most, self.confidence = taps, arch["most"], confidence
        self.fuse, self.stops = Merger(backbone, tensors, heads), StopHead(backbone, tensors)
        self._micro, self._embed = micro, backbone.embed

    def new_cache(self, rows: int) -> KVCache:
        return self._micro.new_cache(rows, len(self.taps) + self.most)

    def begin(self, features_BFd: Tensor, cache: KVCache) -> MicroSteps:
        return _Steps(self._micro, self._embed, cache, features_BFd)


class _Steps:
    """Micro steps whose first run reads the features too, of the rows that go on."""

    def __init__(
        self, micro: MicroDecoder, embed: Callable[[Tensor], Tensor], cache: KVCache, features_BFd: Tensor
    ):  # fmt: skip
        self._micro, self._embed, self._cache, self._features_BFd = micro, embed, cache, features_BFd
        self._begun = False
        for row in range(len(features_BFd)):
            cache.rollback(row, 0)

    def run(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        embedded_Rd = self._embed(torch.tensor(tokens))
        if self._begun:
            nodes = Nodes.chains(rows, [self._cache.lengths[row] for row in rows], [1] * len(rows))
            out_Rd = self._micro.run(embedded_Rd, nodes, self._cache)
        else:
            features_RFd = self._features_BFd[list(rows)]
            out_Rd = self._micro.begin(self._cache, rows, features_RFd, embedded_Rd)
        self._begun = True
        self._cache.commit(rows, [[0]] * len(rows))
        return out_Rd


class Merger:
    """Makes one vector of a segment (`learning.Merger`)."""

    def __init__(self, backbone: Backbone, tensors: Mapping[str, Tensor], heads: int):
        self._pos_Sp = tensors["merger.pos_Sp"].float().to(backbone.device)
        self._linear = {
            name: backbone.linear(tensors[f"merger.{name}.weight"].float(), tensors[f"merger.{name}.bias"].float())
            for name in ("q", "k", "v", "out")
        }
        self._embed, self._heads = backbone.embed, heads

    def __call__(self, segments: Sequence[Sequence[int]]) -> Tensor:
        """Returns the vectors [G, d] of segments of tokens; of one token it is its embedding."""
        sizes = list(map(len, segments))
        embedded_Td = self._embed(torch.tensor([token for tokens in segments for token in tokens]))
        if max(sizes) == 1:
            return embedded_Td
        each = embedded_Td.split(sizes)
        mean_Gd = torch.stack([x_Sd[0] if len(x_Sd) == 1 else x_Sd.mean(0) for x_Sd in each])
        several = [g for g, size in enumerate(sizes) if size > 1]
        read = torch.cat([torch.cat([each[g], self._pos_Sp[: sizes[g]]], 1) for g in several])
        q = self._linear["q"](mean_Gd[several])
        k, v = (self._linear[name](read).split([sizes[g] for g in several]) for name in "kv")
        mixed = torch.stack([self._mixed(*of_g) for of_g in zip(q, k, v, strict=True)])
        return mean_Gd.index_add(0, torch.tensor(several, device=mean_Gd.device), self._linear["out"](mixed))

    def _mixed(self, q_d: Tensor, k_Sd: Tensor, v_Sd: Tensor) -> Tensor:
        q_Hh, k_SHh, v_SHh = (x.unflatten(-1, (self._heads, -1)) for x in (q_d, k_Sd, v_Sd))
        weight_SH = ((q_Hh * k_SHh).sum(-1) / q_Hh.shape[-1] ** 0.5).softmax(0)
        return (weight_SH[..., None] * v_SHh).sum(0).flatten()


class StopHead:
    """Says how probable it is that a token ends its macro step (`learning.StopHead`)."""

    def __init__(self, backbone: Backbone, tensors: Mapping[str, Tensor]):
        self._layers = [
            backbone.linear(tensors[f"stop.{name}.weight"].float(), tensors[f"stop.{name}.bias"].float())
            for name in ("first", "second", "third")
        ]

    def __call__(self, states_Bd: Tensor) -> list[float]:
        x = self._layers[0](states_Bd)
        for layer in self._layers[1:]:
            x = layer(F.silu(x))
        return [1 / (1 + math.exp(-max(logit, -700.0))) for logit in x[:, 0].tolist()]
