"""Tokens per step, counted by replay: as decoded, by group as by hand, resumed; questions reworded, content kept."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import finish
from random_backbones import BF16
from test_kangaroo import drafter_of as kangaroo_of
from test_kangaroo import random_adapter
from test_medusa import backbone_of, saved
from test_replay import conversations, drafter_of
from trainables import trainable

from foretell.api import LLM, load
from foretell.bench.suites import load_suite
from foretell.drafters.hydra.drafter import Hydra, HydraPlus
from foretell.drafters.kangaroo import Kangaroo
from foretell.drafters.medusa import Medusa
from foretell.drafters.prompt_lookup import WithLookup
from foretell.engine import SpeculativeDecoder
from foretell.errors import ForetellError
from foretell.requests import SamplingParams, Statistics

pytestmark = pytest.mark.usefixtures("one_thread")
LOOP, SOUND = [1, 2, 3] * 40, list(range(30))


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))


@pytest.fixture
def tool(tools: None) -> Any:
    import breadth_figures

    return breadth_figures


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Medusa, Hydra, HydraPlus, Kangaroo])
@pytest.mark.parametrize("lookup", [False, True])
def test_steps_are_those_of_decoding_whatever_the_batch(tool: Any, kind: Any, lookup: bool) -> None:
    backbone = backbone_of(BF16)
    data = conversations(backbone)
    prompts = [talk.tokens[: talk.answers[0][0]] for talk in data]
    if kind is Kangaroo:
        drafter = kangaroo_of(backbone, random_adapter(backbone), nodes=12)
    else:
        drafter = drafter_of(kind, backbone, data, nodes=12)
    drafter = WithLookup(drafter) if lookup else drafter
    done = list[int]()
    last = tool.answered(backbone, prompts[:1], 40, 2)[0][20]
    backbone.config = replace(backbone.config, eos_ids=(last,))
    truth = tool.answered(backbone, prompts, 40, 2, done.append)
    assert min(map(len, truth)) < 40  # one ends before its limit, and drafts near its end reach beyond it
    found = tool.Answers.of(backbone, prompts, truth, 40, drafter.taps, done.append).steps(drafter, done.append)
    for rows in (1, 2, 5):
        decoder = SpeculativeDecoder(backbone, drafter, max_rows=rows, adapt=False)
        decoded = finish(decoder, [(prompt, SamplingParams(max_new_tokens=40)) for prompt in prompts])
        assert [output.ids for output in decoded] == truth
        for one, output in zip(found, decoded, strict=True):
            for figure in ("steps", "new_tokens", "drafted", "accepted", "by_depth", "suspended_steps"):
                assert getattr(one, figure) == getattr(output.statistics, figure)
    assert done == 3 * [1, 2, 3, 4, 5]
    assert sum(one.steps for one in found) < sum(map(len, truth))


def test_a_failed_answer_ends_the_count(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(BF16)
    monkeypatch.setattr(tool.SpeculativeDecoder, "_join", lambda *_: (_ for _ in ()).throw(ForetellError("no room")))
    with pytest.raises(ForetellError, match="no room"):
        tool.answered(backbone, [[1, 2, 3]], 8, 1)


# -- figures -----------------------------------------------------------------------------------------------------------


def counted(ids: list[int], steps: int, by_depth: list[tuple[int, int]]) -> Any:
    return Statistics(new_tokens=len(ids), steps=steps, by_depth=by_depth)


def test_groups_are_counted_as_by_hand(tool: Any) -> None:
    asked = [
        tool.Asked("translation", True, False, [1]),
        tool.Asked("translation", True, False, [2], repetitive=True),
        tool.Asked("qa", False, False, [3]),
        tool.Asked("translation", True, True, [4]),
        tool.Asked("translation", True, True, [5]),
    ]
    found = [
        counted(SOUND, 10, [(10, 5)]),
        counted(LOOP, 20, [(20, 20), (10, 4)]),
        counted(SOUND, 15, [(10, 1), (5, 1), (1, 0)]),
        counted(SOUND, 20, []),
        counted(SOUND, 10, []),
    ]
    groups = tool.grouped(asked, found)
    assert groups["all"] == {
        "tokens_per_step": 4.0,  # 180 tokens in 45 steps
        "without_repetitive": 2.4,  # 60 in 25
        "by_kind": {"translation": 5.0, "qa": 2.0},
        "accepted_by_depth": [0.65, 0.333, 0.0],
    }
    assert groups["fixed words"]["tokens_per_step"] == 5.0
    assert groups["fixed words"]["without_repetitive"] == 3.0
    assert groups["reworded"]["tokens_per_step"] == 2.0
    assert groups["own words"]["by_kind"] == {"qa": 2.0}
    assert tool.answers(asked) == {
        "all": {"answers": 3, "repetitive": 1}, "fixed words": {"answers": 2, "repetitive": 1},
        "reworded": {"answers": 2, "repetitive": 0}, "own words": {"answers": 1, "repetitive": 0},
        "by_kind": {"translation": 2, "qa": 1},
    }  # fmt: skip


def test_a_group_without_answers_is_left_out(tool: Any) -> None:
    only = [(tool.Asked("qa", False, False, [3], repetitive=True), counted(LOOP, 60, []))]
    groups = tool.grouped(*map(list, zip(*only, strict=True)))
    assert groups.keys() == {"all", "own words"}
    assert groups["all"]["without_repetitive"] is None


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny: str) -> LLM:
    llm = load(tiny, dtype="bf16", threads=1)
    llm.backbone.fingerprint = "tiny"
    return llm


def test_a_run_is_resumed_and_other_heads_are_counted_anew(
    tool: Any, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, heads = llm.backbone, tmp_path / "heads"
    module = trainable(Medusa, backbone, torch.ones(backbone.config.vocab), heads=3, draft_vocab=20)
    paths = [[0], [0, 0], [1], [2], [1, 0], [0, 1], [0, 0, 0]]
    saved(heads, backbone, module, paths=paths)
    questions, results = tmp_path / "questions.jsonl", tmp_path / "results.json"
    texts = [("translation", "Translate German to English: Ja."), ("qa", "Who?"), ("summarization", "Summarize: Rain.")]
    questions.write_text("".join(
        json.dumps({"question_id": i, "category": kind, "turns": [text]}) + "\n" for i, (kind, text) in enumerate(texts)
    ))  # fmt: skip
    counts, steps = list[int](), tool.Answers.steps
    monkeypatch.setattr(
        tool.Answers, "steps", lambda self, *given: counts.append(len(self.batches)) or steps(self, *given)
    )
    monkeypatch.setattr(tool.foretell, "load", lambda name, **options: llm)

    def run(*more: str) -> dict[str, Any]:
        counts.clear()
        monkeypatch.setattr(sys, "argv", [
            "breadth_figures.py", "--questions", str(questions), "--after", f"medusa:{heads}", "--every", "1",
            "--new-tokens", "24", "--results", str(results), *more,
        ])  # fmt: skip
        tool.main()
        found: dict[str, Any] = json.loads(results.read_text())
        return found

    found = run("--sizes", "4")
    assert counts == [5, 5]  # without and with lookup: three questions, two of them in other words too
    assert found["medusa after"]["command"].endswith("--sizes 4")
    assert "--after medusa:heads " in found["medusa after"]["command"]
    result = found["medusa after"]["result"]
    assert (result["answers"]["all"]["answers"], result["answers"]["reworded"]["answers"]) == (3, 2)
    resumed = run("--sizes", "4", "8")["medusa after"]["result"]
    assert counts == [5, 5]
    assert resumed["sizes"]["4"] == result["sizes"]["4"]
    assert list(resumed["sizes"]) == ["4", "4 with lookup", "8", "8 with lookup"]
    saved(heads, backbone, module, paths=paths[:3])  # the same tensors, another tree
    anew = run("--sizes", "4", "--before", f"medusa:{heads}")
    assert counts == [5, 5, 5, 5]
    assert list(anew["medusa after"]["result"]["sizes"]) == ["4", "4 with lookup"]
    assert anew["medusa before"]["result"] == anew["medusa after"]["result"]


# -- rewording ---------------------------------------------------------------------------------------------------------


def test_every_question_with_fixed_words_is_reworded_and_keeps_its_content(tools: None) -> None:
    from rewording import RULES, reworded

    starts = {"translation": "Translate German to English: ", "summarization": "Summarize: ", "rag": ""}
    seen = dict.fromkeys(RULES, 0)
    for question in load_suite("mini").questions:
        text, kind = question.turns[0], question.category
        other = reworded(kind, text)
        if kind not in RULES:
            assert other is None
            continue
        seen[kind] += 1
        assert other is not None and other != text and other == reworded(kind, text)
        content = text.removeprefix(starts[kind])
        assert not starts[kind] or starts[kind].strip() not in other
        for part in content.rsplit("\n", 1) if kind == "rag" else [content]:
            assert part in other
    assert all(seen.values())


def test_each_text_of_a_rule_holds_every_part(tools: None) -> None:
    from rewording import RULES, reworded

    for pattern, texts in RULES.values():
        parts = set(re.compile(pattern).groupindex)
        assert all(set(re.findall(r"\{(\w+)\}", text)) == parts for text in texts)
    every = {reworded("translation", f"Translate German to English: {i}").replace(str(i), "") for i in range(40)}
    assert len(every) == len(RULES["translation"][1])
    assert reworded("translation", "Say {this} in German.") is None
    assert "a {brace}" in str(reworded("summarization", "Summarize: a {brace}"))


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_show_both_sides(tools: None) -> None:
    import breadth_tables

    def section(tokens: float) -> dict[str, Any]:
        group = {
            "tokens_per_step": tokens, "without_repetitive": tokens - 0.1, "by_kind": {"qa": tokens, "rag": None},
            "accepted_by_depth": [0.5, 0.25],
        }  # fmt: skip
        sizes = {"16": {"all": group, "reworded": group}, "16 with lookup": {"all": group}, "4": {"all": group}}
        groups = ("all", "fixed words", "reworded", "own words")
        counts = {name: {"answers": 2, "repetitive": 1} for name in groups} | {"by_kind": {"qa": 1, "rag": 1}}
        of = {"model": "tiny", "answers": counts, "new_tokens": 24, "sizes": sizes}
        return {"command": "python x", "commit": "abc", "machine": "a laptop", "result": of}

    found = {"hydra++ before": section(2), "hydra++ after": section(3), "medusa after": section(4)}
    lines = breadth_tables.tables(found)
    assert "| nodes | 4 | 16 | 4, lookup | 16, lookup |" in lines
    assert "| hydra++ before | 2.00 | 2.00 |  | 2.00 |" in lines
    assert "| questions (1) | 2.00 → 3.00 | 2.00 → 3.00 | 4.00 | 4.00 |" in lines
    assert "| questions, reworded (1) | 2.00 → 3.00 |  | 4.00 |  |" in lines
    assert not any(line.startswith("| retrieval") for line in lines)  # counted nowhere
    assert "| hydra++ after | 3.00 | 2.90 |  | 3.00 | 2.90 |  |" in lines
    assert any("hydra++ before 50%, 25%; hydra++ after 50%, 25%" in line for line in lines)
    assert not any("questions (1)" in line for line in breadth_tables.tables(found, brief=True))
    assert breadth_tables.tables({}) == []
