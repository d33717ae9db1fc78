"""The number type of products in training: the faster one on this machine, as measured.

bfloat16 halves the memory traffic, and is several times faster than float32 on processors with units for it. On others
the library may multiply number by number and take forty times as long. The processor's features do not predict how fast
a library's product is, so the three products of a linear layer are timed, once per process: the forward product, and
those of the gradients of input and weight.

Legend: P positions, d inputs, V outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTH, SIZES = 576, ((16, 512), (64, 2048), (256, 4096), (1024, 8192), (2048, 16384))
"""Inputs, and (positions, outputs), small ones first: a slow product may take seconds at the last size."""
CLEAR = 2.5
"""Ratio that decides without timing larger products."""
LONG = 0.01
"""Seconds of one size after which no larger one is timed, which would take eight times as long."""


@dataclass(frozen=True)
class Measured:
    """Seconds of the three products at one size, by the name of the number type."""

    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)

    def slower(self, name: str) -> float:
        """Time in this type relative to the fastest."""
        return self.seconds[name] / self.seconds[self.fastest]

    def clearly_slower(self, name: str) -> bool:
        return self.slower(name) > CLEAR

    def explained(self, name: str, before: str) -> str:
        """A sentence on the type of a training that began in `before`, and why."""
        other = next(other for other in TYPES if other != name)
        gain = self.seconds[other] / self.seconds[name]
        if name != before:
            return f"the training began in {before} and continues in {name}, {gain:.1f} times as fast here"
        if gain < 1:
            return f"training multiplies in {name}, as it began, though {other} is {1 / gain:.1f} times as fast here"
        return f"training multiplies in {name}, {gain:.1f} times as fast here as {other}"


@cache
def measured(device: str) -> Measured:
    """Times a kind of device; takes a fraction of a second, once."""
    for size in SIZES:
        found = Measured({name: _seconds(dtype, device, *size) for name, dtype in TYPES.items()})
        if any(map(found.clearly_slower, TYPES)) or sum(found.seconds.values()) > LONG:
            break
    return found


def _seconds(dtype: torch.dtype, device: str, positions: int, outputs: int) -> float:
    """Seconds of the three products, each at its best of three; the first call of each is not counted."""
    x_Pd, weight_Vd, slope_PV = (
        torch.ones(shape, dtype=dtype, device=device)
        for shape in ((positions, WIDTH), (outputs, WIDTH), (positions, outputs))
    )
    products: list[Callable[[], Tensor]] = [
        lambda: x_Pd @ weight_Vd.T, lambda: slope_PV @ weight_Vd, lambda: slope_PV.T @ x_Pd
    ]  # fmt: skip

    def timed(multiply: Callable[[], Tensor]) -> float:
        began = time.perf_counter()
        multiply()[0, 0].item()  # waits for an asynchronous device
        return time.perf_counter() - began

    return sum(min([timed(multiply) for _ in range(4)][1:]) for multiply in products)


_given: ContextVar[str | None] = ContextVar("number type of training", default=None)


@contextmanager
def multiply_in(name: str) -> Iterator[None]:
    """Uses this type inside the block, whatever is faster."""
    token = _given.set(name)
    try:
        yield
    finally:
        _given.reset(token)


def chosen(device: torch.device) -> str:
    """Name of the type to use: the given one, else the faster one on this device."""
    return _given.get() or measured(device.type).fastest


def number_type(device: torch.device) -> torch.dtype:
    """The type to use for products."""
    return TYPES[chosen(device)]


def product(x: Tensor, weight_Vd: Tensor) -> Tensor:
    """Returns x Wᵀ in float32, multiplied in the chosen type."""
    dtype = number_type(x.device)
    return F.linear(x.to(dtype), weight_Vd.to(dtype)).float()
