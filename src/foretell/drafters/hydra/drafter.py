"""Hydra: heads that read the guesses before theirs, so that a path's tokens fit together.

A Medusa head guesses token p + k + 2 from position p alone, whatever the tokens between are guessed to be. Head k of
Hydra reads the path's own tokens as well, [state; E(p + 1); ...; E(p + 1 + k)], and is evaluated level by level, once
for each node of the frontier: one batched call a level. arXiv 2402.05109.

`hydra++` has a decoder layer of its own before the heads: it attends to every committed state, before each draft, and
its stream takes the place of the state. Here the layer adds to that stream and starts at zero, as all blocks do, so
that a fresh drafter of either kind equals the output head; the paper's blocks have a matrix in the place of x in
x + SiLU(W u + b), and its layer is followed by a norm.

Trees grow best first: a node is as probable as its path, and only nodes that may still be among the best are expanded
(EAGLE-2, arXiv 2406.16858, §4); or they are static, made of rank paths.

Legend: B rows, K heads, d hidden width, P positions, T tokens, V draft vocabulary, F frontier nodes of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache
from foretell.contracts import FINAL_NORM, Draft, Drafter, Features, Row
from foretell.drafters.hydra.heads import HydraHeads, HydraPlusTraining, HydraTraining, read_arch, shapes
from foretell.drafting.checkpoint import (
    CheckpointOptions,
    Loaded,
    check_shapes,
    check_tree,
    damage_named,
    find,
    read_scales,
)
from foretell.drafting.heads import DrafterHeads
from foretell.drafting.kernels import kernels_for
from foretell.drafting.learning.decoder_layer import DecoderLayer
from foretell.drafting.learning.heads import draft_outputs, evenly_spread
from foretell.drafting.options import option
from foretell.drafting.protocols import LevelDrafting
from foretell.drafting.tree_size import TreeSize, no_guesses, size_for, tree_size
from foretell.trees import TokenTree, from_paths
from foretell.trees.calibration import Floats, calibrated
from foretell.trees.growing import GrowingTree
from foretell.trees.published import published

MIN_GAIN = 0.08
"""Tokens that a level must be expected to gain: it costs some 4 % of a step of two tokens."""
BEAM = 8
"""Most nodes of a level that are expanded: rows that the kernels multiply at the price of one."""
WIDTH = 10
"""Guesses of each of them."""
MAX_NODES = 128
"""Most nodes of a tree."""


class Hydra(Drafter):
    """Drafts with trained heads that read their path.

    Args:
        arch, tensors: as `HydraHeads.checkpoint` gave them.
        paths: rank paths of static trees, prefixes first.
        size: nodes of the tree to draft, root included; 1 drafts nothing.
        tokens_per_step: tree size -> tokens per step on held-out text.
        grown: whether trees grow best first; else they are static.
        scales: calibration of each head.
    """

    method, plus = "hydra", False
    STARTS: ClassVar[tuple[str, ...]] = (
        "medusa",
        "medusa2",
        "hydra",
    )  # methods whose checkpoints a training may start from

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        tree: str = option("", "A published tree by name, drafted as it is.")
        grown: bool = option(True, "Choose the most probable guesses at each step; false takes fixed trees.")

    Training: ClassVar[type[HydraTraining]] = HydraTraining

    def __init__(
        self,
        backbone: Backbone,
        arch: dict[str, Any],
        tensors: dict[str, Tensor],
        paths: Sequence[Sequence[int]],
        size: TreeSize,
        tokens_per_step: dict[int, float] | None = None,
        grown: bool = True,
        scales: Sequence[Sequence[float]] = (),
    ):
        arch = read_arch(arch)
        check_shapes(tensors, shapes(arch, backbone.config.hidden, len(tensors["vocabulary"])))
        self._scales = read_scales(scales, arch["heads"])
        self.tokens_per_step, self.size, self.grown, self.paths = (
            tokens_per_step or {},
            size,
            grown,
            [tuple(path) for path in paths],
        )
        self.taps, self.heads = (*arch["taps"], FINAL_NORM), arch["heads"]
        self._hidden, self._device = backbone.config.hidden, backbone.device
        self._embed, self._vocabulary_V = backbone.embed, tensors["vocabulary"].long().numpy()
        check_tree(self.paths, self.heads, len(self._vocabulary_V))
        self._shape = cache(lambda count: from_paths(self.paths[:count]))
        width = max((rank for path in self.paths for rank in path), default=0) + 1
        self._width = min(WIDTH, len(self._vocabulary_V)) if grown else width
        self._levels: list[DrafterHeads] = []
        for k in range(self.heads):
            pairs = [(tensors[f"first.{k}"], tensors["first_bias"][k].float())]
            pairs += zip(tensors["deep"][k], tensors["deep_bias"][k].float(), strict=True)
            if arch["linear_tail"]:
                pairs.append((tensors["last"][k], tensors["last_bias"][k].float()))
            outputs = self._levels[0] if k else list(tensors["head"])
            self._levels.append(kernels_for(backbone).heads([[pair] for pair in pairs], outputs, arch["linear_tail"]))
        streams = 1 if arch["fuse_prefix"] else len(self.taps)
        self._grower = kernels_for(backbone).grower(
            LevelDrafting(self._levels, streams, self._width, self._vocabulary_V, self._scales)
        )
        layer = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("prefix.")}
        fuse = tensors["fuse"] if arch["fuse_prefix"] else None
        self._prefix = kernels_for(backbone).prefix_layer(layer, fuse) if arch["prefix"] else None
        self.parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
        self._states: dict[int, Tensor] = {}  # slot -> what the heads read: state, then streams [S, d]
        self._newest: dict[int, tuple[list[Tensor], int]] = {}  # slot -> streams and a place in them: unread

    @classmethod
    def build(cls, backbone: Backbone, options: Options, loaded: Loaded | None = None) -> Hydra:
        """See `Drafter.build`, and `TrainableMethod.build` for `loaded`."""
        found, tensors = loaded or find(cls.method, backbone, options.checkpoint, options.any_backbone)
        paths = published(options.tree) if options.tree else found.paths
        grown = options.grown and not options.tree
        most = MAX_NODES if grown else min(MAX_NODES, len(paths) + 1)
        nodes = options.nodes or (most if options.tree else 0)
        size = tree_size(backbone, nodes, found.tokens_per_step, cls.method, cls.usual_cost, most)
        with damage_named(options.checkpoint or f"The {cls.method} drafter that ships with foretell"):
            if found.arch["prefix"] != cls.plus:
                raise KeyError("prefix")
            return cls(backbone, found.arch, tensors, paths, size, found.tokens_per_step, grown, found.calibration)

    @classmethod
    def trainable(
        cls, backbone: Backbone, training: HydraTraining, counts_V: Tensor, folder: Path | None = None
    ) -> HydraHeads:
        """Returns fresh heads; see `TrainableMethod`."""
        return HydraHeads(
            *draft_outputs(backbone, counts_V, training.draft_vocab), training,
            taps=evenly_spread(training.taps, backbone), embed=backbone.embed,
            prefix=DecoderLayer(backbone.config, backbone.rotation) if cls.plus else None,
        )  # fmt: skip

    @property
    def max_nodes(self) -> int:
        return MAX_NODES

    # -- committed states -----------------------------------------------------------------------------------------

    def bind(self, cache: KVCache) -> None:
        if self._prefix:
            self._prefix = self._prefix.attached(cache.rows)
        self._states, self._newest = {}, {}

    def reusable_tokens(self, slot: int, tokens: int) -> int:
        """Returns fewer after an interruption: states are missing, and a fused layer read the last one with another
        token after it."""
        return max(0, min(tokens - self._prefix.fused, self._prefix.length(slot))) if self._prefix else tokens

    def forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._states.pop(slot, None)
            self._newest.pop(slot, None)
        if self._prefix:
            self._prefix.forget(slots)

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._states.pop(row.slot, None)
            self._newest.pop(row.slot, None)
            if self._prefix:
                self._prefix.begin(row.slot, row.reused, len(row.tokens) + row.budget)

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        streams, begin, full = [features.taps[tap] for tap in reversed(self.taps)], 0, list[Row]()
        for row, count in zip(rows, features.counts, strict=True):
            if not self._prefix:
                self._newest[row.slot] = streams, begin + count - 1
            elif self._prefix.wait(row.slot, streams, begin, count):
                full.append(row)
            begin += count
        self._read(full)

    def _unread(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the rows with unread states."""
        prefix = self._prefix
        return [row for row in rows if (prefix.waiting(row.slot) if prefix else row.slot in self._newest)]

    def _read(self, rows: Sequence[Row]) -> None:
        """Reads the states of these rows that wait: through the prefix layer, or the newest alone."""
        slots = [row.slot for row in rows]
        if self._prefix and rows:
            self._states.update(zip(slots, self._prefix.read(slots, [row.tokens for row in rows]), strict=True))
        if not self._prefix:
            for slot in slots:
                streams, at = self._newest[slot]
                self._states[slot] = torch.stack([stream_Nd[at] for stream_Nd in streams])
                del self._newest[slot]

    # -- guesses ----------------------------------------------------------------------------------------------------

    def draft(self, rows: Sequence[Row]) -> Draft:
        unread = sum(self._prefix.waiting(row.slot) for row in rows) if self._prefix else 0
        count = min(size_for(self.size, rows, unread), self.max_nodes) - 1
        if not count:
            return no_guesses(rows)
        self._read(self._unread(rows))
        if self.grown and self._grower:
            states = [self._states.get(row.slot) for row in rows]
            grown = self._grower.grow([row.tokens[-1] for row in rows], states, count, BEAM, MIN_GAIN)
            return Draft(
                [TokenTree(tuple(parents)) for parents, _, _ in grown], [tokens for _, tokens, _ in grown],
                [probabilities for _, _, probabilities in grown],
            )  # fmt: skip
        return self._by_level(rows, count)

    def _by_level(self, rows: Sequence[Row], count: int) -> Draft:
        """Returns the same trees, or static ones, one level at a time."""
        shape = None if self.grown else self._shape(count)
        trees = [GrowingTree([row.tokens[-1]], [0] if row.slot in self._states else []) for row in rows]
        inputs = HeadInputs(self._hidden, self._device)
        for i, row in enumerate(rows):
            if row.slot in self._states:  # none after a prompt of one token
                inputs.of[i, 0] = list(inputs.add(self._states[row.slot]))
        for k in range(self.heads):
            if shape:
                for tree in trees:
                    tree.frontier = [node for node in tree.frontier if shape[0].children[node]]
            if not any(tree.frontier for tree in trees):
                break
            log_probs_FR, tokens_FR = self._expand(k, trees, inputs)
            end = 0
            for tree in trees:
                begin, end, since = end, end + len(tree.frontier), len(tree.parents)
                if shape:
                    tree.fill(*shape, log_probs_FR[begin:end], tokens_FR[begin:end])
                else:
                    tree.extend(log_probs_FR[begin:end], tokens_FR[begin:end], count)
                    if k + 1 < self.heads:
                        tree.select_frontier(count, since, BEAM, MIN_GAIN)
        cut = [tree.cut(range(1, len(tree.parents)) if shape else tree.best(count)) for tree in trees]
        return Draft(
            [tree for tree, _, _ in cut],
            [tokens for _, tokens, _ in cut],
            [probabilities for _, _, probabilities in cut],
        )

    def _expand(self, k: int, trees: Sequence[GrowingTree], inputs: HeadInputs) -> tuple[Floats, list[list[int]]]:
        """Head k at the frontiers of all trees: log-probabilities and tokens of its guesses, best first."""
        nodes_F = [(row, node) for row, tree in enumerate(trees) for node in tree.frontier]
        parents_F = [(row, max(0, trees[row].parents[node])) for row, node in nodes_F]
        read_FS = [inputs.of[parent] for parent in parents_F]
        embedded_Fd = self._embed(torch.tensor([trees[row].tokens[node] for row, node in nodes_F]))
        read_FS = [[*read, index] for read, index in zip(read_FS, inputs.add(embedded_Fd), strict=True)]
        inputs.of.update(zip(nodes_F, read_FS, strict=True))
        log_probs_FKR, best_FKR = self._levels[k].top(inputs.store_Nd, read_FS, self._width)
        log_probs_FR = log_probs_FKR[:, 0].cpu().numpy()
        if self._scales:
            log_probs_FR = calibrated(log_probs_FR, self._scales[k])
        return log_probs_FR, self._vocabulary_V[best_FKR[:, 0].cpu().numpy()].tolist()


class HeadInputs:
    """The heads' inputs during a draft: states in one store, so that levels share those of their common paths.

    Attributes:
        of: (row of the batch, node) -> indices of the states that are read there.
    """

    def __init__(self, width: int, device: torch.device):
        self.store_Nd, self.used = torch.empty(64, width, device=device), 0
        self.of: dict[tuple[int, int], list[int]] = {}

    def add(self, states_Fd: Tensor) -> range:
        """Stores states; returns their indices."""
        count = len(states_Fd)
        if self.used + count > len(self.store_Nd):
            larger = self.store_Nd.new_empty(2 * (self.used + count), self.store_Nd.shape[1])
            larger[: self.used] = self.store_Nd[: self.used]
            self.store_Nd = larger
        indices = range(self.used, self.used + count)
        self.used += count
        self.store_Nd[indices.start : indices.stop] = states_Fd
        return indices


class HydraPlus(Hydra):
    """Hydra with a layer of its own before the heads."""

    method, plus, Training = "hydra++", True, HydraPlusTraining
    STARTS = (*Hydra.STARTS, method)
