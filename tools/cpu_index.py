"""Prints pip's option for PyTorch's CPU builds where they are wanted: on Linux, without an NVIDIA GPU.

PyPI's torch for Linux brings gigabytes of CUDA; PyTorch's own index has builds without. If that index does not answer
within a few seconds, nothing is printed, and pip takes what its own index has. Runs with any Python, before anything is
installed.
"""

import platform
import shutil
import sys
import threading
import urllib.request
from pathlib import Path

INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS = 4.0
"""How long the index may take to answer, name lookup included."""


def wanted() -> bool:
    """Whether torch should come without CUDA."""
    gpu = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()
    return platform.system() == "Linux" and not gpu


def answers(index: str, seconds: float = SECONDS) -> bool:
    """Whether an index lists torch within so many seconds."""
    found: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{index}/torch/", timeout=seconds) as page:
                found.append(b"torch" in page.read(4096))
        except (OSError, ValueError):  # no route, no name, a refusal, a time-out
            return

    asking = threading.Thread(target=ask, daemon=True)  # a name lookup knows no time-out
    asking.start()
    asking.join(seconds)
    return any(found)


if __name__ == "__main__" and wanted() and answers(INDEX):
    print(f"no NVIDIA GPU here: torch comes without CUDA, from {INDEX}", file=sys.stderr)
    print(f"--extra-index-url {INDEX}")
