"""Typical acceptance (Medusa, arXiv 2401.10774 §2.3.1): keep guesses that the target finds plausible enough.

A guess x passes if p(x) > min(ε, δ·exp(−H(p))), p being the target's distribution at its parent and H its entropy:
the less certain the target, the more is accepted. The longest accepted path wins, then the one of highest
probability. Lossy: the output need not follow the target's distribution, and reports say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foretell.contracts import Draft, Verdict
from foretell.errors import UsageError


@dataclass(frozen=True)
class Typical:
    """Thresholds; the published ones are ε = 0.09 and δ = 0.3 (about √ε), at temperature 0.7.

    Raises:
        UsageError: for a negative threshold or a temperature that is not positive.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and self.delta >= 0):
            raise UsageError(f"Typical thresholds must be at least 0, not ε={self.epsilon}, δ={self.delta}.")
        if not 0 < self.temperature <= 100:
            raise UsageError(f"Typical acceptance needs a temperature above 0 (at most 100), not {self.temperature}.")


def typical(draft: Draft, logits: Callable[[int], Tensor], rule: Typical) -> Verdict:
    """The longest path whose every guess passes, then the argmax after it.

    Args:
        logits: row -> logits of its nodes [N, V], processors applied.
    """
    paths, bonus = [], []
    for row, (tree, tokens) in enumerate(zip(draft.trees, draft.tokens, strict=True)):
        logits_NV = logits(row)
        log_p_NV = (logits_NV.float() / rule.temperature).log_softmax(-1)
        entropy_N = -(log_p_NV.exp() * log_p_NV.clamp(min=-1e9)).sum(-1)
        threshold_N = (rule.delta * (-entropy_N).exp()).clamp(max=rule.epsilon)
        best, scores = (0, 0.0, 0), [0.0] * len(tree)
        for node, parent in enumerate(tree.parents[1:], start=1):
            log_p = float(log_p_NV[parent, tokens[node]])
            passed = scores[parent] > -math.inf and math.exp(log_p) > float(threshold_N[parent])
            scores[node] = scores[parent] + log_p if passed else -math.inf
            if passed:
                best = max(best, (tree.depths[node], scores[node], -node))
        paths.append(tree.path(-best[2]))
        bonus.append(int(torch.argmax(logits_NV[-best[2]])))
    return Verdict(paths, bonus)
