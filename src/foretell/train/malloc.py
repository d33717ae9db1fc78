"""Keeps the memory that a training step frees in the process, since the next step needs as much again.

glibc maps every block of more than 32 MiB anew, and the system clears each of its pages: with logits of a few hundred
MB that takes half the time of a step.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Options of mallopt(3)."""
_MAX_INT = 2**31 - 1


def keep() -> bool:
    """Lets glibc keep freed memory, for the whole process; returns False, and does nothing, with other libraries."""
    if sys.platform != "linux":
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    wanted = ((_MMAP_THRESHOLD, _MAX_INT), (_TRIM_THRESHOLD, _MAX_INT), (_TOP_PAD, 1 << 28))
    accepted = [set_option(name, value) == 1 for name, value in wanted]
    return all(accepted)
