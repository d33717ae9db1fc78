"""The formats in which the kernels keep weights: one row each.

A row defines a weight's conversion before packing, and the type of the activations that it is multiplied with; the row
of the same name in `native/products/formats.inc` defines its layout and its product.

Shapes: a weight has N outputs and K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone.base import check_ids
from foretell.backbone.cpu.library import Build, Matrix, call, require
from foretell.backbone.cpu.panel_file import PanelFile
from foretell.errors import check
from foretell.loading.blocks import TYPES, Blocks, Joined
from foretell.loading.quantize import quantize

BF16, FP32 = torch.bfloat16, torch.float32
Numbers = tuple[Tensor, Tensor | None]
"""What is packed, a row for each output [N, ...], and the scale of each output [N] float32, if there is one."""


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`.

    Attributes:
        activations: the type that activations are rounded to before they are multiplied with it; None: eight bits.
        numbers: turns a weight [N, K] into what the kernels pack.
        stored: the type of `loading.blocks` that it keeps as it is, if it does.
        packed: whether it is packed into panels; otherwise it stays as it is, and its rows can only be read.
    """

    name: str
    activations: torch.dtype | None
    numbers: Callable[[Blocks], Numbers]
    stored: str = ""
    packed: bool = True


def _as(dtype: torch.dtype) -> Callable[[Blocks], Numbers]:
    return lambda weight_NK: (weight_NK.floats(dtype), None)


def _int8(weight: Blocks) -> Numbers:
    """Rounds to 255 even steps of each output's own size."""
    scale_N = weight.floats(FP32).abs().amax(1).clamp(min=1e-30) / 127
    return (weight.floats(FP32) / scale_N[:, None]).round().to(torch.int8), scale_N


def _stored(weight: Blocks) -> Numbers:
    return weight.data, None


def _q8_0(weight: Blocks) -> Numbers:
    """Keeps blocks, and rounds floats to blocks."""
    if weight.type.quantized:
        return weight.data, None
    return quantize(weight.floats(), TYPES["Q8_0"]).data, None


QUANTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types of GGUF files that are multiplied as they are stored."""

FORMATS = {
    row.name: row
    for row in (
        Format("bf16", BF16, _as(BF16), stored="BF16"),
        Format("fp32", FP32, _as(FP32), stored="F32"),
        Format("int8", BF16, _int8),  # widened before it is multiplied
        Format("int8_both", BF16, _int8),  # what it is multiplied with is rounded too, where the processor can
        *(Format(name.lower(), None, _q8_0 if name == "Q8_0" else _stored, stored=name) for name in QUANTS),
        Format("bf16_rows", BF16, _as(BF16), packed=False),
        Format("fp32_rows", FP32, _as(FP32), packed=False),
    )
}


WITH_INT8 = ("amx", "avx512bf16", "avx512vnni")
"""Builds with AVX512-VNNI, which have the products of "int8_both"."""
WITH_BLOCKS = ("avx512vnni", "avx512", "avxvnni", "avx2", "i8mm", "dotprod", "neon")
"""Builds that multiply blocks of eight bits faster than numbers widened to bfloat16."""


def exact_format(dtype: torch.dtype, packed: bool = True) -> Format:
    """Returns the format that keeps every bit of a model's weights.

    Raises:
        TypeError: models are bfloat16 or float32.
    """
    names = {BF16: "bf16", FP32: "fp32"}
    if dtype not in names:
        raise TypeError(f"packed weights are bfloat16 or float32, not {dtype}")
    return FORMATS[names[dtype] + ("" if packed else "_rows")]


def draft_format(inputs: int, build: Build, output: bool) -> Format:
    """Returns the format in which a build multiplies a draft head's matrix fastest: its guesses need not be exact.

    Args:
        output: whether it is an output matrix; the others read inputs side by side, which differ too much in size to
            share one scale a row.
    """
    if build.name in WITH_BLOCKS and inputs % 32 == 0:
        return FORMATS["q8_0"]
    return FORMATS["int8_both" if output else "int8"]


def format_for(weight: Blocks | Joined, dtype: torch.dtype | None = None, packed: bool = True) -> Format:
    """Returns the format of a weight in a model of this type: one that keeps its blocks, else floats of that type.

    Args:
        dtype: by default the weight's own.

    Raises:
        TypeError: models are bfloat16 or float32.
    """
    dtype = dtype or weight.type.dtype
    for row in FORMATS.values():
        if row.stored == weight.type.name and row.activations is None:  # its rows are read from its panels
            return row
        if (row.stored, row.activations, row.packed) == (weight.type.name, dtype, packed):
            return row
    return exact_format(dtype, packed)


class PackedMatrix:
    """A weight [N, K] in one of `FORMATS`; its outputs may be followed by those of another, the `rest`.

    Args:
        file: gives memory for the panels; where it is mapped they are packed already, and no number is read.

    Attributes:
        outputs_in_all: with those of the rest; activations: what the floats among both are multiplied with.
        about: how it is described to the kernels; it keeps the memory alive.
    """

    def __init__(
        self,
        weight: Tensor | Blocks | Joined,
        format: Format,
        build: Build,
        rest: PackedMatrix | None = None,
        file: PanelFile | None = None,
    ):
        weight = Joined.of(weight)
        check(len(weight.shape) == 2, f"A matrix has two dimensions, not the shape {weight.shape}.")
        self.format, self.build = format, build
        self.outputs, self.inputs = weight.shape
        self.activations: torch.dtype | None = format.activations or (rest.activations if rest else None)
        self.outputs_in_all: int = self.outputs + (rest.outputs_in_all if rest else 0)
        number = require().foretell_format(build.handle, format.name.encode())
        check(number >= 0, f"The kernels have no weight format {format.name!r}.")
        if rest:
            check(self.outputs % 32 == 0, f"What follows {self.outputs} outputs begins within a panel.")
            check((rest.inputs, rest.build) == (self.inputs, build), "Matrices in a row read the same, in one build.")
        self._kept = file is not None
        self._shape, self._rest = (number, self.outputs, self.inputs), rest.about if rest else None
        sizes = torch.zeros(2, dtype=torch.int64)
        call("sizes", build, Matrix(None, None, *self._shape, None), sizes)
        panels, rows = sizes.tolist()
        name = f"{format.name} {self.outputs} {self.inputs}"
        if file and file.mapped and panels:
            self.blocks = file.take(name, panels)
            self.about: Matrix = Matrix(self.blocks, None, *self._shape, self._rest)
        else:
            memory = file.take(name, panels) if file and panels else torch.empty(panels, dtype=torch.uint8)
            self._pack(weight.blocks(), memory, rows)

    def _pack(self, weight: Blocks, memory: Tensor, row_bytes: int) -> None:
        """Packs the weight into memory; rows that stay as they are take none of it."""
        format = self.format
        numbers, scale_N = format.numbers(weight)
        numbers = numbers.contiguous()
        check(
            numbers.nbytes == row_bytes and format.packed == (len(memory) > 0),
            f"The rows {format.name!r} of formats.py and formats.inc differ: of a weight of shape {weight.shape}, one "
            f"makes {numbers.nbytes} bytes {'to be packed' if format.packed else 'that stay as they are'}, the other "
            f"reads {row_bytes} bytes and makes panels of {len(memory)}.",
        )
        check(scale_N is None or not self._kept, "A file of panels has no room for scales.")
        scale_N = None if scale_N is None else F.pad(scale_N, (0, -self.outputs % 32))
        self.blocks = memory if format.packed else numbers
        self.about = Matrix(self.blocks, scale_N, *self._shape, self._rest)
        if format.packed:
            call("pack", self.build, numbers, self.about)

    def rows(self, ids_M: Tensor) -> Tensor:
        """Returns rows of the weight [M, K] as float32.

        Raises:
            TypeError, IndexError: ids are not rows; see `check_ids`.
        """
        check_ids(ids_M, self.outputs)
        out_MK = torch.empty(len(ids_M), self.inputs)
        call("rows", self.build, self.about, ids_M.contiguous(), len(ids_M), out_MK)
        return out_MK
