"""Linear layers of the compiled kernels: weights packed once into panels, and multiplied in one call.

Shapes: M rows, K inputs and N outputs of a linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone.cpu.formats import Format, PackedMatrix, format_for
from foretell.backbone.cpu.library import Build, call, default
from foretell.backbone.cpu.panel_file import PanelFile
from foretell.errors import check
from foretell.loading.blocks import Blocks, Joined


def _padded(bias: Tensor | None, outputs: int) -> Tensor | None:
    """Returns a bias in float32, padded to full panels."""
    if bias is None:
        return None
    check(bias.shape == (outputs,), f"A bias of shape {tuple(bias.shape)} does not fit {outputs} outputs.")
    return F.pad(bias.float(), (0, -outputs % 32))


class PackedLinear:
    """y = x Wᵀ + b with W [N, K] packed once into panels of 32 outputs; x and y are float32, W decides the rounding.

    Every output depends on its own row of x alone: one row or sixty-four, the bits are the same (but for formats that
    draft heads alone use).

    Args:
        format: of W; by default the one that keeps its bits.
        rest, file: see `PackedMatrix`.
    """

    def __init__(
        self,
        weight: Tensor | Blocks | Joined,
        bias: Tensor | None = None,
        build: Build | None = None,
        format: Format | None = None,
        rest: PackedMatrix | None = None,
        file: PanelFile | None = None,
    ):
        self.build = build or default()
        self.matrix = PackedMatrix(weight, format or format_for(Joined.of(weight)), self.build, rest, file)
        self.outputs, self.inputs = self.matrix.outputs_in_all, self.matrix.inputs
        self.bias = _padded(bias, self.outputs)

    def __call__(self, x_MK: Tensor, threads: int) -> Tensor:
        """Returns y [M, N] float32."""
        y_MN = torch.empty(x_MK.shape[0], self.outputs)
        self._run(x_MK, y_MN, 0, None, None, False, threads)
        return y_MN

    def argmax(self, x_MK: Tensor, threads: int) -> Tensor:
        """Returns the first index of the greatest output of each row [M] int64; the outputs are not written to memory.

        It is -1 for a row whose outputs are not all finite numbers.
        """
        return self._best(x_MK, 1, True, threads)[1][:, 0]

    def top(self, x_MK: Tensor, count: int, threads: int) -> tuple[Tensor, Tensor]:
        """Returns the `count` greatest outputs of each row, greatest first: values [M, count] and their indices int64.

        Of equals the first comes first; indices are valid even of NaN outputs. The outputs are not written to memory.
        """
        check(0 < count <= self.outputs, f"The {count} greatest of {self.outputs} outputs were requested.")
        return self._best(x_MK, count, False, threads)

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
        bf16 = int(self.matrix.activations == torch.bfloat16)
        call(
            "linear", self.build, x_MK.contiguous(), len(x_MK), self.matrix.about, self.bias, y_MN, count, values,
            best, strict, threads, bf16,
        )  # fmt: skip


@dataclass(frozen=True)
class ThreadedLinear:
    """A packed linear with its number of threads: as a drafter gets it (see `Backbone.linear`)."""

    packed: PackedLinear
    threads: int

    def __call__(self, x_MK: Tensor) -> Tensor:
        return self.packed(x_MK, self.threads)

    def top(self, x_MK: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self.packed.top(x_MK, count, self.threads)
