"""Makes a backbone canonical where padding can, and stores the verdict: probing a large model takes seconds."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from foretell.backbone.base import Backbone
from foretell.backbone.cpu.library import digest
from foretell.backbone.eager.linear import MAX_ROWS, MIN_ROWS
from foretell.backbone.probe import probe
from foretell.backbone.step_costs import processor
from foretell.errors import ForetellError, is_number
from foretell.files import read_json, write_json
from foretell.loading.cache_dir import StageProgress, cache_folder

KERNEL_CHOICE = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE")
"""Environment variables that make libraries choose other kernels on the same machine."""
MIN_STORED_SECONDS = 0.5
"""A verdict that took less is found again at each load."""


@dataclass(frozen=True)
class Probed:
    """The verdict on one backbone on this machine.

    Attributes:
        nondeterminism: None if its arithmetic is canonical, else one sentence on what depends on the other rows.
        rows: number of rows that every call of a linear is padded to.
        seconds: time that the probe took.
    """

    nondeterminism: str | None
    rows: int
    seconds: float


def settle(
    backbone: Backbone, cache_dir: str | Path | None = None, progress: StageProgress = lambda fraction: None
) -> Probed:
    """Probes a backbone, and pads its calls if a library computes one row differently from many.

    A verdict that took long is stored, and read from the cache at the next load. Padding costs time in every pass:
    where a library needs 64 rows, plain decoding multiplies 64 rows per token. Where not even that helps, nothing is
    padded, and results are marked as not exact.

    Raises:
        ForetellError: the weights are damaged.
    """
    path = _verdict_file(backbone, cache_dir)
    verdict = _stored(path)
    if verdict is None:
        verdict = _probed(backbone, progress)
        if verdict.seconds > MIN_STORED_SECONDS:
            with suppress(ForetellError):  # without a writable cache the next load probes again
                write_json(path, asdict(verdict), shared=True)
    backbone.pad_rows(verdict.rows)
    return verdict


def _probed(backbone: Backbone, progress: StageProgress) -> Probed:
    began = time.perf_counter()
    nondeterminism, rows = probe(backbone, progress), MIN_ROWS
    for padded in (16, MAX_ROWS):
        if nondeterminism and backbone.pad_rows(padded) and probe(backbone) is None:
            nondeterminism, rows = None, padded
    progress(1.0)
    return Probed(nondeterminism, rows, time.perf_counter() - began)


def _verdict_file(backbone: Backbone, cache_dir: str | Path | None) -> Path:
    """Names the file of a verdict by all it depends on: these weights, this machine and the code that computes."""
    on_gpu = backbone.device.type == "cuda"
    parts = (
        backbone.fingerprint, backbone.kernels + backbone.quantized, str(backbone.dtype), str(backbone.device),
        str(backbone.threads),
        torch.cuda.get_device_name(backbone.device) if on_gpu else processor() or platform.machine(),
        torch.backends.cpu.get_cpu_capability(), torch.__version__, code(),
        *(os.environ.get(name, "") for name in KERNEL_CHOICE), str(torch.backends.cuda.matmul.allow_tf32),
    )  # fmt: skip
    name = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
    return cache_folder(cache_dir) / "probes" / f"{name}.json"


@cache
def code() -> str:
    """Returns a digest of the kernels and of the code around them: what is kept on disk holds for one version."""
    here = Path(__file__).parent
    modules = b"".join(file.read_bytes() for file in sorted([*here.rglob("*.py"), *here.parent.glob("loading/*.py")]))
    return hashlib.sha256(modules + digest().encode()).hexdigest()


def _stored(path: Path) -> Probed | None:
    """Reads a verdict; None if there is none, or the file is damaged."""
    try:
        found = Probed(**read_json(path)) if path.is_file() else None
    except (ForetellError, OSError, TypeError):
        return None
    valid = (
        found
        and isinstance(found.nondeterminism, str | None)
        and is_number(found.rows, True)
        and is_number(found.seconds)
    )
    return found if valid else None
