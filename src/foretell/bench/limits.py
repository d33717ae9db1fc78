"""The bound of this machine: a step reads all weights once, so tokens per step / reading time bounds the speed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median

import torch

from foretell.backbone import Backbone
from foretell.loading.blocks import Blocks
from foretell.loading.tensors import weight_shapes

BUFFER_BYTES = 256 << 20
"""Bytes read by one measurement: far more than any cache holds."""


def limits(weight_bytes: int, bandwidths: Sequence[float]) -> dict[str, float]:
    """Returns the bound for plain decoding.

    Args:
        weight_bytes: bytes of the weights that a step reads.
        bandwidths: bytes per second, measured throughout a run, since machines drift.
    """
    typical = median(bandwidths)
    return {
        "read_bytes_per_s": typical, "weight_bytes": weight_bytes, "plain_tokens_per_s": typical / weight_bytes,
    }  # fmt: skip


def step_bytes(backbone: Backbone) -> int:
    """Counts the bytes of the weights that one step reads: all but an embedding that is not also the output matrix."""
    shapes = weight_shapes(backbone.config)
    if not backbone.config.tied:
        del shapes["model.embed_tokens.weight"]
    itemsize = torch.empty(0, dtype=backbone.dtype).element_size()

    def stored(name: str) -> int:
        blocks = Blocks.of(backbone.read(name)) if backbone.quantized and backbone.read else None
        return blocks.data.nbytes if blocks and blocks.type.quantized else math.prod(shapes[name]) * itemsize

    return sum(map(stored, shapes))


def read_bandwidth(backbone: Backbone, repeats: int = 9) -> float:
    """Measures bytes per second at which the backbone's own linear kernel streams weights that it uses once."""
    width = backbone.config.hidden
    itemsize = torch.empty(0, dtype=backbone.dtype).element_size()
    rows = BUFFER_BYTES // (itemsize * width)
    weight = torch.zeros(rows, width, dtype=backbone.dtype, device=backbone.device)
    linear, x = backbone.linear(weight, None), torch.zeros(1, width, device=backbone.device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        linear.top(x, 1)[1].tolist()
        seconds.append(time.perf_counter() - began)
    return weight.nbytes / min(median(seconds[i::3]) for i in range(3))
