"""Memory that a training gives up goes back to the allocator, not to the system: the next step wants as much again.

glibc maps what is larger than 32 MiB anew each time, and the system clears every page of it: of a step with logits of
a few hundred MB that is half the time.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Names of mallopt(3)."""
_MOST = 2**31 - 1


def keep() -> bool:
    """From now on, for the whole process; False where the C library is another, and all stays as it was."""
    if sys.platform != "linux":
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    wanted = ((_MMAP_THRESHOLD, _MOST), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, 1 << 28))
    taken = [set_option(name, value) == 1 for name, value in wanted]
    return all(taken)
