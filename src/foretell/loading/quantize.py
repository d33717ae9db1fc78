"""From floats to the blocks of GGUF's types Q8_0 and Q4_K, as `--weights q8_0` and `q4_k` make them while loading.

Q8_0: 32 numbers are scale · q, q from -127 to 127. The scale is the largest number's share, and there is nothing to
search for.

Q4_K: 32 numbers are scale · q - least, q from 0 to 15. Scale and least are counts, 0 to 63, of two units that a
super-block of eight such blocks has. The least possible error is searched for in two steps:

1. For a few trial scales, numbers are rounded to q, and the line x = scale · q - least is fitted to them by least
   squares. The line that leaves the smallest error wins; the largest scale and least of a super-block make its units.
2. Of the counts nearest to the line's scale and least, and their neighbours, the pair wins whose rounded numbers are
   closest to the floats.

Squares of errors are weighted by |x| + 1.5 times the mean of |x| in the block: large numbers move an output most. The
same floats become the same blocks on every machine: heads trained for a quantized model fit its copies elsewhere.

Shapes: Q numbers of a block (32), B blocks, S super-blocks of 8 blocks.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foretell.errors import ForetellError, ForetellWarning
from foretell.loading.blocks import TYPES, Blocks, BlockType, save
from foretell.loading.cache_dir import Progress
from foretell.loading.choices import quantized_already
from foretell.loading.families import read_config
from foretell.loading.lora import copy_beside
from foretell.loading.weights import keep_fingerprint, keeps_blocks, read_weights

PIECE = 3 << 13
"""Numbers that are quantized at once: few enough for a cache of the processor, and to let PyTorch's team sleep."""
LARGEST = torch.finfo(torch.float16).max
"""Of a weight; scales and leasts are kept in float16."""
TRIALS = [13.0 + 0.5 * i for i in range(8)]
"""Steps that the range of 32 numbers is divided into for a trial scale; those above the fifteenth round down to it."""
EVEN = 1.5
"""Weight of the mean |x| beside |x|."""
NEIGHBOURS = sorted(itertools.product((-1, 0, 1), repeat=2), key=lambda pair: pair != (0, 0))
"""Changes of the two counts; among equals the first wins."""


def quantize(weight: Tensor, kind: BlockType) -> Blocks:
    """Rounds a weight [..., K] to blocks of Q8_0 or Q4_K; K is a multiple of the numbers of a block."""
    encode = {"Q8_0": _q8_0, "Q4_K": _q4_k}[kind.name]
    pieces = weight.flatten().split(PIECE)
    blocks = torch.cat([encode(piece.float().view(-1, kind.numbers)) for piece in pieces])
    return Blocks(kind, blocks.view(*weight.shape[:-1], -1))


def type_for(shape: tuple[int, ...], choice: str) -> BlockType | None:
    """Returns the type that a tensor of a model is quantized to.

    Args:
        choice: "q8_0" or "q4_k".

    Returns:
        None for vectors, and for matrices whose inputs do not fill blocks of Q8_0, the second choice, either.
    """
    kinds = (TYPES[name] for name in (choice.upper(), "Q8_0"))
    return next((kind for kind in kinds if len(shape) == 2 and shape[1] % kind.numbers == 0), None)


def quantized_weight(name: str, weight: Blocks, choice: str) -> Blocks:
    """Returns a tensor of a model as `type_for` says.

    Raises:
        ForetellError: it holds numbers that are not finite, or too large for scales in float16.
    """
    kind = type_for(weight.shape, choice)
    if kind is None:
        return weight
    floats = weight.floats()
    least, most = (float(number) for number in floats.aminmax())
    largest = max(-least, most)
    if not largest <= LARGEST:  # nor is one that is not a number
        raise ForetellError(
            f"{name} holds {largest:g}, but weights to be quantized are finite and at most {LARGEST:,.0f} in size; "
            "fetch the model again, or load it without `weights=`."
        )
    return quantize(floats, kind)


def quantize_folder(base: Path, target: Path, choice: str, progress: Progress) -> None:
    """Writes the model folder `target`: `base` with its matrices quantized, norms and biases as they are.

    Raises:
        ForetellError, UsageError: the folder is damaged, or quantized already.
    """
    config = read_config(base)
    weights = read_weights(base, config)
    if keeps_blocks(base):
        raise quantized_already(base)
    warn_of_exceptions(weights.shapes, choice)
    files, index = weights.files(), dict[str, str]()
    for number, names in enumerate(files, 1):
        shard = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = dict[str, Blocks]()
        for name in names:
            tensors[name] = quantized_weight(name, weights.blocks(name), choice)
            index[name] = shard
            progress("quantizing", len(index) / len(weights.shapes))
        save(tensors, target / shard)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}, indent=2), encoding="utf-8")
    copy_beside(base, target)
    progress("reading it back", 0.0)
    keep_fingerprint(target, read_weights(target, config), config)


def warn_of_exceptions(shapes: Mapping[str, tuple[int, ...]], choice: str) -> None:
    """Says which matrices of a model do not get the type of the choice, if any do not."""
    wanted = TYPES[choice.upper()]
    others: dict[str, dict[str, None]] = {}  # what becomes of them -> their names, each once
    for name, shape in shapes.items():
        kind = type_for(shape, choice)
        if len(shape) == 2 and kind is not wanted:
            becomes = f"become {kind.name.lower()}" if kind else "stay as they are"
            others.setdefault(becomes, {})[name.split(".")[-2]] = None
    if others:
        each = "; ".join(f"{', '.join(names)} {becomes}" for becomes, names in others.items())
        warnings.warn(f"{choice} needs inputs that {wanted.numbers} divides: {each}.", ForetellWarning, stacklevel=3)


def _q8_0(numbers_B32: Tensor) -> Tensor:
    scale_B1 = (numbers_B32.abs().amax(1, keepdim=True) / 127).half()
    q_B32 = _rounded((numbers_B32 / scale_B1.float().clamp(min=1e-30)).clamp_(-127, 127)).to(torch.int8)
    return torch.cat([scale_B1.view(torch.uint8), q_B32.view(torch.uint8)], 1)


def _q4_k(numbers_S256: Tensor) -> Tensor:
    x_QB = numbers_S256.view(-1, 32).T.contiguous()  # sums over Q are then sums of whole vectors
    share_QB = x_QB.abs()
    share_QB += (_sum(share_QB) * (EVEN / 32)).clamp(min=1e-30)
    share_QB /= _sum(share_QB)
    line = [each_B.view(-1, 8) for each_B in _fitted(x_QB, share_QB)]
    units = [(each_S8.amax(1, keepdim=True) / 63).half() for each_S8 in line]
    counts = [
        _rounded((each_S8 / unit_S1.float().clamp(min=1e-30)).clamp_(0, 63))
        for each_S8, unit_S1 in zip(line, units, strict=True)
    ]
    counts = _chosen(x_QB, share_QB, units, counts)
    scale_B, least_B = _multiplied(units, counts)
    return _packed(units, counts, _multiples(x_QB + least_B, scale_B))


def _packed(units: list[Tensor], counts: list[Tensor], q_QB: Tensor) -> Tensor:
    """Returns super-blocks [S, 144]: two units, six bits for each count, four for each q."""
    scales_S8, leasts_S8 = (each_S8.to(torch.uint8) for each_S8 in counts)
    (low_S4, high_S4), (low_least_S4, high_least_S4) = scales_S8.split(4, 1), leasts_S8.split(4, 1)
    counts_S12 = [low_S4 | high_S4 >> 4 << 6, low_least_S4 | high_least_S4 >> 4 << 6, high_S4 & 15 | high_least_S4 << 4]
    q_S42Q = q_QB.T.to(torch.uint8).reshape(-1, 4, 2, 32)
    q_S128 = (q_S42Q[:, :, 0] | q_S42Q[:, :, 1] << 4).flatten(1)
    return torch.cat([*(unit_S1.view(torch.uint8) for unit_S1 in units), *counts_S12, q_S128], 1)


def _fitted(x_QB: Tensor, share_QB: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and least [B] of the best line through each block's numbers; neither is negative.

    Args:
        share_QB: weights of the squares; of a block they sum to one.
    """
    start_B, end_B = x_QB.amin(0).clamp(max=0), x_QB.amax(0)
    width_B = end_B - start_B
    scale_B, least_B = width_B / 15, -start_B  # of numbers that are all alike
    best_B = torch.full_like(scale_B, -torch.inf)
    mean_B = _sum(share_QB * x_QB)
    off_QB, way_QB = x_QB - mean_B, (x_QB - start_B) / width_B.clamp(min=1e-30)
    for steps in TRIALS:
        q_QB = _rounded((way_QB * steps).clamp_(max=15))
        shared_QB = share_QB * q_QB
        mean_q_B, square_B = _sum(shared_QB), _sum(shared_QB * q_QB)
        with_x_B = _sum(shared_QB * off_QB)
        spread_B = square_B - mean_q_B.square()
        slope_B = with_x_B / spread_B
        gain_B, offset_B = with_x_B * slope_B, slope_B * mean_q_B - mean_B
        # no least is negative: a line that would begin above 0 begins at 0
        product_B = with_x_B + mean_B * mean_q_B
        through_B, above_B = product_B / square_B, offset_B < 0
        slope_B = through_B.where(above_B, slope_B)
        gain_B = (product_B * through_B - mean_B.square()).where(above_B, gain_B)
        # no share is below 1.5/80, nor much below it the spread, unless all q are the same
        better_B = (gain_B > best_B) & (spread_B > 1e-3) & (slope_B > 0)
        scale_B = slope_B.where(better_B, scale_B)
        least_B = offset_B.clamp(min=0).where(better_B, least_B)
        best_B = gain_B.where(better_B, best_B)
    return scale_B, least_B


def _chosen(x_QB: Tensor, share_QB: Tensor, units: list[Tensor], counts: list[Tensor]) -> list[Tensor]:
    """Returns the counts [S, 8] of scale and least, these or their neighbours, that leave the smallest error."""
    smallest_B = torch.full_like(x_QB[0], torch.inf)
    chosen = counts
    for changes in NEIGHBOURS:
        tried = [(each_S8 + by).clamp_(0, 63) for each_S8, by in zip(counts, changes, strict=True)]
        scale_B, least_B = _multiplied(units, tried)
        above_QB = x_QB + least_B
        off_QB = _multiples(above_QB, scale_B).mul_(scale_B).sub_(above_QB)
        error_B = _sum(off_QB.square_().mul_(share_QB))
        better_S8 = (error_B < smallest_B).view(-1, 8)
        smallest_B = error_B.minimum(smallest_B)
        chosen = [new_S8.where(better_S8, old_S8) for new_S8, old_S8 in zip(tried, chosen, strict=True)]
    return chosen


def _multiplied(units: list[Tensor], counts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns scale and least [B] of units [S, 1] and their counts [S, 8]."""
    scale_B, least_B = ((unit_S1.float() * each_S8).flatten() for unit_S1, each_S8 in zip(units, counts, strict=True))
    return scale_B, least_B


def _multiples(above_QB: Tensor, scale_B: Tensor) -> Tensor:
    """Returns q [Q, B] of numbers above their block's -least."""
    return _rounded((above_QB / scale_B.clamp(min=1e-30)).clamp_(0, 15))


def _sum(numbers_QB: Tensor) -> Tensor:
    """Returns the sums [B] in an order of its own: that of PyTorch depends on B, and may on the processor."""
    while len(numbers_QB) > 1:
        low, high = numbers_QB.chunk(2)
        numbers_QB = low + high
    return numbers_QB[0]


def _rounded(x: Tensor) -> Tensor:
    """Rounds small numbers to whole ones, in place; `round_` would wake PyTorch's team, even for so few."""
    unit = 1.5 * 2**23  # floats of this size are whole
    return x.add_(unit).sub_(unit)
