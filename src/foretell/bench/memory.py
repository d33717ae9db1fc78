"""Peak memory of processes since it was last reset."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak(device: torch.device, processes: Collection[int] = ()) -> None:
    """Resets the peak. Only Linux can: elsewhere the peak is that of the whole process so far.

    Args:
        processes: ids; by default this process.
    """
    if device.type == "cuda" and not processes:
        torch.cuda.reset_peak_memory_stats(device)
    for process in processes or [os.getpid()]:
        with suppress(OSError):  # a container may forbid it
            Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_bytes(device: torch.device, processes: Collection[int] = ()) -> int:
    """Returns the sum over the processes, shared pages counted for each; 0 where the system does not report it."""
    if device.type == "cuda" and not processes:
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return sum(_high_water(process) for process in processes or [os.getpid()])
    return (
        0
        if processes
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )


def group(leader: int) -> list[int]:
    """Returns the process ids of a group, on Linux."""
    found = [leader]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            after_name = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(after_name[2]) == leader and int(stat.parent.name) != leader:
                found.append(int(stat.parent.name))
    return found


def _high_water(process: int) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    return 0
