"""Where speculation does not pay: drafters guess nothing, lookup what it is sure of, and the command line says so."""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Foretell
from decoding import assert_same, decoder_of, finish, plainly
from hypothesis import given, settings
from hypothesis import strategies as st
from random_backbones import Model
from test_lookup import TEXT, Line, Says
from tiny_models import DIMENSIONS
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone
from foretell.backbone.step_costs import StepCosts
from foretell.cli.demo import _Side
from foretell.cli.speculation_notes import held_back, verdict
from foretell.contracts import Drafter
from foretell.drafters.hydra.drafter import Hydra, HydraPlus
from foretell.drafters.kangaroo import Kangaroo
from foretell.drafters.layerskip import LayerSkip
from foretell.drafters.medusa import Medusa
from foretell.drafters.prompt_lookup import MOST_LEARNT, PromptLookup, WithLookup, least_paying, most_paying, prices_of
from foretell.engine.governor import Governor
from foretell.requests import SamplingParams, Statistics
from foretell.trees import chain

PATHS = [[0], [1], [0, 0]]


def heads(method: type[Medusa | Hydra], backbone: Backbone, size: Callable[[int, int], int]) -> Drafter:
    tensors, arch = trainable(method, backbone, torch.arange(backbone.config.vocab), heads=2).checkpoint()
    return method(backbone, arch, tensors, PATHS, size)


def kangaroo(backbone: Backbone, size: Callable[[int, int], int]) -> Drafter:
    tensors, arch = trainable(Kangaroo, backbone, torch.arange(backbone.config.vocab)).checkpoint()
    return Kangaroo(backbone, arch, tensors, size)


MADE: dict[str, Callable[[Backbone, Callable[[int, int], int]], Drafter]] = {
    "medusa": lambda backbone, size: heads(Medusa, backbone, size),
    "hydra": lambda backbone, size: heads(Hydra, backbone, size),
    "hydra++": lambda backbone, size: heads(HydraPlus, backbone, size),
    "kangaroo": kangaroo,
    "layerskip": lambda backbone, size: LayerSkip(backbone, None, 1, size),
}


# --- drafters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MADE)
def test_where_no_tree_pays_a_drafter_guesses_nothing_and_the_statistics_say_so(method: str) -> None:
    """Until the context is another: what was committed meanwhile is not lost on the drafter."""
    backbone = Model({"model_type": "llama", **DIMENSIONS}).build()
    requests = [([3, 1, 4], SamplingParams(max_new_tokens=12, ignore_eos=True)),
                ([2, 7], SamplingParams(max_new_tokens=12, ignore_eos=True))]  # fmt: skip
    truth = plainly(backbone, requests)
    for size, held in ((lambda rows, context, *_: 1, 12), (lambda rows, context, *_: 1 if context < 10 else 4, 7)):
        drafter = MADE[method](backbone, size)
        outputs = finish(decoder_of(backbone, drafter, max_rows=2), requests)
        assert_same(outputs, truth, method)
        statistics = outputs[0].statistics
        assert statistics.suspended_steps == held
        assert bool(statistics.drafted) == (held < 12)
        assert outputs[0].statistics.plain_steps >= held


@pytest.mark.parametrize("kind", [SamplingParams(temperature=1.0), SamplingParams(repetition_penalty=1.2)])
def test_guesses_are_worth_what_they_prove_to_be(kind: SamplingParams) -> None:
    """Of rows that copy less they stop to pay, and pay again when these copy; greedy rows are judged by themselves."""
    lookup = PromptLookup(prices=lambda rows, context: [1.0 + 0.5 * guesses for guesses in range(17)])

    def drafted(params: SamplingParams, copies: bool, steps: int) -> list[bool]:
        """Whether each step of a text that repeats itself, or only seems to, has guesses."""
        line, found = Line([1, 2, 3, 4, 5, 6, 7] * 3, params=params), []
        lookup.reset([line])
        for step in range(steps):
            found.append(len(lookup.draft([line]).tokens[0]) > 1)
            line.tokens = [*line.tokens, line.tokens[-7] if copies else 100 + step, *([] if copies else [1, 2, 3, 4])]
        return found

    greedy = SamplingParams()
    assert all(drafted(greedy, copies=True, steps=100))
    assert all(drafted(kind, copies=True, steps=100))
    fooled = drafted(kind, copies=False, steps=400)
    assert all(fooled[:20])
    assert not any(fooled[200:])
    assert all(drafted(greedy, copies=True, steps=1))
    again = drafted(kind, copies=True, steps=400)
    assert not again[0]
    assert all(again[300:])


def test_sampled_text_is_expected_to_copy_less() -> None:
    """A match of 0.63 when greedy is one of 0.43 at temperature 1; guesses cost half a step here."""

    def drafted(**params: float) -> int:
        lookup = PromptLookup(prices=lambda rows, context: [1.0, 1.5, *range(2, 16)])
        line = Line(TEXT, params=SamplingParams(**params))
        lookup.reset([line])
        return len(lookup.draft([line]).tokens[0]) - 1

    assert drafted() == drafted(temperature=0.3) == drafted(temperature=1.0, top_p=0.5) == 1
    assert drafted(temperature=1.0) == 0


def test_text_that_copies_is_guessed_at_any_temperature_and_nothing_runs_away() -> None:
    lookup = PromptLookup(prices=lambda rows, context: [1.0 + 0.5 * guesses for guesses in range(17)])
    line, found = Line([1, 2, 3, 4, 5, 6, 7] * 3, params=SamplingParams(temperature=2.0)), list[bool]()
    lookup.reset([line])
    for _ in range(300):
        found.append(len(lookup.draft([line]).tokens[0]) > 1)
        line.tokens = [*line.tokens, line.tokens[-7]]
    assert all(found[200:])
    assert 1 < lookup._odds[False] <= MOST_LEARNT
    assert lookup._odds[True] == 1


def test_where_no_tree_pays_lookup_still_guesses() -> None:
    backbone, line = Model({"model_type": "llama", **DIMENSIONS}).build(), Line(TEXT)
    drafter = WithLookup(MADE["medusa"](backbone, lambda *_: 1), prices=lambda rows, context: [1.0] * 16)
    drafter.reset([line])
    draft = drafter.draft([line])
    assert draft.tokens == [[7, 8, 9, 5, 6, 7]]
    asked = [([*TEXT, 8], SamplingParams(max_new_tokens=9, ignore_eos=True))]
    found = finish(decoder_of(backbone, drafter), asked)
    assert_same(found, plainly(backbone, asked))
    statistics = found[0].statistics
    assert statistics.drafted
    # plain steps are those with nothing to look up; and the last, which has room for no guess, if there was one
    assert statistics.plain_steps - statistics.suspended_steps in (0, 1)


# --- prompt lookup ------------------------------------------------------------------------------------------


def test_as_many_guesses_as_earn_the_most_tokens_for_their_price() -> None:
    values = [0.8, 0.6, 0.5, 0.1]
    assert most_paying(1, values, [1.0] * 5) == 4
    assert most_paying(1, values, [1.0, 1.1, 1.3, 1.7, 2.0]) == 2  # 1.8 / 1.1, 2.4 / 1.3, 2.9 / 1.7
    assert most_paying(1, values, [1.0, 2.0, 3.0, 4.0, 5.0]) == 0
    assert most_paying(4, values, [1.0, 1.1, 1.3, 1.7, 2.0]) == 1  # of four rows: 4.8 / 1.1, 5.4 / 1.3
    assert most_paying(1, [], [1.0]) == 0


@pytest.mark.parametrize(
    ("relative", "guesses"), [((1, 1.1, 1.2, 1.3), 5), ((1, 1.8, 2.9, 4.2), 3), ((1, 4.0, 8.0, 16.0), 0)]
)
def test_lookup_guesses_what_pays_here(
    cache: Path, monkeypatch: pytest.MonkeyPatch, relative: Sequence[float], guesses: int
) -> None:
    seconds = dict(zip((1, 4, 8, 16), relative, strict=True))
    monkeypatch.setattr("foretell.backbone.step_costs._step_seconds", lambda b, c, size, *_: seconds[size])
    monkeypatch.setattr("foretell.backbone.step_costs.FIRST_SECONDS", 1e9)
    backbone, line = Model({"model_type": "llama", **DIMENSIONS}).build(), Line(TEXT)
    backbone.costs = cache / "costs.json"
    lookup = drafters.build("prompt_lookup", backbone)
    lookup.reset([line])
    draft = lookup.draft([line])
    assert draft.tokens == [[7, 8, 9, 5, 6, 7][: guesses + 1]]
    assert draft.probabilities == [[1.0, 0.63, 0.78, 0.84, 0.88, 0.9][: guesses + 1]]
    given = drafters.build("prompt_lookup", backbone, nodes=6)  # who says how many gets as many
    given.reset([line])
    assert given.draft([line]).tokens == [[7, 8, 9, 5, 6, 7]]


def test_a_larger_batch_pays_for_fewer_guesses(cache: Path) -> None:
    backbone = Model({"model_type": "llama", **DIMENSIONS}).build()
    backbone.costs = cache / "costs.json"
    StepCosts({1: {256: {1: 1.0, 4: 1.1, 8: 1.2, 16: 2.4}}}).save(backbone.costs)
    lookup = PromptLookup(prices=prices_of(backbone))
    lines = [Line(TEXT, slot=slot) for slot in range(8)]
    lookup.reset(lines)
    drafted = [len(lookup.draft(lines[:rows]).tokens[0]) - 1 for rows in (1, 2, 8)]
    assert drafted == sorted(drafted, reverse=True)
    assert drafted[0] == 5
    assert drafted[-1] == 0


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4), st.lists(st.floats(0, 1), max_size=12), st.lists(st.floats(0.01, 2), min_size=12, max_size=12)
)
def test_no_guess_below_the_least_that_pays_is_ever_kept(rows: int, values: list[float], steps: list[float]) -> None:
    prices, values = list(accumulate(steps, initial=1.0)), sorted(values, reverse=True)
    kept = most_paying(rows, values, prices)
    assert all(value >= least_paying(rows, tuple(prices)) * (1 - 1e-9) for value in values[:kept])


def test_a_row_that_repeats_itself_has_the_guesses_of_those_that_do_not() -> None:
    def drafted(*texts: Sequence[int]) -> list[int]:
        lookup = PromptLookup(prices=lambda rows, context: [1.0] * 6 + [9.0] * 60)
        lines = [Line(list(text), slot=slot) for slot, text in enumerate(texts)]
        lookup.reset(lines)
        return [len(tokens) - 1 for tokens in lookup.draft(lines).tokens]

    silent = range(30, 42)
    assert drafted(TEXT, TEXT, TEXT, TEXT) == [2, 1, 1, 1]
    assert drafted(silent, TEXT, silent, silent) == [0, 5, 0, 0]


def test_a_row_that_copies_at_length_is_guessed_however_dear_guesses_are() -> None:
    """Matches longer than any n-gram that is looked up are surer than those: 0.96 a guess."""
    lookup, line = PromptLookup(prices=lambda rows, context: [1 + 0.9 * n for n in range(16)]), Line([*range(20)] * 2)
    lookup.reset([line])
    assert 0.84 < least_paying(1, tuple(lookup.prices(1, 40))) < 0.96
    assert lookup.draft([line]).tokens[0][:2] == [19, 0]
    short = Line([*range(20), *range(40, 50), *range(16, 20)])  # four tokens match
    lookup.reset([short])
    assert lookup.draft([short]).tokens == [[19]]


def test_a_merged_tree_is_as_large_as_what_pays_of_either() -> None:
    def merged(inner: Drafter, prices: Any) -> list[int]:
        drafter, line = WithLookup(inner, prices=prices), Line(TEXT)
        drafter.reset([line])
        return drafter.draft([line]).tokens[0]

    unsure = Says(chain(2), [7, 1, 2], [1.0, 0.3, 0.3])
    assert merged(unsure, None) == [7, 8, 9]  # the tree keeps its size
    assert merged(unsure, lambda rows, context: [1.0] * 16) == [7, 8, 9, 5, 6, 7]
    assert merged(unsure, lambda rows, context: [1.0, 1.1, 1.2, 9, 9, 9]) == [7, 8, 9]
    assert merged(unsure, lambda rows, context: [1.0, 9, 9, 9, 9, 9]) == [7, 1, 2]
    silent = Says(chain(2), [7, 1, 2], None)
    assert merged(silent, lambda rows, context: [1.0] * 16) == [7, 1, 8]


# --- in words -----------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(cache: Path) -> Backbone:
    made = Model({"model_type": "llama", **DIMENSIONS}).build()
    made.costs = cache / "costs.json"
    return made


def test_what_was_held_back_is_said_with_the_remedy(backbone: Backbone) -> None:
    assert held_back(Statistics(steps=35), backbone) == ""
    said = held_back(Statistics(steps=35, suspended_steps=28), backbone)
    assert said.startswith("Speculation was held back in 28 of 35 steps, where it does not pay on this machine; ")
    assert "`foretell tune`" in said
    assert backbone.costs is not None
    for first in (True, False):
        StepCosts({1: {1: {1: 1.0}}}, first=first).save(backbone.costs)
        assert ("`foretell tune`" in held_back(Statistics(steps=35, suspended_steps=28), backbone)) == first


@pytest.mark.parametrize(
    ("speed", "sums", "said"),
    [
        (1.3, Statistics(steps=9, drafted=9), ""),
        (0.999, Statistics(steps=9, drafted=9), ""),  # it shows as 1.00
        (1.3, Statistics(steps=9, drafted=9, suspended_steps=4), "held back in 4 of 9 steps"),
        (0.9, Statistics(steps=9, drafted=9, suspended_steps=4), "0.90 times .* taken instead in 4 of 9 steps"),
        (0.9, Statistics(steps=9, drafted=9), "0.90 times .* too short, or the loss too small"),
        (0.9, Statistics(steps=9), "0.90 times .* nothing was guessed"),
    ],
)
def test_a_loss_is_always_said(backbone: Backbone, speed: float, sums: Statistics, said: str) -> None:
    found = verdict(speed, sums, backbone)
    assert re.search(said, found)
    assert bool(found) == bool(said)
    assert "\n" not in found


def test_the_command_line_says_that_it_does_not_pay(
    foretell: Foretell, tiny: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-m", tiny, "-n", "9", "--dtype", "fp32", "-d", "prompt_lookup")
    assert "held back" not in foretell("generate", "hello", "--stats", *options, "--no-adapt").err

    def stop(governor: Governor, rows: int) -> bool:
        governor.suspended = True
        return False

    monkeypatch.setattr(Governor, "speculate", stop)
    for arguments in (("generate", "hello", "--stats"), ("chat",)):
        said = foretell(*arguments, *options, "--ignore-eos", stdin=b"hello\n/stats\n").err.splitlines()
        assert said[-1].startswith("Speculation was held back in 9 of 9 steps")
    for speed, sentence in (
        (
            0.5,
            r"does not pay for this answer on this machine \(0\.50 times .*taken instead in 9 of 9 steps.*\.\n\nNext:",
        ),
        (1.5, r"was held back in 9 of 9 steps.*\.\n\nNext:"),
    ):
        monkeypatch.setattr(_Side, "rate", property(lambda side, s=speed: 1.0 if side.name == "plain" else s))
        ran = foretell("demo", "hello", *options)
        assert ran.code == 0
        assert re.search(sentence, ran.out)
