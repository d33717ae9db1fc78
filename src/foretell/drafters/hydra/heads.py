"""Training module of Hydra's heads; `drafter.py` describes the method.

Legend: K heads, L deeper blocks of a head, d hidden width, P positions, I width of a head's input, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.contracts import FINAL_NORM
from foretell.drafting.heads import normed
from foretell.drafting.learning.decoder_layer import DecoderLayer
from foretell.drafting.learning.heads import GuessingHeads, SeveralHeadsTraining
from foretell.drafting.learning.number_types import product
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.options import option, renamed, stored_options
from foretell.errors import UsageError


@dataclass(frozen=True)
class HydraTraining(SeveralHeadsTraining):
    """Training options of Hydra."""

    REMOVED: ClassVar[Mapping[str, Any]] = {
        "output": "tied", "grounded": True, "tied": False, "chained": False, "fused": False,
    }  # fmt: skip
    heads: int = option(4, "Number of heads; head k guesses the token k + 1 ahead.", low=1, high=16, stored=True)
    layers: int = option(1, "Residual blocks of each head.", low=1, high=8, unset=0, stored=True)
    taps: int = option(2, "Intermediate layers whose streams are read too; 0 as in the paper.", low=0, high=8)
    linear_tail: bool = option(
        False, "Whether a last block x + W x + b follows, which can lower a number by more than SiLU's 0.28.",
        former="linear", stored=True,
    )  # fmt: skip
    dropout: float = option(0.0, "Dropout on the inputs of blocks and of the output matrix.", low=0, high=0.9)


@dataclass(frozen=True)
class HydraPlusTraining(HydraTraining):
    """Training options of Hydra++: its heads and the layer before them."""

    REMOVED: ClassVar[Mapping[str, Any]] = {
        name: value for name, value in HydraTraining.REMOVED.items() if name != "fused"
    }
    layers: int = option(2, "Residual blocks of each head.", low=1, high=8, unset=0, stored=True)
    fuse_prefix: bool = option(
        False, "Whether the layer reads the intermediate streams and the token after each state, and the heads its "
        "stream alone, as in EAGLE-3.", former="fused", stored=True,
    )  # fmt: skip


def read_arch(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a checkpoint under their present names.

    Raises:
        UsageError: it was trained with an option that is gone.
    """
    for name, kept in HydraPlusTraining.REMOVED.items():
        if arch.get(name, kept) != kept:
            raise UsageError(
                f"It was trained with {name}={str(arch[name]).lower()}, which this version no longer has; train it "
                "again, or install the version that wrote it."
            )
    return ({} if arch["prefix"] else {"fuse_prefix": False}) | renamed(HydraPlusTraining, arch)


class HydraHeads(GuessingHeads):
    """The heads in training; float32, multiplied as `number_types` says. All share one trained output matrix.

    Args:
        head_Vd, vocabulary_V, vocab_size: see `GuessingHeads`.
        training: its `layers` count the blocks of each head; the first reads the path, the others d numbers.
        taps: layers whose streams are read beside the final state.
        embed: the backbone's embedding.
        prefix: the layer before the heads of Hydra++, or None.
    """

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, training: HydraTraining, *,
        taps: Sequence[int], embed: Callable[[Tensor], Tensor], prefix: DecoderLayer | None = None,
    ):  # fmt: skip
        heads, d = training.heads, head_Vd.shape[1]
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, heads=heads, output="tied")
        self.options, self.taps, self.embed, self.prefix = training, (*taps, FINAL_NORM), embed, prefix
        self.layers, self.dropout = training.layers, training.dropout
        fused = isinstance(training, HydraPlusTraining) and training.fuse_prefix
        self.fuse = nn.Parameter(torch.zeros(d, d * len(self.taps))) if fused else None
        widths = _widths(d, 1 if fused else len(self.taps), heads)
        self.first = nn.ParameterList([torch.zeros(d, width) for width in widths])
        self.first_bias_Kd = nn.Parameter(torch.zeros(heads, d))
        self.deep_KLdd = nn.Parameter(torch.zeros(heads, self.layers - 1, d, d))
        self.deep_bias_KLd = nn.Parameter(torch.zeros(heads, self.layers - 1, d))
        self.last_Kdd = nn.Parameter(torch.zeros(heads, d, d)) if training.linear_tail else None
        self.last_bias_Kd = nn.Parameter(torch.zeros(heads, d)) if training.linear_tail else None

    def blocks(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each block of head k."""
        deep = zip(self.deep_KLdd[k], self.deep_bias_KLd[k], strict=True)
        return [(self.first[k], self.first_bias_Kd[k]), *deep]

    def states(self, k: int, x_PI: Tensor) -> Tensor:
        """Output of the blocks of head k, [P, d]; `x_PI` as `drafting.heads.side_by_side` gives it."""
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
        inputs = [first, *map(normed, others)]  # as in `side_by_side`, each computed once
        tokens = batch.tokens_BT.flatten()
        out: list[Tensor] = []
        for k in range(self.heads):
            # beyond the end of the text nothing is guessed either
            inputs.append(normed(self.embed(tokens[(sources_P + k + 1).clamp(max=len(tokens) - 1)])))
            out.append(self.states(k, torch.cat(inputs, 1)))
        return torch.stack(out)

    @torch.no_grad()
    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if "weight.0" in tensors:  # Medusa's heads, which read no more than the root
            if arch["output"] == "own":
                raise UsageError("It has an output matrix for each head; train one with `output='tied'` to start from.")
            tensors, arch = _as_hydra(tensors), arch | {"linear_tail": False, "prefix": False, "fuse_prefix": False}
        else:
            arch = read_arch(arch)
        stored, deep = tensors["deep"].shape[1], self.deep_KLdd.shape[1]
        more = arch["prefix"] > bool(self.prefix) or arch["fuse_prefix"] > (self.fuse is not None)
        if arch["taps"] != list(self.taps[:-1]) or more:
            raise UsageError("It has other inputs than these heads; train with the same method and options.")
        if arch["linear_tail"] > (self.last_Kdd is not None):
            raise UsageError("It has a last block without SiLU; train with `linear_tail=True`.")
        if stored > deep:
            raise UsageError(
                f"It has {_blocks(arch['layers'])} in each head, these would have {_blocks(self.layers)}; train with "
                f"`layers={arch['layers']}`."
            )
        for k in range(min(self.heads, arch["heads"])):
            inputs = tensors[f"first.{k}"].split(len(self.first[k]), 1)
            if self.fuse is not None and not arch["fuse_prefix"]:  # these streams now come through the layer
                inputs = (inputs[0], *inputs[len(self.taps) :])
            first = torch.cat(inputs, 1)  # weights of new inputs stay zero
            self.first[k][:, : first.shape[1]] = first
            self.first_bias_Kd[k] = tensors["first_bias"][k]
            self.deep_KLdd[k, :stored], self.deep_bias_KLd[k, :stored] = tensors["deep"][k], tensors["deep_bias"][k]
            if self.last_Kdd is not None and self.last_bias_Kd is not None and arch["linear_tail"]:
                self.last_Kdd[k], self.last_bias_Kd[k] = tensors["last"][k], tensors["last_bias"][k]
        if self.fuse is not None and arch["fuse_prefix"]:
            self.fuse.copy_(tensors["fuse"])
        if self.prefix and arch["prefix"]:
            for name, weight in self.prefix.named().items():
                weight.copy_(tensors[f"prefix.{name}"])
        self.start_outputs(tensors)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {f"first.{k}": weight for k, weight in enumerate(self.first)}
        tensors |= {"first_bias": self.first_bias_Kd, "deep": self.deep_KLdd, "deep_bias": self.deep_bias_KLd}
        if self.last_Kdd is not None and self.last_bias_Kd is not None:
            tensors |= {"last": self.last_Kdd, "last_bias": self.last_bias_Kd}
        if self.fuse is not None:
            tensors["fuse"] = self.fuse
        if self.prefix:
            tensors |= {f"prefix.{name}": weight for name, weight in self.prefix.named().items()}
        arch = stored_options(self.options) | {"taps": list(self.taps[:-1]), "prefix": self.prefix is not None}
        return self.stored(tensors), arch


def _blocks(layers: int) -> str:
    return f"{layers} block{'s' * (layers != 1)}"


def _widths(d: int, streams: int, heads: int) -> list[int]:
    """Input width of each head: streams and the tokens of its path."""
    return [d * (streams + k + 1) for k in range(heads)]


def shapes(arch: dict[str, Any], d: int, choices: int) -> dict[str, tuple[int, ...]]:
    """Expected shape of each checkpoint tensor but those of the prefix layer, which are checked where it is made."""
    heads, deep, streams = arch["heads"], arch["layers"] - 1, len(arch["taps"]) + 1
    widths = _widths(d, 1 if arch["fuse_prefix"] else streams, heads)
    found: dict[str, tuple[int, ...]] = {f"first.{k}": (d, width) for k, width in enumerate(widths)}
    found |= {"first_bias": (heads, d), "deep": (heads, deep, d, d), "deep_bias": (heads, deep, d)}
    if arch["linear_tail"]:
        found |= {"last": (heads, d, d), "last_bias": (heads, d)}
    if arch["fuse_prefix"]:
        found["fuse"] = (d, d * streams)
    return found | {"head": (1, choices, d)}


def _as_hydra(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of Medusa's heads under the names of Hydra's."""
    weights = [tensors[f"weight.{layer}"] for layer in range(len(tensors["bias"]))]
    first = {f"first.{k}": weight for k, weight in enumerate(weights[0])}
    heads, d, _ = weights[0].shape
    deep = torch.stack(weights[1:], 1) if weights[1:] else weights[0].new_zeros(heads, 0, d, d)
    biases = {"first_bias": tensors["bias"][0], "deep": deep, "deep_bias": tensors["bias"][1:].transpose(0, 1)}
    return {**tensors, **first, **biases}
