"""The library names Python's arguments, and the command line its own options."""

import ast
import re
from pathlib import Path

import pytest
from command_line import Foretell

import foretell as package
from foretell.cli.wording import for_command_line
from foretell.errors import ForetellError

ROOT = Path(package.__file__).parent
SPEAK_PYTHON = ("backbone", "drafters", "drafting", "engine", "loading", "train", "trees", "verify")
"""Folders whose errors name Python's arguments; `drafting/options.py` also parses what the command line was given."""
FILES = [path for folder in SPEAK_PYTHON for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "options.py"]


@pytest.mark.parametrize(
    ("sentence", "spoken"),
    [
        ("choose another `nodes=`.", "choose another -o nodes=."),
        ("use `device='cpu'`.", "use --device cpu."),
        ("run once without `offline=True`, or", "run once without --offline, or"),
        ("lower `max_new_tokens=` to at most 3", "lower --max-new-tokens to at most 3"),
        ("without `keep_features=True`, or `other_model=True`", "without --keep-features, or --other-model"),
        ("choose another `out=`; lower `learning_rate=`", "choose another --out; lower --lr"),
        ("train with `linear=True`.", "train with -o linear=true."),
        ("name one in `stop_ids=`", "name one in --stop-id"),
        ("with `plan='FILE'` and `search=False`", "with -o plan=FILE and -o search=false"),
        ("give one object with `prompt` or `turns`", "give one object with `prompt` or `turns`"),
        ("x = 3", "x = 3"),
    ],
)
def test_arguments_become_options(sentence: str, spoken: str) -> None:
    assert for_command_line(sentence) == spoken


def options_named(source: str) -> list[str]:
    """Options of the command line in the sentences that the code raises."""
    raised = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise))
    texts = (node.value for each in raised for node in ast.walk(each) if isinstance(node, ast.Constant))
    return [text for text in texts if isinstance(text, str) and re.search(r"(^|[ (`])(--[a-z]|-[a-z] \w+=)", text)]


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_names_no_option_of_the_command_line(path: Path) -> None:
    assert options_named(path.read_text(encoding="utf-8")) == []


def test_the_check_itself() -> None:
    assert options_named('raise E(f"run {x} without --offline.")') == [" without --offline."]
    assert options_named('raise E("say (-o nodes=3)")') == ["say (-o nodes=3)"]
    assert options_named('run("--no-deps")\nraise E("a - b, x-o, `nodes=3`")') == []


def test_the_command_line_prints_its_own_options(foretell: Foretell, tiny: str) -> None:
    with pytest.raises(ForetellError, match=r"lower `max_new_tokens=` to at most \d+"):
        package.load(tiny, threads=1).generate("hi", max_new_tokens=600)
    ran = foretell("generate", "hi", "-m", tiny, "-n", "600")
    assert re.search(r"lower --max-new-tokens to at most \d+", ran.err)


NAMES_NOTHING = re.compile(
    r"(What|Whether|Of|Those|How|Where|Who|Whom|Why|When|That|Nobody|Everything|All|By|To|In|With|From|Which)\b"
)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_with_what_they_name(path: Path) -> None:
    """The rule of CONTRIBUTING.md, as far as a first word shows it."""
    defined = (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    )  # fmt: skip
    assert [node.name for node in defined if NAMES_NOTHING.match(ast.get_docstring(node) or "")] == []
