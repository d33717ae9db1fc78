"""What this machine allows: a step must read all weights once, so tokens per step / reading time bounds the speed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median

import torch

from foretell.backbone import Backbone
from foretell.loading.families import weight_shapes

BUFFER_BYTES = 256 << 20
"""Far beyond any cache."""


def limits(weight_bytes: int, bandwidths: Sequence[float]) -> dict[str, float]:
    """The bound that follows for plain decoding.

    Args:
        weight_bytes: that a step reads.
        bandwidths: bytes per second, measured all through a run, since machines drift.
    """
    typical = median(bandwidths)
    return {
        "read_bytes_per_s": typical, "weight_bytes": weight_bytes, "plain_tokens_per_s": typical / weight_bytes,
    }  # fmt: skip


def step_bytes(backbone: Backbone) -> int:
    """Bytes of the weights that one step reads: all but an embedding that is not the output matrix too."""
    shapes = weight_shapes(backbone.config)
    if not backbone.config.tied:
        del shapes["model.embed_tokens.weight"]
    return sum(math.prod(shape) for shape in shapes.values()) * torch.empty(0, dtype=backbone.dtype).element_size()


def read_bandwidth(backbone: Backbone, repeats: int = 9) -> float:
    """Bytes per second at which the backbone's own linear kernel streams weights that it uses once, at its best."""
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
