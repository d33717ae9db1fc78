"""Imports run downhill only. The design's table of floors, enforced by reading every import of the package.

A part may import parts of lower floors and itself, never a neighbour on its own floor. Imports for type checkers
do not count; imports inside functions do.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import foretell

ROOT = Path(foretell.__file__).parent
FLOORS = {
    "errors": -1,
    "files": -0.5,
    "trees": 0,
    "requests": 0.5,  # what is asked for and what comes of it: contracts build on them
    "contracts": 1, "loading": 1, "prompt_files": 1, "results": 1,
    "backbone": 2, "verify": 2,
    "drafting": 2.5,  # what methods share while they draft and learn
    "drafters": 3, "engine": 3,
    "api": 4,
    "conversations": 4.5,  # several turns or prompts through the api; every floor above may use it
    "train": 5, "bench": 5, "interop": 5, "serve": 5,
    "cli": 6,
}  # fmt: skip
HOMES = {
    "transformers": ("loading/", "interop/", "bench/peers/", "drafting/learning/finetune.py"),
    "fastapi": ("serve/",),
    "matplotlib": ("bench/plots.py",),
}
"""Heavy libraries and the only places that may import them."""

MAX_LINES, MAX_LINES_OF_A_FUNCTION = 400, 60
LONGER: set[str] = set()
"""Files, and functions as "file:name", that may be longer; each a decision somebody made."""

FILES = sorted(ROOT.rglob("*.py"))
names = [str(path.relative_to(ROOT)) for path in FILES]
every_file = pytest.mark.parametrize("path", FILES, ids=names)


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(tree: ast.AST, package: str = "foretell") -> Iterator[str]:
    """Dotted names of all modules that the code imports, relative ones resolved against its package."""
    for node in ast.iter_child_nodes(tree):
        if only_for_types(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from map(behind, (alias.name for alias in node.names)) if module == "foretell" else (module,)
        else:
            yield from imported(node, package)


def behind(name: str) -> str:
    """What `from foretell import name` imports: a part, or the part where a public name lives."""
    home = foretell._HOME.get(name, name)
    return "foretell" if name == "__version__" else f"foretell.{home}"


def part_of(dotted: str) -> str | None:
    """Which part of the package a module belongs to; None for the outside world."""
    words = dotted.split(".")
    return words[1] if words[0] == "foretell" and len(words) > 1 else None


def uphill(part: str, modules: list[str]) -> list[str]:
    """Imports that do not run downhill."""
    return [
        module for module in modules
        if (other := part_of(module)) is not None and other != part and FLOORS.get(other, 99) >= FLOORS[part]
    ]  # fmt: skip


def modules_of(path: Path) -> list[str]:
    package = ".".join(("foretell", *path.relative_to(ROOT).parent.parts))
    return list(imported(ast.parse(path.read_text(encoding="utf-8")), package))


@every_file
def test_imports_run_downhill(path: Path) -> None:
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    if part in ("__init__", "__main__"):  # the lazy front door, and the door to the command line
        allowed = {"__init__": set(), "__main__": {"cli"}}[part]
        assert {part_of(module) for module in modules_of(path)} - {None} <= allowed
        return
    assert part in FLOORS, f"{part} has no floor; add it to the design and to this table"
    assert [
        module for module in uphill(part, modules_of(path)) if not (part == "backbone" and "drafting" in module)
    ] == []


@every_file
def test_heavy_libraries_stay_at_home(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    for library, homes in HOMES.items():
        if any(module.split(".")[0] == library for module in modules_of(path)):
            assert where.startswith(homes), f"{library} is imported in {where}"


@every_file
def test_files_and_functions_stay_short(path: Path) -> None:
    where, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    assert where in LONGER or len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert f"{where}:{node.name}" in LONGER or lines <= MAX_LINES_OF_A_FUNCTION, (
                f"{node.name} has {lines} lines"
            )


def test_exceptions_are_still_needed() -> None:
    for exception in LONGER:
        assert (ROOT / exception.split(":")[0]).exists()


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("verify", "from foretell.backbone import Nodes", ["foretell.backbone"]),
        ("engine", "def f():\n    import foretell.drafters.plain as p", ["foretell.drafters.plain"]),
        ("trees", "from foretell import errors, api", ["foretell.api"]),
        ("backbone", "from ..engine.loop import x", ["foretell.engine.loop"]),
        ("serve", "try:\n    from foretell.bench import y\nexcept ImportError: ...", ["foretell.bench"]),
        ("errors", "from foretell.trees import chain", ["foretell.trees"]),
        ("verify", "from foretell import load, TokenTree, __version__", ["foretell.api"]),
        ("api", "from foretell.newcomer import x", ["foretell.newcomer"]),
        ("contracts", "if TYPE_CHECKING:\n    from foretell.backbone import Backbone", []),
        ("engine", "from foretell.engine.sequence import Sequence\nimport torch, foretell.verify.walk", []),
    ],
)
def test_the_check_itself(part: str, source: str, found: list[str]) -> None:
    assert uphill(part, list(imported(ast.parse(source), f"foretell.{part}"))) == found


def test_importing_foretell_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "transformers", "tokenizers", "typer", "rich", "huggingface_hub", "gguf", "fastapi")
    script = f"import sys, foretell; dir(foretell); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_public_is_there_when_asked_for() -> None:
    for name in foretell.__all__:
        assert getattr(foretell, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        foretell.lode  # noqa: B018
