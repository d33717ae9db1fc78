"""Drafting operations that a backbone's kernels may offer in one call: protocols, arguments and results.

Each of these exists twice: level by level in plain Python (`drafting.lower_layers`, the drafters themselves), which
runs everywhere and is the reference of the tests, and in the kernels of a backbone (`drafting.cpu`).

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
from foretell.backbone.base import Adapters, LinearLayer
from foretell.drafting.heads import DrafterHeads
from foretell.drafting.prefix_layer import PrefixLayer


@dataclass(frozen=True)
class LevelDrafting:
    """Heads that draft a tree level by level: each reads states of its row, then the embeddings of its path's tokens.

    Attributes:
        levels: one head each.
        streams: states of a row that are read; width: guesses of a node.
        vocabulary_V: int64 tokens that the heads choose from.
        scales: calibration of each head (`trees.calibration`); empty leaves probabilities unchanged.
    """

    levels: Sequence[DrafterHeads]
    streams: int
    width: int
    vocabulary_V: NDArray[np.int64]
    scales: Sequence[tuple[float, float]]


class TreeGrower(Protocol):
    def grow(
        self, roots: Sequence[int], states: Sequence[Tensor | None], count: int, beam: int, min_gain: float
    ) -> list[tuple[list[int], list[int], list[float]]]:
        """Returns trees of the most probable paths, at most `count` nodes besides the root.

        Args:
            roots: newest token of each row.
            states: states of each row that the heads read, [S, d] float32; None makes a tree of its root alone.
            beam: most nodes of a level that are expanded; min_gain: tokens that a level must be expected to gain.

        Returns:
            Per row parents, tokens, and the probability of each node given its parent.
        """
        ...


@dataclass(frozen=True)
class LowerLayerDrafting:
    """A head that guesses from the streams of the model's own lower layers.

    Attributes:
        head: one output matrix, without blocks; width: guesses of a node.
        vocabulary_V: int64 tokens that it chooses from.
        scale: its calibration (`trees.calibration`); None leaves probabilities unchanged.
        adapter: a layer of the drafter's own before the head, with its final norm; None is the backbone's norm alone.
        skip: of the adapter, see `Backbone.run_layers`.
        beside: adapters of the layers that draft, which a second stream goes through (see `drafters.m2r2`); the head
            then reads that stream.
    """

    head: DrafterHeads
    width: int
    vocabulary_V: NDArray[np.int64]
    scale: tuple[float, float] | None = None
    adapter: Backbone | None = None
    skip: bytes | None = None
    beside: Adapters | None = None


@dataclass(frozen=True)
class DraftRequest:
    """Arguments of a draft for B rows; see `drafting.lower_layers.EarlyExitTrees`.

    Attributes:
        layers: those that draft; slots: cache rows; roots: newest tokens; budgets: tokens that may still be emitted.
        count: most nodes besides the root; steps: most levels; room: most nodes of a row that run.
        thresholds: per row the probability below which its chain ends; none make trees.
        beam, min_gain: of trees, see `GrowingTree.select_frontier`.
        taps: layers whose streams are returned for the nodes that run.
        waiting: per row states [W, d] that the adapter has not read yet, or None.
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
    min_gain: float = 0.0
    taps: Sequence[int] = ()
    waiting: Sequence[Tensor | None] = ()


@dataclass(frozen=True)
class DraftedTrees:
    """Trees whose first `ran` nodes passed the layers.

    Attributes:
        trees: per row parents, tokens, and the probability of each node given its parent.
        hidden_Rd, taps: streams of the nodes that ran, row after row, and those after `DraftRequest.taps` layers.
    """

    trees: list[tuple[list[int], list[int], list[float]]]
    ran: list[int]
    hidden_Rd: Tensor
    taps: dict[int, Tensor]


class LowerLayerDrafter(Protocol):
    def grow_through_layers(self, request: DraftRequest, cache: KVCache, own: KVCache | None) -> DraftedTrees:
        """Returns in one call what `drafting.lower_layers` drafts level by level.

        Args:
            cache: the engine's; own: the adapter's, which then holds the `waiting` states too.
        """
        ...


class DraftKernels(Protocol):
    """Drafting on one backbone; `kernels.kernels_for` looks it up."""

    def heads(
        self, blocks: Sequence[Sequence[tuple[Tensor, Tensor]]], outputs: Sequence[Tensor] | DrafterHeads,
        linear: bool = False,
    ) -> DrafterHeads:  # fmt: skip
        """Returns K heads of a drafter, computed side by side by this backbone's kernels.

        Args:
            blocks: by layer and head, weight [d, I or d] and bias [d] of x + SiLU(W x + b); the first layer reads
                I numbers (`heads.side_by_side`), whose first d are its x. Without blocks the matrices read the input.
            outputs: the matrices [V, d] after the blocks, one per head or one for all; or other heads, whose
                matrices are shared.
            linear: makes the last layer x + W x + b.
        """
        ...

    def grower(self, drafting: LevelDrafting) -> TreeGrower | None:
        """Returns a grower of whole trees; None if drafting level by level is as fast."""
        ...

    def lower_layers(self, drafting: LowerLayerDrafting) -> LowerLayerDrafter | None:
        """Returns a drafter through lower layers; None if running them level by level is as fast."""
        ...

    def linear(self, weight_NK: Tensor) -> LinearLayer:
        """Returns a drafter's own matrix, which may be rounded to eight bits."""
        ...

    def own_layers(self, layers: Sequence[Mapping[str, Tensor]], norm_d: Tensor | None = None) -> Backbone:
        """Returns a drafter's own layers, see `Backbone.own_layers`; their matrices may be rounded to eight bits."""
        ...

    def prefix_layer(self, tensors: Mapping[str, Tensor], fuse_dP: Tensor | None) -> PrefixLayer:
        """Returns a drafter's own layer over the committed states.

        Args:
            tensors: see `Backbone.own_layers`; fuse_dP: see `PrefixLayer`.
        """
        ...
