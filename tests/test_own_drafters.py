"""Drafters of the user's own: a class, a file, an installed package; and the page that says how to write one."""

import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from command_line import Foretell
from decoding import decoder_of, finish
from toy_drafters import EarlyExit

import foretell as package
from foretell import drafters
from foretell.contracts import Draft, Drafter, Row
from foretell.drafting.from_file import split
from foretell.errors import ForetellError, UsageError
from foretell.requests import SamplingParams
from foretell.testing import MODELS, check_drafter, random_backbone

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-drafter.md"
SAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
BIGRAM = next(sample for sample in SAMPLES if "class Bigram" in sample)
LLAMA: Any = ("llama",)


@pytest.fixture
def bigram(tmp_path: Path) -> str:
    (tmp_path / "bigram.py").write_text(BIGRAM)
    return str(tmp_path / "bigram.py")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Adds entry points as installed packages have them."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(**points: str) -> None:
        found = [EntryPoint(name, value, "foretell.drafters") for name, value in points.items()]
        monkeypatch.setattr(drafters, "entry_points", lambda group: found if group == "foretell.drafters" else [])
        drafters._installed.cache_clear()

    yield add
    drafters._installed.cache_clear()
    sys.modules.pop("bigram", None)


# -- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [("Bigram", "llama"), ("TwoHeads", "mistral"), ("FirstLayers", "llama"), ("RowsOfItsOwn", "mistral")],
)
def test_the_drafters_of_the_page_are_exact(tmp_path: Path, name: str, model: str) -> None:
    (tmp_path / "page.py").write_text(next(sample for sample in SAMPLES if f"class {name}" in sample))
    assert check_drafter(f"{tmp_path}/page.py:{name}", (model,)) > 1000


@pytest.mark.parametrize("name", ["Bigram", "TwoHeads", "FirstLayers", "RowsOfItsOwn"])
def test_the_drafters_of_the_page_draft_once_plain_steps_are_timed(tmp_path: Path, name: str) -> None:
    """A governor that never met a plain step would wait for one for ever."""
    (tmp_path / "page.py").write_text(next(sample for sample in SAMPLES if f"class {name}" in sample))
    cls, backbone = drafters.drafter_class(f"{tmp_path}/page.py:{name}"), random_backbone(MODELS["llama"])
    decoder = decoder_of(backbone, cls.build(backbone, cls.Options()), adapt=True)
    (output,) = finish(decoder, [([5, 6, 7] * 5, SamplingParams(max_new_tokens=16, ignore_eos=True))])
    assert output.statistics.drafted > 0


def test_the_other_samples_of_the_page_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bigram: str, tiny: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(drafters, "DRAFTERS", dict(drafters.DRAFTERS))
    loads, checks = (next(s for s in SAMPLES if text in s) for text in ("foretell.load(", "def test_bigram"))
    try:
        loaded: dict[str, Any] = {}
        exec(loads.replace('"smollm2-135m"', repr(tiny)), loaded)
        assert loaded["llm"].drafter.options.length == 6
        register = re.search(r"^- `(foretell\.register.*?)`", PAGE.read_text(), re.MULTILINE)
        assert register
        exec(register[1], loaded)
        assert drafters.drafter_class("bigram") is loaded["Bigram"]
        tests: dict[str, Any] = {}
        exec(checks, tests)
        monkeypatch.setitem(tests, "check_drafter", lambda cls, **options: check_drafter(cls, LLAMA, **options))
        tests["test_bigram_changes_no_token"]()
    finally:
        sys.modules.pop("bigram", None)


def test_the_commands_of_the_page_run(foretell: Foretell, tiny: str, bigram: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "--drafter bigram.py -o length=6" in text
    assert "--drafter bigram.py:Bigram" in text
    options = ("hello hello hello", "-m", tiny, "--json", "-n", "24", "--dtype", "fp32", "--ignore-eos", "--no-adapt")
    plain = foretell("generate", *options)
    for name in (bigram, f"{bigram}:Bigram"):
        mine = foretell("generate", *options, "--drafter", name, "-o", "length=6")
        assert mine.lines[0]["ids"] == plain.lines[0]["ids"]
        assert mine.lines[0]["drafted"] > 0
    refused = foretell("generate", *options, "--drafter", bigram, "-o", "lenght=6")
    assert re.fullmatch(r"error: Drafter '.*' has no option 'lenght'; did you mean 'length'\? .*\n", refused.err)


# -- a file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_split_from_class_and_options() -> None:
    assert split("hydra++") is None
    assert split("a/b.py") == ("a/b.py", "", "")
    assert split("a/b.py:Mine") == ("a/b.py", "Mine", "")
    assert split("a/b.py:Mine:n=1,m=2") == ("a/b.py", "Mine", ":n=1,m=2")
    assert split("C:/b.py:n=1") == ("C:/b.py", "", ":n=1")


def test_a_file_runs_once_until_it_changes(bigram: str, tmp_path: Path) -> None:
    first = drafters.drafter_class(bigram)
    assert drafters.drafter_class(f"{bigram}:Bigram") is first
    path = Path(bigram)
    path.write_text(BIGRAM.replace("option(4", "option(5"))
    os.utime(path, ns=(1, 1))
    assert drafters.drafter_class(bigram).Options().length == 5


MINE = "from foretell import Drafter\nclass {}(Drafter):\n    def draft(self, rows): ...\n"


@pytest.mark.parametrize(
    ("source", "name", "error", "sentence"),
    [
        (None, "", ForetellError, r"There is no file .*x\.py; give the path of a Python file that defines a drafter\."),
        ("", "", UsageError, r".*x.py defines no subclass of foretell.Drafter; add one[.]"),
        ("from foretell import Drafter", "", UsageError, r".*x.py defines no subclass of .*; add one[.]"),
        (MINE.format("A") + MINE.format("B"), "", UsageError, r".* several drafters \(A, B\); name one, as in .*:A\."),
        (MINE.format("A"), ":B", UsageError, r".*x\.py has no B; its drafters are A\."),
        ("", ":B", UsageError, r".*x\.py has no B; it defines no drafter\."),
        ("class B: ...", ":B", UsageError, r"B in .*x\.py is no subclass of foretell\.Drafter; derive it .*\."),
        ("B = 3", ":B", UsageError, r"B in .*x\.py is no subclass of foretell\.Drafter; derive it .*\."),
        (MINE.format("B").replace("draft(", "drafts("), "", UsageError, r".* lacks a method draft\(self, rows\).*"),
        (MINE.format("B"), ":n=3", UsageError, r"Drafter '.*x\.py:n=3' is not FILE\.py or FILE\.py:Class; correct .*"),
        ("\nimport nothing_such", "", ForetellError, r".*x\.py, line 2 fails: ModuleNotFoundError: .*"),
        ("a = 1\nb = (", "", ForetellError, r".*x\.py, line 2 fails: SyntaxError: .*"),
        ("1 / 0", "", ForetellError, r".*x\.py, line 1 fails: ZeroDivisionError: division by zero\."),
    ],
)  # fmt: skip
def test_what_is_no_drafter_is_one_sentence(
    tmp_path: Path, source: str | None, name: str, error: type[ForetellError], sentence: str
) -> None:
    if source is not None:
        (tmp_path / "x.py").write_text(source)
    with pytest.raises(ForetellError) as refusal:
        drafters.drafter_class(f"{tmp_path}/x.py{name}")
    assert type(refusal.value) is error
    assert re.fullmatch(sentence, str(refusal.value))


# -- a class, a package ---------------------------------------------------------------------------------------------


class Twice(Drafter):
    """Guesses nothing."""

    def draft(self, rows: Sequence[Row]) -> Draft:
        return drafters.drafter_class("plain")().draft(rows)


def test_a_class_itself_is_a_drafter(tiny: str) -> None:
    llm = package.load(tiny, drafter=Twice, dtype="fp32", threads=1)
    assert isinstance(llm.drafter, Twice)
    assert llm.drafter.backbone is llm.backbone
    with pytest.raises(UsageError, match="Drafter 'Twice' has no option 'times'; it has none"):
        package.load("no-such-model", drafter=Twice, times=3)  # before a model is looked for
    other: Any
    for other in (3, int, Twice()):
        with pytest.raises(UsageError, match=r"^drafter=.* is no subclass of foretell\.Drafter; derive it"):
            package.load("no-such-model", drafter=other)


def test_an_installed_package_adds_rows(installed: Any, bigram: str, foretell: Foretell, tiny: str) -> None:
    installed(bigram="bigram:Bigram", medusa="bigram:Bigram")
    assert drafters.drafter_class("bigram").__name__ == "Bigram"
    assert drafters.drafter_class("medusa").__name__ == "Medusa"  # names of foretell's own stay
    assert "bigram" in drafters.table()
    assert re.search(r"bigram +from the package", foretell("generate", "--help").out)
    ran = foretell("generate", "hi hi hi", "-m", tiny, "-n", "4", "-d", "bigram", "-o", "length=2")
    assert ran.code == 0
    with pytest.raises(UsageError, match="A drafter named 'bigram' exists already"):
        drafters.register("bigram", Twice, "")
    with pytest.raises(UsageError, match="Unknown drafter 'bigrams': did you mean 'bigram'"):
        drafters.drafter_class("bigrams")


def test_a_package_that_cannot_be_imported_is_one_sentence(installed: Any, bigram: str) -> None:
    installed(gone="no_such_module:X", lacks="bigram:Trigram", number="bigram:option")
    for name in ("gone", "lacks"):
        with pytest.raises(ForetellError, match=rf"^Drafter '{name}' \(from the package \?\) cannot be imported"):
            drafters.drafter_class(name)
    with pytest.raises(UsageError, match=r"^Drafter 'number' .* is no subclass of foretell\.Drafter"):
        drafters.drafter_class("number")


# -- the check ------------------------------------------------------------------------------------------------------


class Spoiler(EarlyExit):
    """Hands over states that its layers did not compute."""

    def draft(self, rows: Sequence[Row]) -> Draft:
        draft = super().draft(rows)
        assert draft.resume
        draft.resume.hidden_Rd[:] += 0.5
        return draft


@pytest.mark.slow
def test_the_check_finds_what_changes_a_token() -> None:
    assert check_drafter(lambda backbone: EarlyExit(backbone, 2), LLAMA) > 1000
    with pytest.raises(AssertionError, match=r"request \d+ of llama in float32, 1 rows: token \d+ is .*, but without"):
        check_drafter(lambda backbone: Spoiler(backbone, 2), LLAMA)


def test_a_lossy_drafter_cannot_be_checked() -> None:
    class Lossy(Twice):
        lossless = False

    with pytest.raises(UsageError, match="lossless = False"):
        check_drafter(Lossy, LLAMA)
    assert set(LLAMA) < set(MODELS)
    assert random_backbone(MODELS["qwen3"]).config.layers == 4
