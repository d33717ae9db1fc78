"""DEL: leave at the layer that pays best just now, and stop drafting when that layer becomes unsure.

Every so many steps the streams of what was committed are read off at every candidate exit: which token would each have
guessed, and how sure was it (shadow tokens). How often each was right, decayed, says how many tokens a layer it would
earn as the drafter:

    TPL(l, γ) = (1 + α + ... + α^γ) / (L + γ (l + c))

and the best exit drafts next. A chain ends where a guess is less sure than halfway between the mean confidences of
right and of wrong guesses at that exit. DEL, arXiv 2504.05598, §3.

Differences: candidates are a set of exits, their guesses come out of a draft vocabulary, and one step in `every` is
read (every layer over the whole vocabulary at every step costs a small model half a step), so that ω counts readings;
only committed positions count, which are those that the paper keeps; c, what output matrix and calls cost in layers,
is 0 in the paper; rows of a batch share the exit of the best sum; and prompts are read off before the first draft,
which is therefore made at an exit that is known to pay.

Legend: B rows, C candidate exits, S slots, T committed positions of all rows, d hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.backbone import Backbone, KVCache
from foretell.contracts import FINAL_NORM, Draft, Features, Row
from foretell.drafting.checkpoint import CheckpointOptions
from foretell.drafting.early_exit import OVERHEAD, EarlyExitDrafter, candidates
from foretell.drafting.lower_layers import MAX_TREE_NODES, check_exit
from foretell.drafting.options import option
from foretell.drafting.tree_size import DEFAULT_NODES, tree_size
from foretell.errors import UsageError
from foretell.trees.calibration import Floats

DECAY = 0.95
"""ω, of all counts at every reading."""
LONGEST = 18
"""Tokens of a chain at most: γ is 0 up to one less."""
EVERY = 4
"""Steps for which a reading of the exits holds, at most: one that knows too little is made anew at the next."""
CONTEXT = 32
"""Positions of a chunk of a prompt that are read off."""


def tokens_per_layer(
    alpha_C: Floats, exits_C: Sequence[int], layers: int, longest: int = LONGEST, cost: float = 0.0
) -> Floats:
    """TPL [..., C, γ]: tokens that a step earns for each layer that it runs, γ from 0.

    Args:
        alpha_C: how often guesses at the exits [C] are right, [..., C].
        cost: what a guess costs beside its layers, in layers.
    """
    gamma = np.arange(longest)
    tokens_per_step = (alpha_C[..., None] ** gamma).cumsum(
        -1
    )  # the sum, for (1 - α^(γ + 1)) / (1 - α) is nothing at α = 1
    return tokens_per_step / (layers + gamma * (np.asarray(exits_C)[:, None] + cost))


class Shadows:
    """What the exits would have guessed, row by row: decayed counts and confidences, on the backbone's device.

    They grow there; at each reading four numbers for each exit and row come over, and an exit is chosen.

    Args:
        exits: candidates, ascending.
    """

    def __init__(
        self, exits: Sequence[int], layers: int, device: torch.device, decay: float = DECAY, cost: float = 0.0
    ):
        self.exits, self.layers, self.decay, self.cost = list(exits), layers, decay, cost
        self._told_SC22 = torch.zeros(0, len(exits), 2, 2, device=device)  # right or wrong, count or sum of confidences

    def attached(self) -> Shadows:
        """Those of another engine's rows, of which nothing is known yet."""
        return Shadows(self.exits, self.layers, self._told_SC22.device, self.decay, self.cost)

    def forget(self, slots: Sequence[int]) -> None:
        self._reserve(max(slots))
        self._told_SC22[list(slots)] = 0.0

    def told(self, slots_T: Sequence[int], right_TC: Tensor, sure_TC: Tensor) -> None:
        """What the exits guessed at newly committed positions, of the rows of these slots, and how sure they were."""
        self._reserve(max(slots_T))
        device, slots = right_TC.device, list(dict.fromkeys(slots_T))
        both_TC2 = torch.stack([right_TC, ~right_TC], -1)
        each_TC22 = both_TC2[..., None] * torch.stack([torch.ones_like(sure_TC), sure_TC], -1)[:, :, None]
        self._told_SC22[slots] *= self.decay
        self._told_SC22.index_add_(0, torch.tensor(slots_T, device=device), each_TC22)

    def alpha(self, slots: Sequence[int]) -> Floats:
        """How often each exit is right in each row, [B, C]; NaN where nothing is known."""
        return _right(self._of(slots))

    def choose(self, slots: Sequence[int]) -> tuple[int | None, list[float]]:
        """The exit that earns the rows most tokens a layer, and the confidences below which their chains end.

        Returns:
            Index of the exit, None where nothing is known; per row what lies halfway between the mean confidences of
            right and wrong guesses there, 0 where one kind has not been seen.
        """
        told_BC22 = self._of(slots)
        tpl_BCG = tokens_per_layer(_right(told_BC22), self.exits, self.layers, cost=self.cost)
        most_C = np.nansum(tpl_BCG.max(-1), 0)
        at = int(most_C.argmax())  # of equals the smallest exit
        with np.errstate(invalid="ignore"):
            halfway_B = (told_BC22[:, at, :, 1] / told_BC22[:, at, :, 0]).mean(-1)
        return at if most_C[at] > 0 else None, np.nan_to_num(halfway_B).tolist()

    def _of(self, slots: Sequence[int]) -> Floats:
        """The only transfer from the device."""
        self._reserve(max(slots))
        return self._told_SC22[list(slots)].double().cpu().numpy()

    def _reserve(self, slot: int) -> None:
        if missing := max(0, slot + 1 - len(self._told_SC22)):
            self._told_SC22 = F.pad(self._told_SC22, (0, 0) * 3 + (0, missing))


def _right(told_BC22: Floats) -> Floats:
    """Share of right guesses."""
    with np.errstate(invalid="ignore"):
        return told_BC22[..., 0, 0] / told_BC22[..., 0].sum(-1)


class DEL(EarlyExitDrafter):
    """Drafts at the exit that pays best.

    Args:
        exits: candidates.
        ids_V, size, chain, steps: see `EarlyExitDrafter`.
        every: steps between two readings of the exits.
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
            LONGEST, "How often the lower layers are run for a draft, at most.", low=0, high=MAX_TREE_NODES - 1
        )
        every: int = option(EVERY, "Steps between two readings of the exits; 1 as in the paper.", low=1, high=1 << 20)

    def __init__(
        self, backbone: Backbone, ids_V: Tensor | None, exits: Sequence[int], size: Callable[[int, int], int],
        chain: bool = True, steps: int = LONGEST, every: int = EVERY,
    ):  # fmt: skip
        super().__init__(backbone, ids_V, size, chain, steps)
        self.every, self._steps, self._sure = every, 0, False  # whether right and wrong guesses are known of every row
        self._chosen: dict[tuple[int, ...], tuple[int | None, list[float]]] = {}  # slots -> what the last reading says
        self.exits = sorted(check_exit(exit, backbone) for exit in exits or [backbone.config.layers])
        self.exit, self.depth = self.exits[0], self.exits[-1]
        self.taps = (*self.exits, FINAL_NORM)
        self._ids_V = torch.from_numpy(self._vocabulary_V).to(backbone.device)
        cost = OVERHEAD * backbone.config.layers
        self.shadows = Shadows(self.exits, backbone.config.layers, backbone.device, cost=cost)

    @classmethod
    def build(cls, backbone: Backbone, options: Options) -> DEL:
        """See `Drafter.build`."""
        layers, stride = backbone.config.layers, options.stride
        if stride > layers - 1:
            raise UsageError(f"stride is {stride}; it must lie between 1 and {layers - 1} for this model.")
        ids_V, arch, tokens_per_step = candidates(backbone, options.checkpoint, options.any_backbone)
        exits = arch.get("exits") if not stride else None
        stride = stride or max(1, layers // 10)
        nodes = options.nodes or (DEFAULT_NODES if options.chain else 0)  # chains have their steps
        size = tree_size(backbone, nodes, tokens_per_step, cls.method, cls.usual_cost, MAX_TREE_NODES)
        exits = exits or list(range(stride, layers, stride))
        return cls(backbone, ids_V, exits, size, options.chain, options.steps, options.every)

    def bind(self, cache: KVCache) -> None:
        super().bind(cache)
        self._chosen, self.shadows = {}, self.shadows.attached()

    def reset(self, rows: Sequence[Row]) -> None:
        self._chosen.clear()
        self.shadows.forget([row.slot for row in rows])

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        """Reads the new streams off at every exit: what the whole model says there tells who was right."""
        assert self._cache is not None, "the engine binds its cache first"
        reading = not features.paths  # a prompt is read
        self._steps += not reading
        if not reading and self._sure and self._steps % self.every:
            return
        self._chosen.clear()
        places, slots_T, came, at = list[int](), list[int](), list[int](), 0
        for row, count in zip(rows, features.counts, strict=True):
            those = range(max(0, count - CONTEXT), count)
            if not reading:
                begin = self._cache.lengths[row.slot] - count + 1
                came += row.tokens[begin : begin + count]
                those = range(min(count, len(row.tokens) - begin))  # an answer's end cuts what was accepted
            places += [at + each for each in those]
            slots_T += [row.slot] * len(those)
            at += count
        if not places:
            return
        places_T = torch.tensor(places, device=self._ids_V.device)
        streams_TCd = torch.stack([features.taps[exit].index_select(0, places_T) for exit in self.exits], 1)
        if reading:
            comes_T = self._backbone.argmax(features.taps[FINAL_NORM].index_select(0, places_T))
        else:
            comes_T = torch.tensor(came, device=streams_TCd.device)
        log_probs_F, best_F = (each.flatten() for each in self._read_off(streams_TCd.flatten(0, 1), 1))
        guessed_TC, sure_TC = (each.view(len(slots_T), -1) for each in (self._ids_V[best_F], log_probs_F.exp()))
        self.shadows.told(slots_T, guessed_TC == comes_T[:, None], sure_TC)

    def draft(self, rows: Sequence[Row]) -> Draft:
        slots = tuple(row.slot for row in rows)
        at, thresholds = self._chosen.get(slots) or self._chosen.setdefault(slots, self.shadows.choose(slots))
        self._sure = all(thresholds)
        if at is not None:
            self.exit = self.exits[at]
        return self._drafted(rows, self.exit, thresholds, [tap for tap in self.exits if tap < self.exit])
