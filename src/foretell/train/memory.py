"""One sentence where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from foretell.errors import UsageError
from foretell.files import one_line


@contextmanager
def fits(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    """Refuses what does not fit into the memory of a device.

    Raises:
        UsageError: memory ran out inside the block; the sentence begins with `what` and ends with `remedy`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise UsageError(
            f"{what} does not fit into the memory of {device} ({one_line(error)[:200]}); {remedy}."
        ) from error


def _out_of_memory(error: Exception) -> bool:
    """Returns whether memory ran out; on a CPU, PyTorch has no error of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
