"""Speculation goes on where it pays, stops where it loses and is tried again; no decision shows in the tokens."""

from typing import Any

import pytest
from decoding import answers, assert_same, decoder_of, finish, plainly
from random_backbones import Model
from tiny_models import DIMENSIONS
from toy_drafters import Checker, RandomTrees

from foretell.contracts import Draft
from foretell.drafters.plain import Plain
from foretell.engine.governor import BASELINE, IMPATIENCE, MARGIN, PATIENCE, TRIAL, Governor
from foretell.requests import SamplingParams


def play(governor: Governor, steps: int, speculative: tuple[float, int], plain: tuple[float, int]) -> list[bool]:
    """Steps of a made-up machine: (seconds, tokens) of each kind; returns which steps speculated."""
    chosen = []
    for _ in range(steps):
        chosen.append(governor.speculate(1, 100))
        seconds, tokens = speculative if chosen[-1] else plain
        governor.record(1, 100, 5 if chosen[-1] else 0, seconds, tokens)
    return chosen


def test_the_governor_speculates_while_that_wins_and_stops_where_it_loses() -> None:
    winning = play(Governor(), 1000, (2.0, 3), (1.0, 1))
    assert winning == [False] * BASELINE + [True] * (1000 - BASELINE)
    losing = play(Governor(), 1000, (2.0, 1), (1.0, 1))  # a clear case: a third of a trial is enough
    expected, holds = [False] * BASELINE, IMPATIENCE
    while len(expected) < 1000:  # a short trial must not decide for long; one that is confirmed may
        expected += [True] * (TRIAL // 3) + [False] * holds
        holds = min(PATIENCE, 2 * holds)
    assert losing == expected[:1000]
    near = play(Governor(), 1000, (1.0, 1), (MARGIN + 0.01, 1))  # a hair slower is no reason to stop
    assert sum(near) == 1000 - BASELINE
    unclear = play(Governor(), 1000, (1.0, 8), (1.0, 9))  # a tenth slower: judged after a whole trial
    assert unclear[: BASELINE + TRIAL + 1] == [False] * BASELINE + [True] * TRIAL + [False]


def test_the_governor_comes_back_when_speculation_wins_again() -> None:
    governor = Governor()
    play(governor, BASELINE + TRIAL // 3 + IMPATIENCE, (2.0, 1), (1.0, 1))
    assert all(play(governor, TRIAL, (1.0, 3), (1.0, 1)))
    assert all(play(governor, 500, (1.0, 3), (1.0, 1)))


def test_the_governor_judges_each_kind_of_batch_by_itself_and_can_be_switched_off() -> None:
    governor = Governor()
    play(governor, 100, (2.0, 1), (1.0, 1))
    assert not governor.speculate(1, 100)
    assert governor.suspended
    for rows, context in ((8, 100), (1, 5000)):
        for _ in range(BASELINE):
            assert not governor.speculate(rows, context)
            assert not governor.suspended  # it measures
            governor.record(rows, context, 0, 1.0, 1)
        assert governor.speculate(rows, context)
    off = Governor(enabled=False)
    assert all(play(off, 200, (2.0, 1), (1.0, 1)))


def test_one_slow_step_decides_nothing() -> None:
    governor = Governor()
    play(governor, BASELINE + TRIAL // 2, (1.0, 3), (1.0, 1))
    play(governor, 1, (1000.0, 3), (1.0, 1))
    assert all(play(governor, TRIAL // 2 - 1, (1.0, 3), (1.0, 1)))
    assert all(play(governor, 300, (1.0, 3), (1.0, 1)))


def test_the_governor_never_changes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock.__setitem__(0, clock[0] + 1) or clock[0])
    monkeypatch.setattr("foretell.engine.governor.TRIAL", 4)
    monkeypatch.setattr("foretell.engine.governor.PATIENCE", 6)

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
