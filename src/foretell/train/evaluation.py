"""Held-out figures of a trained module: losses and accuracy, the best trees, and the calibration of its heads.

Legend: P positions, K heads, R guesses of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from foretell.drafting.learning.trainable import Trainable
from foretell.train.features import Batches
from foretell.trees.calibration import Floats, Scale, fit
from foretell.trees.search import ENDED, Ranks, nested, tree_tokens_per_step

SIZES = (4, 8, 12, 16, 24, 32, 48, 64)
"""Tree sizes whose tokens per step are reported."""
CANDIDATES = 128
"""Nodes of the tree of all paths that are kept: trees grown at every step choose among them."""
BATCH = 8
"""Conversations of a batch."""


@dataclass
class Report:
    """Held-out figures of a module.

    Attributes:
        loss: mean of each term.
        accuracy: per head, the share of positions whose token was among the head's best 1, 2, 3, 5, 10.
        paths: those that came true most often, most frequent first; any beginning is a tree.
        tokens_per_step: tree size -> tokens per step of fixed trees by replay.
        calibration: per head, as `trees.calibration` fits it.
        replayed: the conversations that no tree was searched on.
        fitted: see `Trainable.fitted`.
    """

    loss: dict[str, float]
    accuracy: list[dict[str, float]]
    paths: list[tuple[int, ...]]
    tokens_per_step: dict[int, float]
    calibration: list[Scale]
    replayed: list[int]
    fitted: dict[str, Any] = field(default_factory=dict)


def spread(indices: Sequence[int], most: int) -> list[int]:
    """At most so many conversations, evenly spread over those given, and so over all folders of data."""
    count = min(most, len(indices))
    return [indices[i * len(indices) // count] for i in range(count)]


@torch.no_grad()
def evaluate(
    module: Trainable, features: Batches, indices: Sequence[int], sizes: Sequence[int] = SIZES,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Report:  # fmt: skip
    """Measures a module on some conversations.

    Trees are searched, and heads calibrated, on every second conversation; the others measure the trees.

    Args:
        indices: the conversations, as `features` counts them.
        sizes: of the trees that are measured, root included.
        progress: called with the share that is done.
    """
    module.eval()
    loss: dict[str, float] = {}
    ranks: list[Ranks] = []
    log_probs: list[Floats] = []
    for begin in range(0, len(indices), BATCH):
        members = indices[begin : begin + BATCH]
        batch = features.batch(members).to(features.backbone.device)
        losses, guesses = module.measured(batch)
        for name, term in losses.items():
            loss[name] = loss.get(name, 0.0) + term.item() * len(members) / len(indices)
        for guessed in guesses:
            ranks.append(guessed.ranks_PK.numpy())
            log_probs.append(guessed.log_probs_PKR.numpy())
        progress((begin + len(members)) / len(indices))
    searched, measured = (slice(0, None, 2), slice(1, None, 2)) if len(ranks) > 1 else (slice(None), slice(None))
    paths = nested(ranks[searched], CANDIDATES)
    tokens_per_step = {
        size: round(tree_tokens_per_step(ranks[measured], paths[: size - 1]), 4)
        for size in sizes
        if size <= len(paths) + 1
    }
    calibration = fit(log_probs[searched], ranks[searched])
    fitted = module.fitted(ranks[searched], log_probs[searched], calibration)
    return Report(loss, _accuracy(ranks), paths, tokens_per_step, calibration, list(indices[measured]), fitted)


def _accuracy(ranks: Sequence[Ranks]) -> list[dict[str, float]]:
    """Per head: share of the tokens there were that are among its first 1, 2, 3, 5 and 10."""
    heads = [head[head != ENDED] for head in np.concatenate(ranks).T]
    return [
        {f"top{n}": round(float((head < n).mean()), 4) if len(head) else 0.0 for n in (1, 2, 3, 5, 10)}
        for head in heads
    ]
