"""`foretell models`, `pull` and `rm`: what can be loaded by name, fetched before it is needed, and deleted again."""

import re
from pathlib import Path

import pytest
from command_line import Foretell
from test_cli_refusals import refused
from test_loading import make_snapshot
from tiny_gguf import write_gguf
from tiny_models import tiny_model

from foretell.loading.cache_dir import cached_models


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))


def test_models_lists_what_is_here_and_what_could_be(foretell: Foretell, cache: Path) -> None:
    ran = foretell("models")
    assert ran.code == 0
    assert re.search(r"smollm2-135m +\d+ MB +Apache-2.0 +catalog +no", ran.out)
    assert "On disk" not in ran.out
    assert foretell("models", "--json").lines == [
        {
            "name": name, "bytes": size, "licence": "Apache-2.0", "source": source,
            "cached": False, "path": None, "problem": "",
        }
        for name, size, source in (
            ("qwen2.5-coder-0.5b", 491_400_064, "catalog"),
            ("qwen2.5-coder-1.5b", 1_117_320_768, "catalog"),
            ("smollm2-135m", 92_000_000, "catalog"),
            ("smollm2-135m+layerskip", 273_000_000, "catalog, with an adapter"),
            ("smollm2-135m+medusa2", 273_000_000, "catalog, with an adapter"),
        )
    ]  # fmt: skip


def test_models_lists_the_hub_cache_and_sizes(foretell: Foretell, cache: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "hub", "org/owl")
    bare = make_snapshot(tmp_path / "hub", "org/bare")
    (bare / "tokenizer.json").unlink()
    ran = foretell("models")
    assert re.search(r"org/owl +0 MB +see its card +hub +yes", ran.out)
    assert re.search(r"org/bare .* hub +incomplete", ran.out)
    assert re.search(r"On disk: 0 MB\.", ran.out)
    rows = {row["name"]: row for row in foretell("models", "--json").lines}
    size = sum(file.stat().st_size for file in snapshot.iterdir())
    assert (rows["org/owl"]["bytes"], rows["org/owl"]["path"]) == (size, str(snapshot))
    assert rows["org/bare"]["problem"].startswith("incomplete: no tokenizer")


def test_pull_and_rm(foretell: Foretell, cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = foretell("pull", str(gguf))
    assert ran.code == 0
    [model] = cached_models()
    assert ran.err.splitlines()[-1] == f"{gguf} is ready: 0 MB in {model.path}"
    refused(foretell("rm", str(gguf)), 2, r"Deleting .*tiny.gguf \(0 MB\) needs a yes; give --yes")
    assert cached_models() == [model]
    monkeypatch.chdir(gguf.parent)
    ran = foretell("rm", "tiny.gguf", "--yes")  # by another name of the same file
    assert (ran.code, ran.out) == (0, "")
    assert "tiny.gguf is deleted" in ran.err
    assert cached_models() == []
    assert gguf.exists()


def test_rm_refuses_what_is_not_its_own(
    foretell: Foretell, cache: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = make_snapshot(tmp_path / "hub", "org/owl")
    capsys.readouterr()
    refused(
        foretell("rm", "org/owl", "--yes"),
        2,
        "in the hub's cache, which other programs share.*hf cache rm model/org/owl",
    )
    refused(foretell("rm", str(gguf), "--yes"), 2, "is a file or folder of yours")
    refused(foretell("rm", str(tmp_path), "--yes"), 2, "is a file or folder of yours")
    refused(
        foretell("rm", "smollm2-135m", "--yes"), 2, "smollm2-135m is not in .*cache; `foretell models` lists what is"
    )
    assert snapshot.is_dir()
    assert gguf.exists()


def test_pull_refuses_an_unknown_name(foretell: Foretell, cache: Path) -> None:
    refused(foretell("pull", "smolm"), 2, "No model is called 'smolm'; did you mean smollm2-135m")
