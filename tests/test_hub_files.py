"""Models of the catalogue that are files of a hub repository: found, fetched, checked, listed and deleted."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command_line import Foretell
from huggingface_hub import errors
from test_cli_refusals import refused
from test_loading import hub_error
from tiny_gguf import write_gguf
from tiny_models import opened, raising, tiny_model

from foretell.bench.gguf_files import gguf_file
from foretell.errors import ForetellError
from foretell.loading import ModelFolder, catalog
from foretell.loading.resolve import resolve

REPO, FILE = "org/tiny-GGUF", "tiny-1.5b-q4_k_m.gguf"


class Hub:
    """A hub with one file, which `hf_hub_download` puts where the real one does."""

    def __init__(self, cache: Path, content: bytes) -> None:
        self.cache, self.content, self.asked = cache, content, 0

    def download(self, repo: str, name: str) -> str:
        self.asked += 1
        assert (repo, name) == (REPO, FILE)
        base = self.cache / f"models--{repo.replace('/', '--')}"
        blob, path = base / "blobs" / "a", base / "snapshots" / ("0" * 40) / name
        for file, content in ((blob, self.content), (base / "refs" / "main", b"0" * 40)):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(blob)
        return str(path)


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")).read_bytes()


@pytest.fixture
def entry(gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> catalog.Entry:
    digest, source = hashlib.sha256(gguf).hexdigest(), catalog.HubFile(REPO, FILE)
    entry = catalog.Entry("tiny-coder", "a test", "MIT", source, digest, 5_000_000, 7_000_000)
    monkeypatch.setitem(catalog.CATALOG, "tiny-coder", entry)
    return entry


@pytest.fixture
def hub(cache: Path, tmp_path: Path, entry: catalog.Entry, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub", gguf)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


@pytest.fixture
def kept(cache: Path, gguf: bytes) -> Path:
    """The file where tools/fetch_model.py puts it."""
    path = cache / "gguf" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(gguf)
    return path


def test_a_file_is_fetched_once_for_both_kinds_of_weights(cache: Path, hub: Hub) -> None:
    found = resolve("Tiny-Coder")
    opened(found.path)
    assert (found.source, found.licence, hub.asked) == ("catalog", "MIT", 1)
    assert not list(found.path.rglob("*.gguf"))
    unpacked = resolve("tiny-coder", weights="bf16", offline=True)
    assert (unpacked.path != found.path, hub.asked) == (True, 1)
    assert resolve("tiny-coder", offline=True, progress=raising(AssertionError())).path == found.path


def test_a_file_in_the_cache_is_taken_before_the_hub_is_asked(kept: Path, hub: Hub) -> None:
    opened(resolve("tiny-coder").path)
    assert hub.asked == 0
    assert kept.is_file()


def test_another_file_is_refused_until_it_is_deleted(cache: Path, hub: Hub, gguf: bytes) -> None:
    hub.content = gguf[:-1] + b"x"
    with pytest.raises(ForetellError, match=r"tiny-coder has SHA-256 \w+ instead of .*; delete .*blobs/a and run"):
        resolve("tiny-coder")
    hub.content = gguf
    with pytest.raises(ForetellError, match="SHA-256"):
        resolve("tiny-coder")  # it lies there still
    (hub.cache / "models--org--tiny-GGUF/blobs/a").unlink()
    opened(resolve("tiny-coder").path)


def test_another_file_in_the_cache_is_refused(kept: Path, hub: Hub) -> None:
    kept.write_bytes(b"another")
    with pytest.raises(ForetellError, match=f"SHA-256 .*delete {kept} and run the command again, or load another"):
        resolve("tiny-coder")
    assert hub.asked == 0


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionError("no route\nto host"), "Could not fetch org/tiny-GGUF from the hub .no route to host.*connect"),
        (errors.LocalEntryNotFoundError("Name or service not known"), "Could not fetch .*connect"),
        (hub_error(errors.GatedRepoError), "gated.*hf auth login"),
        (hub_error(errors.RepositoryNotFoundError), "has no model org/tiny-GGUF, or it is private"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "not enough disk space in .*hub .*HF_HUB_CACHE"),
    ],
)
def test_what_the_network_can_say(
    error: Exception, sentence: str, cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    with pytest.raises(ForetellError, match=sentence) as caught:
        resolve("tiny-coder")
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []


def free(monkeypatch: pytest.MonkeyPatch, megabytes: dict[str, int]) -> None:
    """Disks that have so much room left in the cache and in the hub's cache."""
    monkeypatch.setattr("foretell.files._free_bytes", lambda folder: megabytes[folder.name] * 10**6)


def test_the_disk_is_looked_at_before_the_download(
    cache: Path, hub: Hub, entry: catalog.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, {"models": 11, "hub": 100})  # the conversion alone would fit
    with pytest.raises(ForetellError, match="not enough disk space in .*models .about 12 MB are needed, 11 MB"):
        resolve("tiny-coder", weights="bf16")
    free(monkeypatch, {"models": 12, "hub": 4})
    with pytest.raises(ForetellError, match="disk space in .*hub .about 5 MB are needed, 4 MB.*HF_HUB_CACHE"):
        resolve("tiny-coder", weights="bf16")
    assert hub.asked == 0
    free(monkeypatch, {"models": 10, "hub": 5})
    resolve("tiny-coder", weights="stored")
    free(monkeypatch, {"models": 7, "hub": 0})
    resolve("tiny-coder", weights="bf16")  # the file is here by now
    assert hub.asked == 1


def test_offline(cache: Path, hub: Hub, gguf: bytes) -> None:
    for weights in ("bf16", "stored"):
        with pytest.raises(ForetellError, match="tiny-coder is not in the cache .*offline mode forbids"):
            resolve("tiny-coder", weights=weights, offline=True)
    assert not cache.exists()
    hub.download(REPO, FILE)
    opened(resolve("tiny-coder", offline=True).path)
    assert hub.asked == 1


def test_a_peer_reads_the_file_where_it_lies(cache: Path, hub: Hub, gguf: bytes) -> None:
    folder = ModelFolder("tiny-coder", cache, "catalog")
    path = gguf_file(folder, "q4_1")
    assert (path.read_bytes(), hub.asked, path.name) == (gguf, 1, FILE)
    assert path.is_relative_to(hub.cache)
    assert gguf_file(folder, "bf16") == cache / "gguf" / "tiny-1.5b-q4_k_m.bf16.gguf"
    assert hub.asked == 1


def test_a_peer_reads_the_file_of_the_cache_first(cache: Path, kept: Path, hub: Hub) -> None:
    hub.download(REPO, FILE)
    assert gguf_file(ModelFolder("Tiny-Coder", cache, "catalog"), "q4_1") == kept


def test_models_pull_and_rm(foretell: Foretell, cache: Path, hub: Hub) -> None:
    def row() -> dict[str, Any]:
        return next(row for row in foretell("models", "--json").lines if row["name"] == "tiny-coder")

    absent = {"bytes": 5_000_000, "licence": "MIT", "source": "catalog", "cached": False, "path": None, "problem": ""}
    assert row() == {"name": "tiny-coder"} | absent
    refused(foretell("rm", "tiny-coder", "--yes"), 2, "tiny-coder is not in")
    ran = foretell("pull", "tiny-coder")
    assert (ran.code, hub.asked) == (0, 1)
    assert "tiny-coder is ready: 0 MB" in ran.err
    assert (row()["cached"], row()["licence"]) == (True, "MIT")
    ran = foretell("rm", "tiny-coder", "--yes")
    assert "tiny-coder is deleted" in ran.err
    assert f"stays: {hub.cache}" in ran.err
    assert row()["cached"] is False
