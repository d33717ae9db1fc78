"""What a changed model lost: its figures are those of reading token by token."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell.api import LLM, load
from foretell.backbone import Nodes

pytestmark = pytest.mark.usefixtures("one_thread")
SOLUTION = "2 + 3 = <<2+3=5>>5\n#### 5"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    import quality_figures

    return quality_figures


@pytest.fixture(scope="module")
def llm(tiny: str) -> LLM:
    return load(tiny, dtype="fp32", threads=1)


def read_aloud(llm: LLM, tokens: list[int], start: int) -> tuple[float, int]:
    """Slow twin of log_p_and_best: the text up to each token, anew."""
    total, best = 0.0, 0
    for i in range(start, len(tokens)):
        nodes = Nodes.chains([0], [0], [i])
        states_Md = llm.backbone.forward(torch.tensor(tokens[:i]), nodes, llm.backbone.new_cache(1, i))
        log_p_V = llm.backbone.logits(states_Md[-1:])[0].double().log_softmax(-1)
        total += float(log_p_V[tokens[i]])
        best += int(log_p_V.argmax()) == tokens[i]
    return total, best


def half_its_own(llm: LLM, prompt: list[int], length: int) -> list[int]:
    """A text of which the model chose about every second token."""
    tokens = list(prompt)
    while len(tokens) < length:
        tokens += llm.generate([tokens], max_new_tokens=1, ignore_eos=True)[0].ids
        tokens += [7 * len(tokens) % 256]
    return tokens[:length]


def test_a_text_is_read_as_token_by_token(tool: Any, llm: LLM) -> None:
    tokens = half_its_own(llm, [72, 105, 33], 15)
    for start in (1, 3, 14):
        log_p, best = read_aloud(llm, tokens, start)
        ours = tool.log_p_and_best(llm.backbone, tokens, start)
        assert ours == (pytest.approx(log_p, rel=1e-5), best)
    assert 6 <= read_aloud(llm, tokens, 3)[1] < 12


def test_figures_weigh_each_token_alike(tool: Any, llm: LLM) -> None:
    texts = [(half_its_own(llm, [72, 105], 5), 2), (half_its_own(llm, [65] * 9, 22), 9)]
    found = tool.figures(llm, {"some": texts, "one": texts[:1]})
    for name, those in (("some", texts), ("one", texts[:1])):
        read = [read_aloud(llm, *text) for text in those]
        count = {"some": 3 + 13, "one": 3}[name]
        assert found[f"{name}_perplexity"] == pytest.approx(math.exp(-sum(p for p, _ in read) / count), rel=1e-4)
        assert found[f"{name}_agreement"] == round(sum(best for _, best in read) / count, 4)
    assert found["some_perplexity"] != found["one_perplexity"]


def test_solutions_are_read_after_the_sums_that_they_answer(
    tool: Any, llm: LLM, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, Any]] = [
        {"question_id": 1, "category": "sums", "turns": ["2 and 3?"], "reference": [SOLUTION]},
        {"question_id": 2, "category": "words", "turns": ["Say more."], "reference": ["Some more of it."]},
        {"question_id": 3, "category": "talk", "turns": ["Hello"]},
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(tool.core, "RESULTS", tmp_path / "core.json")
    monkeypatch.setattr(tool.foretell, "load", lambda name, **options: llm)
    options = ["--base", "base", "--questions", str(questions), "--every", "1", "--new-tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["quality_figures.py", "base+changed", *options])
    tool.main()
    result = json.loads((tmp_path / "quality.json").read_text())["base+changed"]["result"]
    assert (result["questions"], result["texts"], result["sums"]) == (3, 2, 1)
    kinds = {f"{kind}_{figure}" for kind in ("human", "own", "sums") for figure in ("perplexity", "agreement")}
    assert result["base"].keys() == kinds | {"exact_match"}
    asked = llm.encode("2 and 3?\n\nThink step by step, and end with the answer alone after ####.")
    log_p, _ = read_aloud(llm, [*asked, *llm.tokenizer.encode(SOLUTION)], len(asked))
    assert result["base"]["sums_perplexity"] == pytest.approx(math.exp(-log_p / len(SOLUTION)), rel=1e-4)
    assert result["base"]["own_agreement"] == 1.0
