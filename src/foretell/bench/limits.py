"""What this machine allows: a step must read all weights once, so tokens per step / reading time bounds the speed."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any

import torch

from foretell.backbone import Backbone
from foretell.backbone.families import weight_shapes

BUFFER_BYTES = 256 << 20
"""Far beyond any cache."""


def limits(backbone: Backbone) -> dict[str, Any]:
    """Bandwidth, the weights that a step reads, and the bound that follows for plain decoding."""
    bandwidth = read_bandwidth(backbone)
    return {
        "read_bytes_per_s": bandwidth,
        "weight_bytes": step_bytes(backbone),
        "plain_tokens_per_s": bandwidth / step_bytes(backbone),
    }


def step_bytes(backbone: Backbone) -> int:
    """Bytes of the weights that one step reads: all but an embedding that is not the output matrix too."""
    shapes = weight_shapes(backbone.config)
    if not backbone.config.tied:
        del shapes["model.embed_tokens.weight"]
    return sum(math.prod(shape) for shape in shapes.values()) * torch.empty(0, dtype=backbone.dtype).element_size()


def read_bandwidth(backbone: Backbone, repeats: int = 15) -> float:
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
