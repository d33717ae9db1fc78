"""Drafting with the lower layers, the final norm and the output head, and nothing else: what LayerSkip and DEL share.

Guesses may come out of a draft vocabulary, where training stored one; else the output matrix is copied in eight bits.

Legend: V (draft) vocabulary, F nodes that are asked, R guesses of a node, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import Draft, Drafter, Row
from foretell.drafting.checkpoint import Loaded, damage_named, find, shipped
from foretell.drafting.kernels import kernels_for
from foretell.drafting.lower_layers import MAX_TREE_NODES, EarlyExitTrees, check_exit, climbed
from foretell.drafting.protocols import LowerLayerDrafting
from foretell.drafting.tree_size import nothing
from foretell.trees.calibration import Floats

BEAM, WIDTH = 8, 10
"""Nodes of a level that are asked for more, and guesses that each of them makes."""
OVERHEAD = 0.04
"""What output matrix and calls add to a level, as a share of a step."""
LEARNT = "layerskip"
"""The method whose checkpoints say where a model has learnt to exit."""


class EarlyExitDrafter(Drafter):
    """A drafter that leaves the model at some layer; a method says at which.

    Args:
        ids_V: tokens to choose from, ascending; None for all.
        size: (rows, context) -> nodes of a tree, root included; 1 drafts nothing.
        chain: drafts are chains, as published.
        steps: γ, tokens of a chain and levels of a tree at most.
    """

    usual_cost = 0.5

    def __init__(
        self, backbone: Backbone, ids_V: Tensor | None, size: Callable[[int, int], int], chain: bool, steps: int
    ):
        self._backbone, self.size, self.chain, self.steps = backbone, size, chain, steps
        ids_V = torch.arange(backbone.config.vocab) if ids_V is None else ids_V.long()
        self._vocabulary_V = ids_V.numpy()
        self._head = kernels_for(backbone).heads([], [backbone.head_rows(ids_V)])
        self._width = 1 if chain else min(WIDTH, len(ids_V))
        self._climber = kernels_for(backbone).lower_layers(
            LowerLayerDrafting(self._head, self._width, self._vocabulary_V)
        )
        self._cache: KVCache | None = None

    @property
    def max_nodes(self) -> int:
        return MAX_TREE_NODES

    def bind(self, cache: KVCache) -> None:
        self._cache = cache

    def _drafted(self, rows: Sequence[Row], exit: int, thresholds: Sequence[float], taps: Sequence[int] = ()) -> Draft:
        assert self._cache is not None, "the engine binds its cache first"
        count, how = self.steps, dict[str, Any](thresholds=thresholds)
        if not self.chain:
            count = min(self.size(len(rows), max(len(row.tokens) for row in rows)), MAX_TREE_NODES) - 1
            if not count:
                return nothing(rows)
            least = 2 * (exit / self._backbone.config.layers + OVERHEAD)  # a step earns two tokens
            how = {"beam": BEAM, "least": least}
        if self._climber:
            return climbed(self._climber, self._cache, rows, exit, count, self.steps, taps=taps, **how)
        return EarlyExitTrees(self._backbone, self._cache, rows, taps).grow(
            exit, self._guesses, count, self.steps, **how
        )

    def _guesses(self, hidden_Fd: Tensor, nodes: Nodes) -> tuple[Floats, list[list[int]]]:
        log_probs_FR, best_FR = (each.cpu().numpy() for each in self._read_off(hidden_Fd, self._width))
        return log_probs_FR, self._vocabulary_V[best_FR].tolist()

    def _read_off(self, streams_Fd: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of what the output head reads off streams, best first, and their places among `ids_V`."""
        which = np.arange(len(streams_Fd))[:, None].tolist()
        log_probs_FKR, best_FKR = self._head.top(self._backbone.norm(streams_Fd), which, width)
        return log_probs_FKR[:, 0], best_FKR[:, 0]


def candidates(
    backbone: Backbone, checkpoint: str, any_backbone: bool, loaded: Loaded | None = None
) -> tuple[Tensor | None, dict[str, Any], dict[int, float]]:
    """Of a checkpoint, given or shipped: draft vocabulary, exits and tokens per step. Without one, nothing."""
    if not loaded and not checkpoint and LEARNT not in shipped(backbone):
        return None, {}, {}
    found, tensors = loaded or find(LEARNT, backbone, checkpoint, any_backbone)
    with damage_named(checkpoint or "The layerskip drafter that came with foretell"):
        exits = [check_exit(exit, backbone) for exit in (found.arch["exit"], *found.arch["exits"])]
        return tensors["vocabulary"], {"exit": exits[0], "exits": exits[1:]}, found.tokens_per_step
