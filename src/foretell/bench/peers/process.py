"""A peer's process: started in its environment, driven over pipes, stopped while other systems answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import IO, Any

from foretell.api import LLM
from foretell.bench.gguf_files import gguf_file
from foretell.bench.memory import group, peak_bytes, reset_peak
from foretell.bench.peers import HERE, Kind, MissingPeerError, environment, find
from foretell.bench.systems import Answer
from foretell.errors import UsageError
from foretell.loading.resolve import resolve
from foretell.loading.weights import keeps_blocks
from foretell.requests import SamplingParams

PATIENCE = 3600.0
"""Seconds after which a peer that does not answer is ended."""


class Peer:
    """A system in a process of its own, stopped while others answer because some spin when idle.

    See `systems.System`.
    """

    lossless = False

    def __init__(self, llm: LLM, name: str, peer: str, parts: Sequence[str], *, rows: int, cache_dir: Path | None):
        kind = find(peer)
        variant, *more = [part for part in parts if "=" not in part] or [""]
        if more:
            raise UsageError(f"{name} names the variants {variant} and {', '.join(more)}; run them one by one.")
        if variant not in kind.variants:
            raise UsageError(f"{peer} has no variant {variant!r}; it has {', '.join(filter(None, kind.variants))}.")
        options = kind.variants[variant] | _overrides(kind.variants[variant], parts)
        python = environment(peer, cache_dir)
        if not python.exists():
            raise MissingPeerError(f"{peer} is not installed; foretell bench setup {peer} installs it.")
        backbone = llm.backbone
        assert llm.folder is not None
        folder = llm.folder
        if keeps_blocks(folder.path) and not kind.gguf:  # it reads unpacked weights only
            folder = resolve(folder.name, weights="bf16", cache_dir=cache_dir)
            if keeps_blocks(folder.path):
                raise UsageError(f"{peer} reads unpacked weights; compare with it by the GGUF file of {folder.name}.")
        config: dict[str, Any] = {
            "model": str(folder.path), "dtype": "bf16" if "bfloat16" in str(backbone.dtype) else "fp32",
            "device": str(backbone.device), "threads": backbone.threads, "rows": rows,
            "context": backbone.config.max_positions, "options": options,
        }  # fmt: skip
        if kind.gguf:
            config["gguf"] = str(gguf_file(folder, kind.gguf[variant], cache_dir))
        self.name, self.peer, self._ends = name, peer, sorted(backbone.config.eos_ids)
        self._peak, self._device = 0, backbone.device
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process lives)
        self._process = _start(kind, python, config["threads"], self._errors)
        self.about = self._request(config)["ready"] | {"peer": peer, "variant": variant, "options": options}
        self._signal(signal.SIGSTOP)

    def answer(self, prompts: Sequence[list[int]], params: SamplingParams, keys: Sequence[int]) -> list[Answer]:
        self._signal(signal.SIGCONT)
        processes = group(self._process.pid)
        reset_peak(self._device, processes)
        try:
            reply = self._request(
                {"prompts": list(prompts), "new_tokens": params.max_new_tokens, "temperature": params.temperature,
                 "seed": params.seed, "ends": self._ends}
            )  # fmt: skip
        finally:
            self._peak = peak_bytes(self._device, processes)
            self._signal(signal.SIGSTOP)
        return [_answer(raw) for raw in reply["answers"]]

    @property
    def peak_bytes(self) -> int:
        return self._peak

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        with suppress(OSError, BrokenPipeError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)

    def _last_line(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"exit code {self._process.poll()}; {last}"

    def _signal(self, number: int) -> None:
        """Sends a signal to the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        watch = Timer(PATIENCE, self._signal, [signal.SIGKILL])
        watch.start()
        try:
            _pipe(self._process.stdin).write(json.dumps(message) + "\n")
            _pipe(self._process.stdin).flush()
            reply = json.loads(_pipe(self._process.stdout).readline())
        except (OSError, ValueError) as error:
            raise MissingPeerError(f"{self.peer} ended unexpectedly ({self._last_line()}).") from error
        finally:
            watch.cancel()
        if "error" in reply:
            raise MissingPeerError(f"{self.peer} failed: {' '.join(str(reply['error']).split())[:300]}")
        return reply


def _start(kind: Kind, python: Path, threads: int, errors: IO[bytes]) -> subprocess.Popen[str]:
    variables = {**os.environ, **kind.environment, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    found = [str(path) for name in kind.preload for path in python.parent.parent.rglob(name)][:1]
    if found:
        variables["LD_PRELOAD"] = " ".join(found)
    return subprocess.Popen(
        [str(python), str(HERE / kind.script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=errors, text=True, env=variables,
        process_group=0,  # in this session, so that the kernel ends it, though stopped, when this process is killed
    )  # fmt: skip


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _answer(raw: dict[str, Any]) -> Answer:
    known: dict[str, Any] = {name: raw[name] for name in ("steps", "drafted", "accepted") if name in raw}
    arrivals = [(int(count), float(at)) for count, at in raw["arrivals"]]
    return Answer(raw["ids"], raw["seconds"], arrivals, raw.get("prefill_seconds"), known)


def _overrides(options: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """Parses key=value parts, numbers as numbers; refuses options that the variant does not have."""
    out: dict[str, Any] = {}
    for key, equals, value in (part.partition("=") for part in parts):
        if not equals:
            continue
        if key not in options:
            raise UsageError(f"This peer's variant has no option {key!r}; it has {', '.join(options) or 'none'}.")
        out[key] = int(value) if value.isdigit() else value
    return out
