"""DEL: leave at the layer that pays best just now, and stop drafting when that layer becomes unsure.

After every step the streams of what was committed are read off at every candidate exit: which token would each have
guessed, and how sure was it (shadow tokens). How often each was right, decayed, says how many tokens a layer it would
earn as the drafter:

    TPL(l, γ) = (1 + α + ... + α^γ) / (L + γ (l + c))

and the best exit drafts next. A chain ends where a guess is less sure than halfway between the mean confidences of
right and of wrong guesses at that exit. DEL, arXiv 2504.05598, §3.

Differences: candidates are a set of exits and their guesses come out of a draft vocabulary (every layer over the whole
vocabulary costs a small model more than a step); only committed positions count, which are those that the paper keeps;
c, what output matrix and calls cost in layers, is 0 in the paper; rows of a batch share the exit of the best sum; and
prompts are read off before the first draft, which is therefore made at an exit that is known to pay.

Legend: B rows, C candidate exits, T committed positions, d hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache
from foretell.contracts import FINAL, Draft, Features, Row
from foretell.drafters.exiting import OVERHEAD, Exiting, candidates
from foretell.drafters.lower import MOST
from foretell.drafters.parts import check_exit, tree_size
from foretell.errors import check_numbers

DECAY = 0.95
"""ω, of all counts at every step."""
LONGEST = 18
"""Tokens of a chain at most: γ is 0 up to one less."""
CONTEXT = 32
"""Positions of a chunk of a prompt that are read off."""


def tokens_per_layer(
    alpha_C: Tensor, exits_C: Tensor, layers: int, longest: int = LONGEST, cost: float = 0.0
) -> Tensor:
    """TPL [..., C, γ]: tokens that a step earns for each layer that it runs, γ from 0.

    Args:
        alpha_C: how often guesses at the exits [C] are right, [..., C].
        cost: what a guess costs beside its layers, in layers.
    """
    gamma = torch.arange(longest, device=alpha_C.device)
    earned = (alpha_C[..., None] ** gamma).cumsum(-1)  # the sum, for (1 - α^(γ + 1)) / (1 - α) is nothing at α = 1
    return earned / (layers + gamma * (exits_C[:, None] + cost))


class Shadows:
    """What the exits would have guessed, row by row: decayed counts and confidences, on the backbone's device.

    Args:
        exits: candidates, ascending.
    """

    def __init__(
        self, exits: Sequence[int], layers: int, device: torch.device, decay: float = DECAY, cost: float = 0.0
    ):
        self.exits, self.layers, self.decay, self.cost = list(exits), layers, decay, cost
        self.exits_C = torch.tensor(self.exits, device=device)
        self._rows: dict[int, Tensor] = {}  # slot -> [C, right or wrong, count or sum of confidences]

    def forget(self, slot: int) -> None:
        self._rows.pop(slot, None)

    def told(self, slot: int, right_CT: Tensor, confidence_CT: Tensor) -> None:
        """What the exits guessed at newly committed positions, and how sure they were."""
        each_C2T = torch.stack([right_CT, ~right_CT], 1).float()
        new_C22 = torch.stack([each_C2T.sum(-1), (each_C2T * confidence_CT[:, None]).sum(-1)], -1)
        old = self._rows.get(slot)
        self._rows[slot] = new_C22 if old is None else self.decay * old + new_C22

    def alpha(self, slots: Sequence[int]) -> Tensor:
        """How often each exit is right in each row, [B, C]; NaN where nothing is known."""
        return _right(self._of(slots))

    def choose(self, slots: Sequence[int]) -> tuple[int | None, list[float]]:
        """The exit that earns the rows most tokens a layer, and the confidences below which their chains end.

        The only transfer from the device in a round.

        Returns:
            Index of the exit, None where nothing is known; per row what lies halfway between the mean confidences of
            right and wrong guesses there, 0 where one kind has not been seen.
        """
        told_BC22 = self._of(slots)
        tpl_BCG = tokens_per_layer(_right(told_BC22), self.exits_C, self.layers, cost=self.cost)
        most, at = tpl_BCG.amax(-1).nansum(0).max(0)  # of equals the smallest exit
        counts_B2, sums_B2 = told_BC22.index_select(1, at[None])[:, 0].unbind(-1)
        halfway_B = (sums_B2 / counts_B2).mean(-1).nan_to_num(0.0)
        known, chosen, *thresholds = torch.cat([most[None], at[None].float(), halfway_B]).tolist()
        return int(chosen) if known > 0 else None, thresholds

    def _of(self, slots: Sequence[int]) -> Tensor:
        unknown = torch.full((len(self.exits), 2, 2), torch.nan, device=self.exits_C.device)
        return torch.stack([self._rows.get(slot, unknown) for slot in slots])


def _right(told_BC22: Tensor) -> Tensor:
    """Share of right guesses."""
    return told_BC22[..., 0, 0] / told_BC22[..., 0].sum(-1)


class DEL(Exiting):
    """Drafts at the exit that pays best.

    Args:
        exits: candidates.
        ids_V, size, chain, steps: see `Exiting`.
    """

    method = "del"

    def __init__(
        self, backbone: Backbone, ids_V: Tensor | None, exits: Sequence[int], size: Callable[[int, int], int],
        chain: bool = True, steps: int = LONGEST,
    ):  # fmt: skip
        super().__init__(backbone, ids_V, size, chain, steps)
        self.exits = sorted(check_exit(exit, backbone) for exit in exits or [backbone.config.layers])
        self.exit, self.depth = self.exits[0], self.exits[-1]
        self.taps = (*self.exits, FINAL)
        self._ids_V = torch.from_numpy(self._vocabulary_V).to(backbone.device)
        cost = OVERHEAD * backbone.config.layers
        self.shadows = Shadows(self.exits, backbone.config.layers, backbone.device, cost=cost)

    @classmethod
    def build(
        cls, backbone: Backbone, checkpoint: str = "", stride: int = 0, nodes: int = 0, chain: bool = True,
        steps: int = LONGEST, any_backbone: bool = False,
    ) -> DEL:  # fmt: skip
        """See `Drafter.build`.

        Args:
            checkpoint: folder that `foretell train layerskip` wrote: its draft vocabulary and exits; by default those
                that came with foretell for this backbone, else the whole vocabulary.
            stride: every so many layers are candidates; by default those that learnt to exit, else every tenth part.
            nodes: size of trees; by default what `foretell tune` found best here, else 16.
            chain: draft chains, as in the paper; false grows trees.
            steps: how often the lower layers are run for a draft, at most.
            any_backbone: accept a checkpoint of another model of the same sizes.
        """
        layers = backbone.config.layers
        options = SimpleNamespace(stride=stride, steps=steps)
        check_numbers(options, [("stride", 0, layers - 1), ("steps", 0, MOST - 1)], whole=("stride", "steps"))
        ids_V, arch, earned = candidates(backbone, checkpoint, any_backbone)
        exits = arch.get("exits") if not stride else None
        exits = exits or list(range(stride or max(1, layers // 10), layers, stride or max(1, layers // 10)))
        return cls(backbone, ids_V, exits, tree_size(backbone, nodes, earned, cls.method, MOST), chain, steps)

    def bind(self, cache: KVCache) -> None:
        super().bind(cache)
        for slot in range(cache.rows):
            self.shadows.forget(slot)

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.shadows.forget(row.slot)

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        """Reads the new streams off at every exit: what the whole model says there tells who was right."""
        reading, exits = not features.paths, len(self.exits)  # a prompt is read
        kept = [min(count, CONTEXT) if reading else count for count in features.counts]
        of_rows = [features.taps[tap].split(features.counts) for tap in self.taps]
        streams_Fd = torch.cat([each[i][-count:] for i, count in enumerate(kept) for each in of_rows[:exits]])
        said_F, best_F = (each.flatten() for each in self._read_off(streams_Fd, 1))
        sure_F, tokens_F = said_F.exp(), self._ids_V.index_select(0, best_F)
        at = 0
        for i, (row, count) in enumerate(zip(rows, kept, strict=True)):
            mine = slice(at, at + count * exits)
            at = mine.stop
            if reading:
                comes_T = self._backbone.argmax(of_rows[exits][i][-count:])
            else:
                comes_T = torch.tensor(row.tokens[len(row.tokens) - count :], device=sure_F.device)
            guessed_CT, sure_CT = (each[mine].view(exits, count) for each in (tokens_F, sure_F))
            self.shadows.told(row.slot, guessed_CT == comes_T, sure_CT)

    def draft(self, rows: Sequence[Row]) -> Draft:
        at, thresholds = self.shadows.choose([row.slot for row in rows])
        if at is not None:
            self.exit = self.exits[at]
        return self._drafted(rows, self.exit, thresholds, [tap for tap in self.exits if tap < self.exit])
