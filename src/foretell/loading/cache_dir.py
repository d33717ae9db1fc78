"""The cache: one folder per converted model, built once however many processes ask for it.

    <cache>/models/<name>-<key>/   config.json, safetensors, tokenizer, and foretell.json saying whence
    <cache>/locks/                 one lock per model, held while it is built

The key covers the source and the version of the converter, so a changed file or a better converter makes a
new folder instead of a mixture. Models of the hub stay in the hub's own cache, shared with every other tool.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from foretell.errors import ForetellError
from foretell.files import read_json, staged_folder, write_errors
from foretell.loading.families import FAMILIES

Progress = Callable[[str, float], None]  # (what is being done, how much of it: 0 to 1)
MANIFEST = "foretell.json"
CONVERTER_VERSION = 2  # part of the cache key: raise it when what a conversion writes changes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one of them makes a tokenizer


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that is ready without a network."""

    name: str  # what to type to load it
    path: Path
    bytes: int
    licence: str | None
    source: str  # "catalog", "gguf", "adapter" or "hub"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """What was asked for, else FORETELL_CACHE, else foretell's folder in the user's cache folder."""
    chosen = cache_dir or os.environ.get("FORETELL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "foretell"


def build_once(target: Path, make: Callable[[Path], None], needed_bytes: int, progress: Progress) -> Path:
    """Returns `target`, first made by `make(empty folder)` if it is not there yet.

    Processes asking for the same target wait for the first one; a failure leaves nothing behind.
    """
    if target.is_dir():
        return target
    from filelock import FileLock, Timeout

    with write_errors(target.parent, needed_bytes):
        locks = target.parent.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress("waiting for another process that prepares this model", 0.0)
            lock.acquire()
        try:
            if not target.is_dir():
                with staged_folder(target) as staging:
                    make(staging)
        finally:
            lock.release()
    return target


def write_manifest(folder: Path, name: str, source: str, licence: str | None) -> None:
    """Says in the folder itself what it is, for `cached_models`."""
    manifest = {"name": name, "source": source, "licence": licence, "converter": CONVERTER_VERSION}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def cached_models(cache_dir: str | Path | None = None) -> list[CachedModel]:
    """Every model that loads without a network: our conversions, then the hub cache's supported families."""
    return sorted(_converted(cache_folder(cache_dir)), key=lambda model: model.name) + sorted(
        _from_hub(hub_folder()), key=lambda model: model.name
    )


def hub_folder() -> Path:
    """Where huggingface_hub keeps its snapshots, by its own rules, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def has_weights(folder: Path) -> bool:
    """Whether every safetensors file the folder promises is there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(read_json(index).get("weight_map", {}).values())
        except (ForetellError, AttributeError, TypeError):
            return False
        return bool(shards) and all((folder / str(shard)).is_file() for shard in shards)
    return (folder / "model.safetensors").is_file()


def lacks(folder: Path) -> str | None:
    """The first thing without which a folder is no model, if any; half a snapshot is a dead end, not a model."""
    if not has_weights(folder):
        return "safetensors weights"
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"tokenizer ({', '.join(TOKENIZER_FILES[:-1])} or {TOKENIZER_FILES[-1]})"
    return None


def _converted(cache: Path) -> Iterator[CachedModel]:
    for manifest_file in (cache / "models").glob(f"[!.]*/{MANIFEST}"):
        try:
            manifest = read_json(manifest_file)
        except ForetellError:
            continue  # a listing does not fail over one broken folder; loading it does, and says why
        if manifest.get("converter", 1) != CONVERTER_VERSION:
            continue  # it is converted anew when it is next loaded
        folder = manifest_file.parent
        name, source = str(manifest.get("name", folder.name)), str(manifest.get("source", "gguf"))
        yield CachedModel(name, folder, _folder_bytes(folder), manifest.get("licence"), source)


def _from_hub(hub: Path) -> Iterator[CachedModel]:
    for ref in hub.glob("models--*/refs/main"):
        repo = ref.parent.parent
        try:
            folder = repo / "snapshots" / ref.read_text(encoding="utf-8").strip()
            family = read_json(folder / "config.json").get("model_type")
        except (ForetellError, OSError, ValueError):
            continue
        if family in FAMILIES and lacks(folder) is None:
            name = repo.name.removeprefix("models--").replace("--", "/")
            yield CachedModel(name, folder, _folder_bytes(folder), None, "hub")


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
