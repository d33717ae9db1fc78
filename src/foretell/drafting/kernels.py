"""What a backbone offers to drafters, looked up by its kind: the backbone itself knows no drafter.

A new way to compute (a GPU's) adds one row here and one module beside `cpu.py`; without one, drafters run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from foretell.backbone import Adapters, Backbone
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.drafting.cpu import CpuKernels
from foretell.drafting.eager import EagerKernels
from foretell.drafting.protocols import DraftKernels

KERNELS: dict[type, Callable[[Any], DraftKernels]] = {Backbone: EagerKernels, CompiledBackbone: CpuKernels}


def adapters_of(backbone: Backbone, down_Lrd: Tensor, up_Ldr: Tensor, begin: int = 0) -> Adapters:
    """Returns adapters beside layers, from `begin` on, rounded as drafts may be."""
    linear = kernels_for(backbone).linear
    return backbone.adapters(
        [(linear(down.float()), linear(up.float())) for down, up in zip(down_Lrd, up_Ldr, strict=True)], begin
    )


def kernels_for(backbone: Backbone) -> DraftKernels:
    """Returns the fastest that this backbone, or what it is derived from, has."""
    return next(KERNELS[kind](backbone) for kind in type(backbone).__mro__ if kind in KERNELS)
