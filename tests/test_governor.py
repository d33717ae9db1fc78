"""Speculation goes on where it pays, stops where it loses and is tried again; no decision shows in the tokens."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pytest
from decoding import answers, assert_same, decoder_of, finish, plainly
from random_backbones import Model
from scipy.optimize import brentq
from tiny_models import DIMENSIONS
from toy_drafters import Checker, RandomTrees

from foretell.contracts import Draft
from foretell.drafters.plain import Plain
from foretell.engine.governor import CLEAR_TRIAL, LONGEST, LONGEST_SHARED, PLAIN, SHORTEST, TRIAL, TRIAL_SHARE, Governor
from foretell.requests import SamplingParams


@dataclass
class Machine:
    """A made-up machine and text: seconds of a step of either kind, tokens a row of a speculative one.

    With `reading`, a draft reads what was committed since the last one: so many seconds for each of 40 steps at most.
    """

    plain: float
    speculative: float
    tokens: Callable[[], int]
    reading: float = 0.0
    seconds: float = 0.0
    emitted: int = 0
    unread: int = 0

    def run(self, governor: Governor, steps: int, rows: int = 1) -> list[bool]:
        """Returns which steps speculated."""
        chosen = []
        for _ in range(steps):
            speculates = governor.speculate(rows)
            seconds, tokens = (self.speculative, self.tokens() * rows) if speculates else (self.plain, rows)
            seconds += self.reading * min(self.unread, 40) if speculates else 0.0
            self.unread = 0 if speculates else self.unread + 1
            governor.record(rows, 5 if speculates else 0, seconds, tokens)
            self.seconds, self.emitted = self.seconds + seconds, self.emitted + tokens
            chosen.append(speculates)
        return chosen


def always(tokens: int) -> Callable[[], int]:
    return lambda: tokens


def varied(mean: float, seed: int) -> Callable[[], int]:
    """Tokens of a step of five guesses, each accepted by the same chance if all before it are: `mean` on average."""
    rng, chance = random.Random(seed), brentq(lambda p: sum(p**k for k in range(6)) - mean, 0.0, 1.0)
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
    pause = PLAIN + round(CLEAR_TRIAL * (2 - 1) / TRIAL_SHARE)
    trial = [True] * CLEAR_TRIAL
    expected = [False] * PLAIN + (trial + [False] * pause) * 5
    assert clear == expected[:1000]
    long = Machine(1.0, 9.0, always(1)).run(Governor(), 1100)
    assert long.count(True) == 2 * CLEAR_TRIAL, f"{LONGEST} steps at most"
    near = Machine(0.99, 1.0, always(1)).run(Governor(), 200)  # judged after a whole trial, and soon again
    pause = [False] * (PLAIN + SHORTEST)
    assert near[: PLAIN + TRIAL + len(pause) + 1] == [False] * PLAIN + [True] * TRIAL + pause + [True]


@pytest.mark.parametrize("cost", [1.1, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("mean", [1.3, 1.7, 2.0, 2.2, 2.6, 4.0])
def test_it_is_nearly_as_fast_as_the_better_of_both(cost: float, mean: float) -> None:
    rates = []
    for seed in range(10):
        machine = Machine(1.0, cost, varied(mean, seed))
        machine.run(Governor(), 3000)
        rates.append(machine.emitted / machine.seconds)
    best = max(1.0, mean / cost)
    assert fmean(rates) > (0.97 if best == 1 else 0.95 * best)


def test_what_a_drafter_reads_before_a_trial_is_part_of_its_price() -> None:
    machine = Machine(1.0, 1.05, always(1), reading=0.25)
    machine.run(Governor(), 5000)
    assert machine.emitted / machine.seconds > 0.96


@pytest.mark.parametrize("slower", [3.0, 1 / 3])
@pytest.mark.parametrize("after", [0, 4, 20, 50, 200])
def test_a_machine_that_becomes_slower_or_faster_deceives_nobody(slower: float, after: int) -> None:
    """Steps that are compared were taken one after the other."""
    for tokens, share in ((1, 0.8), (2, 0.85)):  # of the better way's speed, over the next 300 steps
        governor = Governor()
        Machine(1.0, 1.5, always(tokens)).run(governor, PLAIN + after)
        later = Machine(slower, 1.5 * slower, always(tokens))
        later.run(governor, 300)
        assert later.emitted / later.seconds * slower > share * max(1.0, tokens / 1.5)


@pytest.mark.parametrize("slower", [1.3, 1.5])
def test_cold_plain_steps_at_the_start_deceive_nobody_for_long(slower: float) -> None:
    """Before anything has run, caches are cold: speculation that costs more than it earns looks as if it paid."""
    governor = Governor()
    Machine(slower, 1.8, varied(1.4, 0)).run(governor, PLAIN)
    assert Machine(1.0, 1.8, varied(1.4, 1)).run(governor, 70).count(True) <= 2 * TRIAL


def test_a_machine_that_is_busy_now_and_then_deceives_nobody() -> None:
    governor, seconds, emitted = Governor(), 0.0, 0
    for turn in range(60):
        slower = 1.0 + 2 * (turn % 2)
        machine = Machine(slower, 1.5 * slower, always(2))
        machine.run(governor, 20)
        seconds, emitted = seconds + machine.seconds / slower, emitted + machine.emitted
    assert emitted / seconds > 0.9 * 2 / 1.5


def test_batches_of_a_size_that_comes_back_are_timed_anew() -> None:
    governor = Governor()
    Machine(20.0, 25.0, always(2)).run(governor, 100)
    Machine(1.0, 1.0, always(1)).run(governor, 50, rows=8)
    assert Machine(60.0, 75.0, always(2)).run(governor, 300).count(True) > 270  # at a long context
    for steps in range(1, 40):  # wherever it was left, in the midst of a verdict too
        governor = Governor()
        Machine(1.0, 3.0, always(1)).run(governor, steps)
        Machine(1.0, 1.0, always(1)).run(governor, 50, rows=8)
        assert Machine(1.0, 3.0, always(1)).run(governor, 300).count(True) < 3 * TRIAL


def test_the_governor_comes_back_when_speculation_wins_again() -> None:
    governor = Governor()
    Machine(1.0, 2.0, always(1)).run(governor, 300)
    assert Machine(1.0, 1.0, always(3)).run(governor, 600)[-50:].count(True) > 45
    governor = Governor()
    Machine(1.0, 2.0, always(1)).run(governor, 20_000)
    assert Machine(1.0, 2.0, always(3)).run(governor, 2000).count(True) > 1000, "after the pause of its last trial"


def test_the_governor_judges_each_size_of_batch_by_itself_and_can_be_switched_off() -> None:
    governor = Governor()
    Machine(1.0, 1.0, always(2)).run(governor, 100)
    for _ in range(PLAIN):
        assert not governor.speculate(8)
        assert not governor.suspended  # it measures
        governor.record(8, 0, 1.0, 8)
    assert governor.speculate(8)
    Machine(1.0, 2.0, always(1)).run(governor, 100, rows=8)
    assert not governor.speculate(8)
    assert governor.suspended
    assert Machine(1.0, 1.0, always(2)).run(governor, 100).count(True) > 90
    assert all(Machine(1.0, 2.0, always(1)).run(Governor(enabled=False), 200))


def test_a_batch_of_a_new_size_waits_with_the_one_before_it() -> None:
    """Rows that leave one by one do not make each size pay for a trial of its own."""
    governor = Governor()
    Machine(1.0, 2.0, always(1)).run(governor, 50, rows=8)
    for rows in (7, 3, 1):
        assert not any(Machine(1.0, 2.0, always(1)).run(governor, 40, rows=rows))
        assert governor.suspended
    assert Machine(1.0, 1.0, always(3)).run(governor, 1000).count(True) > 700, "it has its trial in the end"
    assert governor.speculate(7) is False, "which says nothing about the others"


def test_what_wins_in_a_smaller_batch_waits_not_long() -> None:
    governor = Governor()
    Machine(1.0, 20.0, always(1)).run(governor, 50, rows=8)
    assert not any(Machine(1.0, 20.0, always(1)).run(governor, LONGEST - 50, rows=8))
    assert governor.speculate(8) is False, f"it waits for {LONGEST} steps"
    governor = Governor()
    Machine(1.0, 20.0, always(1)).run(governor, 50, rows=8)
    chosen = Machine(1.0, 1.0, always(3)).run(governor, 1000)
    assert chosen.index(True) == LONGEST_SHARED


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
    governor, refused = Governor(), 0
    for step in range(2000):
        speculates = governor.speculate(1) and step % 4 == 0
        refused += not governor.speculate(1)
        governor.record(1, 5 if speculates else 0, 1.2 if speculates else 1.0, 3 if speculates else 1)
    assert refused == PLAIN
    for step in range(2000):
        speculates = governor.speculate(1) and step % 4 == 0
        governor.record(1, 5 if speculates else 0, 4.0 if speculates else 1.0, 1)
    assert governor.suspended


def test_a_clock_that_stands_still_decides_nothing() -> None:
    governor = Governor()
    assert all(Machine(0.0, 0.0, always(1)).run(governor, 100)[PLAIN:])


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
