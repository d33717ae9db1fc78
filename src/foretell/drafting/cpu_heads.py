"""Draft heads in one call of the compiled kernels.

Shapes: B rows, S states that each reads, K heads, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foretell.backbone.cpu.formats import draft_format, exact_format
from foretell.backbone.cpu.library import Build, Heads, call, table
from foretell.backbone.cpu.linear import PackedLinear
from foretell.drafting.heads import DrafterHeads
from foretell.errors import check


class PackedHeads:
    """`heads.StackedHeads` in one call: the team of threads is woken once, not at every layer of every head.

    Guesses need not be exact: of bfloat16 models their matrices are in eight bits.
    """

    def __init__(
        self, blocks: Sequence[Sequence[tuple[Tensor, Tensor]]], outputs: Sequence[Tensor] | DrafterHeads,
        linear: bool, dtype: torch.dtype, threads: int, build: Build,
    ):  # fmt: skip
        self.build, self.bf16 = build, int(dtype == torch.bfloat16)

        def pack(weight: Tensor, bias: Tensor | None, output: bool) -> PackedLinear:
            format = draft_format(weight.shape[1], build, output) if self.bf16 else exact_format(dtype)
            return PackedLinear(weight, bias, build, format)

        layers = [[pack(weight, bias, output=False) for weight, bias in layer] for layer in blocks]
        if isinstance(outputs, Sequence):
            self._outputs = [pack(weight, None, output=True) for weight in outputs]
        else:
            if not isinstance(outputs, PackedHeads) or (outputs.build, outputs.bf16) != (build, self.bf16):
                raise ValueError("Heads share the output matrices of heads of the same kernels and type alone.")
            self._outputs = outputs._outputs
        self.heads = len(blocks[0]) if blocks else len(self._outputs)
        check(len(self._outputs) in (1, self.heads), "Heads have an output matrix each, or one for all.")
        self._check_shapes(layers)
        self._blocks = [block for layer in layers for block in layer]
        first, output = (self._blocks or self._outputs)[0], self._outputs[0]
        self.about = Heads(
            self.heads, output.inputs, first.inputs, len(blocks), linear, len(self._outputs), output.outputs, threads,
            table([block.matrix.about for block in self._blocks]), table([block.bias for block in self._blocks]),
            table([output.matrix.about for output in self._outputs]),
        )  # fmt: skip

    def _check_shapes(self, layers: Sequence[Sequence[PackedLinear]]) -> None:
        """Refuses blocks whose width is not that of the blocks below or of the output matrices."""
        d, choices = self._outputs[0].inputs, self._outputs[0].outputs
        wide = layers[0][0].inputs if layers else d
        fits = wide % d == 0 and all((output.outputs, output.inputs) == (choices, d) for output in self._outputs)
        for i, layer in enumerate(layers):
            shape = (d, d if i else wide)
            fits &= len(layer) == self.heads
            fits &= all((block.outputs, block.inputs) == shape and block.bias is not None for block in layer)
        check(fits, f"Weights of heads of width {d} do not fit together.")

    def top(self, store_Nd: Tensor, which_BS: Sequence[Sequence[int]], count: int) -> tuple[Tensor, Tensor]:
        rows, about, which = len(which_BS), self.about, np.array(which_BS, dtype=np.int64)
        check(store_Nd.dtype == torch.float32 and store_Nd.shape[1:] == (about.hidden,), "Heads read float32 states.")
        check(which.shape == (rows, about.inputs // about.hidden), "Each row names the states that heads read.")
        check(which.min() >= 0 and which.max() < len(store_Nd), "A row names a state that is not there.", IndexError)
        check(0 < count <= about.choices, f"The {count} most probable of {about.choices} outputs were requested.")
        values = torch.empty(self.heads, rows, count)
        best = torch.empty(self.heads, rows, count, dtype=torch.int64)
        call("heads", self.build, about, store_Nd, which, rows, count, values, best, self.bf16)
        return values.transpose(0, 1), best.transpose(0, 1)
