"""How far heads can be believed: what they call probable, held against how often it came true.

Heads overrate themselves, the later ones most: their probabilities leave out the tokens beyond a draft vocabulary, and
what is sure of its own text is less sure of others. One temperature and one bias of the log-odds for each head (Platt
scaling) mend both, so that paths of different lengths, and guesses of prompt lookup, can be compared.

A head's guesses matter only behind a path that came true: only such positions are counted.

Legend: P positions, K heads, R guesses, N guesses of all positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foretell.trees.search import ENDED, Ranks

Floats = NDArray[np.floating]
Scale = tuple[float, float]
"""Inverse temperature and bias of a head's log-odds; (1, 0) leaves them as they are."""

FLATTEST = 0.05
"""Least slope."""
STEPS = 30
PULL = 1.0
"""Weight, in guesses, of what was believed before: a head that never guessed stays as it is."""


def calibrated(log_probs: Floats, scale: Scale) -> Floats:
    """Log-probabilities as they should have been said; the order stays."""
    slope, bias = scale
    return -np.logaddexp(0.0, -(slope * _log_odds(log_probs) + bias))


def _log_odds(log_probs: Floats) -> Floats:
    log_probs = np.fmin(np.fmax(log_probs, -50.0), -1e-6)  # what is no number counts as hopeless
    return log_probs - np.log(-np.expm1(log_probs))


def fit(log_probs: Sequence[Floats], ranks: Sequence[Ranks]) -> list[Scale]:
    """One scale per head.

    Args:
        said: per text [P, K, R], log-probabilities of each head's first guesses, best first.
        ranks: per text [P, K] as in `trees.search`: where what came stood among them.
    """
    log_probs_PKR, ranks_PK = np.concatenate(list(log_probs)), np.concatenate(list(ranks))
    count = log_probs_PKR.shape[2]
    scales: list[Scale] = []
    reached_P = np.ones(len(ranks_PK), dtype=bool)
    for k in range(ranks_PK.shape[1]):
        there_P = reached_P & (ranks_PK[:, k] != ENDED)
        came_true = (ranks_PK[there_P, k, None] == np.arange(count)).ravel()
        odds = _log_odds(log_probs_PKR[there_P, k]).ravel()
        slope, bias = _logistic(odds, came_true)
        if slope < FLATTEST:  # a head's own order is kept
            slope, bias = FLATTEST, _logistic(FLATTEST * odds, came_true, only_bias=True)[1]
        scales.append((slope, bias))
        reached_P &= ranks_PK[:, k] < count
    return scales


def _logistic(odds_N: Floats, came_true_N: NDArray[np.bool_], only_bias: bool = False) -> Scale:
    """Slope (or 1) and bias that make what came true most probable, by Newton's method; held near (1, 0)."""
    read_N2 = np.stack([odds_N.astype(np.float64), np.ones(len(odds_N))], 1)
    start = np.array([1.0, 0.0])
    scale = start.copy()
    for _ in range(STEPS):
        p_N = 1 / (1 + np.exp(-np.clip(read_N2 @ scale, -60, 60)))
        gradient = read_N2.T @ (p_N - came_true_N) + PULL * (scale - start)
        hessian = (read_N2 * (p_N * (1 - p_N))[:, None]).T @ read_N2 + PULL * np.eye(2)
        step = np.array([0.0, gradient[1] / hessian[1, 1]]) if only_bias else np.linalg.solve(hessian, gradient)
        scale = scale - step / max(1.0, float(np.abs(step).max()))  # far from the end, steps may be too long
    return float(scale[0]), float(scale[1])
