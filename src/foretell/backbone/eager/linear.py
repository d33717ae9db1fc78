"""The kernel seam of the eager backbone: which library multiplies, and how it is kept row-independent.

Libraries pick another algorithm for one row than for many, and the bits differ. So a call is cut into pieces of at
most 64 rows and a short piece is padded; `probe.py` checks that this is enough, and more is padded where it is not.
oneDNN's packed weights run at memory speed on CPUs but are private to PyTorch and drop gradients silently:
they are probed for, never used for training, and `F.linear` stands behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_ROWS, MAX_ROWS = 4, 64


class Linear:
    """y [M, N] = x [M, K] Wᵀ + b, row by row independent of M; x is cast to the weight's type, y is float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, packed: bool = True):
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.dtype, self.min_rows = weight.dtype, MIN_ROWS
        self.packed = _onednn_pack(weight) if packed and weight.device.type == "cpu" else None
        missing = -weight.shape[1] % 16
        if self.packed is None and missing:  # rows at unaligned addresses, of which MKL's sums differ
            weight = F.pad(weight, (0, missing))
        self.weight = weight if self.packed is None else weight[:0]

    def __call__(self, x_MK: Tensor) -> Tensor:
        x_MK = x_MK.to(self.dtype)
        pieces = [self._piece(piece).float() for piece in x_MK.split(MAX_ROWS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def top(self, x_MK: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns the `count` greatest outputs of each row, greatest first: values [M, count], indices int64."""
        return self(x_MK).topk(count)

    def _piece(self, x_MK: Tensor) -> Tensor:
        rows = len(x_MK)
        wider = 0 if self.packed is not None else self.weight.shape[1] - x_MK.shape[1]
        if wider or rows < self.min_rows:
            x_MK = F.pad(x_MK, (0, wider, 0, max(0, self.min_rows - rows)))
        if self.packed is not None:
            y_MN = torch.ops.mkldnn._linear_pointwise(x_MK, self.packed, self.bias, "none", [], "")
        else:
            y_MN = F.linear(x_MK, self.weight, self.bias)
        return y_MN[:rows]


def _onednn_pack(weight: Tensor) -> Tensor | None:
    """Returns the weight in oneDNN's own layout, or None where this build or processor has none for its type."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, MAX_ROWS)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(4, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return packed
