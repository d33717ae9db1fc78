"""The compiled kernels, reached with ctypes: one call runs any range of layers over any set of rows.

The shared library is built with the package (`native/`); where no compiler was at hand it is absent and the eager
modules serve instead. The structures below mirror `native/common.h` word for word.

Shapes: M rows, d hidden width, K inputs and N outputs of a linear.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone.linear import DrafterHeads, LevelDrafting
from foretell.errors import ForetellError

LIBRARY = Path(__file__).with_name("_kernels.so")
LAYOUT = 12
"""Of the structures below and of the calls; what `foretell_layout` in native.cpp must say too."""
INT8, INT8_BOTH = 1, 8
"""How numbers in int8 are packed: widened before they are multiplied, or with what they meet in int8 too (common.h)."""
BUILDS = ("amx", "avx512bf16", "avx512", "avx2", "generic")


def _words(names: str) -> list[tuple[str, type]]:
    return [(name, c_int64) for name in names.split()]


class Layer(Structure):
    _fields_ = _words(
        "attention_norm qkv qkv_bias query_norm key_norm out out_bias "
        "mlp_norm gate_up gate_up_bias down down_bias window"
    )


class Model(Structure):
    _fields_ = [*_words("hidden heads kv_heads head_dim mlp threads"), ("eps", c_double), ("layers", POINTER(Layer))]


class Cache(Structure):
    _fields_ = _words("keys values layer_stride starts head_stride")


class Rows(Structure):
    _fields_ = _words("count sequences sequence node cache_row length offset parents position cosine sine")


class Span(Structure):
    _fields_ = _words("begin end skip taps")


class Heads(Structure):
    _fields_ = _words("heads hidden inputs layers linear outputs choices threads weight bias output scale output_scale")


class Committed(Structure):
    _fields_ = _words(
        "sequences cache_row length count cosine sine fuse others stream following embedding packed"
    )  # fmt: skip


class Drafting(Structure):
    _fields_ = _words("levels hidden streams width grounded chained heads embedding packed vocabulary scales")


class Wanted(Structure):
    _fields_ = [
        *_words("rows count beam"), ("least", c_double), *_words("states roots sizes parents tokens given")
    ]  # fmt: skip


class Lower(Structure):
    _fields_ = [
        *_words("model adapter skip norm"), ("eps", c_double), *_words("head width vocabulary scale embedding packed")
    ]  # fmt: skip


class Climb(Structure):
    _fields_ = [
        *_words("rows layers count steps room beam"), ("least", c_double),
        *_words("thresholds roots budget cache_row length own_length waiting states cosine sine cache own"),
        *_words("sizes ran at parents tokens given hidden tapped"),
    ]  # fmt: skip


@cache
def loaded() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built."""
    if not LIBRARY.exists():
        return None
    lib = ctypes.CDLL(str(LIBRARY))
    if not hasattr(lib, "foretell_layout") or lib.foretell_layout() != LAYOUT:
        raise ForetellError(f"{LIBRARY} was compiled from other sources; install foretell again (pip install -e .).")
    pointer, flag, size = c_void_p, c_int, c_int64
    lib.foretell_build.restype, lib.foretell_build.argtypes = pointer, [ctypes.c_char_p]
    lib.foretell_name.restype, lib.foretell_name.argtypes = ctypes.c_char_p, [pointer]
    lib.foretell_pack.argtypes = [pointer, pointer, size, size, pointer, flag]
    lib.foretell_unpack_rows.argtypes = [pointer, pointer, size, pointer, size, pointer, flag]
    lib.foretell_layers.argtypes = [pointer] * 7 + [flag]
    lib.foretell_norm.argtypes = [pointer, pointer, pointer, c_double, size, size, pointer]
    lib.foretell_linear.argtypes = [
        pointer, pointer, size, size, pointer, size, pointer, pointer, size, pointer, pointer, size, flag
    ]  # fmt: skip
    lib.foretell_heads.argtypes = [pointer, pointer, pointer, size, size, pointer, pointer, pointer, flag]
    lib.foretell_observe.argtypes = [pointer] * 5 + [size, pointer, flag]
    lib.foretell_grow.argtypes = lib.foretell_climb.argtypes = [pointer, pointer, pointer, flag]
    lib.foretell_attention.argtypes = [pointer] * 6 + [size, flag]
    return lib


def require() -> ctypes.CDLL:
    """The library, where the caller knows that it was built."""
    lib = loaded()
    assert lib is not None, "the kernels were not compiled"
    return lib


@dataclass(frozen=True)
class Build:
    """The kernels for one instruction set; all share one packed layout but that of `INT8_BOTH`."""

    name: str
    handle: int


def find(name: str = "") -> Build | None:
    """A build by name (see BUILDS), or the best; None if this processor lacks it, or none was compiled."""
    lib = loaded()
    handle = lib.foretell_build(name.encode()) if lib is not None else None
    return Build(lib.foretell_name(handle).decode(), handle) if lib is not None and handle else None


def default() -> Build:
    """What `FORETELL_KERNELS` names, or the best, where the caller knows that there is one."""
    build = find(os.environ.get("FORETELL_KERNELS", ""))
    assert build is not None, "no such kernels here"
    return build


def address(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous() and tensor.device.type == "cpu" and dtype in (None, tensor.dtype)
    return tensor.data_ptr()


def _up(count: int) -> int:
    return -(-count // 32) * 32


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
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(_up(self.outputs))
            self.bias[: self.outputs] = bias
        require().foretell_pack(
            self.build.handle, address(weight.contiguous()), self.outputs, self.inputs, address(self.packed),
            weight.itemsize,
        )  # fmt: skip

    def __call__(self, x_MK: Tensor, threads: int) -> Tensor:
        """Returns y [M, N] float32."""
        y_MN = torch.empty(x_MK.shape[0], self.outputs)
        self._run(x_MK, y_MN, 0, None, None, threads)
        return y_MN

    def argmax(self, x_MK: Tensor, threads: int) -> Tensor:
        """First index of the greatest output of each row [M] int64, without writing the outputs to memory."""
        return self.top(x_MK, 1, threads)[1][:, 0]

    def top(self, x_MK: Tensor, count: int, threads: int) -> tuple[Tensor, Tensor]:
        """The `count` greatest outputs of each row, greatest first: values [M, count] and their indices int64.

        Of equals the first; the outputs are not written to memory.
        """
        assert 0 < count <= self.outputs
        values = torch.empty(x_MK.shape[0], count)
        best = torch.empty(x_MK.shape[0], count, dtype=torch.int64)
        self._run(x_MK, None, count, values, best, threads)
        return values, best

    def rows(self, ids_M: Tensor) -> Tensor:
        """Rows of W [M, K] as float32: a tied embedding read back from the packed head."""
        out_MK = torch.empty(ids_M.shape[0], self.inputs)
        require().foretell_unpack_rows(
            self.build.handle, address(self.packed), self.inputs, address(ids_M, torch.int64), ids_M.shape[0],
            address(out_MK), self.bf16,
        )  # fmt: skip
        return out_MK

    def _run(
        self, x_MK: Tensor, y_MN: Tensor | None, count: int, values: Tensor | None, best: Tensor | None, threads: int
    ) -> None:
        x_MK = x_MK.contiguous()
        assert x_MK.dtype == torch.float32 and x_MK.shape[1] == self.inputs
        require().foretell_linear(
            self.build.handle, address(x_MK), x_MK.shape[0], self.inputs, address(self.packed), self.outputs,
            address(self.bias), address(y_MN), count, address(values), address(best), threads,
            self.bf16,
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
        self.bias = None if bias is None else F.pad(bias.float(), (0, -self.outputs % 32))
        require().foretell_pack(
            build.handle, address(rounded.contiguous()), self.outputs, self.inputs, address(self.packed), how
        )


class PackedHeads:
    """`linear.StackedHeads` in one call: the team of threads is woken once, not at every layer of every head.

    Guesses need not be exact: of bfloat16 models they are computed with `Int8Linear`.
    """

    def __init__(
        self, blocks: Sequence[Sequence[tuple[Tensor, Tensor]]], outputs: Sequence[Tensor] | DrafterHeads,
        linear: bool, dtype: torch.dtype, threads: int, build: Build,
    ):  # fmt: skip
        self._build, self._bf16 = build, int(dtype == torch.bfloat16)

        def pack(weight: Tensor, bias: Tensor | None, how: int) -> Int8Linear | PackedLinear:
            return Int8Linear(weight, bias, build, how) if self._bf16 else PackedLinear(weight.to(dtype), bias, build)

        # what the first block reads side by side differs too much in size for one step a row
        self._blocks = [pack(weight, bias, INT8) for layer in blocks for weight, bias in layer]
        if isinstance(outputs, Sequence):
            self._outputs = [pack(weight, None, INT8_BOTH) for weight in outputs]
        else:
            assert isinstance(outputs, PackedHeads)
            self._outputs = outputs._outputs
        self._heads = len(blocks[0]) if blocks else len(self._outputs)
        assert len(self._outputs) in (1, self._heads)
        first, output = (self._blocks or self._outputs)[0], self._outputs[0]
        self._tables = [
            (c_uint64 * len(addresses))(*addresses)
            for addresses in (
                [address(block.packed) for block in self._blocks],
                [address(block.bias) for block in self._blocks],
                [address(each.packed) for each in self._outputs],
                [address(each.scale) for each in self._blocks if isinstance(each, Int8Linear)],
                [address(each.scale) for each in self._outputs if isinstance(each, Int8Linear)],
            )
        ]
        self._described = Heads(
            self._heads, output.inputs, first.inputs, len(blocks), linear, len(self._outputs), output.outputs,
            threads,
            *(ctypes.addressof(table) if len(table) else 0 for table in self._tables),
        )  # fmt: skip

    def top(
        self, store_Nd: Tensor, which_BS: Sequence[Sequence[int]], count: int, states_BKd: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, about, which = len(which_BS), self._described, np.array(which_BS, dtype=np.int64)
        assert store_Nd.dtype == torch.float32 and store_Nd.shape[1] == about.hidden
        assert which.shape == (rows, about.inputs // about.hidden) and 0 < count <= about.choices
        assert which.min() >= 0 and which.max() < len(store_Nd)
        pointers = address(store_Nd) + which * (about.hidden * 4)
        values = torch.empty(self._heads, rows, count)
        best = torch.empty(self._heads, rows, count, dtype=torch.int64)
        assert states_BKd is None or states_BKd.shape == (rows, self._heads, about.hidden)
        require().foretell_heads(
            self._build.handle, ctypes.byref(about), pointers.ctypes.data, rows, count, address(values),
            address(best), address(states_BKd, torch.float32), self._bf16,
        )  # fmt: skip
        return values.transpose(0, 1), best.transpose(0, 1)


class PackedGrower:
    """`linear.TreeGrower` in one call."""

    def __init__(self, drafting: LevelDrafting, embedding: Tensor | PackedLinear, build: Build):
        d = drafting
        levels = [level for level in d.levels if isinstance(level, PackedHeads)]
        assert len(levels) == len(d.levels) and all(level._heads == 1 for level in levels)
        for k, about in enumerate(level._described for level in levels):
            assert about.inputs == about.hidden * (d.streams + d.grounded * (k + 1) + d.chained * (k > 0))
            assert 0 < d.width <= about.choices == len(d.vocabulary_V)
        self._kept = levels, embedding, (Heads * len(levels))(*(level._described for level in levels))
        self._build, self._bf16, self.streams = build, levels[0]._bf16, d.streams
        self._vocabulary_V = np.ascontiguousarray(d.vocabulary_V, dtype=np.int64)
        self._scales = np.array(d.scales, dtype=np.float32) if d.scales else None
        rows, packed = (embedding.packed, True) if isinstance(embedding, PackedLinear) else (embedding, False)
        self._described = Drafting(
            len(levels), levels[0]._described.hidden, d.streams, d.width, d.grounded, d.chained,
            ctypes.addressof(self._kept[2]), address(rows), packed,
            self._vocabulary_V.ctypes.data, 0 if self._scales is None else self._scales.ctypes.data,
        )  # fmt: skip

    def grow(
        self, roots: Sequence[int], states: Sequence[Tensor | None], count: int, beam: int, least: float
    ) -> list[tuple[list[int], list[int], list[float]]]:
        rows, shape = len(roots), (self.streams, self._described.hidden)
        assert all(each is None or (each.shape == shape and each.dtype == torch.float32) for each in states)
        parents, tokens = np.empty((2, rows, count + 1), dtype=np.int64)
        sizes, given = np.empty(rows, dtype=np.int64), np.empty((rows, count + 1))
        pointers, newest = np.array([address(each) for each in states]), np.array(roots, dtype=np.int64)
        wanted = Wanted(
            rows, count, beam, least, pointers.ctypes.data, newest.ctypes.data, sizes.ctypes.data, parents.ctypes.data,
            tokens.ctypes.data, given.ctypes.data,
        )  # fmt: skip
        require().foretell_grow(self._build.handle, ctypes.byref(self._described), ctypes.byref(wanted), self._bf16)
        ends = sizes.tolist()
        return [
            (parents[b, :end].tolist(), tokens[b, :end].tolist(), given[b, :end].tolist()) for b, end in enumerate(ends)
        ]
