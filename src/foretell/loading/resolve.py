"""From the name a user types to a folder that holds a model.

Five kinds of names, told apart without touching a network:

    smollm2-135m              the catalogue: downloaded by pip or from the hub, converted into the cache
    Qwen/Qwen3-0.6B[@rev]     the hub: a snapshot in the hub's own cache, used as it is once it is complete
    ./my-model                a folder with config.json, safetensors and a tokenizer
    ./my-model.gguf           a GGUF file (of several, the first), converted into the cache
    BASE+ADAPTER              any of these with a LoRA adapter, merged into the cache (`lora`)

Float weights can be quantized on the way (`quantize`): another folder in the cache.

Everything after that (`read_config`, `read_weights`, `Tokenizer.from_folder`) reads plain files. torch is imported
only where something is converted: a name that cannot be loaded is refused at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from foretell.errors import ForetellError, UsageError
from foretell.files import exists, read_json
from foretell.loading import catalog, hub, lora
from foretell.loading.cache_dir import (
    CONVERTER_VERSION,
    MANIFEST,
    Progress,
    build_once,
    cache_folder,
    cached_models,
    has_weights,
    write_manifest,
)
from foretell.loading.choices import QUANTIZED, chosen, of_base, quantized_already
from foretell.loading.gguf_file import parts

_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Folder and name of a model."""

    name: str  # what was typed
    path: Path
    source: str  # "catalog", "hub", "folder", "gguf" or "adapter"
    licence: str | None = None
    weights: str = "bf16"  # what became of them: see `choices`


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
        weights: "stored", "bf16", "fp32", "q8_0" or "q4_k"; see `loading.choices`.
        cache_dir: where conversions are kept; default FORETELL_CACHE, else ~/.cache/foretell.
        offline: fetch nothing; default FORETELL_OFFLINE=1 or HF_HUB_OFFLINE=1.
        progress: called with what is being done and how much of it is done (0 to 1).

    Raises:
        UsageError: no model can have this name, or its weights are quantized already.
        ForetellError: the model cannot be fetched, is incomplete or damaged.
    """
    report = progress or (lambda stage, fraction: None)
    check_name(name, weights=weights, cache_dir=cache_dir, offline=offline)
    source = identify(name, cache_dir)
    cache = cache_folder(cache_dir)
    choice = _choice(name, source, weights, cache, offline)
    match source:
        case "catalog":
            entry = catalog.CATALOG[name.lower()]
            return ModelFolder(name, _from_catalog(entry, choice, cache, report), "catalog", entry.licence, choice)
        case "gguf":
            path = _from_gguf(Path(name).expanduser(), choice, cache, report)
            return ModelFolder(name, path, "gguf", None, choice)
        case "adapter":
            pair = lora.split(name)
            assert pair
            into = of_base(choice)
            base = resolve(pair[0], weights=into, cache_dir=cache_dir, offline=offline, progress=progress)
            path = _with_adapter(base, pair[1], name, cache, report)
            found = ModelFolder(name, path, "adapter", base.licence, base.weights)
        case "folder":
            found = ModelFolder(name, Path(name).expanduser(), "folder")
        case source:
            # a complete snapshot is used as it is, so a model never changes under the heads trained for it
            found = ModelFolder(name, hub.model_here(*_repo(name)) or hub.fetch_model(*_repo(name)), source)
    return _quantized(found, choice, cache, report) if choice in QUANTIZED else found


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
    raise catalog.unknown_name(name, [model.name for model in cached_models(cache_dir) if model.shared])


def check_name(
    name: str, *, weights: str | None = None, cache_dir: str | Path | None = None, offline: bool | None = None
) -> None:
    """Refuses, without torch and without a network, a model that `resolve` could not find.

    Raises:
        UsageError: no model can have this name, or its weights are quantized already.
        ForetellError: it would have to be fetched, and offline mode forbids it.
    """
    source = identify(name, cache_dir)
    choice = _choice(name, source, weights, cache_folder(cache_dir), offline)
    if pair := lora.split(name) if source == "adapter" else None:
        if choice == "stored":
            raise UsageError(f'An adapter is merged into unpacked weights; give {name} without `weights="stored"`.')
        return check_name(pair[0], weights=of_base(choice), cache_dir=cache_dir, offline=offline)
    if source == "catalog" and choice in QUANTIZED and catalog.CATALOG[name.lower()].quantized:
        raise quantized_already(name)
    if not is_offline(offline):
        return None
    cache = cache_folder(cache_dir)
    if source == "catalog":
        entry = catalog.CATALOG[name.lower()]
        if not _catalog_folder(entry, choice, cache).is_dir() and not catalog.here(entry, cache):
            raise ForetellError(f"{entry.name} is not in the cache {cache} {_FORBIDDEN}")
    if source == "hub" and hub.model_here(*_repo(name)) is None:
        raise ForetellError(f"{_repo(name)[0]} is not complete in the hub cache {_FORBIDDEN}")
    return None


def _choice(name: str, source: str, weights: str | None, cache: Path, offline: bool | None) -> str:
    """Returns what becomes of the weights; offline, of those that nothing is said of, what has become of them."""
    choice = chosen(weights, source)
    if weights is None and source == "catalog" and is_offline(offline):
        entry = catalog.CATALOG[name.lower()]
        return next((each for each in (choice, "bf16") if _catalog_folder(entry, each, cache).is_dir()), choice)
    return choice


_FORBIDDEN = (
    "and offline mode forbids fetching it; fetch it once with a network, or name a local model folder or .gguf file."
)


def _catalog_folder(entry: catalog.Entry, choice: str, cache: Path) -> Path:
    return _target(cache, entry.name, " ".join([entry.sha256, *_named(choice)]))


def _named(choice: str) -> list[str]:
    """Returns the choice as a part of a key; "bf16" came first and has none."""
    return [] if choice == "bf16" else [choice]


def _from_catalog(entry: catalog.Entry, choice: str, cache: Path, progress: Progress) -> Path:
    def make(folder: Path) -> None:
        from foretell.loading import gguf

        download = folder / "download"
        download.mkdir()
        gguf.convert(catalog.fetch(entry, cache, download, progress), folder, progress, choice)
        shutil.rmtree(download)
        write_manifest(folder, entry.name, "catalog", entry.licence, choice)

    room = catalog.room(entry, cache, choice == "stored")
    return build_once(_catalog_folder(entry, choice, cache), make, room, progress)


def _from_gguf(path: Path, choice: str, cache: Path, progress: Progress) -> Path:
    from foretell.loading.blocks import TYPES  # PyTorch, which a listing does without

    stats = [part.stat() for part in parts(path) if exists(part)]
    # size and time instead of a digest: hashing tens of gigabytes would cost more than loading them
    changed = " ".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)
    kinds = sorted(name for name, row in TYPES.items() if row.quantized)  # a type more makes another folder
    kept = kinds if choice == "stored" else _named(choice)
    target = _target(cache, path.stem, " ".join([str(path.resolve()), changed, *kept]))
    packed = sum(stat.st_size for stat in stats)

    def make(folder: Path) -> None:
        from foretell.loading import gguf

        gguf.convert(path, folder, progress, choice)
        write_manifest(folder, str(path.resolve()), "gguf", None, choice)

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
        write_manifest(folder, name, "adapter", base.licence, base.weights)

    return build_once(target, make, weights, progress)


def _quantized(base: ModelFolder, choice: str, cache: Path, progress: Progress) -> ModelFolder:
    """Returns the model quantized: a folder in the cache for each state of the files and each choice."""
    stats = {path.name: path.stat() for path in sorted(base.path.iterdir()) if path.is_file()}
    state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
    known_as = base.name  # so it can be typed anywhere
    if base.source == "folder":
        known_as = str(base.path.resolve())
    elif base.source == "adapter":
        known_as = str(read_json(base.path / MANIFEST)["name"])
    target = _target(cache, Path(known_as).name, f"{base.path.resolve()} {state} {choice}")

    def make(folder: Path) -> None:
        from foretell.loading.quantize import quantize_folder

        quantize_folder(base.path, folder, choice, progress)
        write_manifest(folder, known_as, base.source, base.licence, choice)

    weights = sum(stat.st_size for name, stat in stats.items() if name.endswith(".safetensors"))
    return replace(base, path=build_once(target, make, weights // 4, progress), weights=choice)


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
