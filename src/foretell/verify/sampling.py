"""Exact sampling with noise that belongs to a position.

A draw is a function of (seed, key, position) and of the target's distribution there, nothing else: plain
decoding and every speculative path that reaches the position with the same tokens draw the same token. Verification
needs one draw per node (sample and match; FasterDecoding/Medusa, issue 56), and no ratio of two models' probabilities.

Legend: V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foretell.requests import SamplingParams

Array = npt.NDArray[np.float64]
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
    weights_V = _weights(logits_V, params)
    return torch.from_numpy(weights_V / weights_V.sum())


def sample(logits_V: Tensor, params: SamplingParams, noise: float) -> int:
    """The token that `noise` in [0, 1) selects: the first whose cumulative probability exceeds it."""
    cumulative_V = _weights(logits_V, params).cumsum()
    token = int(np.searchsorted(cumulative_V, noise * cumulative_V[-1], side="right"))
    return min(token, len(cumulative_V) - 1)


def _weights(logits_V: Tensor, params: SamplingParams) -> Array:
    """The distribution, not yet divided by its sum. NumPy stays on this thread (see native.cpp)."""
    logits = logits_V.detach().cpu().numpy().astype(np.float64)
    with np.errstate(over="ignore"):  # at a tiny temperature all but the greatest become -inf
        weights_V = np.exp((logits - logits.max()) / params.temperature)
    if 0 < params.top_k < len(weights_V):
        weights_V = _keep_from(weights_V, np.partition(weights_V, -params.top_k)[-params.top_k])
    if params.top_p < 1:
        weights_V = _keep_from(weights_V, _nucleus_threshold(weights_V, params.top_p))
    if params.min_p > 0:
        weights_V = _keep_from(weights_V, params.min_p * weights_V.max())
    return weights_V


def _keep_from(weights_V: Array, threshold: float) -> Array:
    return np.where(weights_V >= threshold, weights_V, 0.0)


def _nucleus_threshold(weights_V: Array, top_p: float) -> float:
    """Weight of the least probable token in the smallest set that holds `top_p` of the total."""
    goal = top_p * weights_V.sum()
    for count in (min(_FEW, len(weights_V)), len(weights_V)):
        top = np.sort(np.partition(weights_V, -count)[-count:])[::-1]
        reached = top.cumsum() >= goal
        if reached.any():
            return float(top[reached.argmax()])
    return float(top[-1])
