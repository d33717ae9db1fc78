"""Sweeping typical acceptance: a system for each threshold, the exact one beside them, and a plot of what it costs.

ε comes from the command, δ is its root; `typical=true` still means the published pair.
"""

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import Foretell

import foretell as package
from foretell.api import LLM
from foretell.bench.results import read_results
from foretell.bench.run_folder import RESULTS
from foretell.bench.systems import ForetellSystem
from foretell.verify import Typical

TINY = ("--dtype", "fp32", "--threads", "1")
CAPTION = "Speed and quality against the threshold of typical acceptance."
LOOKUP = "prompt_lookup:nodes=8"


@pytest.fixture(scope="module")
def llm(tiny: str) -> LLM:
    return package.load(tiny, dtype="fp32", threads=1)


@pytest.fixture
def suite(tmp_path: Path) -> str:
    """Questions with something to judge their answers by."""
    path = tmp_path / "suite.jsonl"
    lines = [{"id": word, "prompt": f"{word} {word} {word}", "reference": word} for word in ("one", "two", "three")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.slow
def test_a_sweep_has_a_system_for_each_threshold_and_the_exact_one(
    foretell: Foretell, tiny: str, cache: Path, suite: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("bench", "sweep", "-m", tiny, *TINY, "--suite", suite, "-n", "12", "--out", str(out))
    ran = foretell(*command, "-d", LOOKUP, "--epsilon", "0.25", "--epsilon", "0")
    assert ran.code == 0, ran.err
    results = read_results(out)
    names = ["plain", LOOKUP, f"{LOOKUP},typical=0.25", f"{LOOKUP},typical=0"]
    assert results["settings"]["contenders"] == names
    assert (results["settings"]["temperatures"], results["settings"]["batches"]) == ([0.7], [1])
    about = [results["contenders"][name] for name in names]
    assert [each["typical"] and (each["typical"]["epsilon"], each["typical"]["delta"]) for each in about] == [
        None, None, (0.25, 0.5), (0, 0),
    ]  # fmt: skip
    assert [each["options"] for each in about[1:]] == [{"nodes": 8}] * 3
    assert not any(each["exact"] for each in about[2:])
    rows = {row["contender"]: row for row in results["table"]}
    assert list(rows) == names
    assert rows[LOOKUP]["same"] == rows[LOOKUP]["compared"] == 3
    assert all({"rouge_l", "bleu"} <= row["quality"].keys() for row in rows.values())
    anything, exact = rows[names[3]]["tokens_per_step"], rows[LOOKUP]["tokens_per_step"]
    assert anything > exact  # at ε = 0 whatever is guessed is kept; otherwise a guess hits once in a hundred times
    page = (out / "report.html").read_text()
    assert (CAPTION in page) == (find_spec("matplotlib") is not None)
    for name in names:
        assert name in ran.out
    again = foretell(*command, "-d", LOOKUP, "--epsilon", "0.25", "--epsilon", "0")
    assert (again.code, "holds a finished benchmark; choose another --out" in again.err) == (2, True)


@pytest.mark.slow
def test_without_thresholds_to_compare_there_is_no_such_plot(
    foretell: Foretell, tiny: str, cache: Path, suite: str, tmp_path: Path
) -> None:
    runs = ("--run", "prompt_lookup:typical=true", "--run", "prompt_lookup:typical=false", "--run", "prompt_lookup")
    out = tmp_path / "out"
    ran = foretell("bench", "-m", tiny, *TINY, "--suite", suite, "-n", "8", "-t", "0.7", "--out", str(out), *runs)
    assert ran.code == 0, ran.err
    about = read_results(out)["contenders"]
    assert about["prompt_lookup:typical=true"]["typical"] == {"epsilon": 0.09, "delta": 0.3}
    assert about["prompt_lookup:typical=false"]["typical"] is about["prompt_lookup"]["typical"] is None
    assert CAPTION not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        (False, None), (True, Typical(temperature=0.5)), (0.04, Typical(0.04, 0.2, 0.5)), (0.0, Typical(0.0, 0.0, 0.5)),
        (1.0, Typical(1.0, 1.0, 0.5)), (0.09, Typical(0.09, math.sqrt(0.09), 0.5)),
    ],
)  # fmt: skip
def test_a_threshold_makes_the_rule_at_the_temperature_that_is_sampled_at(
    llm: LLM, asked: bool | float, rule: Typical | None
) -> None:
    ours = ForetellSystem(llm, "name", "prompt_lookup", {"typical": asked})
    assert ours._decoder(1, 0.5).rule == rule
    assert ours.lossless == (rule is None)


@pytest.mark.parametrize("value", ["-1", "abc", "nan", "inf"])
def test_what_is_no_threshold_is_refused_before_a_model_is_loaded(
    foretell: Foretell, tmp_path: Path, value: str
) -> None:
    spec = f"prompt_lookup:typical={value}"
    ran = foretell("bench", "-m", "./nowhere", "--out", str(tmp_path / "out"), "--run", spec)
    assert (ran.code, ran.out) == (2, "")
    sentence = f"'{spec}': typical is '{value}'; it must be true, false, or a threshold of at least 0."
    assert ran.err == f"error: {sentence}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-t", "0"], r"--temperature is 0\.0; typical acceptance needs one above 0"),
        (["-t", "-0.5"], r"--temperature is -0\.5; typical acceptance needs one above 0"),
        (["--out", "{done}"], "holds a finished benchmark; choose another --out, or delete it"),
        (["--suite", "nowhere"], "Cannot read the suite nowhere"),
    ],
)
def test_sweeps_that_could_never_work_load_no_model(
    foretell: Foretell, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / RESULTS).write_text("{}")
    given = [each.format(done=tmp_path / "done") for each in arguments]
    ran = foretell("bench", "sweep", "-m", "./nowhere", "--out", str(tmp_path / "out"), *given)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(rf"error: .*{sentence}.*\n", ran.err), ran.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_drafter_is_refused(foretell: Foretell, tiny: str, cache: Path, suite: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = foretell("bench", "sweep", "-m", tiny, *TINY, "--suite", suite, "--out", str(out), "-d", "medussa")
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: Unknown drafter or peer 'medussa'; .*\n", ran.err), ran.err
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--epsilon", "-0.1"], ["--epsilon", "much"], ["-n", "0"], ["--limit", "0"]])
def test_what_the_parser_refuses(foretell: Foretell, tmp_path: Path, arguments: list[str]) -> None:
    ran = foretell("bench", "sweep", "-m", "./nowhere", "--out", str(tmp_path / "out"), *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: " in ran.err
    assert "Traceback" not in ran.err
