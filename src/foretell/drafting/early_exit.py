"""Drafting with the lower layers, the final norm and the output head alone, as LayerSkip and DEL do.

Guesses come from the draft vocabulary that training stored; without one, from the whole output matrix in eight bits.

Legend: V (draft) vocabulary, F frontier nodes, R guesses of a node, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import Draft, Drafter, Row
from foretell.drafting.checkpoint import Loaded, damage_named, find, shipped
from foretell.drafting.kernels import kernels_for
from foretell.drafting.lower_layers import MAX_TREE_NODES, EarlyExitTrees, check_exit, grow_in_one_call, guesses_of
from foretell.drafting.protocols import LowerLayerDrafting
from foretell.drafting.tree_size import TreeSize, no_guesses, size_for
from foretell.trees.calibration import Floats

BEAM, WIDTH = 8, 10
"""Nodes of a level that are expanded, at most, and guesses of each."""
OVERHEAD = 0.04
"""Cost of output matrix and calls in a level, as a share of a step."""
EXITS_OF = "layerskip"
"""The method whose checkpoints hold the exits that a model has learnt."""


class EarlyExitDrafter(Drafter):
    """A drafter that leaves the model at a layer that the method chooses.

    Args:
        ids_V: tokens to choose from, ascending; None for all.
        size: (rows, context) -> nodes of a tree, root included; 1 drafts nothing.
        chain: whether drafts are chains, as published.
        steps: γ, most tokens of a chain and levels of a tree.
    """

    usual_cost = 0.5

    def __init__(self, backbone: Backbone, ids_V: Tensor | None, size: TreeSize, chain: bool, steps: int):
        self._backbone, self.size, self.chain, self.steps = backbone, size, chain, steps
        ids_V = torch.arange(backbone.config.vocab) if ids_V is None else ids_V.long()
        self._vocabulary_V = ids_V.numpy()
        self._head = kernels_for(backbone).heads([], [backbone.head_rows(ids_V)])
        self._width = 1 if chain else min(WIDTH, len(ids_V))
        self._one_call = kernels_for(backbone).lower_layers(
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
            count = min(size_for(self.size, rows), MAX_TREE_NODES) - 1
            if not count:
                return no_guesses(rows)
            min_gain = 2 * (exit / self._backbone.config.layers + OVERHEAD)  # at two tokens per step
            how = {"beam": BEAM, "min_gain": min_gain}
        if self._one_call:
            return grow_in_one_call(self._one_call, self._cache, rows, exit, count, self.steps, taps=taps, **how)
        return EarlyExitTrees(self._backbone, self._cache, rows, taps).grow(
            exit, self._guesses, count, self.steps, **how
        )

    def _guesses(self, hidden_Fd: Tensor, nodes: Nodes) -> tuple[Floats, list[list[int]]]:
        return guesses_of(self._head, self._backbone.norm(hidden_Fd), self._width, self._vocabulary_V)

    def _top(self, streams_Fd: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The head's best guesses at streams: log-probabilities, best first, and their indices in `ids_V`."""
        which = np.arange(len(streams_Fd))[:, None].tolist()
        log_probs_FKR, best_FKR = self._head.top(self._backbone.norm(streams_Fd), which, width)
        return log_probs_FKR[:, 0], best_FKR[:, 0]


def trained_exits(
    backbone: Backbone, checkpoint: str, any_backbone: bool, loaded: Loaded | None = None
) -> tuple[Tensor | None, dict[str, Any], dict[int, float]]:
    """Returns draft vocabulary, exits and tokens per step of a checkpoint, given or shipped; empty without one."""
    if not loaded and not checkpoint and EXITS_OF not in shipped(backbone):
        return None, {}, {}
    found, tensors = loaded or find(EXITS_OF, backbone, checkpoint, any_backbone)
    with damage_named(checkpoint or "The layerskip drafter that ships with foretell"):
        exits = [check_exit(exit, backbone) for exit in (found.arch["exit"], *found.arch["exits"])]
        return tensors["vocabulary"], {"exit": exits[0], "exits": exits[1:]}, found.tokens_per_step
