"""One caller's requests on a decoder: followed to their end, beside others' requests, and cancelled when it leaves."""

from contextlib import suppress

import pytest
from decoding import decoder_of, plainly
from random_backbones import Model
from tiny_models import DIMENSIONS
from toy_drafters import RandomTrees

from foretell.backbone import Backbone
from foretell.drafters.plain import Plain
from foretell.engine import Driver, SpeculativeDecoder, run
from foretell.errors import ContextError, UsageError
from foretell.requests import Request, SamplingParams
from foretell.results import Result
from foretell.verify import Typical

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4, 5], [6]]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Model({"model_type": "llama", **DIMENSIONS, "max_position_embeddings": 512}).build()


@pytest.fixture(scope="module")
def truth(backbone: Backbone) -> list[list[int]]:
    return [plainly(backbone, [(prompt, PARAMS)])[0].ids for prompt in PROMPTS]


def ids_of(decoder: SpeculativeDecoder, prompts: list[list[int]]) -> list[list[int]]:
    results = [Result() for _ in prompts]
    for index, event in run(decoder, [Request(prompt, PARAMS) for prompt in prompts]):
        results[index].add(event)
    return [result.ids for result in results]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_events_come_with_the_index_of_their_request(backbone: Backbone, truth: list[list[int]], rows: int) -> None:
    decoder = decoder_of(backbone, RandomTrees(64, 8), max_rows=rows)
    assert ids_of(decoder, PROMPTS) == truth
    assert ids_of(decoder, PROMPTS[1:]) == truth[1:]  # numbers of requests go on, indices begin anew
    assert not decoder.busy


def test_requests_may_be_submitted_while_others_are_answered(backbone: Backbone, truth: list[list[int]]) -> None:
    results: dict[str, Result] = {}
    with Driver[str](decoder_of(backbone, Plain())) as driver:
        driver.submit("first", Request(PROMPTS[0], PARAMS))
        for name, event in driver:
            results.setdefault(name, Result()).add(event)
            if event.finish_reason and name == "first":
                driver.submit("second", Request(PROMPTS[1], PARAMS))
        assert driver.unfinished == 0
    assert [(name, result.ids) for name, result in results.items()] == [("first", truth[0]), ("second", truth[1])]


def test_drivers_share_a_decoder(backbone: Backbone, truth: list[list[int]]) -> None:
    """Each is handed its own events only, whoever steps."""
    decoder = decoder_of(backbone, RandomTrees(64, 8), max_rows=2)
    results = [Result() for _ in PROMPTS]
    with Driver[int](decoder) as one, Driver[int](decoder) as other:
        for index, driver in enumerate((one, other, one)):
            driver.submit(index, Request(PROMPTS[index], PARAMS))
        while one.unfinished or other.unfinished:
            for mine, driver in (((0, 2), one), ((1,), other)):
                for index, event in driver.step():
                    assert index in mine
                    results[index].add(event)
    assert [result.ids for result in results] == truth


def test_a_prompt_is_read_in_steps_that_emit_nothing(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:  # a caller may stop between them
    monkeypatch.setattr("foretell.engine.batch.PREFILL_NODES", 16)
    decoder = decoder_of(backbone, Plain())
    with Driver[int](decoder) as driver:
        driver.submit(0, Request([1] * 100, PARAMS))
        assert driver.step() == driver.step() == []
        assert driver.unfinished == 1
    assert not decoder.busy


@pytest.mark.parametrize("left", ["by the end of the block", "by an error", "by closing the generator"])
def test_leaving_cancels_what_is_unfinished(backbone: Backbone, truth: list[list[int]], left: str) -> None:
    decoder = decoder_of(backbone, Plain(), max_rows=2)
    if left == "by closing the generator":
        events = run(decoder, [Request(prompt, PARAMS) for prompt in PROMPTS])
        next(events)
        events.close()
    elif left == "by an error":
        with suppress(KeyError), Driver[int](decoder) as driver:
            driver.submit(0, Request(PROMPTS[0], PARAMS))
            raise KeyError
    else:
        with Driver[int](decoder) as driver:
            driver.submit(0, Request(PROMPTS[0], PARAMS))
    assert not decoder.busy
    assert ids_of(decoder, PROMPTS) == truth


def test_a_refused_request_cancels_those_before_it(backbone: Backbone) -> None:
    decoder = decoder_of(backbone, Plain())
    with pytest.raises(UsageError, match="token 64"):
        list(run(decoder, [Request([1], PARAMS), Request([64], PARAMS)]))
    assert not decoder.busy


def test_requests_that_another_caller_cancels_are_not_waited_for(backbone: Backbone) -> None:
    decoder = decoder_of(backbone, Plain())
    with Driver[int](decoder) as driver:
        driver.submit(0, Request(PROMPTS[0], PARAMS))
        for _, event in driver:
            decoder.cancel(event.request)
        assert driver.unfinished == 0


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "error", "sentence"),
    [
        ([1] * 500, {"max_new_tokens": 13}, ContextError, "500 tokens and 13 new.*`max_new_tokens=` to at most 12"),
        ([1] * 511, {"max_new_tokens": 2}, ContextError, "to at most 1"),
        ([1] * 512, {"max_new_tokens": 1}, ContextError, "512 tokens leaves no room .* to at most 511 tokens"),
        ([64], {}, UsageError, "token 64"),
        ([1], {"stop": "x"}, UsageError, "there is no tokenizer to find it"),
    ],
)  # fmt: skip
def test_a_check_refuses_what_submitting_would(
    backbone: Backbone, prompt: list[int], params: dict[str, int], error: type[UsageError], sentence: str
) -> None:
    decoder = decoder_of(backbone, Plain())
    for door in (decoder.check, decoder.submit):
        with pytest.raises(UsageError, match=sentence) as caught:
            door(prompt, SamplingParams(**params))  # type: ignore[arg-type]
        assert type(caught.value) is error
    assert not decoder.busy


def test_a_check_queues_nothing(backbone: Backbone) -> None:
    decoder = decoder_of(backbone, Plain())
    decoder.check([1, 2, 3], PARAMS)
    assert not decoder.busy
    assert decoder.submit([1, 2, 3], PARAMS) == 0


def test_typical_acceptance_refuses_what_it_would_ignore(backbone: Backbone) -> None:
    decoder = decoder_of(backbone, Plain(), rule=Typical(temperature=0.5))
    for params, sentence in (
        ({"temperature": 0.7}, "temperature is 0.7, but the rule .* has 0.5"),
        ({"top_p": 0.9, "min_p": 0.1}, "would ignore top_p, min_p"),
        ({"temperature": 0.5, "top_k": 5}, "would ignore top_k"),
    ):
        with pytest.raises(UsageError, match=sentence):
            decoder.check([1], SamplingParams(**params))  # type: ignore[arg-type]
    for temperature in (0, 0.5):
        decoder.check([1], SamplingParams(temperature=temperature))
