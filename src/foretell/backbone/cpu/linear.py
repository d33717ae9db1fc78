"""Linear layers and draft heads of the compiled kernels: weights packed once into panels, and multiplied in one call.

Shapes: M rows, d hidden width, K inputs and N outputs of a linear; B rows and S states of each that draft heads read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone.base import check_ids
from foretell.backbone.cpu.library import Build, call, default
from foretell.errors import check

INT8, INT8_BOTH = 1, 8
"""How numbers in int8 are packed: widened before they are multiplied, or with what they meet in int8 too (common.h)."""


def _up(count: int) -> int:
    return -(-count // 32) * 32


def _padded(bias: Tensor | None, outputs: int) -> Tensor | None:
    """A bias in float32, as long as the panels are wide."""
    if bias is None:
        return None
    check(bias.shape == (outputs,), f"A bias of shape {tuple(bias.shape)} does not fit {outputs} outputs.")
    return F.pad(bias.float(), (0, -outputs % 32))


class PackedLinear:
    """y = x Wᵀ + b with W [N, K] packed once into panels of 32 outputs; x and y are float32, W decides the rounding.

    Every output depends on its own row of x alone: one row or sixty-four, the bits are the same.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, build: Build | None = None):
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"packed weights are bfloat16 or float32, not {weight.dtype}")
        self.build = build or default()
        self.outputs, self.inputs = weight.shape
        self.bf16 = int(weight.dtype == torch.bfloat16)
        self.packed = torch.empty(_up(self.outputs) * _up(self.inputs), dtype=weight.dtype)
        self.bias = _padded(bias, self.outputs)
        call("pack", self.build, weight.contiguous(), self.outputs, self.inputs, self.packed, weight.itemsize)

    def __call__(self, x_MK: Tensor, threads: int) -> Tensor:
        """Returns y [M, N] float32."""
        y_MN = torch.empty(x_MK.shape[0], self.outputs)
        self._run(x_MK, y_MN, 0, None, None, False, threads)
        return y_MN

    def argmax(self, x_MK: Tensor, threads: int) -> Tensor:
        """First index of the greatest output of each row [M] int64, without writing the outputs to memory.

        -1 for a row whose outputs are not all finite numbers.
        """
        return self._best(x_MK, 1, True, threads)[1][:, 0]

    def top(self, x_MK: Tensor, count: int, threads: int) -> tuple[Tensor, Tensor]:
        """The `count` greatest outputs of each row, greatest first: values [M, count] and their indices int64.

        Of equals the first, and indices of outputs whatever these are, NaN too; they are not written to memory.
        """
        check(0 < count <= self.outputs, f"The {count} greatest of {self.outputs} outputs were asked for.")
        return self._best(x_MK, count, False, threads)

    def rows(self, ids_M: Tensor) -> Tensor:
        """Rows of W [M, K] as float32: a tied embedding read back from the packed head."""
        check_ids(ids_M, self.outputs)
        out_MK = torch.empty(ids_M.shape[0], self.inputs)
        call(
            "unpack_rows", self.build, self.packed, self.inputs, ids_M.contiguous(), len(ids_M), out_MK, self.bf16
        )  # fmt: skip
        return out_MK

    def _best(self, x_MK: Tensor, count: int, strict: bool, threads: int) -> tuple[Tensor, Tensor]:
        values = torch.empty(x_MK.shape[0], count)
        best = torch.empty(x_MK.shape[0], count, dtype=torch.int64)
        self._run(x_MK, None, count, values, best, strict, threads)
        return values, best

    def _run(
        self, x_MK: Tensor, y_MN: Tensor | None, count: int, values: Tensor | None, best: Tensor | None, strict: bool,
        threads: int,
    ) -> None:  # fmt: skip
        check(x_MK.dtype == torch.float32, f"A packed linear reads float32, not {x_MK.dtype}.", TypeError)
        check(x_MK.shape[1:] == (self.inputs,), f"A packed linear reads {self.inputs} numbers a row.")
        call(
            "linear", self.build, x_MK.contiguous(), x_MK.shape[0], self.inputs, self.packed, self.outputs,
            self.bias, y_MN, count, values, best, strict, threads, self.bf16,
        )  # fmt: skip


@dataclass(frozen=True)
class ThreadedLinear:
    """A packed linear with its number of threads: what a drafter gets (see `Backbone.linear`)."""

    packed: PackedLinear
    threads: int

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.packed(x_MK, self.threads)

    def top(self, x_MK: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self.packed.top(x_MK, count, self.threads)


class Int8Linear:
    """W [N, K] in int8 and one scale an output, for heads that draft: half the memory to read.

    Args:
        how: `INT8`, or `INT8_BOTH`: what it is multiplied with is rounded too, row by row, where the processor can.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, build: Build, how: int = INT8):
        self.outputs, self.inputs = weight.shape
        scale = weight.float().abs().amax(1).clamp(min=1e-30) / 127
        rounded = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.packed = torch.empty(_up(self.outputs) * _up(self.inputs), dtype=torch.int8)
        self.scale = F.pad(scale, (0, -self.outputs % 32))
        self.bias = _padded(bias, self.outputs)
        call("pack", build, rounded.contiguous(), self.outputs, self.inputs, self.packed, how)
