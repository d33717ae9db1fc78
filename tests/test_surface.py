"""What a caller meets at a Python prompt: names that complete, reprs that fit on a line, options taken as meant."""

from typing import Any

import numpy as np
import pytest
from random_backbones import Model
from test_engine import Letters
from tiny_models import DIMENSIONS

import foretell
from foretell import LLM, Result, SamplingParams, drafters
from foretell.drafters.plain import Plain
from foretell.requests import Event, Statistics
from foretell.results import total


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer: Any = Letters()
    return LLM(Model({"model_type": "llama", **DIMENSIONS, "max_position_embeddings": 512}).build(), tokenizer, Plain())


def test_the_public_names_complete() -> None:
    assert sorted(dir(foretell)) == sorted(foretell.__all__)
    assert {"load", "Drafter", "register", "LLM"} <= set(dir(foretell))


def test_reprs_fit_on_a_line(llm: LLM) -> None:
    assert repr(llm) == "<LLM model: plain, float32 on cpu>"
    looking = LLM(llm.backbone, llm.tokenizer, drafters.build("swift", llm.backbone, lookup=True))
    assert repr(looking) == "<LLM model: swift with lookup, float32 on cpu>"
    events = list(llm.stream([1, 2, 3], max_new_tokens=90, ignore_eos=True))
    (result,) = llm.generate([[1, 2, 3]], max_new_tokens=90, ignore_eos=True)
    for text in (repr(result), *map(repr, events), repr(Result(error="It broke.", finish_reason="error"))):
        assert len(text) < 120
    assert "90 tokens, length" in repr(result)
    assert "tokens/s, 1.00 tokens per step" in repr(result)
    assert result.text[:30] in repr(result)
    assert repr(events[-1]).endswith("1 tokens, length>")
    assert repr(Event(3, [5], [True], "hi")) == "<Event of request 3: 'hi', 1 tokens>"
    assert result.statistics.tokens_per_second > 0


def test_results_say_how_often_speculation_was_held_back() -> None:
    held = Statistics(steps=35, plain_steps=30, suspended_steps=28, new_tokens=40)
    assert held.held_back == 28 / 35
    assert "speculation held back in 28 of 35 steps" in repr(Result(statistics=held))
    assert total([Result(statistics=held)] * 2).held_back == 28 / 35
    assert Statistics().held_back == 0
    assert "held back" not in repr(Result(statistics=Statistics(steps=3)))


def test_one_stop_string_is_a_stop_string(llm: LLM) -> None:
    text = llm.generate([1, 2, 3], max_new_tokens=20, ignore_eos=True).text
    stop = text[9:12]
    for stops in (stop, [stop], (stop,)):
        assert SamplingParams(stop=stops).stop == (stop,)
        stopped = llm.generate([1, 2, 3], max_new_tokens=20, ignore_eos=True, stop=stops)
        assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    assert SamplingParams(stop_ids=[3, 4]).stop_ids == (3, 4)
    assert SamplingParams(stop=list(np.array(["a", "b"]))).stop == ("a", "b")
