"""Exact sampling with noise that belongs to a position.

A draw is a function of (seed, key, position) and of the target's distribution there, nothing else: plain
decoding and every speculative path that reaches the position with the same tokens draw the same token. One draw per
visited node is all that verification needs (arXiv 2401.10774 issue 56: sample and match); no ratio of two models.

Legend: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foretell.contracts import SamplingParams

_MASK = (1 << 64) - 1
_FEW = 1024
"""Most nucleus truncations keep fewer tokens than this: a partial sort is tried first."""


def uniform(seed: int, key: int, position: int) -> float:
    """A number in [0, 1) fixed by its three arguments (three rounds of SplitMix64)."""
    state = 0
    for word in (seed, key, position):
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The target distribution [V] float64 at temperature > 0: temperature, then top-k, top-p, min-p.

    Truncations keep every token tied with the last one kept, so that no sorting order matters.
    """
    logits_V = logits_V.double() / params.temperature
    weights_V = (logits_V - logits_V.max()).exp()
    if 0 < params.top_k < len(weights_V):
        weights_V = _keep_from(weights_V, weights_V.topk(params.top_k).values[-1])
    if params.top_p < 1:
        weights_V = _keep_from(weights_V, _nucleus_threshold(weights_V, params.top_p))
    if params.min_p > 0:
        weights_V = _keep_from(weights_V, params.min_p * weights_V.max())
    return weights_V / weights_V.sum()


def sample(logits_V: Tensor, params: SamplingParams, noise: float) -> int:
    """The token that `noise` in [0, 1) selects: the first whose cumulative probability exceeds it."""
    cumulative_V = distribution(logits_V, params).cumsum(0)
    token = int(torch.searchsorted(cumulative_V, noise * float(cumulative_V[-1]), right=True))
    return min(token, len(cumulative_V) - 1)


def _keep_from(weights_V: Tensor, least: Tensor) -> Tensor:
    return weights_V.where(weights_V >= least, 0.0)


def _nucleus_threshold(weights_V: Tensor, top_p: float) -> Tensor:
    """Weight of the last token in the smallest set that holds `top_p` of the whole."""
    goal = top_p * weights_V.sum()
    for count in (_FEW, len(weights_V)):
        top = weights_V.topk(min(count, len(weights_V))).values
        reached = top.cumsum(0) >= goal
        if reached.any():
            return top[reached.int().argmax()]
    return top[-1]
