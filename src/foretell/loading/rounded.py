"""Matrices stored small: rounded to multiples of a step, and the multiples Huffman-coded.

In a file of safetensors such a matrix is two tensors, and the metadata tells its shape:

    NAME         the multiples: int8 as a zlib stream, uint8 [bytes]; metadata NAME: "int8 zlib 4 576 1152"
    NAME.scale   the steps: float32, of the matrix's shape but for axes of 1

Files of format 1 hold the multiples as int8 [..., rows, columns] and the steps as [..., rows], without metadata.

Most numbers are a few steps only. Huffman's code spends few bits on those, so that the step, not the number of bits of
an integer, decides on the size: at a tenth of a row's root mean square 5.4 bits a number and 3 % of error, where blocks
of 32 with a scale each (GGUF's Q5_0) take 5.5 bits for 5 to 6 %.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SCALE = ".scale"
_CODED = "int8 zlib"
_MOST = 127
"""Largest multiple."""


def steps(matrix: Tensor, coarseness: float = 0.0, dim: int = -1) -> Tensor:
    """Returns a step for each row, or whatever lies along `dim`, where the result has size 1.

    Args:
        coarseness: step over the root mean square of the row, if 127 steps then reach its largest number; 0 for the
            finest steps that do.
    """
    numbers = matrix.float()
    finest = (numbers.abs().amax(dim, keepdim=True) / _MOST).clamp(min=1e-30)
    return finest.maximum(coarseness * numbers.square().mean(dim, keepdim=True).sqrt())


def save(path: Path, tensors: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file.

    Args:
        rounded: steps of those tensors that are to be rounded.
    """
    from safetensors.torch import save_file

    stored, about = {name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}
    for name, step in rounded.items():
        multiples = (tensors[name].float() / step).round().clamp(-_MOST, _MOST).to(torch.int8)
        about[name] = " ".join([_CODED, *map(str, multiples.shape)])
        stored |= {name: _coded(multiples), name + SCALE: step.float().contiguous()}
    save_file(stored, path, about)


def load(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file; rounded ones in float32.

    Raises:
        KeyError, ValueError: naming a tensor that is damaged.
        SafetensorError, OSError: the file is no safetensors file, or cannot be read.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about, stored = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = {name: tensor for name, tensor in stored.items() if tensor.dtype == torch.int8}
    sizes = {name: stored[name + SCALE][..., None] for name in found}
    for name, kind in about.items():
        if kind.startswith(_CODED):
            found[name] = _decoded(stored[name], kind, name)
            sizes[name] = stored[name + SCALE]
    for name, multiples in found.items():
        if multiples.ndim != sizes[name].ndim or not _fits(sizes[name], multiples):
            raise ValueError(name + SCALE)
        stored[name] = multiples.float().mul_(sizes[name])
        del stored[name + SCALE]
    return stored


def _fits(step: Tensor, multiples: Tensor) -> bool:
    sizes = zip(step.shape, multiples.shape, strict=True)
    return step.dtype == torch.float32 and all(own in (1, whole) for own, whole in sizes)


def _coded(multiples: Tensor) -> Tensor:
    # neighbouring numbers tell nothing of one another: repetitions are not searched for
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    stream = coder.compress(multiples.numpy().tobytes()) + coder.flush()
    return torch.from_numpy(np.frombuffer(stream, dtype=np.uint8).copy())


def _decoded(stream: Tensor, kind: str, name: str) -> Tensor:
    shape = [int(size) for size in kind.removeprefix(_CODED).split()]
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(name)
    count, coder = math.prod(shape), zlib.decompressobj()
    try:
        multiples = coder.decompress(stream.numpy().tobytes(), count + 1) if stream.dtype == torch.uint8 else b""
    except zlib.error as error:
        raise ValueError(name) from error
    if len(multiples) != count or not coder.eof or coder.unused_data:
        raise ValueError(name)
    return torch.frombuffer(bytearray(multiples), dtype=torch.int8).view(shape)
