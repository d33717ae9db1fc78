"""Imports run downhill only. The design's table of floors, enforced by reading every import of the package.

A part may import parts of lower floors and itself, never a neighbour on its own floor; and no module may import
itself by way of others, inside a folder either. Imports for type checkers count, and so do those inside functions.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import foretell

ROOT = Path(foretell.__file__).parent
FLOORS = {
    "errors": -1,
    "files": -0.5,
    "trees": 0,
    "requests": 0.5,  # what is asked for and what comes of it: contracts build on them
    "loading": 1, "prompt_files": 1, "results": 1,
    "backbone": 2,
    "contracts": 2.2,  # its types name the backbone and its cache, which know no drafter
    "verify": 2.3,
    "drafting": 2.5,  # what methods share while they draft and learn
    "drafters": 3, "engine": 3,
    "api": 4, "testing": 4, "recommendation": 4,
    "conversations": 4.5,  # several turns or prompts through the api; every floor above may use it
    "train": 5, "bench": 5, "interop": 5, "serve": 5,
    "cli": 6,
}  # fmt: skip
STRANGERS = {("verify", "backbone")}
"""(part, lower one that it may not import all the same): verification takes logits, wherever they come from."""
HOMES = {
    "transformers": ("loading/", "interop/", "bench/peers/", "drafting/learning/finetune.py"),
    "fastapi": ("serve/",),
    "matplotlib": ("bench/plots.py",),
}
"""Heavy libraries and the only places that may import them."""

MAX_LINES, MAX_LINES_OF_A_FUNCTION = 400, 60
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module of the package."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}
names = [str(path.relative_to(ROOT)) for path in FILES]
every_file = pytest.mark.parametrize("path", FILES, ids=names)


def imported(tree: ast.AST, package: str = "foretell") -> Iterator[str]:
    """Dotted names of all modules that the code imports, relative ones resolved against its package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield behind(alias.name) if module == "foretell" else whole if whole in MODULES else module


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
        if (other := part_of(module)) is not None and other != part
        and (FLOORS.get(other, 99) >= FLOORS[part] or (part, other) in STRANGERS)
    ]  # fmt: skip


def modules_of(path: Path) -> list[str]:
    package = ".".join(("foretell", *path.relative_to(ROOT).parent.parts))
    return list(imported(ast.parse(path.read_text(encoding="utf-8")), package))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Without the front door, `foretell` itself, which imports lazily whatever is asked of it."""
    graph = {name: set(modules_of(path)) & set(MODULES) for name, path in MODULES.items()}
    assert circle({name: others - {"foretell"} for name, others in graph.items() if name != "foretell"}) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "import foretell.b", "b": ""}, []),
        ({"a": "from foretell.b import x", "b": "if TYPE_CHECKING:\n    from foretell.a import y"}, ["a", "b", "a"]),
        ({"a": "def f():\n    import foretell.b", "b": "from foretell.c import x", "c": "import foretell.a"}, "abca"),
        ({"a": "from foretell.a import x"}, ["a", "a"]),
        ({"a": "import foretell.c", "b": "import foretell.c", "c": ""}, []),
    ],
)
def test_the_check_for_circles_itself(sources: dict[str, str], found: list[str]) -> None:
    graph = {f"foretell.{name}": set(imported(ast.parse(source))) for name, source in sources.items()}
    names = [name.removeprefix("foretell.") for name in circle(graph)]
    assert sorted(set(names)) == sorted(set(found))
    assert len(names) == len(found)
    assert not names or names[0] == names[-1]


def test_the_graph_reaches_every_module() -> None:
    """A check that sees no imports would find no circles."""
    graph = {name: set(modules_of(path)) & set(MODULES) for name, path in MODULES.items()}
    assert "foretell.engine.passes" in graph["foretell.engine.loop"]
    assert "foretell.loading.catalog" in graph["foretell.loading.resolve"]  # from a package, a module
    assert "foretell.backbone" in graph["foretell.contracts"]  # for types only
    assert sum(map(len, graph.values())) > 3 * len(graph)


@every_file
def test_imports_run_downhill(path: Path) -> None:
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    if part in ("__init__", "__main__"):  # the lazy front door, and the door to the command line
        allowed = {"__init__": set(foretell._HOME.values()), "__main__": {"cli"}}[part]
        assert {part_of(module) for module in modules_of(path)} - {None} <= allowed
        return
    assert part in FLOORS, f"{part} has no floor; add it to the design and to this table"
    assert uphill(part, modules_of(path)) == []


@every_file
def test_heavy_libraries_stay_at_home(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    for library, homes in HOMES.items():
        if any(module.split(".")[0] == library for module in modules_of(path)):
            assert where.startswith(homes), f"{library} is imported in {where}"


@every_file
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"


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
        ("backbone", "if TYPE_CHECKING:\n    from foretell.contracts import Row", ["foretell.contracts"]),
        ("engine", "from foretell.engine.row_state import RowState\nimport torch, foretell.verify.walk", []),
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
