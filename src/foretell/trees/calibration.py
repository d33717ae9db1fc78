"""Calibration of heads: their probabilities, corrected by how often their guesses came true.

Heads are overconfident, later ones most: their probabilities leave out the tokens outside a draft vocabulary, and they
are trained on other text than they draft. One slope and one bias of the log-odds for each head (Platt scaling) correct
both, so that paths of different lengths, and guesses of prompt lookup, can be compared.

A head's guesses matter only after a path that came true: only such positions are counted.

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

MIN_SLOPE = 0.05
"""Smallest slope."""
STEPS = 30
PULL = 1.0
"""Weight, in guesses, of the uncorrected probabilities: a head without guesses stays as it is."""


def calibrated(log_probs: Floats, scale: Scale) -> Floats:
    """Returns corrected log-probabilities, in the same order."""
    slope, bias = scale
    return -np.logaddexp(0.0, -(slope * _log_odds(log_probs) + bias))


def _log_odds(log_probs: Floats) -> Floats:
    log_probs = np.fmin(np.fmax(log_probs, -50.0), -1e-6)  # NaN counts as impossible
    return log_probs - np.log(-np.expm1(log_probs))


def fit(log_probs: Sequence[Floats], ranks: Sequence[Ranks]) -> list[Scale]:
    """Returns one scale per head.

    Args:
        log_probs: per text [P, K, R], of each head's first guesses, best first.
        ranks: per text [P, K] as in `trees.search`: rank of the true token among them.
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
        if slope < MIN_SLOPE:  # a head's own order is kept
            slope, bias = MIN_SLOPE, _logistic(MIN_SLOPE * odds, came_true, only_bias=True)[1]
        scales.append((slope, bias))
        reached_P &= ranks_PK[:, k] < count
    return scales


def _logistic(odds_N: Floats, came_true_N: NDArray[np.bool_], only_bias: bool = False) -> Scale:
    """Slope (or 1) and bias of the largest likelihood, by Newton's method; regularized towards (1, 0)."""
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
