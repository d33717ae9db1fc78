"""Fused decoding: budgets, ends and stop strings inside a step; rows that join, leave and fail; what is left then."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import Output, finish, finish_in_spite_of
from test_engine import Letters
from test_hamburger import drafter_of, ragged, random_grafts, same_outputs
from tiny_models import save_tiny

from foretell.backbone import Backbone
from foretell.backbone.load import assemble
from foretell.drafters.hamburger.learning import MacroSteps
from foretell.engine import FusedDecoder, decoder_for
from foretell.errors import ContextError, UsageError
from foretell.requests import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
OPEN = SamplingParams(max_new_tokens=24, ignore_eos=True)
PROMPT = [5, 9, 2, 33, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def backbone(folder: Path, request: pytest.FixtureRequest) -> Backbone:
    return assemble(folder, dtype=request.param, threads=1)


@pytest.fixture(scope="module")
def module(backbone: Backbone, folder: Path) -> MacroSteps:
    return random_grafts(backbone, folder)


@pytest.fixture
def fused(backbone: Backbone, module: MacroSteps) -> Any:
    """Makes decoders that write some two tokens a step."""

    def make(rows: int = 1, confidence: float = 0.5, tokenizer: Any = None) -> FusedDecoder:
        drafter = drafter_of(backbone, module, mode="fused", confidence=0.5)
        assert drafter.fused
        drafter.fused.confidence = confidence
        decoder = decoder_for(backbone, drafter, tokenizer, max_rows=rows)
        assert isinstance(decoder, FusedDecoder)
        return decoder

    return make


def test_a_batch_writes_what_each_row_writes_alone(fused: Any) -> None:
    """In both number types, while rows join and leave."""
    alone = [finish(fused(), [each], [key])[0] for key, each in enumerate(ragged())]
    for rows in (2, 5):
        same_outputs(finish(fused(rows), ragged()), alone)
    assert any(output.statistics.slots < len(output.ids) for output in alone)


@pytest.mark.parametrize("place", range(8))
def test_an_end_inside_a_step_ends_there(fused: Any, place: int) -> None:
    """A budget, a stop token and a stop string, wherever in a step they fall: what a free run wrote up to there."""
    [free] = finish(fused(confidence=0.0, tokenizer=Letters()), [(PROMPT, OPEN)])
    last = free.ids[place]
    first = free.ids.index(last)
    [output] = finish(fused(confidence=0.0), [(PROMPT, replace(OPEN, max_new_tokens=place + 1))])
    assert (output.ids, output.finish_reason) == (free.ids[: place + 1], "length")
    [output] = finish(fused(confidence=0.0), [(PROMPT, replace(OPEN, stop_ids=(last,)))])
    assert (output.ids, output.finish_reason) == (free.ids[: first + 1], "stop")
    assert len(output.ids) == output.statistics.new_tokens
    stop = free.text[2 * place + 1 : 2 * place + 4]
    [output] = finish(fused(confidence=0.0, tokenizer=Letters()), [(PROMPT, replace(OPEN, stop=("#", stop)))])
    assert (output.text, output.finish_reason) == (free.text[: free.text.index(stop)], "stop")


def test_events_add_up_to_the_answer(fused: Any) -> None:
    """What streaming shows, piece by piece, with the mark of what was trusted."""
    [whole] = finish(fused(tokenizer=Letters()), [(PROMPT, OPEN)])
    assert whole.text == Letters().decode(whole.ids)
    assert len(whole.drafted) == len(whole.ids)
    assert sum(whole.drafted) == len(whole.ids) - whole.statistics.steps
    assert (whole.statistics.drafted, whole.statistics.accepted, whole.statistics.by_depth) == (0, 0, [])


def test_the_next_turn_reuses_the_prompt(fused: Any) -> None:
    """What was fused is read again, a slot for each token, as every prompt is."""
    decoder, turn = fused(), replace(OPEN, max_new_tokens=6)
    [first] = finish(decoder, [(PROMPT, OPEN)])
    following = [*PROMPT, *first.ids, 3, 4]
    [second] = finish(decoder, [(following, turn)])
    assert second.statistics.reused_tokens == len(PROMPT) - 1
    same_outputs([second], finish(fused(), [(following, turn)]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["backbone.run_layers", "_write", "_emit", "cache.commit", "fused.fuse"])
def test_an_error_anywhere_in_a_step_changes_no_answer(fused: Any, place: str, error: type[BaseException]) -> None:
    truth, decoder = finish(fused(), ragged()[:1]), fused(rows=2)
    truth += finish(fused(), ragged()[1:2], [1])
    outputs, raised = finish_in_spite_of(error, place, decoder, ragged()[:2], every=5)
    assert raised > 0
    same_outputs(outputs, truth)


def test_a_row_can_be_cancelled_in_mid_answer(fused: Any) -> None:
    decoder = fused(rows=2)
    kept, dropped = (decoder.submit(PROMPT, OPEN, key) for key in (0, 1))
    output = Output()
    while decoder.pending([kept]):
        for event in decoder.events([kept]):
            output.add(event)
        decoder.cancel(dropped)
    same_outputs([output], finish(fused(), [(PROMPT, OPEN)]))
    assert not decoder.busy


def test_logits_that_are_no_numbers_end_that_request(
    fused: Any, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, steps = fused(rows=2), [0]
    usual = backbone.argmax

    def damaged(states: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        tokens = usual(states)
        if steps[0] > 6:
            tokens[0] = -1
        return tokens

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "argmax", damaged)
        [first, second] = finish(decoder, [(PROMPT, OPEN), ([1, 2], replace(OPEN, max_new_tokens=2))])
    assert first.finish_reason == "error"
    assert "the model's logits are not finite numbers" in first.error
    assert first.ids == finish(fused(), [(PROMPT, OPEN)])[0].ids[: len(first.ids)]
    assert second.finish_reason == "length"


def test_what_cannot_be_decoded_is_refused_at_the_door(fused: Any) -> None:
    with pytest.raises(ContextError, match=r"exceed this model's context of 128"):
        fused().submit(PROMPT, replace(OPEN, max_new_tokens=200))
    with pytest.raises(UsageError, match=r"^The batch needs at least one row, not 0\.$"):
        fused(rows=0)
