"""From the name a user types to a folder that holds a model.

Five kinds of names, told apart without touching a network:

    smollm2-135m              the catalogue: downloaded by pip or from the hub, converted into the cache
    Qwen/Qwen3-0.6B[@rev]     the hub: a snapshot in the hub's own cache, used as it is once it is complete
    ./my-model                a folder with config.json, safetensors and a tokenizer
    ./my-model.gguf           a GGUF file (of several, the first), converted into the cache
    BASE+ADAPTER              any of these with a LoRA adapter, merged into the cache (`adapters`)

Everything after that (`read_config`, `read_weights`, `Tokenizer.from_folder`) reads plain files. torch is imported
only where something is converted: a name that cannot be loaded is refused at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from foretell.errors import ForetellError, ForetellWarning, UsageError
from foretell.files import exists
from foretell.loading import catalog, hub, lora
from foretell.loading.cache_dir import (
    CONVERTER_VERSION,
    Progress,
    build_once,
    cache_folder,
    cached_models,
    has_weights,
    write_manifest,
)
from foretell.loading.gguf_file import parts

_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
WEIGHTS = ("bf16", "stored")
"""What becomes of quantized weights of GGUF files: unpacked, or multiplied as they are."""
UNPACKED = 1.1
"""How much larger a converted GGUF has to be for a warning."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Folder and name of a model."""

    name: str  # what was typed
    path: Path
    source: str  # "catalog", "hub", "folder", "gguf" or "adapter"
    licence: str | None = None


def resolve(
    name: str,
    *,
    weights: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> ModelFolder:
    """Finds the model of this name, fetching and converting it the first time.

    Args:
        name: a catalogue name, a hub id, a local folder, a .gguf file, or one of these + an adapter.
        weights: of a GGUF file: "bf16" to unpack quantized ones, "stored" to keep them; by default `WEIGHTS[0]`.
        cache_dir: where conversions are kept; default FORETELL_CACHE, else ~/.cache/foretell.
        offline: fetch nothing; default FORETELL_OFFLINE=1 or HF_HUB_OFFLINE=1.
        progress: called with what is being done and how much of it is done (0 to 1).

    Raises:
        UsageError: no model can have this name.
        ForetellError: the model cannot be fetched, is incomplete or damaged.
    """
    report = progress or (lambda stage, fraction: None)
    check_name(name, weights=weights, cache_dir=cache_dir, offline=offline)
    cache, stored = cache_folder(cache_dir), weights == "stored"
    match identify(name, cache_dir):
        case "catalog":
            entry = catalog.CATALOG[name.lower()]
            return ModelFolder(name, _from_catalog(entry, stored, cache, report), "catalog", entry.licence)
        case "adapter":
            pair = lora.split(name)
            assert pair
            base = resolve(pair[0], cache_dir=cache_dir, offline=offline, progress=progress)
            return ModelFolder(name, _with_adapter(base, pair[1], name, cache, report), "adapter", base.licence)
        case "gguf":
            return ModelFolder(name, _from_gguf(Path(name).expanduser(), stored, cache, report), "gguf")
        case "folder":
            return ModelFolder(name, Path(name).expanduser(), "folder")
        case source:
            # a complete snapshot is used as it is, so a model never changes under the heads trained for it
            return ModelFolder(name, hub.model_here(*_repo(name)) or hub.fetch_model(*_repo(name)), source)


def identify(name: str, cache_dir: str | Path | None = None) -> str:
    """Returns which kind of name this is: "catalog", "adapter", "gguf", "folder" or "hub".

    Raises:
        UsageError: it is none of them.
    """
    if name.lower() in catalog.CATALOG:
        return "catalog"
    if pair := lora.split(name):
        identify(pair[0], cache_dir)
        return "adapter"
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf") and not path.is_dir():
        if not exists(path):
            raise UsageError(f"There is no GGUF file {path}; check the path.")
        return "gguf"
    if name.strip() and path.is_dir():
        if not has_weights(path) and (files := sorted(path.glob("*.gguf"))):
            raise UsageError(f"{name} holds GGUF files; name the one to load, such as {files[0]}.")
        lora.refuse_alone(path)
        return "folder"
    if name.strip() and path.is_file():
        raise UsageError(f"{name} is a file, but only .gguf files load alone; name the folder it lies in.")
    if _HUB_ID.fullmatch(name):
        return "hub"
    if os.sep in name or name.startswith((".", "~")):
        raise UsageError(f"There is no folder {name}; check the path, or give a hub id (org/name).")
    raise catalog.unknown_name(name, [model.name for model in cached_models(cache_dir) if model.source == "hub"])


def check_name(
    name: str, *, weights: str | None = None, cache_dir: str | Path | None = None, offline: bool | None = None
) -> None:
    """Refuses, without torch and without a network, a model that `resolve` could not find.

    Raises:
        UsageError: no model can have this name.
        ForetellError: it would have to be fetched, and offline mode forbids it.
    """
    if weights not in (None, *WEIGHTS):
        raise UsageError(f"weights is {weights!r}; it must be {' or '.join(WEIGHTS)}.")
    source = identify(name, cache_dir)
    if pair := lora.split(name) if source == "adapter" else None:
        if weights == "stored":
            raise UsageError(f'An adapter is merged into unpacked weights; give {name} without `weights="stored"`.')
        return check_name(pair[0], cache_dir=cache_dir, offline=offline)
    if not is_offline(offline):
        return None
    cache = cache_folder(cache_dir)
    if source == "catalog":
        entry = catalog.CATALOG[name.lower()]
        if not _catalog_folder(entry, weights == "stored", cache).is_dir() and not catalog.here(entry, cache):
            raise ForetellError(f"{entry.name} is not in the cache {cache} {_FORBIDDEN}")
    if source == "hub" and hub.model_here(*_repo(name)) is None:
        raise ForetellError(f"{_repo(name)[0]} is not complete in the hub cache {_FORBIDDEN}")
    return None


_FORBIDDEN = (
    "and offline mode forbids fetching it; fetch it once with a network, or name a local model folder or .gguf file."
)


def _catalog_folder(entry: catalog.Entry, stored: bool, cache: Path) -> Path:
    return _target(cache, entry.name, entry.sha256 + " stored" * stored)


def _from_catalog(entry: catalog.Entry, stored: bool, cache: Path, progress: Progress) -> Path:
    def make(folder: Path) -> None:
        from foretell.loading import gguf

        download = folder / "download"
        download.mkdir()
        gguf.convert(catalog.fetch(entry, cache, download, progress), folder, progress, stored)
        shutil.rmtree(download)
        write_manifest(folder, entry.name, "catalog", entry.licence, "stored" * stored)

    return build_once(_catalog_folder(entry, stored, cache), make, catalog.room(entry, cache, stored), progress)


def _from_gguf(path: Path, stored: bool, cache: Path, progress: Progress) -> Path:
    from foretell.loading.blocks import TYPES  # PyTorch, which a listing does without

    stats = [part.stat() for part in parts(path) if exists(part)]
    # size and time instead of a digest: hashing tens of gigabytes would cost more than loading them
    changed = " ".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)
    kept = sorted(name for name, row in TYPES.items() if row.quantized and stored)  # a type more makes another folder
    target = _target(cache, path.stem, " ".join([str(path.resolve()), changed, *kept]))
    packed = sum(stat.st_size for stat in stats)

    def make(folder: Path) -> None:
        from foretell.loading import gguf

        gguf.convert(path, folder, progress, stored)
        write_manifest(folder, str(path.resolve()), "gguf", None, "stored" * stored)
        unpacked = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if unpacked > UNPACKED * packed and not stored:
            warnings.warn(
                f"{path.name} is unpacked to the 16-bit weights it is computed with: {unpacked / 1e6:,.0f} MB of disk "
                f"and memory instead of {packed / 1e6:,.0f} MB, and the speed of 16-bit weights; with weights stored "
                "(--weights stored) what can be multiplied as it is stays so, by activations in eight bits.",
                ForetellWarning,
                stacklevel=2,
            )

    return build_once(target, make, packed, progress)  # at least; unpacked it is larger


def _with_adapter(base: ModelFolder, adapter: Path, name: str, cache: Path, progress: Progress) -> Path:
    stats = [file.stat() for file in sorted(base.path.glob("model*.safetensors"))]
    weights = sum(stat.st_size for stat in stats)
    changed = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    about = f"{base.path.resolve()} {changed} {lora.identity(adapter)}"
    target = _target(cache, f"{Path(base.name).name}+{Path(adapter).name}", about)

    if adapter.parent != lora.SHIPPED:
        name = f"{base.name}+{adapter.resolve()}"  # so it can be typed anywhere

    def make(folder: Path) -> None:
        lora.merge(base.path, adapter, folder, progress)
        write_manifest(folder, name, "adapter", base.licence)

    return build_once(target, make, weights, progress)


def _target(cache: Path, name: str, identity: str) -> Path:
    key = hashlib.sha256(f"{identity} {CONVERTER_VERSION}".encode()).hexdigest()[:12]
    return cache / "models" / f"{name}-{key}"


def _repo(name: str) -> tuple[str, str | None]:
    """The repository and revision of a hub id."""
    match = _HUB_ID.fullmatch(name)
    assert match
    return match[1], match[2]


def is_offline(offline: bool | None) -> bool:
    """Returns `offline`, or what FORETELL_OFFLINE or HF_HUB_OFFLINE say where it is None."""
    if offline is not None:
        return offline
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("FORETELL_OFFLINE", "HF_HUB_OFFLINE")
    )
