"""`foretell bench` as it is typed: its report, what it explains, how it resumes, and what a mistake prints."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Foretell

from foretell.bench.results import read_results
from foretell.bench.run_folder import ABOUT, RESULTS, ROUNDS
from foretell.bench.runner import PLAIN

pytestmark = pytest.mark.slow

TINY = ("--dtype", "fp32", "--threads", "1")
QUESTIONS = [("a", "one", ("first", "and?")), ("b", "two", ("second",)), ("c", "one", ("third", "so?"))]


@pytest.fixture
def suite(tmp_path: Path) -> str:
    lines = [{"id": id, "category": category, "turns": turns} for id, category, turns in QUESTIONS]
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.slow
def test_the_command_writes_a_report(
    foretell: Foretell, tiny: str, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "no peers here"))
    out = tmp_path / "out"
    command = ("bench", "-m", tiny, *TINY, "--suite", suite, "-n", "10", "-b", "1", "-b", "2")
    ran = foretell(*command, "--out", str(out), "--run", "prompt_lookup:adapt=false", "--run", "vllm")
    assert ran.code == 0, ran.err
    assert "vllm is not installed; foretell bench setup vllm installs it" in ran.err
    results = read_results(out)
    assert [row["contender"] for row in results["table"]] == [PLAIN, "prompt_lookup:adapt=false"] * 2
    assert all(row["same"] == row["compared"] == 5 for row in results["table"] if row["contender"] != PLAIN)
    assert len(results["requests"]) == 20
    assert list(results["by_category"]) == ["one", "two"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 2 and "http" not in re.sub(
        r"http://www\.w3\.org|http://purl\.org|https://matplotlib\.org|http://creativecommons\.org", "", page
    )
    assert "vllm: not measured" in (out / "results.md").read_text()
    for row in results["table"]:
        assert f"{row['tokens_per_s']:.1f}" in page and f"{row['tokens_per_s']:.1f}" in ran.out
    refused = foretell(*command, "--out", str(out))
    assert (refused.code, "holds a finished benchmark" in refused.err) == (2, True)
    same = foretell("bench", "compare", str(out), str(out / RESULTS))
    assert (same.code, "worse" in same.out) == (0, False)
    for row in results["table"]:
        row["tokens_per_step"] = row.get("tokens_per_step", 1) * 0.9
    (tmp_path / "slower").mkdir()
    (tmp_path / "slower" / RESULTS).write_text(json.dumps(results))
    worse = foretell("bench", "compare", str(out), str(tmp_path / "slower"))
    assert (worse.code, worse.out.count("worse")) == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--out", "{out}", "--run", "medussa"], 2, "Unknown drafter or peer 'medussa'"),
        (["--out", "{out}", "--run", "prompt_lookup:depth=3"], 2, "has no option 'depth'"),
        (["--out", "{out}", "--run", "prompt_lookup:lookup=1"], 2, "lookup is '1'; it must be true or false"),
        (["--out", "{out}", "--suite", "nowhere"], 2, "Cannot read the suite nowhere"),
        (["--out", "{out}", "--suite", "{broken}"], 1, "line 2 is not valid JSON"),
        (["--out", "{broken}", "--suite", "{suite}"], 1, "annot write to"),
        (["--out", "/proc/nowhere", "--suite", "{suite}"], 1, "annot write to"),
        (["--out", "{out}", "-b", "0"], 2, "--batch-size is 0"),
        (["--out", "{out}", "-t", "-1", "--suite", "{suite}"], 2, "temperature is -1.0"),
        (["--out", "{out}", "-n", "100000", "--suite", "{suite}"], 2, "exceed the model's context"),
    ],
)
def test_mistakes_are_one_line(
    foretell: Foretell, tiny: str, suite: str, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"pro')
    names = {"out": str(tmp_path / "out"), "broken": str(tmp_path / "broken.jsonl"), "suite": suite}
    ran = foretell("bench", "-m", tiny, *TINY, *(each.format(**names) for each in arguments))
    assert (ran.code, ran.out) == (code, "")
    assert re.search(rf"error: .*{re.escape(sentence)}", ran.err), ran.err


def test_results_that_are_none_are_one_line(foretell: Foretell, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": 9}')
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ABOUT).write_text("{}")
    for path, sentence in (
        ("nowhere", "is not a result of foretell bench"), ("other.json", "of this version"), ("begun", "unfinished"),
    ):  # fmt: skip
        ran = foretell("bench", "compare", str(tmp_path / path), str(tmp_path / path))
        assert (ran.code, sentence in ran.err) == (1, True)


def test_defaults_are_explained_and_a_run_is_resumed_with_the_systems_it_holds(
    foretell: Foretell, tiny: str, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("bench", "-m", tiny, *TINY, "--suite", suite, "-n", "4")
    ran = foretell(*command)
    assert ran.code == 0, ran.err
    assert "The results go to bench-1; --out names another folder." in ran.err
    assert (
        "Systems: plain, prompt_lookup. Chosen for this model and machine: prompt_lookup: no trained drafter comes"
        in ran.err
    )
    assert re.search(r"5 rounds of up to 4 tokens for each of 2 systems: about \d+ s, if all are as fast", ran.err)
    assert foretell(*command, "--run", "prompt_lookup:nodes=8").code == 0
    folder = tmp_path / "bench-2"
    for name in (RESULTS, "results.md", "report.html"):  # as if interrupted
        (folder / name).unlink()
    (folder / ROUNDS).write_text((folder / ROUNDS).read_text().split("\n")[0] + "\n")
    ran = foretell(*command)
    assert ran.code == 0, ran.err
    assert "Systems: plain, prompt_lookup:nodes=8. bench-2 holds an unfinished run of them." in ran.err
    results = read_results(folder)
    assert [row["contender"] for row in results["table"]] == [PLAIN, "prompt_lookup:nodes=8"]
    assert results["sittings"] == 2


def test_refusals_that_need_no_model_load_no_torch(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text("{}")
    for arguments, sentence in (
        (["--run", "medussa"], "Unknown drafter or peer"), (["--out", str(tmp_path)], "holds a finished benchmark"),
    ):  # fmt: skip
        code = (
            "import sys; from foretell.cli import main\n"
            f"try: main(['bench', *{arguments!r}])\n"
            "except SystemExit as left: print(left.code, 'torch' in sys.modules)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (ran.stdout, sentence in ran.stderr) == ("2 False\n", True), ran.stderr


def test_setup_takes_only_what_it_uses(foretell: Foretell) -> None:
    helped = foretell("bench", "setup", "--help")
    assert "--cache-dir" in helped.out
    assert not [option for option in ("--model", "--dtype", "--threads") if option in helped.out]
    assert foretell("bench", "setup", "transformers").err == (
        "transformers needs no environment of its own: nothing to install.\n"
    )
    assert "Unknown peer 'vlm'; the peers are" in foretell("bench", "setup", "vlm").err
