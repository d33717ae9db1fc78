"""Typical acceptance (Medusa, arXiv 2401.10774 §2.3.1): keep guesses that the target finds plausible enough.

A guess x passes if p(x) > min(ε, δ·exp(−H(p))), p being the target's distribution at its parent and H its entropy:
the less certain the target, the more is accepted. The longest accepted path wins, then the one of highest
probability. Lossy: the output need not follow the target's distribution, and reports say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foretell.contracts import Draft, Row, Verdict
from foretell.errors import UsageError
from foretell.verify.logit_edits import process
from foretell.verify.target import DAMAGED

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Typical:
    """Thresholds; the published ones are ε = 0.09 and δ = 0.3 (about √ε), at temperature 0.7.

    Nothing is drawn, so a request's seed has no effect; another temperature than the rule's, and top-p, top-k and
    min-p, are refused. Penalties and biases act as in exact verification.

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


def typical(draft: Draft, logits: Sequence[Tensor], rule: Typical) -> Verdict:
    """Accepts the longest path whose every guess passes; the bonus is the argmax after it.

    Args:
        logits: of each row's nodes, [N, V], edits applied (see `path_logits`).
    """
    paths, bonus = [], []
    for tree, tokens, logits_of_row in zip(draft.trees, draft.tokens, logits, strict=True):
        logits_NV = logits_of_row.detach().float().cpu().numpy()
        finite_N = np.isfinite(logits_NV.max(1))  # no token is possible, or one infinitely probable, or a NaN
        best, scores = (0, 0.0, 0), {0: 0.0}
        plausible: dict[int, tuple[Array, float]] = {}
        for node, parent in enumerate(tree.parents[1:], start=1):
            if parent not in scores or not finite_N[parent]:
                continue
            if parent not in plausible:
                plausible[parent] = _plausible(logits_NV[parent], rule)
            log_p_V, threshold = plausible[parent]
            log_p = float(log_p_V[tokens[node]])
            if math.exp(log_p) > threshold:
                scores[node] = scores[parent] + log_p
                best = max(best, (tree.depths[node], scores[node], -node))
        paths.append(tree.path(-best[2]))
        bonus.append(int(logits_NV[-best[2]].argmax()) if finite_N[-best[2]] else DAMAGED)
    return Verdict(paths, bonus)


def path_logits(draft: Draft, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[Tensor]:
    """Edits the logits [N, V] of each row's nodes, every node with the history of its own path."""
    edited = []
    for tree, ids, row, logits_NV in zip(draft.trees, draft.tokens, rows, logits, strict=True):
        if row.params.edits_logits:
            histories = [row.tokens + [ids[n] for n in tree.path(node)[1:]] for node in range(len(tree))]
            pairs = zip(logits_NV, histories, strict=True)
            edited.append(torch.stack([process(x_V, row.params, history, row.prompt_length) for x_V, history in pairs]))
        else:
            edited.append(logits_NV)
    return edited


def _plausible(logits_V: Array, rule: Typical) -> tuple[Array, float]:
    """Log-probabilities [V], and the probability that a guess must exceed.

    NumPy stays on this thread: PyTorch's threads, once woken, spin in the way of the next pass (see native.cpp).
    """
    below_V = np.maximum((logits_V - logits_V.max()) / np.float32(rule.temperature), np.float32(-1e9))
    p_V = np.exp(below_V)
    total = float(p_V.sum(dtype=np.float64))
    entropy = math.log(total) - float((p_V * below_V).sum(dtype=np.float64)) / total
    return below_V - math.log(total), min(rule.epsilon, rule.delta * math.exp(-entropy))
