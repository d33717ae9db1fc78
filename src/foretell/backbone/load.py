"""From a model folder to a running backbone: device, type, threads and kernels chosen once, here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from foretell.backbone.base import Backbone
from foretell.backbone.canonical import code, settle
from foretell.backbone.cpu import library
from foretell.backbone.cpu.backbone import CompiledBackbone
from foretell.backbone.cpu.panel_file import PanelFile
from foretell.backbone.eager.backbone import EagerBackbone
from foretell.errors import UsageError
from foretell.loading.cache_dir import Progress, when_slow
from foretell.loading.config import ModelConfig
from foretell.loading.families import read_config
from foretell.loading.weights import Weights, keeps_blocks, known_fingerprint, read_weights, state

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_THREADS = 128
"""A step of a model is too short to share among more; the kernels' team holds 255."""


def assemble(
    folder: Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    kernel: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Backbone:
    """Loads the model in `folder`.

    Args:
        dtype: "bf16" or "fp32"; by default bf16 where the processor (or the compiled kernels) multiply it well.
        device: a torch device; by default the first GPU, else the CPU.
        threads: CPU threads; by default the cores this process may use.
        kernel: "eager", or one of `library.BUILDS`; by default the best compiled build, eager on a GPU.
        cache_dir: where the probe's verdict is kept, if it took long; see `canonical.settle`.
        progress: called with (stage, fraction) by what takes long.

    Raises:
        ForetellError, UsageError: what cannot be loaded, and the remedy.
    """
    report = when_slow(progress)
    where = _device(device)
    count = _threads(threads)
    # For the whole process: PyTorch has no other setting, and its idle threads would spin on the kernels' cores.
    torch.set_num_threads(count)
    config = read_config(folder)
    weights = read_weights(folder, config)
    mark = _fingerprint_beside(folder, weights, config)
    build = _build(kernel, where) if CompiledBackbone.supports(config) else None
    kind = _dtype(dtype, where, build is not None)
    backbone: Backbone
    if build:
        panels = _panel_file(folder, config, kind, build)
        packing = partial(report, "packing weights")
        backbone = CompiledBackbone(config, weights.blocks, kind, count, build, panels, packing)
        if panels:
            panels.keep()
        packing(1.0)
    else:
        backbone = EagerBackbone(config, weights.blocks, kind, where, count)
    backbone.read = weights.blocks
    backbone.fingerprint = mark()  # part of the name under which the verdict is stored
    verdict = settle(backbone, cache_dir, partial(report, "checking arithmetic"))
    backbone.nondeterminism, backbone.probe_seconds = verdict.nondeterminism, verdict.seconds
    return backbone


def _panel_file(folder: Path, config: ModelConfig, dtype: torch.dtype, build: library.Build) -> PanelFile | None:
    """Returns the file beside weights that are kept as they are stored; others are packed at each load."""
    if not keeps_blocks(folder):
        return None
    source = json.dumps([code(), state(folder, config)])
    return PanelFile(folder / f"panels-{build.name}-{str(dtype).removeprefix('torch.')}.safetensors", source)


def default_weights(device: str | None, kernel: str | None) -> str | None:
    """Returns "bf16" where nothing multiplies quantized weights, which would be unpacked at every load; else None."""
    return None if _build(kernel, _device(device)) else "bf16"


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut down by a cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, quota or cores, MAX_THREADS))


def _fingerprint_beside(folder: Path, weights: Weights, config: ModelConfig) -> Callable[[], str]:
    """Begins to read all weights while they are packed, which takes longer; returns what waits for the fingerprint."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(known_fingerprint, folder, weights, config).result
    except RuntimeError:  # this process may start no more threads
        return partial(known_fingerprint, folder, weights, config)
    finally:
        pool.shutdown(wait=False)


def _cgroup_quota(root: Path) -> int | None:
    """Whole cores granted by cgroup v2 or v1, rounded down but at least one; None without a quota."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        return max(1, int(quota) // int(period)) if quota not in ("max", "-1") else None
    except (OSError, ValueError):
        return None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device {name!r}; use cpu, or cuda (cuda:1, ...) where there is a GPU.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Device {name!r} is not supported; use cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"Device {name!r} was requested, but PyTorch sees no GPU here; use `device='cpu'`.")
    return device


def _threads(count: int | None) -> int:
    if count is not None and not 1 <= count <= MAX_THREADS:
        raise UsageError(f"threads is {count}; it must lie between 1 and {MAX_THREADS}.")
    return count or usable_cores()


def _build(name: str | None, device: torch.device) -> library.Build | None:
    """The compiled build to use; None for the eager modules."""
    chosen, source = (name, "kernel") if name else (os.environ.get("FORETELL_KERNELS", ""), "FORETELL_KERNELS")
    if chosen and chosen not in ("eager", *library.BUILDS):
        raise UsageError(f"{source} is {chosen!r}; it must be eager, {', '.join(library.BUILDS)}.")
    if chosen == "eager" or (name is None and device.type != "cpu"):
        return None
    build = library.find(chosen)
    if chosen and build is None:
        reason = "this processor lacks them" if library.loaded() else "they were not compiled with the package"
        raise UsageError(f"Kernels {chosen!r} cannot run here: {reason}; leave the choice out to take the best.")
    return build


def _dtype(name: str | None, device: torch.device, compiled: bool) -> torch.dtype:
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"Unknown dtype {name!r}; use bf16 or fp32.")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = "avx512_bf16" in _cpu_flags() or "bf16" in _cpu_flags()
    return torch.bfloat16 if compiled or native else torch.float32


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
