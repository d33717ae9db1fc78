"""Speculation goes on where it pays, stops where it loses and is tried again; no decision shows in the tokens."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from decoding import answers, assert_same, decoder_of, finish, plainly
from random_backbones import Model
from scipy.optimize import brentq
from tiny_models import DIMENSIONS
from toy_drafters import Checker, RandomTrees

from foretell.contracts import Draft
from foretell.drafters.plain import Plain
from foretell.engine.governor import CLEAR_TRIAL, LONGEST, PLAIN, SHORTEST, TRIAL, Governor
from foretell.requests import SamplingParams


@dataclass
class Machine:
    """A made-up machine and text: seconds of a step of either kind, tokens a row of a speculative one."""

    plain: float
    speculative: float
    tokens: Callable[[], int]
    seconds: float = 0.0
    emitted: int = 0

    def run(self, governor: Governor, steps: int, rows: int = 1) -> list[bool]:
        """Returns which steps speculated."""
        chosen = []
        for _ in range(steps):
            speculates = governor.speculate(rows)
            seconds, tokens = (self.speculative, self.tokens() * rows) if speculates else (self.plain, rows)
            governor.record(rows, 5 if speculates else 0, seconds, tokens)
            self.seconds, self.emitted = self.seconds + seconds, self.emitted + tokens
            chosen.append(speculates)
        return chosen


def always(tokens: int) -> Callable[[], int]:
    return lambda: tokens


def varied(mean: float) -> Callable[[], int]:
    """Tokens of a step of five guesses, each accepted by the same chance if all before it are: `mean` on average."""
    rng, chance = random.Random(0), brentq(lambda p: sum(p**k for k in range(6)) - mean, 0.0, 1.0)
    return lambda: 1 + next((k for k in range(5) if rng.random() > chance), 5)


def test_the_governor_speculates_while_that_wins() -> None:
    governor, machine = Governor(), Machine(1.0, 2.0, always(3))
    chosen = machine.run(governor, 1000)
    assert chosen[:PLAIN] == [False] * PLAIN
    assert all(chosen[PLAIN : PLAIN + SHORTEST])
    assert chosen.count(False) < 40, "plain steps are timed again, rarely"
    assert not governor.suspended


def test_the_governor_stops_where_speculation_loses_and_tries_it_rarely() -> None:
    clear = Machine(1.0, 2.0, always(1)).run(Governor(), 1000)
    pause = CLEAR_TRIAL * (2 - 1) * 100  # a hundredth of the time
    trial = [True] * CLEAR_TRIAL
    expected = [False] * PLAIN + (trial + [False] * pause) * 3
    assert clear == expected[:1000]
    assert Machine(1.0, 9.0, always(1)).run(Governor(), 1100).count(True) == 2 * CLEAR_TRIAL, f"{LONGEST} steps at most"
    near = Machine(0.95, 1.0, always(1)).run(Governor(), 200)  # judged after a whole trial, and soon again
    assert near[: PLAIN + TRIAL + SHORTEST + 1] == [False] * PLAIN + [True] * TRIAL + [False] * SHORTEST + [True]


@pytest.mark.parametrize("cost", [1.1, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("mean", [1.3, 1.7, 2.0, 2.2, 2.6, 4.0])
def test_it_is_nearly_as_fast_as_the_better_of_both(cost: float, mean: float) -> None:
    machine = Machine(1.0, cost, varied(mean))
    machine.run(Governor(), 6000)
    best = max(1.0, mean / cost)
    assert machine.emitted / machine.seconds > (0.98 if best == 1 else 0.95 * best)


@pytest.mark.parametrize("faster", [0.5, 2.0])
def test_a_machine_that_becomes_faster_or_slower_deceives_nobody(faster: float) -> None:
    """Steps that are compared were taken one after the other."""
    for tokens, wins in ((1, False), (2, True)):
        governor = Governor()
        Machine(1.0, 1.5, always(tokens)).run(governor, PLAIN)
        later = Machine(1.0 / faster, 1.5 / faster, always(tokens))
        later.run(governor, 2000)
        assert later.run(governor, 1000).count(True) > 960 if wins else later.run(governor, 1000).count(True) < 60


def test_the_governor_comes_back_when_speculation_wins_again() -> None:
    governor = Governor()
    Machine(1.0, 2.0, always(1)).run(governor, 300)
    assert all(Machine(1.0, 1.0, always(3)).run(governor, 600)[-50:])


def test_the_governor_judges_each_size_of_batch_by_itself_and_can_be_switched_off() -> None:
    governor = Governor()
    Machine(1.0, 2.0, always(1)).run(governor, 100)
    assert not governor.speculate(1)
    assert governor.suspended
    for _ in range(PLAIN):
        assert not governor.speculate(8)
        assert not governor.suspended  # it measures
        governor.record(8, 0, 1.0, 8)
    assert governor.speculate(8)
    assert all(Machine(1.0, 2.0, always(1)).run(Governor(enabled=False), 200))


def test_one_slow_step_decides_nothing() -> None:
    for at in (0, PLAIN, PLAIN + 2, PLAIN + TRIAL - 1):
        governor, machine = Governor(), Machine(1.0, 2.0, always(3))
        machine.run(governor, at)
        Machine(1000.0, 1000.0, always(3)).run(governor, 1)
        assert not governor.suspended
        chosen = machine.run(governor, 100)
        assert chosen.count(False) <= 2 * PLAIN


def test_steps_without_guesses_are_plain_ones() -> None:
    """A drafter that rarely guesses has them timed without asking."""
    governor = Governor()
    for step in range(400):
        governor.speculate(1)
        governor.record(1, 0 if step % 4 else 5, 1.0 if step % 4 else 1.2, 1 if step % 4 else 3)
    assert not governor.suspended


def test_the_governor_never_changes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock.__setitem__(0, clock[0] + 1) or clock[0])
    monkeypatch.setattr("foretell.engine.governor.SHORTEST", 6)
    monkeypatch.setattr("foretell.engine.governor.LONGEST", 6)

    class Slow(RandomTrees):
        def draft(self, rows: Any) -> Draft:
            clock[0] += 100
            return super().draft(rows)

    backbone = Model({"model_type": "llama", **DIMENSIONS}).build()
    requests = [([3, 1, 4], SamplingParams(max_new_tokens=60, temperature=t, logprobs=1)) for t in (0.0, 1.0, 0.5)]
    truth = plainly(backbone, requests)
    drafter = Checker(Slow(64, answers=answers(requests, truth)), backbone)
    decoder = decoder_of(backbone, drafter, max_rows=2, adapt=True)
    outputs = finish(decoder, requests)
    assert_same(outputs, truth)
    assert sum(output.statistics.suspended_steps for output in outputs) > 10
    plain = finish(decoder_of(backbone, Plain(), adapt=True), requests)
    assert all(output.statistics.suspended_steps == 0 for output in plain)
