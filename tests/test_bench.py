"""The benchmark's parts: suites as they are read, figures against their definitions, judges, comparisons."""

import gzip
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from foretell.bench import quality
from foretell.bench.compare import compare
from foretell.bench.metrics import figures, gaps, histogram, table
from foretell.bench.peers.protocol import Clock
from foretell.bench.report import tokens_per_step
from foretell.bench.results import read_results
from foretell.bench.suites import QUICK_QUESTIONS, SHIPPED, SUMS, Question, load_suite
from foretell.errors import ForetellError, UsageError
from foretell.loading.catalog import FORMER_FINGERPRINTS

# -- suites ------------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str, name: str = "suite.jsonl") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_the_shipped_suite_has_every_category_of_spec_bench() -> None:
    suite = load_suite(SHIPPED)
    assert len(suite.questions) == 23
    assert len({question.category for question in suite.questions}) == 13
    assert max(len(question.turns) for question in suite.questions) == 2
    assert [q.category for q in suite.chosen(per_category=1).questions] == list(
        dict.fromkeys(q.category for q in suite.questions)
    )
    assert suite.chosen(every=5, limit=3).questions == suite.questions[::5][:3]


def test_a_quick_look_takes_the_shortest_question_of_each_kind(tmp_path: Path) -> None:
    suite = load_suite(SHIPPED).quick()
    assert len({question.category for question in suite.questions}) == len(suite.questions) == QUICK_QUESTIONS
    assert max(sum(map(len, question.turns)) for question in suite.questions) < 200
    lines = [{"id": f"{kind}{size}", "category": kind, "prompt": "x" * size} for kind in "ba" for size in (9, 3, 5)]
    few = load_suite(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert [question.id for question in few.quick(3).questions] == ["b3", "b5", "a3"]
    assert few.quick(9).questions == few.questions


def test_spec_bench_is_read(tmp_path: Path) -> None:
    line = {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["x", "y"]}
    assert load_suite(written(tmp_path, json.dumps(line) + "\n\n")).questions == [Question("81", "writing", ("a", "b"))]


def test_prompts_with_references_are_judged_as_texts(tmp_path: Path) -> None:
    lines = '{"prompt": "a", "reference": "b"}\n{"turns": ["c"], "id": "k", "category": "z"}\n'
    assert load_suite(written(tmp_path, lines)).questions == [
        Question("1", "all", ("a",), "text", "b"), Question("k", "z", ("c",)),
    ]  # fmt: skip


def test_gsm8k_is_read(tmp_path: Path) -> None:
    line = {"question": "2 + 3?", "answer": "It is <<2+3=5>>5.\n#### 5"}
    assert load_suite(written(tmp_path, json.dumps(line))).questions == [
        Question("1", "gsm8k", (SUMS.format(question="2 + 3?"),), "number", "5")
    ]


def test_text_is_prompts_with_blank_lines_between_them(tmp_path: Path) -> None:
    suite = load_suite(written(tmp_path, "one\nmore\n\n\ntwo\n", "prompts.txt"))
    assert [question.turns for question in suite.questions] == [("one\nmore",), ("two",)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"prompt": "a"}\n{"pro', "suite.jsonl, line 2 is not valid JSON"),
        ('{"prompt": "a"}\n{"category": "b"}', "line 2 has neither `prompt` nor `turns`"),
        (
            '{"question_id": 3, "prompt": "a"}\n{"question_id": 3, "prompt": "b"}',
            "line 2 has id '3' for the second time",
        ),
        ('{"question": "a", "answer": "b"}', "line 1: `answer` does not end with ####"),
        ('{"question": "a", "answer": "b #### yes"}', "line 1: `answer` does not end with #### and a number"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": 3, "answer": "#### 1"}', "line 2: `question` is 3"),
        ("\n \n", "holds no questions"),
    ],
)
def test_malformed_suites_are_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ForetellError) as refused:
        load_suite(written(tmp_path, text))
    assert sentence in str(refused.value)


def test_suites_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read the suite .*nowhere.*'mini', which comes with foretell"):
        load_suite(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}' * 9)[:-9])
    with pytest.raises(ForetellError, match="no whole gzip file"):
        load_suite(str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ForetellError, match="not UTF-8 .byte 3"):
        load_suite(str(tmp_path / "latin.txt"))


# -- figures -----------------------------------------------------------------------------------------------------------


def record(name: str, group: int, seconds: float, arrivals: list[tuple[int, float]], **more: Any) -> dict[str, Any]:
    tokens = sum(count for count, _ in arrivals)
    return {
        "contender": name, "round": [0.0, 1, 0, group, 0], "question": str(group), "category": "ab"[group % 2],
        "turn": 0, "prompt_tokens": 5, "new_tokens": tokens, "seconds": seconds, "prefill_seconds": 0.5,
        "arrivals": arrivals, "peak_bytes": 10, **more,
    }  # fmt: skip


RECORDS = [
    record("plain", 0, 4.5, [(1, 1.0 + i) for i in range(4)], steps=4, drafted=0, accepted=0, by_depth=[],
           draft_seconds=0.0, verify_seconds=3.0),
    record("plain", 1, 2.5, [(1, 1.0), (1, 2.0)], steps=2, drafted=0, accepted=0, by_depth=[],
           draft_seconds=0.0, verify_seconds=1.5),
    record("fast", 0, 1.5, [(3, 1.0), (1, 1.5)], steps=2, drafted=6, accepted=2, by_depth=[[2, 1], [2, 1]],
           draft_seconds=0.25, verify_seconds=0.5, same=True),
    record("fast", 1, 2.0, [(1, 1.0), (1, 2.0)], steps=2, drafted=4, accepted=0, by_depth=[[2, 0]],
           draft_seconds=0.25, verify_seconds=1.0, same=False, divergence={"at": 1, "margin": 0.25}),
]  # fmt: skip


def test_the_figures_are_their_definitions() -> None:
    plain, fast = table(RECORDS)
    assert (plain["contender"], fast["contender"]) == ("plain", "fast")
    assert fast["tokens_per_s"] == pytest.approx(6 / 3.5)
    assert fast["decode_tokens_per_s"] == pytest.approx(6 / 2.5)
    rates, base = [4 / 1.5, 2 / 2.0], [4 / 4.5, 2 / 2.5]
    assert fast["speedup"]["median"] == pytest.approx(median(a / b for a, b in zip(rates, base, strict=True)))
    assert fast["spec_bench_speedup"] == pytest.approx(sum(rates) / sum(base))
    assert fast["tokens_per_step"] == 6 / 4
    assert fast["accepted_share"] == 2 / 10
    assert fast["acceptance_by_depth"] == [1 / 4, 1 / 2]
    assert fast["tokens_of_steps"] == [3, 0, 1]
    assert sum((i + 1) * count for i, count in enumerate(fast["tokens_of_steps"])) == 6
    assert (fast["compared"], fast["same"], fast["margins"]) == (2, 1, [0.25])
    assert fast["draft_share"] == pytest.approx(0.5 / 3.5)
    assert sum(fast[f"{part}_share"] for part in ("draft", "verify", "prefill", "other")) == pytest.approx(1)
    assert "same" not in plain
    assert plain["speedup"] == {"low": 1.0, "median": 1.0, "high": 1.0}


def test_a_batch_takes_as_long_as_its_slowest_row() -> None:
    rows = [record("plain", 0, seconds, [(4, seconds)]) | {"round": [0.0, 2, 0, 0, 0]} for seconds in (2.0, 4.0)]
    assert figures(rows, rows)["tokens_per_s"] == 8 / 4
    assert not {"decode_tokens_per_s", "prefill_share"} & figures(rows, rows).keys()  # whose prefill was when?


def test_the_turns_of_a_question_make_one_rate() -> None:
    def turns(name: str, seconds: list[float]) -> list[dict[str, Any]]:
        made = [record(name, 0, s, [(4, s)]) | {"round": [0.0, 1, 0, 0, i]} for i, s in enumerate(seconds[:2])]
        return [*made, record(name, 1, seconds[2], [(6, seconds[2])])]

    mine, plain = turns("fast", [1.0, 3.0, 2.0]), turns("plain", [4.0, 4.0, 6.0])
    assert figures(mine, plain)["spec_bench_speedup"] == pytest.approx((8 / 4 + 6 / 2) / (8 / 8 + 6 / 6))


def test_answers_without_a_guess_count_as_steps_too() -> None:
    known = {"steps": 2, "drafted": 4, "accepted": 2, "inserted": 6}, {"steps": 3, "drafted": 0, "accepted": 0}, {}
    mine = [record("peer", i, 1.0, [(4, 1.0)], **more) for i, more in enumerate(known)]
    found = figures(mine, mine)
    assert (found["tokens_per_step"], found["accepted_share"], found["rows_per_step"]) == (8 / 5, 0.5, 3)


def test_tokens_that_arrive_together_are_no_time_apart() -> None:
    assert list(gaps([(2, 1.0), (1, 1.5), (3, 2.5)])) == [0.5, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("heard", "whole", "arrivals"),
    [
        ([[1], [2], [4, 5]], [1, 2, 3, 4, 5], [(1, 0.0), (1, 1.0), (3, 2.0)]),
        ([[1], [2]], [1, 2, 3], [(1, 0.0), (2, 1.0)]),
        ([[3], [4]], [3, 3, 4, 4], [(1, 0.0), (3, 1.0)]),
        ([], [1], []),
        ([[1], [7]], [1, 2, 3], []),
    ],
    ids=["came with the next", "came last", "the same token again", "nothing was heard", "another answer"],
)
def test_tokens_that_a_stream_left_out_came_with_the_next(
    heard: list[list[int]], whole: list[int], arrivals: list[tuple[int, float]]
) -> None:
    clock = Clock()
    clock.ids = [token for tokens in heard for token in tokens]
    clock.arrivals = [(len(tokens), float(at)) for at, tokens in enumerate(heard)]
    clock.missed(whole)
    assert (clock.ids, clock.arrivals) == (whole, arrivals)


def test_steps_in_which_speculation_was_held_back_are_told() -> None:
    mine = [record("fast", i, 1.0, [(4, 1.0)], steps=4, suspended_steps=held) for i, held in enumerate((0, 3, 3))]
    row = figures(mine, mine)
    assert (row["steps"], row["suspended_steps"]) == (12, 6)
    assert tokens_per_step(row) == "1.00 (50% held back)"
    assert tokens_per_step(row | {"suspended_steps": 0}) == "1.00"
    assert tokens_per_step({}) == ""


def test_a_result_from_before_held_back_steps_were_a_figure_counts_them(tmp_path: Path) -> None:
    rows = [{"contender": "fast", "batch": batch, "temperature": 0.0, "steps": 9} for batch in (1, 2)]
    requests = [
        {"contender": "fast", "round": [0.0, batch, 0, i, 0], "suspended_steps": held}
        for batch, held in ((1, 2), (2, 5)) for i in range(2)
    ]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "table": rows, "requests": requests}))
    assert [row["suspended_steps"] for row in read_results(tmp_path)["table"]] == [4, 10]


def test_a_histogram_has_every_step() -> None:
    assert histogram([(9, 6), (9, 2)], 10) == [4, 4, 2]
    assert histogram([], 3) == [3]


# -- judges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so 4 + 1 = 5\n#### 5", "5", True), ("#### $1,050.00 in all", "1050", True), ("it is 12.", "12", True),
        ("12 or 13", "12", False), ("#### 5 (not 6)", "6", False), ("no idea", "3", False), ("-7", "-7", True),
    ],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(answer: str, reference: str, right: bool) -> None:
    assert quality.judge("number", [answer], [reference]) == {"exact_match": float(right)}


def test_texts_are_judged_by_known_measures() -> None:
    same = quality.judge("text", ["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same == {"rouge_l": 1.0, "bleu": pytest.approx(1.0)}
    other = quality.judge("text", ["the dog sat on the mat"], ["the cat sat on the mat"])
    assert other["rouge_l"] == pytest.approx(5 / 6)
    assert quality.agreement(["a b"], ["c d"]) == {"agreement_rouge_l": 0.0}


# -- comparing two runs ------------------------------------------------------------------------------------------------


def result(*speedups: float, tokens: float = 2.0, same: int = 5, **settings: Any) -> dict[str, Any]:
    """A run whose questions were answered so much faster than plain."""
    rows = [
        {"contender": name, "batch": 1, "temperature": 0.0, "tokens_per_s": 10.0, "tokens_per_step": steps, **more}
        for name, steps, more in (("plain", 1.0, {}), ("fast", tokens, {"same": same, "compared": 5}))
    ]
    requests = [
        {"contender": name, "round": [0.0, 1, 0, i, 0], "question": str(i), "new_tokens": 10, "seconds": seconds}
        for i, faster in enumerate(speedups)
        for name, seconds in (("plain", 1.0 + i), ("fast", (1.0 + i) / faster))
    ]
    return {
        "machine": "m", "settings": {"model": "m", "new_tokens": 9, **settings},
        "contenders": {"fast": {"exact": True}},
        "table": [row | {"answers": len(speedups)} for row in rows], "requests": requests,
    }  # fmt: skip


BEFORE = 1.2, 2.0, 3.5, 1.5, 2.2


@pytest.mark.parametrize(
    ("after", "worse"),
    [
        (result(*BEFORE), []),
        (result(1.0, 2.2, 3.6, 1.4, 2.2), []),  # some up, some down
        (result(*(0.99 * each for each in BEFORE)), []),  # everywhere, but by too little
        (result(*(0.9 * each for each in BEFORE)), ["speed-up over the first's, question by question"]),
        (result(*(1.5 * each for each in BEFORE)), []),
        (result(*BEFORE, tokens=1.9), ["tokens per step"]),
        (result(*BEFORE, same=4), ["share of answers with plain's ids"]),
    ],
)
def test_only_what_is_beyond_noise_counts(after: dict[str, Any], worse: list[str]) -> None:
    changes = [each for each in compare(result(*BEFORE), after) if each.system != "plain"]
    assert [change.figure for change in changes if change.worse] == worse
    assert len(changes) == 3
    assert all(("worse" in str(change)) == change.worse for change in changes)


def test_runs_of_different_things_are_not_compared() -> None:
    with pytest.raises(UsageError, match="The two results differ in new_tokens; compare runs of one suite"):
        list(compare(result(*BEFORE), result(*BEFORE, new_tokens=8)))


def test_a_result_from_before_fingerprints_covered_every_tensor_is_compared() -> None:
    former, now = next(iter(FORMER_FINGERPRINTS.items()))
    assert len(list(compare(result(*BEFORE, fingerprint=former), result(*BEFORE, fingerprint=now)))) > 0
    with pytest.raises(UsageError, match="differ in fingerprint"):
        list(compare(result(*BEFORE, fingerprint=former), result(*BEFORE, fingerprint="another")))


def test_a_system_that_is_gone_is_worse() -> None:
    after = result(*BEFORE)
    after["table"].pop()
    assert [str(each) for each in compare(result(*BEFORE), after) if each.worse] == [
        "fast, batch 1, temperature 0: answers 5.000 -> 0.000 (-100.0%): worse"
    ]
