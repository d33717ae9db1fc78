"""DEL: exit at the layer that recently paid best, and stop drafting when its confidence drops.

Every few steps the output head is applied to the committed streams after every candidate exit: which token would each
have guessed, and with which confidence (shadow tokens). The decayed share of right guesses of an exit gives its tokens
per layer as the drafter:

    TPL(l, γ) = (1 + α + ... + α^γ) / (L + γ (l + c))

and the best exit drafts next. A chain ends at a guess whose confidence is below the midpoint of the mean confidences of
right and of wrong guesses at that exit. DEL, arXiv 2504.05598, §3.

Differences: candidates are a set of exits, their guesses come from a draft vocabulary, and only one step in `every` is
evaluated (every layer over the whole vocabulary at every step costs a small model half a step), so that ω decays per
evaluation; only committed positions count, which are those that the paper keeps; c, the cost of output matrix and calls
in layers, is 0 in the paper; rows of a batch share the exit of the best sum; and prompts are evaluated before the first
draft, which is therefore made at an exit that is known to pay.

Legend: B rows, C candidate exits, S slots, T committed positions of all rows, d hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone import Backbone, KVCache
from foretell.contracts import FINAL_NORM, Draft, Features, Row
from foretell.drafting.checkpoint import CheckpointOptions
from foretell.drafting.early_exit import OVERHEAD, EarlyExitDrafter, trained_exits
from foretell.drafting.lower_layers import MAX_TREE_NODES, check_exit
from foretell.drafting.options import option
from foretell.drafting.tree_size import DEFAULT_NODES, TreeSize, tree_size
from foretell.errors import UsageError
from foretell.trees.calibration import Floats

DECAY = 0.95
"""ω, of all counts at every evaluation."""
MAX_CHAIN = 18
"""Most tokens of a chain: γ is 0 to one less."""
EVERY = 4
"""Most steps for which an evaluation of the exits holds; one with too few counts is repeated at the next step."""
CONTEXT = 32
"""Positions of a prompt's chunk that are evaluated."""


def tokens_per_layer(
    alpha_C: Floats, exits_C: Sequence[int], layers: int, max_chain: int = MAX_CHAIN, cost: float = 0.0
) -> Floats:
    """Returns TPL [..., C, γ]: tokens per step for each layer that the step runs, γ from 0.

    Args:
        alpha_C: share of right guesses at the exits, [..., C].
        cost: of a guess beside its layers, in layers.
    """
    gamma = np.arange(max_chain)
    tokens_per_step = (alpha_C[..., None] ** gamma).cumsum(
        -1
    )  # the sum, for (1 - α^(γ + 1)) / (1 - α) is nothing at α = 1
    return tokens_per_step / (layers + gamma * (np.asarray(exits_C)[:, None] + cost))


class ExitStatistics:
    """Decayed counts and confidences of the exits' guesses, row by row, on the backbone's device.

    At each evaluation four numbers for each exit and row are copied to the host, where an exit is chosen.

    Args:
        exits: candidates, ascending.
    """

    def __init__(
        self, exits: Sequence[int], layers: int, device: torch.device, decay: float = DECAY, cost: float = 0.0
    ):
        self.exits, self.layers, self.decay, self.cost = list(exits), layers, decay, cost
        self._counts_SC22 = torch.zeros(
            0, len(exits), 2, 2, device=device
        )  # right or wrong, count or sum of confidences

    def attached(self) -> ExitStatistics:
        """Empty statistics for another engine's rows."""
        return ExitStatistics(self.exits, self.layers, self._counts_SC22.device, self.decay, self.cost)

    def forget(self, slots: Sequence[int]) -> None:
        self._reserve(max(slots))
        self._counts_SC22[list(slots)] = 0.0

    def record(self, slots_T: Sequence[int], right_TC: Tensor, confidence_TC: Tensor) -> None:
        """Adds the exits' guesses at newly committed positions of the rows of these slots."""
        self._reserve(max(slots_T))
        device, slots = right_TC.device, list(dict.fromkeys(slots_T))
        both_TC2 = torch.stack([right_TC, ~right_TC], -1)
        new_TC22 = both_TC2[..., None] * torch.stack([torch.ones_like(confidence_TC), confidence_TC], -1)[:, :, None]
        self._counts_SC22[slots] *= self.decay
        self._counts_SC22.index_add_(0, torch.tensor(slots_T, device=device), new_TC22)

    def alpha(self, slots: Sequence[int]) -> Floats:
        """Share of right guesses of each exit in each row, [B, C]; NaN without counts."""
        return _right(self._of(slots))

    def choose(self, slots: Sequence[int]) -> tuple[int | None, list[float]]:
        """Chooses the exit with the most tokens per layer, and the confidences below which chains end.

        Returns:
            Index of the exit, None without counts; per row the midpoint of the mean confidences of right and of wrong
            guesses there, 0 if one kind has not been seen.
        """
        counts_BC22 = self._of(slots)
        tpl_BCG = tokens_per_layer(_right(counts_BC22), self.exits, self.layers, cost=self.cost)
        tpl_C = np.nansum(tpl_BCG.max(-1), 0)
        best = int(tpl_C.argmax())  # of equals the smallest exit
        with np.errstate(invalid="ignore"):
            halfway_B = (counts_BC22[:, best, :, 1] / counts_BC22[:, best, :, 0]).mean(-1)
        return best if tpl_C[best] > 0 else None, np.nan_to_num(halfway_B).tolist()

    def _of(self, slots: Sequence[int]) -> Floats:
        """The only transfer from the device."""
        self._reserve(max(slots))
        return self._counts_SC22[list(slots)].double().cpu().numpy()

    def _reserve(self, slot: int) -> None:
        if missing := max(0, slot + 1 - len(self._counts_SC22)):
            self._counts_SC22 = F.pad(self._counts_SC22, (0, 0) * 3 + (0, missing))


def _right(counts_BC22: Floats) -> Floats:
    """Share of right guesses."""
    with np.errstate(invalid="ignore"):
        return counts_BC22[..., 0, 0] / counts_BC22[..., 0].sum(-1)


class DEL(EarlyExitDrafter):
    """Drafts at the exit that pays best.

    Args:
        exits: candidates.
        ids_V, size, chain, steps: see `EarlyExitDrafter`.
        every: steps between two evaluations of the exits.
    """

    method = "del"

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        stride: int = option(
            0, "Every so many layers are candidates; by default those that learnt to exit, else every tenth part.",
            low=0,
        )  # fmt: skip
        chain: bool = option(True, "Draft chains, as in the paper; false grows trees.")
        steps: int = option(
            MAX_CHAIN, "How often the lower layers are run for a draft, at most.", low=0, high=MAX_TREE_NODES - 1
        )
        every: int = option(
            EVERY, "Steps between two evaluations of the exits; 1 as in the paper.", low=1, high=1 << 20
        )

    def __init__(
        self, backbone: Backbone, ids_V: Tensor | None, exits: Sequence[int], size: TreeSize,
        chain: bool = True, steps: int = MAX_CHAIN, every: int = EVERY,
    ):  # fmt: skip
        super().__init__(backbone, ids_V, size, chain, steps)
        self.every, self._steps, self._informed = every, 0, False  # whether every row has right and wrong guesses
        self._chosen: dict[
            tuple[int, ...], tuple[int | None, list[float]]
        ] = {}  # slots -> choice of the last evaluation
        self.exits = sorted(check_exit(exit, backbone) for exit in exits or [backbone.config.layers])
        self.exit, self.depth = self.exits[0], self.exits[-1]
        self.taps = (*self.exits, FINAL_NORM)
        self._ids_V = torch.from_numpy(self._vocabulary_V).to(backbone.device)
        cost = OVERHEAD * backbone.config.layers
        self.statistics = ExitStatistics(self.exits, backbone.config.layers, backbone.device, cost=cost)

    @classmethod
    def build(cls, backbone: Backbone, options: Options) -> DEL:
        """See `Drafter.build`."""
        layers, stride = backbone.config.layers, options.stride
        if stride > layers - 1:
            raise UsageError(f"stride is {stride}; it must lie between 1 and {layers - 1} for this model.")
        ids_V, arch, tokens_per_step = trained_exits(backbone, options.checkpoint, options.any_backbone)
        exits = arch.get("exits") if not stride else None
        stride = stride or max(1, layers // 10)
        nodes = options.nodes or (DEFAULT_NODES if options.chain else 0)  # chains have their steps
        size = tree_size(backbone, nodes, tokens_per_step, cls.method, cls.usual_cost, MAX_TREE_NODES)
        exits = exits or list(range(stride, layers, stride))
        return cls(backbone, ids_V, exits, size, options.chain, options.steps, options.every)

    def bind(self, cache: KVCache) -> None:
        super().bind(cache)
        self._chosen, self.statistics = {}, self.statistics.attached()

    def reset(self, rows: Sequence[Row]) -> None:
        self._chosen.clear()
        self.statistics.forget([row.slot for row in rows])

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        """Evaluates the exits at the new positions: the whole model's tokens tell which guesses were right."""
        assert self._cache is not None, "the engine binds its cache first"
        prefill = not features.paths
        self._steps += not prefill
        if not prefill and self._informed and self._steps % self.every:
            return
        self._chosen.clear()
        positions, slots_T, written, start = list[int](), list[int](), list[int](), 0
        for row, count in zip(rows, features.counts, strict=True):
            chosen = range(max(0, count - CONTEXT), count)
            if not prefill:
                begin = self._cache.lengths[row.slot] - count + 1
                written += row.tokens[begin : begin + count]
                chosen = range(min(count, len(row.tokens) - begin))  # an answer's end cuts the accepted tokens
            positions += [start + i for i in chosen]
            slots_T += [row.slot] * len(chosen)
            start += count
        if not positions:
            return
        positions_T = torch.tensor(positions, device=self._ids_V.device)
        streams_TCd = torch.stack([features.taps[exit].index_select(0, positions_T) for exit in self.exits], 1)
        if prefill:
            next_T = self._backbone.argmax(features.taps[FINAL_NORM].index_select(0, positions_T))
        else:
            next_T = torch.tensor(written, device=streams_TCd.device)
        log_probs_F, best_F = (found.flatten() for found in self._top(streams_TCd.flatten(0, 1), 1))
        guessed_TC, confidence_TC = (found.view(len(slots_T), -1) for found in (self._ids_V[best_F], log_probs_F.exp()))
        self.statistics.record(slots_T, guessed_TC == next_T[:, None], confidence_TC)

    def draft(self, rows: Sequence[Row]) -> Draft:
        slots = tuple(row.slot for row in rows)
        best, thresholds = self._chosen.get(slots) or self._chosen.setdefault(slots, self.statistics.choose(slots))
        self._informed = all(thresholds)
        if best is not None:
            self.exit = self.exits[best]
        return self._drafted(rows, self.exit, thresholds, [tap for tap in self.exits if tap < self.exit])
