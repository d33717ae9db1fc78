"""How weights are stored: one row of `TYPES` for each type of the files.

The numbers of a weight lie in blocks. A block of a plain float is one number; a block of a quantized type is a few
bytes that hold several numbers and their scale. A row of the table says how large a block is and which numbers it
holds. Loading, fusing and converting move whole rows of blocks and never look inside. The compiled backbone packs
blocks as they are where a row of `backbone/cpu/formats.py` keeps their type; everything else asks for floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockType:
    """A row of `TYPES`.

    Attributes:
        name: in the headers of safetensors and GGUF files.
        dtype: of the tensors that hold such blocks.
        numbers: how many a block holds.
        items: elements of `dtype` that a block takes.
        decode: turns blocks [..., B · items] into their numbers [..., B · numbers], a tensor of floats.
    """

    name: str
    dtype: torch.dtype
    numbers: int = 1
    items: int = 1
    decode: Callable[[Tensor], Tensor] = lambda floats: floats

    @property
    def quantized(self) -> bool:
        return not self.dtype.is_floating_point

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the tensor that holds a weight of this shape."""
        return *shape[:-1], -(-shape[-1] // self.numbers) * self.items


def _gguf_type(name: str, numbers: int, size: int) -> BlockType:
    """Returns the row of a quantized type of GGUF files: blocks of `size` bytes."""

    def decode(blocks: Tensor) -> Tensor:
        rows = blocks.reshape(-1, blocks.shape[-1]).contiguous().numpy()
        return torch.from_numpy(unpacked(rows, name)).reshape(*blocks.shape[:-1], -1)

    return BlockType(name, torch.uint8, numbers, size, decode)


def unpacked(data: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Returns the numbers of blocks of any type of GGUF files.

    Raises:
        NotImplementedError: the gguf library cannot unpack this type.
    """
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # the scales of a damaged file; its logits are not finite, and loading says so
        floats: NDArray[np.float32] = dequantize(data, GGMLQuantizationType[name])
    return floats


TYPES = {
    row.name: row
    for row in (
        BlockType("F32", torch.float32),
        BlockType("F16", torch.float16),
        BlockType("BF16", torch.bfloat16),
        _gguf_type("Q4_0", 32, 18),
        _gguf_type("Q4_1", 32, 20),
        _gguf_type("Q5_0", 32, 22),
        _gguf_type("Q5_1", 32, 24),
        _gguf_type("Q8_0", 32, 34),
        _gguf_type("Q4_K", 256, 144),
        _gguf_type("Q5_K", 256, 176),
        _gguf_type("Q6_K", 256, 210),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A weight as it is stored: `data` [..., B · items] of a row of `TYPES`, whole rows of blocks."""

    type: BlockType
    data: Tensor

    @classmethod
    def of(cls, weight: Tensor | Blocks) -> Blocks:
        """Returns plain floats as blocks, and blocks as they are.

        Raises:
            TypeError: a tensor of another type.
        """
        if isinstance(weight, Blocks):
            return weight
        for row in TYPES.values():
            if row.dtype == weight.dtype and not row.quantized:
                return cls(row, weight)
        raise TypeError(f"weights are float32, float16 or bfloat16, not {weight.dtype}")

    @classmethod
    def join(cls, weights: Sequence[Blocks], rows: Callable[[list[Tensor]], Tensor] = torch.cat) -> Blocks:
        """Returns one weight with the rows of several; of different types, as floats that hold the numbers of all.

        Args:
            rows: puts them in order; it may move whole rows and add rows of zeros, nothing else.
        """
        types = {weight.type for weight in weights}
        if len(types) > 1:
            return cls.of(rows([weight.floats() for weight in weights]))
        return cls(types.pop(), rows([weight.data for weight in weights]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of its numbers."""
        return *self.data.shape[:-1], self.data.shape[-1] // self.type.items * self.type.numbers

    def floats(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """Returns its numbers in `dtype`; by default in the float type that holds all of them."""
        return self.type.decode(self.data).to(device=device, dtype=dtype)

    def pieces(self, numbers: int) -> Iterator[Tensor]:
        """Yields its numbers in order, about so many at a time: memory is bounded by a piece."""
        items = max(1, numbers // self.type.numbers) * self.type.items
        yield from map(self.type.decode, self.data.flatten().split(items))


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """One weight with the rows of several, put together when its blocks are asked for: see `Blocks.join`."""

    weights: Sequence[Blocks]
    rows: Callable[[list[Tensor]], Tensor] = torch.cat

    @classmethod
    def of(cls, weight: Tensor | Blocks | Joined) -> Joined:
        """Returns one weight as such, and several as they are."""
        return weight if isinstance(weight, Joined) else cls([Blocks.of(weight)])

    @property
    def type(self) -> BlockType:
        types = {weight.type for weight in self.weights}
        return types.pop() if len(types) == 1 else TYPES["F32"]

    @property
    def shape(self) -> tuple[int, ...]:
        numbers = self.weights[0].shape[1:]
        return len(self.rows([torch.empty(len(weight.data), 1) for weight in self.weights])), *numbers

    def blocks(self) -> Blocks:
        return self.weights[0] if len(self.weights) == 1 else Blocks.join(self.weights, self.rows)


def quantized(name: str) -> BlockType | None:
    """Returns the quantized type of this name, if there is one: its blocks are kept where floats may be rounded."""
    row = TYPES.get(name)
    return row if row and row.quantized else None


def stored_type(file: Any, name: str) -> str:
    """Returns the name of a tensor's type in an open safetensors file, in `TYPES` or not.

    For a quantized type the header only knows bytes; `save` wrote its name into the metadata.
    """
    header: str = file.get_slice(name).get_dtype()
    return header if header in TYPES else (file.metadata() or {}).get(name, header)


def save(weights: Mapping[str, Blocks], path: Path) -> None:
    """Writes a safetensors file."""
    from safetensors.torch import save_file

    types = {name: weight.type.name for name, weight in weights.items() if weight.type.quantized}
    save_file({name: weight.data for name, weight in weights.items()}, path, metadata={"format": "pt", **types})
