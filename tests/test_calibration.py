"""How far heads are believed: scales that data was drawn with are found again, and what was not reached counts nothing.

Legend: P positions, R guesses.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.trees.calibration import Floats, Scale, calibrated, fit
from foretell.trees.search import ENDED, MISSED, Ranks

SAME = (1.0, 0.0)
kinds = pytest.mark.parametrize("kind", [np.float32, np.float64])


@kinds
def test_belief_keeps_the_order_of_a_heads_guesses(kind: Any) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.floats(0.05, 5), st.floats(-5, 5))
    def reusable_tokens(seed: int, slope: float, bias: float) -> None:
        log_probs_PR = -np.sort(np.random.default_rng(seed).exponential(3, (4, 10)), axis=1).astype(kind)
        found_PR = calibrated(log_probs_PR, (slope, bias))
        assert (found_PR.shape, found_PR.dtype) == (log_probs_PR.shape, kind)
        assert (found_PR <= 0).all()
        assert (np.diff(found_PR) <= 1e-3).all()  # rounding: of two alike either may come first
        apart_P = log_probs_PR[:, 0] - log_probs_PR[:, -1] > 0.5
        assert (found_PR[apart_P, 0] > found_PR[apart_P, -1]).all()

    reusable_tokens()


@kinds
def test_slope_one_and_bias_zero_leave_what_was_said(kind: Any) -> None:
    log_probs = np.array([0.0, -1e-8, -1e-6, -0.01, -0.7, -5.0, -30.0, -50.0, -60.0, -np.inf, np.nan], dtype=kind)
    left = np.clip(np.nan_to_num(log_probs, nan=-50.0), -50, -1e-6)  # nothing is certain, and nothing is impossible
    np.testing.assert_allclose(calibrated(log_probs, SAME), left, rtol=1e-4)
    p = np.exp(log_probs[3:8].astype(np.float64))
    np.testing.assert_allclose(calibrated(log_probs[3:8], (1.0, -1.0)), -np.log1p(np.e * (1 - p) / p), rtol=1e-4)


def drawn(rng: np.random.Generator, scale: Scale, positions: int) -> tuple[Floats, Ranks]:
    """What a head says [P, R], and the ranks [P] of what comes: as often as the scale has it."""
    logits = rng.normal(size=(positions, 40)) * 3
    p_PV = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p_PR = -np.sort(-p_PV, axis=1)[:, :10]
    slope, bias = scale
    true_PR = 1 / (1 + np.exp(-bias) * ((1 - p_PR) / p_PR) ** slope)
    assert (true_PR.sum(1) <= 1).all()
    ranks_P = (rng.random(positions)[:, None] > true_PR.cumsum(1)).sum(1)
    return np.log(p_PR), np.where(ranks_P == 10, MISSED, ranks_P)


def test_the_scales_that_came_true_are_found() -> None:
    rng, scales = np.random.default_rng(0), [(0.7, -1.0), (1.3, -0.5), (0.5, -1.5)]
    log_probs, ranks = zip(*(drawn(rng, scale, 20_000) for scale in scales), strict=True)
    log_probs_PKR, ranks_PK = np.stack(log_probs, 1), np.stack(ranks, 1)
    found = fit([log_probs_PKR[:500], log_probs_PKR[500:]], [ranks_PK[:500], ranks_PK[500:]])
    for (slope, bias), (true_slope, true_bias) in zip(found, scales, strict=True):
        assert slope == pytest.approx(true_slope, abs=0.05)
        assert bias == pytest.approx(true_bias, abs=0.15)


def test_only_what_was_reached_and_had_not_ended_is_counted() -> None:
    """The second head says 1/10 of each of ten guesses, and one of them comes; elsewhere it boasts in vain."""
    right, boast = np.full(10, np.log(0.1)), np.log([0.95, *[0.005] * 9])
    told: list[tuple[int, int, Floats]] = [
        *((i % 3, i % 10, right) for i in range(30)),  # reached
        *((MISSED, MISSED, boast) for _ in range(30)),  # behind a path that did not come true
        *((0, ENDED, boast) for _ in range(30)),  # nothing came any more
        *((ENDED, ENDED, boast) for _ in range(30)),
    ]
    ranks_PK = np.array([[first, second] for first, second, _ in told])
    log_probs_PKR = np.array([[boast, second] for *_, second in told])
    first, second = fit([log_probs_PKR], [ranks_PK])
    assert second == pytest.approx(SAME, abs=1e-6)
    assert first == pytest.approx(fit([log_probs_PKR[:90]], [ranks_PK[:90]])[0], abs=1e-9)
    assert first != pytest.approx(fit([log_probs_PKR[:60]], [ranks_PK[:60]])[0], abs=1e-3)
    seen = fit([log_probs_PKR], [np.where(ranks_PK == ENDED, MISSED, ranks_PK)])[1]
    assert seen != pytest.approx(SAME, abs=0.1)  # in vain indeed


def test_a_head_that_never_guessed_stays_as_it_is() -> None:
    log_probs_PKR = np.full((20, 3, 10), np.log(0.5))
    ranks_PK = np.tile([0, MISSED, 0], (20, 1))  # nobody comes to the third
    first, second, third = fit([log_probs_PKR], [ranks_PK])
    assert third == SAME
    assert SAME not in (first, second)
    assert fit([log_probs_PKR[:0]], [ranks_PK[:0]]) == [SAME] * 3
    assert fit([log_probs_PKR], [np.full((20, 3), ENDED)]) == [SAME] * 3


def test_a_head_that_is_always_mistaken_keeps_its_order() -> None:
    log_probs_PKR = np.tile(np.log([0.6, 0.3, 0.06, 0.01]), (200, 1, 1))
    ((slope, bias),) = fit([log_probs_PKR], [np.full((200, 1), 3)])
    assert slope == 0.05
    assert np.isfinite(bias)
    assert (np.diff(calibrated(log_probs_PKR[0, 0], (slope, bias))) < 0).all()
