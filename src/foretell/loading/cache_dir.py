"""The cache: one folder per converted model, built once however many processes ask for it.

    <cache>/models/<name>-<key>/   config.json, safetensors, tokenizer, and foretell.json with its name and source
    <cache>/locks/                 one lock per model, held while it is built

The key covers the source and the version of the converter, so a changed file or a better converter makes a new folder
instead of a mixture. Hub models stay in the hub's own cache, shared with every other tool.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from foretell.errors import ForetellError
from foretell.files import read_json, staged_folder, write_errors
from foretell.loading.choices import QUANTIZED, WEIGHTS
from foretell.loading.families import FAMILIES

Progress = Callable[[str, float], None]  # (what is being done, how much of it: 0 to 1)
StageProgress = Callable[[float], None]  # the same of one stage
SLOW = 2.0  # seconds after which a load says what it is doing
MANIFEST = "foretell.json"
CONVERTER_VERSION = 2  # part of the cache key: raise it when what a conversion writes changes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one of them makes a tokenizer


def when_slow(progress: Progress | None) -> Progress:
    """Returns what reports stages of loading once `SLOW` seconds have passed: most models load sooner."""
    began = time.monotonic()
    return lambda stage, fraction: progress(stage, fraction) if progress and time.monotonic() - began > SLOW else None


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model on this machine.

    Attributes:
        name: what to type to load it.
        bytes: size on disk.
        source: "catalog", "gguf", "adapter" or "hub".
        problem: why it does not load; empty if it does.
        weights: what became of them, and the choice that loads it: see `choices`.
    """

    name: str
    path: Path
    bytes: int
    licence: str | None
    source: str
    problem: str = ""
    weights: str = WEIGHTS[0]

    @property
    def shared(self) -> bool:
        """Returns whether it lies in the hub's cache; a quantized copy of a hub's model does not."""
        return self.source == "hub" and self.weights not in QUANTIZED


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns `cache_dir`, else FORETELL_CACHE, else foretell's folder in the user's cache folder."""
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


def write_manifest(folder: Path, name: str, source: str, licence: str | None, weights: str) -> None:
    """Writes what the folder holds into it, for `cached_models`."""
    manifest = {
        "name": name, "source": source, "licence": licence, "weights": weights, "converter": CONVERTER_VERSION
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def cached_models(cache_dir: str | Path | None = None) -> list[CachedModel]:
    """Returns every model that loads without a network: foretell's conversions, then those in the hub cache."""
    return [model for model in stored_models(cache_dir) if not model.problem]


def stored_models(cache_dir: str | Path | None = None) -> list[CachedModel]:
    """Returns every model in foretell's cache and in the hub cache, those that do not load included."""
    by_name: Callable[[CachedModel], str] = lambda model: model.name  # noqa: E731
    return [*sorted(_converted(cache_folder(cache_dir)), key=by_name), *sorted(_in_hub(hub_folder()), key=by_name)]


def remove(model: CachedModel) -> None:
    """Deletes a converted model from foretell's cache.

    Raises:
        ForetellError: the folder cannot be deleted.
    """
    hidden = model.path.with_name(f".{model.path.name}.removed")
    with write_errors(model.path.parent):
        model.path.rename(hidden)  # first, so that an interruption leaves no half model
        shutil.rmtree(hidden)


def hub_folder() -> Path:
    """Returns where huggingface_hub keeps its snapshots, by its own rules, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def has_weights(folder: Path) -> bool:
    """True if every safetensors file that the folder's index names exists."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(read_json(index).get("weight_map", {}).values())
        except (ForetellError, AttributeError, TypeError):
            return False
        return bool(shards) and all((folder / str(shard)).is_file() for shard in shards)
    return (folder / "model.safetensors").is_file()


def lacks(folder: Path) -> str | None:
    """Returns the first thing that a model folder lacks; None if it is complete."""
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
        current = manifest.get("converter", 1) == CONVERTER_VERSION
        folder = manifest_file.parent
        name, source = str(manifest.get("name", folder.name)), str(manifest.get("source", "gguf"))
        problem = "" if current else "outdated: converted by an earlier version"
        weights = str(manifest.get("weights", "bf16"))
        yield CachedModel(name, folder, _folder_bytes(folder), manifest.get("licence"), source, problem, weights)


def _in_hub(hub: Path) -> Iterator[CachedModel]:
    for repo in hub.glob("models--*"):
        for ref in (path for path in (repo / "refs").rglob("*") if path.is_file()):
            revision = ref.relative_to(repo / "refs").as_posix()
            name = repo.name.removeprefix("models--").replace("--", "/") + f"@{revision}" * (revision != "main")
            try:
                folder = repo / "snapshots" / ref.read_text(encoding="utf-8").strip()
                family = read_json(folder / "config.json").get("model_type")
                bytes = _folder_bytes(folder)
            except (ForetellError, OSError, ValueError):
                continue  # nothing that looks like a model was fetched
            missing = lacks(folder)
            problem = f"incomplete: no {missing}" if missing else ""
            if family not in FAMILIES:
                problem = f"model_type {family!r} is not supported"
            yield CachedModel(name, folder, bytes, None, "hub", problem)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
