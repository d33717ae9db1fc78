"""Typical acceptance (Medusa, arXiv 2401.10774 §2.3.1): keep guesses that the target finds plausible enough.

A guess x passes if p(x) > min(ε, δ·exp(−H(p))), p being the target's distribution at its parent and H its entropy:
the less certain the target, the more is accepted. The longest accepted path wins, then the one of highest
probability. Lossy: the output need not follow the target's distribution, and reports say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foretell.contracts import Draft, Row, Verdict
from foretell.errors import UsageError
from foretell.verify.logit_edits import process
from foretell.verify.walk import DAMAGED

Array = npt.NDArray[np.float32]


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
        logits_NV = logits(row).detach().float().cpu().numpy()
        finite_N = np.isfinite(logits_NV.max(1))  # where no token is possible, or too possible, or nobody knows
        best, scores = (0, 0.0, 0), {0: 0.0}
        asked: dict[int, tuple[Array, float]] = {}
        for node, parent in enumerate(tree.parents[1:], start=1):
            if parent not in scores or not finite_N[parent]:
                continue
            if parent not in asked:
                asked[parent] = _plausible(logits_NV[parent], rule)
            log_p_V, least = asked[parent]
            log_p = float(log_p_V[tokens[node]])
            if math.exp(log_p) > least:
                scores[node] = scores[parent] + log_p
                best = max(best, (tree.depths[node], scores[node], -node))
        paths.append(tree.path(-best[2]))
        bonus.append(int(logits_NV[-best[2]].argmax()) if finite_N[-best[2]] else DAMAGED)
    return Verdict(paths, bonus)


def path_logits(draft: Draft, rows: Sequence[Row], logits_MV: Tensor, starts: Sequence[int]) -> Callable[[int], Tensor]:
    """Logits [N, V] of every node of a row, each edited with the history of its own path.

    Args:
        logits_MV: logits of all nodes, rows one after another; row b's root is at starts[b].
    """

    def of(i: int) -> Tensor:
        row, tree, ids = rows[i], draft.trees[i], draft.tokens[i]
        logits_NV = logits_MV[starts[i] : starts[i] + len(tree)]
        if not row.params.edits_logits:
            return logits_NV
        histories = [row.tokens + [ids[n] for n in tree.path(node)[1:]] for node in range(len(tree))]
        edited = [process(x, row.params, h, row.prompt_length) for x, h in zip(logits_NV, histories, strict=True)]
        return torch.stack(edited)

    return of


def _plausible(logits_V: Array, rule: Typical) -> tuple[Array, float]:
    """Log-probabilities, and the probability that a guess must exceed. NumPy, because it stays on this thread: a team
    of PyTorch's threads that was woken spins in the way of the next pass (see native.cpp)."""
    below_V = np.maximum((logits_V - logits_V.max()) / np.float32(rule.temperature), np.float32(-1e9))
    p_V = np.exp(below_V)
    total = float(p_V.sum(dtype=np.float64))
    entropy = math.log(total) - float((p_V * below_V).sum(dtype=np.float64)) / total
    return below_V - math.log(total), min(rule.epsilon, rule.delta * math.exp(-entropy))
