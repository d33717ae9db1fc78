"""Pages that are written by hand stay true to the program: sentences that they quote, folders that they name."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from foretell.cli.wording import for_command_line
from foretell.files import ANOTHER_FOLDER
from foretell.loading.resolve import _FORBIDDEN

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/foretell"


def source() -> str:
    """All code of the package, with its adjacent string literals joined as Python joins them."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    code = re.sub(r"""["']\s*\n\s*f?["']""", "", code)
    code = code.replace("{remedy}", ANOTHER_FOLDER).replace("{_FORBIDDEN}", _FORBIDDEN)
    return for_command_line(code)


def test_troubleshooting_quotes_what_is_printed() -> None:
    page, code = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), source()
    quoted = [line for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(quoted) > 10
    missing = [part for line in quoted for part in line.split("…") if part.strip(" .;():") and part.strip() not in code]
    assert not missing


def test_contributing_lists_the_folders_of_the_package() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^ {4}(\S+)/ ", page, re.MULTILINE))
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"."}
    assert listed == folders | {"backbone/cpu/native"}


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_benchmarks_among_the_prompts_are_named_and_never_reported() -> None:
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("data/BROAD_SOURCES.md", "docs/training.md")]
    lists = [re.search(r"[Nn]ever report.*?on \**(SVAMP.*?)\**[:.]", " ".join(page.split())) for page in pages]
    names, others = (re.split(r", | or ", found[1]) for found in lists if found)
    assert names == others
    assert len(names) == 9
    for path in (ROOT / "docs/results").rglob("*.json"):
        text = path.read_text(encoding="utf-8").lower()
        assert not [name for name in names if re.search(rf"\b{name.lower()}\b", text)], path


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import house

    return house


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="lines are counted of tracked files")
def test_lines_are_counted_by_folder(house: ModuleType) -> None:
    counted = house.lines()
    tracked = subprocess.run(["git", "ls-files", "src", "tests", "tools"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in tracked.stdout.splitlines() if name.endswith(".py")]
    total = sum(len(path.read_bytes().split(b"\n")) - 1 for path in files if path.exists())
    assert sum(count for (_, language), count in counted.items() if language == "python") == total
    for path, folder in (("api.py", ""), ("trees/tree.py", "/trees"), ("backbone/cpu/native/x.h", "/backbone")):
        assert house.folder(f"src/foretell/{path}") == f"src/foretell{folder}"


def test_a_former_layout_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import before_after

    assert before_after.module("step_costs").__name__ == "foretell.backbone.step_costs"
    monkeypatch.setitem(before_after.MOVED, "step_costs", ("foretell.nowhere.x", "foretell.backbone.nowhere", "json"))
    assert before_after.module("step_costs") is sys.modules["json"]
