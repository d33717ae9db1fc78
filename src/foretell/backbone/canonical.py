"""What the probe found, what was done about it, and where that is kept: large models take long to probe."""

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
from foretell.backbone.cpu.library import LIBRARY
from foretell.backbone.eager.linear import MAX_ROWS, MIN_ROWS
from foretell.backbone.probe import probe
from foretell.backbone.step_costs import processor
from foretell.errors import ForetellError, is_number
from foretell.files import read_json, write_json
from foretell.loading.cache_dir import cache_folder

CHOOSING = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE")
"""What makes libraries choose other kernels on the same machine."""
KEPT = 0.5
"""Seconds: a verdict that took less is found anew at each load."""


@dataclass(frozen=True)
class Probed:
    """What a backbone needs to be canonical here.

    Attributes:
        inexact: None, or one sentence on what depends on a token's company, whatever is done.
        rows: to how many rows a call of a linear has to be padded.
        seconds: that the probe took.
    """

    nondeterminism: str | None
    rows: int
    seconds: float


def settle(backbone: Backbone, cache_dir: str | Path | None = None) -> None:
    """Probes a backbone, pads its calls where one row is computed otherwise than many, and writes down in it whether it
    is exact; what took long and was found earlier is read from the cache.

    Padding is paid for by every pass: where a library needs 64 rows, plain decoding multiplies 64 rows a token. Where
    not even that helps, nothing is padded, and results say that they are not exact.

    Raises:
        ForetellError: the weights are damaged.
    """
    path = _verdict_file(backbone, cache_dir)
    verdict = _kept(path)
    if verdict is None:
        verdict = _found(backbone)
        if verdict.seconds > KEPT:
            with suppress(ForetellError):  # a cache that cannot be written to costs the next load some time
                write_json(path, asdict(verdict), shared=True)
    backbone.pad_rows(verdict.rows)
    backbone.nondeterminism, backbone.probe_seconds = verdict.nondeterminism, verdict.seconds


def _found(backbone: Backbone) -> Probed:
    began = time.perf_counter()
    nondeterminism, rows = probe(backbone), MIN_ROWS
    for more in (16, MAX_ROWS):
        if nondeterminism and backbone.pad_rows(more) and probe(backbone) is None:
            nondeterminism, rows = None, more
    return Probed(nondeterminism, rows, time.perf_counter() - began)


def _verdict_file(backbone: Backbone, cache_dir: str | Path | None) -> Path:
    """Where the verdict of this arithmetic is kept: these weights, this machine and the code that computes."""
    on_gpu = backbone.device.type == "cuda"
    parts = (
        backbone.fingerprint, backbone.kernels, str(backbone.dtype), str(backbone.device), str(backbone.threads),
        torch.cuda.get_device_name(backbone.device) if on_gpu else processor() or platform.machine(),
        torch.backends.cpu.get_cpu_capability(), torch.__version__, _code(),
        *(os.environ.get(name, "") for name in CHOOSING), str(torch.backends.cuda.matmul.allow_tf32),
    )  # fmt: skip
    name = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
    return cache_folder(cache_dir) / "probes" / f"{name}.json"


@cache
def _code() -> str:
    """A digest of the kernels and of the modules beside and below this one: another version's verdict is none."""
    files = [*sorted(Path(__file__).parent.rglob("*.py")), *([LIBRARY] if LIBRARY.exists() else [])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _kept(path: Path) -> Probed | None:
    """A verdict found earlier; a file that cannot be read holds none."""
    try:
        found = Probed(**read_json(path)) if path.is_file() else None
    except (ForetellError, OSError, TypeError):
        return None
    right = (
        found
        and isinstance(found.nondeterminism, str | None)
        and is_number(found.rows, True)
        and is_number(found.seconds)
    )
    return found if right else None
