"""Weights in the quantized types of GGUF files, made without a file: random bytes with scales of a wanted size."""

import gguf
import numpy as np
import torch
from torch import Tensor

from foretell.loading.blocks import TYPES, Blocks

QUANTS = [name for name, row in TYPES.items() if row.quantized]
_SPREAD = {
    "Q4_0": 4.6,
    "Q4_1": 4.6,
    "Q5_0": 9.2,
    "Q5_1": 9.2,
    "Q8_0": 74.0,
    "Q4_K": 170.0,
    "Q5_K": 340.0,
    "Q6_K": 1350.0,
}
"""Standard deviation of the numbers of random bytes, in scales."""
_SCALE_AT = {"Q6_K": 208}
_LEAST = {"Q4_1": -7.5, "Q5_1": -15.5, "Q4_K": 7.5, "Q5_K": 15.5}
"""The least value in scales that centres the numbers (the K types subtract it)."""


def random_blocks(name: str, shape: tuple[int, int], size: float = 1.0, seed: int = 0) -> Blocks:
    """A weight [N, K] of numbers of about this size."""
    row, (outputs, inputs) = TYPES[name], shape
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (outputs, inputs // row.numbers, row.items), dtype=np.uint8)
    scale = (rng.uniform(0.5, 1.5, data.shape[:2]) * size / _SPREAD[name]).astype(np.float16)

    def put(at: int, numbers: np.ndarray) -> None:
        data[:, :, at : at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)

    put(_SCALE_AT.get(name, 0), scale)
    if name in _LEAST:
        put(2, scale * _LEAST[name])
    return Blocks(row, torch.from_numpy(data.reshape(outputs, -1)))


def whole_numbers(name: str) -> tuple[Blocks, Tensor]:
    """A weight [70, K] whose scales are one, and activations [M, K] whose steps are: their products are whole numbers.

    Each row has one block of activations, with zeros elsewhere: of more, sums would pass 2^24.
    """
    row = TYPES[name]
    weight = random_blocks(name, (70, 2 * row.numbers), seed=5)
    data = weight.data.numpy().reshape(70, 2, row.items)
    one, none = (np.array([number], dtype=np.float16).view(np.uint8) for number in (1.0, 0.0))
    at = _SCALE_AT.get(name, 0)
    data[:, :, at : at + 2] = one
    if name in _LEAST:
        data[:, :, 2:4] = none
    blocks = 2 * row.numbers // 32
    x = torch.randint(-127, 128, (3, blocks, 32)).float()
    x[0, :, 0] = 127.0  # a step of one
    x[1], x[2] = 127.0, -127.0  # the largest sums that there are
    return weight, (x[:, :, None] * torch.eye(blocks)[None, :, :, None]).reshape(3 * blocks, -1)


def quantizable(weights: dict[str, Tensor], kinds: tuple[str, ...]) -> dict[str, Tensor | Blocks]:
    """These weights with matrices of about the same numbers in quantized types, in turn."""
    out: dict[str, Tensor | Blocks] = dict(weights)
    for i, (name, weight) in enumerate(weights.items()):
        kind = kinds[i % len(kinds)]
        if weight.dim() == 2 and weight.shape[1] % TYPES[kind].numbers == 0:
            out[name] = random_blocks(kind, (weight.shape[0], weight.shape[1]), float(weight.std()), i)
    return out


def dequantized(weight: Blocks) -> Tensor:
    """Its numbers [N, K] by the reference library."""
    kind = gguf.GGMLQuantizationType[weight.type.name]
    return torch.from_numpy(gguf.dequantize(weight.data.numpy(), kind))


def rounded(x_MK: Tensor) -> Tensor:
    """What activations are multiplied as: eight bits by blocks of 32. Slow twin of `put_q8`, in float64."""
    blocks = x_MK.unflatten(1, (-1, 32))
    greatest = blocks.abs().amax(2, keepdim=True).clamp(min=1e-30)
    multiples = (blocks * (torch.tensor(127.0) / greatest)).round()
    return (multiples.double() * (greatest / 127).double()).flatten(1)
