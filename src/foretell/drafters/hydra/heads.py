"""Hydra's heads while they learn; `hydra.py` says what they are.

Legend: K heads, L deeper blocks of a head, d hidden width, P positions, I numbers a head reads, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.contracts import FINAL_NORM
from foretell.drafting.heads import normed
from foretell.drafting.learning.heads import DecoderLayer, GuessingHeads, TrainingBatch
from foretell.drafting.learning.products import product
from foretell.drafting.options import output_shape
from foretell.errors import UsageError


class HydraHeads(GuessingHeads):
    """The heads while they learn; float32, multiplied as `products` says.

    Args:
        head_Vd, vocabulary_V, whole, heads, output, soft: see `GuessingHeads`.
        layers: blocks of each head; the first reads the path, the others d numbers.
        tied: whether all but the first block of a head are one and the same.
        linear: whether a block x + W x + b follows: x + SiLU(W x + b) can lower no number by more than 0.28.
        taps: layers whose streams are read besides the final state.
        grounded: whether heads read the tokens of their path; false makes them Medusa's.
        chained: whether heads read the state that the head before them ended in, too.
        prefix: the layer before the heads, if there is one.
        fused: whether that layer reads, besides the final states, the other streams and the token after each; its
            stream is then the only one that heads read.
        dropout: of what every block, and the output matrix, reads.
    """

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, whole: int, *, heads: int, layers: int, output: str, soft: float,
        taps: Sequence[int], embed: Callable[[Tensor], Tensor], grounded: bool = True, tied: bool = False,
        linear: bool = False, chained: bool = False, prefix: DecoderLayer | None = None, fused: bool = False,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, whole, heads=heads, output=output, soft=soft)
        d = head_Vd.shape[1]
        self.taps, self.embed, self.grounded, self.prefix = (*taps, FINAL_NORM), embed, grounded, prefix
        self.tied, self.layers, self.dropout, self.chained = tied, layers, dropout, chained
        self.fuse = nn.Parameter(torch.zeros(d, d * len(self.taps))) if fused else None
        widths = _widths(d, 1 if fused else len(self.taps), heads, grounded, chained)
        self.first = nn.ParameterList([torch.zeros(d, width) for width in widths])
        self.first_bias_Kd = nn.Parameter(torch.zeros(heads, d))
        stored = min(1, layers - 1) if tied else layers - 1
        self.deep_KLdd = nn.Parameter(torch.zeros(heads, stored, d, d))
        self.deep_bias_KLd = nn.Parameter(torch.zeros(heads, stored, d))
        self.last_Kdd = nn.Parameter(torch.zeros(heads, d, d)) if linear else None
        self.last_bias_Kd = nn.Parameter(torch.zeros(heads, d)) if linear else None

    def blocks(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each block of head k."""
        deep = [0 if self.tied else layer for layer in range(self.layers - 1)]
        return [
            (self.first[k], self.first_bias_Kd[k]),
            *((self.deep_KLdd[k, layer], self.deep_bias_KLd[k, layer]) for layer in deep),
        ]

    def states(self, k: int, x_PI: Tensor) -> Tensor:
        """What the output matrix of head k reads, [P, d]; `x_PI` as `drafting.heads.side_by_side` gives it."""
        out_Pd = x_PI[:, : self.deep_KLdd.shape[-1]]
        for weight, bias in self.blocks(k):
            read = F.dropout(x_PI, self.dropout, self.training)
            out_Pd = x_PI = out_Pd + F.silu(product(read, weight) + bias)
        if self.last_Kdd is not None and self.last_bias_Kd is not None:
            read = F.dropout(out_Pd, self.dropout, self.training)
            out_Pd = out_Pd + product(read, self.last_Kdd[k]) + self.last_bias_Kd[k]
        return F.dropout(out_Pd, self.dropout, self.training)

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        streams = [batch.states[tap].float() for tap in reversed(self.taps)]
        if self.fuse is not None:
            following_BTd = self.embed(F.pad(batch.tokens_BT[:, 1:], (0, 1)).flatten()).view_as(streams[0])
            read = F.dropout(
                torch.cat([normed(x) for x in (*streams[1:], following_BTd)], -1), self.dropout, self.training
            )
            streams = [streams[0] + product(read, self.fuse)]
        if self.prefix:
            streams[0] = self.prefix(streams[0])
        first, *others = (stream.flatten(0, 1)[sources_P] for stream in streams)
        parts = [first, *map(normed, others)]  # as `side_by_side` does, each once
        tokens = batch.tokens_BT.flatten()
        out: list[Tensor] = []
        for k in range(self.heads):
            if self.grounded:  # beyond the end there is nothing to guess either
                parts.append(normed(self.embed(tokens[(sources_P + k + 1).clamp(max=len(tokens) - 1)])))
            before = [normed(out[-1])] if self.chained and k else []
            out.append(self.states(k, torch.cat(parts + before, 1)))
        return torch.stack(out)

    @torch.no_grad()
    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if "weight.0" in tensors:  # Medusa's heads, which read no more than the root
            tensors = _as_hydra(tensors)
            lacks = dict.fromkeys(("tied", "linear", "chained", "prefix", "fused"), False)
            arch = arch | {"grounded": arch["root"]} | lacks
        theirs, ours = tensors["deep"].shape[1], self.deep_KLdd.shape[1]
        more = arch["grounded"] > self.grounded or arch["chained"] > self.chained or arch["prefix"] > bool(self.prefix)
        more = more or arch["fused"] > (self.fuse is not None)
        if arch["taps"] != list(self.taps[:-1]) or more or (arch["chained"] and arch["grounded"] != self.grounded):
            raise UsageError("It reads other things than these heads; train with the same method and options.")
        if arch["linear"] > (self.last_Kdd is not None):
            raise UsageError("It has a last block without SiLU; train with -o linear=true.")
        alike = arch["tied"] == self.tied and (not self.tied or arch["layers"] == self.layers)
        if theirs > ours or (theirs and not alike):
            same = f"-o layers={arch['layers']}" + ("" if alike else f" -o tied={str(arch['tied']).lower()}")
            raise UsageError(
                f"It has {_blocks(arch['layers'], arch['tied'])} in each head, these would have "
                f"{_blocks(self.layers, self.tied)}; train with {same}."
            )
        for k in range(min(self.heads, arch["heads"])):
            parts = tensors[f"first.{k}"].split(len(self.first[k]), 1)
            if self.fuse is not None and not arch["fused"]:  # streams that now come through the layer
                parts = (parts[0], *parts[len(self.taps) :])
            first = torch.cat(parts, 1)  # what they did not read begins with zeros
            self.first[k][:, : first.shape[1]] = first
            self.first_bias_Kd[k] = tensors["first_bias"][k]
            self.deep_KLdd[k, :theirs], self.deep_bias_KLd[k, :theirs] = tensors["deep"][k], tensors["deep_bias"][k]
            if self.last_Kdd is not None and self.last_bias_Kd is not None and arch["linear"]:
                self.last_Kdd[k], self.last_bias_Kd[k] = tensors["last"][k], tensors["last_bias"][k]
        if self.fuse is not None and arch["fused"]:
            self.fuse.copy_(tensors["fuse"])
        if self.prefix and arch["prefix"]:
            for name, weight in self.prefix.named().items():
                weight.copy_(tensors[f"prefix.{name}"])
        self.take_outputs(tensors)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {f"first.{k}": weight for k, weight in enumerate(self.first)}
        tensors |= {"first_bias": self.first_bias_Kd, "deep": self.deep_KLdd, "deep_bias": self.deep_bias_KLd}
        if self.last_Kdd is not None and self.last_bias_Kd is not None:
            tensors |= {"last": self.last_Kdd, "last_bias": self.last_bias_Kd}
        if self.fuse is not None:
            tensors["fuse"] = self.fuse
        if self.prefix:
            tensors |= {f"prefix.{name}": weight for name, weight in self.prefix.named().items()}
        arch = {
            "heads": self.heads, "layers": self.layers, "output": self.output, "taps": list(self.taps[:-1]),
            "grounded": self.grounded, "tied": self.tied, "linear": self.last_Kdd is not None, "chained": self.chained,
            "prefix": self.prefix is not None, "fused": self.fuse is not None,
        }  # fmt: skip
        return self.stored(tensors), arch


def _blocks(layers: int, tied: bool) -> str:
    """In words."""
    return f"{layers} block{'s' * (layers != 1)}{' (tied)' if tied and layers > 1 else ''}"


def _widths(d: int, streams: int, heads: int, grounded: bool, chained: bool) -> list[int]:
    """What each head reads: streams, the tokens of the path, the state of the head before."""
    return [d * (streams + grounded * (k + 1) + chained * (k > 0)) for k in range(heads)]


def shapes(arch: dict[str, Any], d: int, choices: int) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's tensors; the prefix layer's are checked where it is made."""
    heads, stored = arch["heads"], min(1, arch["layers"] - 1) if arch["tied"] else arch["layers"] - 1
    streams = len(arch["taps"]) + 1
    widths = _widths(d, 1 if arch["fused"] else streams, heads, arch["grounded"], arch["chained"])
    found: dict[str, tuple[int, ...]] = {f"first.{k}": (d, width) for k, width in enumerate(widths)}
    found |= {"first_bias": (heads, d), "deep": (heads, stored, d, d), "deep_bias": (heads, stored, d)}
    if arch["linear"]:
        found |= {"last": (heads, d, d), "last_bias": (heads, d)}
    if arch["fused"]:
        found["fuse"] = (d, d * streams)
    return found | output_shape(arch, d, choices)


def _as_hydra(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of Medusa's heads by the names of these."""
    weights = [tensors[f"weight.{layer}"] for layer in range(len(tensors["bias"]))]
    first = {f"first.{k}": weight for k, weight in enumerate(weights[0])}
    heads, d, _ = weights[0].shape
    deep = torch.stack(weights[1:], 1) if weights[1:] else weights[0].new_zeros(heads, 0, d, d)
    biases = {"first_bias": tensors["bias"][0], "deep": deep, "deep_bias": tensors["bias"][1:].transpose(0, 1)}
    return {**tensors, **first, **biases}
