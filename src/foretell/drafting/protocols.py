"""What a backbone's kernels may do for drafters in one call, and what such a call is given.

Each of these exists twice: level by level in plain Python (`drafting.lower_layers`, the drafters themselves), which is
what runs everywhere and what the tests trust, and in the kernels of a backbone (`drafting.cpu`).

Legend: B rows, R nodes that pass layers, d hidden width, V draft vocabulary, S states of a row, W waiting states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretell.backbone import Backbone, KVCache
from foretell.drafting.heads import DrafterHeads
from foretell.drafting.prefix_layer import PrefixLayer


@dataclass(frozen=True)
class LevelDrafting:
    """Heads that draft a tree level by level: each reads states of its row, then what its path adds.

    Attributes:
        levels: one head each.
        streams: states of a row that are read; width: guesses of a node.
        vocabulary_V: int64 tokens that the heads choose from.
        scales: how far each head is believed (`trees.calibration`); none are all believed.
        grounded, chained: whether the embeddings of the path's tokens, and the state that the head above ended in,
            are read.
    """

    levels: Sequence[DrafterHeads]
    streams: int
    width: int
    vocabulary_V: NDArray[np.int64]
    scales: Sequence[tuple[float, float]]
    grounded: bool
    chained: bool


class TreeGrower(Protocol):
    def grow(
        self, roots: Sequence[int], states: Sequence[Tensor | None], count: int, beam: int, least: float
    ) -> list[tuple[list[int], list[int], list[float]]]:
        """Trees of the most probable paths, `count` nodes at most besides the root.

        Args:
            roots: newest token of each row.
            states: what the heads read of each row [S, d] float32; None makes a tree of its root alone.
            beam: nodes that a level asks at most; least: tokens that it must be able to gain.

        Returns:
            Per row parents, tokens and how probable each node is given its parent.
        """
        ...


@dataclass(frozen=True)
class LowerLayerDrafting:
    """What guesses behind the model's own lower layers.

    Attributes:
        head: output matrices alone, of one head; width: guesses of a node.
        vocabulary_V: int64 tokens that it chooses from.
        scale: how far it is believed (`trees.calibration`); None is believed.
        adapter: a layer of the drafter's own between, and its final norm; None is the backbone's norm alone.
        skip: of the adapter, see `Backbone.run_layers`.
    """

    head: DrafterHeads
    width: int
    vocabulary_V: NDArray[np.int64]
    scale: tuple[float, float] | None = None
    adapter: Backbone | None = None
    skip: bytes | None = None


@dataclass(frozen=True)
class DraftRequest:
    """A draft that is wanted of B rows; see `drafting.lower_layers.Lower`.

    Attributes:
        layers: those that draft; slots: cache rows; roots: newest tokens; budgets: tokens that may still be emitted.
        count: nodes besides the root; steps: levels; room: nodes of a row that run; all at most.
        thresholds: per row the probability below which its chain ends; none make trees.
        beam, least: of trees, see `Growing.select_frontier`.
        taps: layers whose streams are wanted of the nodes that run.
        waiting: per row states [W, d] that the adapter has still to read, or None.
    """

    layers: int
    slots: Sequence[int]
    roots: Sequence[int]
    budgets: Sequence[int]
    count: int
    steps: int
    room: int
    thresholds: Sequence[float] = ()
    beam: int = 0
    least: float = 0.0
    taps: Sequence[int] = ()
    waiting: Sequence[Tensor | None] = ()


@dataclass(frozen=True)
class DraftedTrees:
    """Trees, of which the `ran` first nodes of each passed the layers.

    Attributes:
        trees: per row parents, tokens and how probable each node is given its parent.
        hidden_Rd, taps: streams of the nodes that passed, row after row, and those after `DraftRequest.taps` layers.
    """

    trees: list[tuple[list[int], list[int], list[float]]]
    ran: list[int]
    hidden_Rd: Tensor
    taps: dict[int, Tensor]


class LowerLayerDrafter(Protocol):
    def climb(self, asked: DraftRequest, cache: KVCache, own: KVCache | None) -> DraftedTrees:
        """Drafts in one call what `drafting.lower_layers` drafts level by level.

        Args:
            cache: the engine's; own: the adapter's, which has read `waiting` too afterwards.
        """
        ...


class DraftKernels(Protocol):
    """What drafts on one backbone; `kernels.kernels_for` looks it up."""

    def heads(
        self, blocks: Sequence[Sequence[tuple[Tensor, Tensor]]], outputs: Sequence[Tensor] | DrafterHeads,
        linear: bool = False,
    ) -> DrafterHeads:  # fmt: skip
        """A drafter's own heads through this backbone's kernels, K of them side by side.

        Args:
            blocks: by layer and head, weight [d, I or d] and bias [d] of x + SiLU(W x + b); the first layer reads
                I numbers (`heads.side_by_side`), whose first d are its x. None at all: matrices read what comes.
            outputs: the matrices [V, d] after the blocks, one per head or one for all; or other heads, whose
                matrices serve these too.
            linear: whether the last layer is x + W x + b.
        """
        ...

    def grower(self, drafting: LevelDrafting) -> TreeGrower | None:
        """Returns what drafts trees in one call; None where drafting level by level is as good."""
        ...

    def lower_layers(self, drafting: LowerLayerDrafting) -> LowerLayerDrafter | None:
        """Returns what drafts with lower layers in one call; None where running them level by level is as good."""
        ...

    def prefix_layer(self, tensors: Mapping[str, Tensor], fuse_dP: Tensor | None) -> PrefixLayer:
        """Returns a drafter's own layer over what was committed.

        Args:
            tensors: see `Backbone.layer`; fuse_dP: see `PrefixLayer`.
        """
        ...
