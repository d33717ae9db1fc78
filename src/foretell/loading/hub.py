"""The Hugging Face hub: whole models and single files, kept in its own cache, which every other tool shares.

What lies in that cache is found without a network, and without huggingface_hub, which is slow to import. Downloads are
huggingface_hub's: it shows a bar, and goes on where an interrupted one stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foretell.errors import ForetellError, UsageError
from foretell.files import disk_full, is_disk_full, one_line, write_errors
from foretell.loading.cache_dir import hub_folder, lacks

# root files only: no pickles, and no second copy of the weights in a maker's own format
_MODEL_FILES = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]
_SKIPPED = ["*/*", "*.bin", "*.pt", "*.pth"]
ANOTHER_HUB_CACHE = "let HF_HUB_CACHE name another folder"


def model_here(repo: str, revision: str | None = None) -> Path | None:
    """Returns the complete snapshot of a model in the hub's cache, if there is one."""
    folder = _snapshot(repo, revision)
    return folder if lacks(folder) is None else None


def fetch_model(repo: str, revision: str | None = None) -> Path:
    """Downloads a model's configuration, weights and tokenizer; returns the folder of the snapshot.

    Raises:
        UsageError: the hub would not accept such a name.
        ForetellError: it cannot be fetched, or the hub lacks a part of it.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repo):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_MODEL_FILES, ignore_patterns=_SKIPPED))
    if missing := lacks(folder):
        raise ForetellError(
            f"{repo} has no {missing} on the hub; convert it once with transformers "
            "(from_pretrained, then save_pretrained, of model and tokenizer) and name that folder."
        )
    return folder


def file_here(repo: str, name: str) -> Path | None:
    """Returns one file of a repository in the hub's cache, if it is there."""
    path = _snapshot(repo) / name
    return path if path.is_file() else None


def fetch_file(repo: str, name: str, size: int) -> Path:
    """Downloads one file of `size` bytes into the hub's cache; returns its path there.

    Raises:
        ForetellError: there is no room for it, or it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    with write_errors(hub_folder(), size, ANOTHER_HUB_CACHE), _hub_errors(repo):
        return Path(hf_hub_download(repo, name))


def _snapshot(repo: str, revision: str | None = None) -> Path:
    """Returns the folder of a revision in the hub's cache, where anything or nothing may be."""
    base = hub_folder() / f"models--{repo.replace('/', '--')}"
    revision = revision or "main"
    try:
        commit = (base / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    return base / "snapshots" / commit


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns what a download raises into one sentence with a remedy."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except HFValidationError as error:  # not a name the hub would accept
        raise UsageError(f"{repo} is neither a local folder nor a hub id: {one_line(error)}.") from error
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
            raise disk_full(hub_folder(), "it ran out while downloading", ANOTHER_HUB_CACHE) from error
        raise ForetellError(
            f"Could not fetch {repo} from the hub ({one_line(error, 80)}); "
            "connect to the network, or name a local model folder or .gguf file."
        ) from error
