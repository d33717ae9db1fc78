"""Hidden Transfer: the pass that verifies a tree writes the guesses of the next one too.

After a layer t, the stream of a node at position n is projected to pseudo streams of the positions n + 1 .. n + K. They
run through the other layers as rows of their own, and come out at the output head: step k guesses token n + k + 1. A
pseudo row attends to all that its node attends to, to its node, and to the steps before its own. Nothing attends to it,
so that it changes nothing, and what it writes to the cache is forgotten. Hidden Transfer, arXiv 2404.12022: linear
projections after fixed layers, pseudo rows that attend to the whole sequence, the frozen output head, a loss by KL
divergence to the model's own distribution.

What the paper says of layers, steps and initialisation could not be read. Ours: W_k h + b_k, which begins as the
identity; every step begins from the real stream, all after one layer unless `layers` names one for each; three steps; a
loss that falls by 0.8 from step to step, over written positions alone; the layers above learn nothing.

A node needs pseudo rows only if the text may leave the tree there, and a step runs no more rows than pay on this
machine: `trees.pseudo_rows` divides them between drafted nodes and pseudo rows. The first step after a prompt has none
to draft from; it verifies no guess, and leaves up to K levels.

Legend: B conversations, T tokens, K steps, P positions (sources), X blocks of S sources of one conversation, M rows of
a pass and R with those that are inserted, N inserted rows, d hidden width, V draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import Draft, Drafter, Features, Insertion, Row
from foretell.drafting.checkpoint import (
    CheckpointOptions,
    Loaded,
    check_shapes,
    damage_named,
    find,
    output_shape,
    read_scales,
)
from foretell.drafting.kernels import adapters_of, kernels_for
from foretell.drafting.learning.frozen_layers import FrozenLayers, beside
from foretell.drafting.learning.heads import GuessingHeads, SeveralHeadsTraining, draft_outputs
from foretell.drafting.learning.pseudo_rows import Blocks
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.options import option
from foretell.drafting.tree_size import TreeSize, no_guesses, size_for, tree_size
from foretell.errors import UsageError, is_number
from foretell.trees import Guesses, TokenTree
from foretell.trees.calibration import Floats, Scale, calibrated
from foretell.trees.pseudo_rows import drafted_nodes, fit_values, most_probable_paths, pseudo_rows
from foretell.trees.search import Ranks

DECAY = 0.8
"""Weight of a step's loss relative to the step before it, as in parallel prompt decoding (arXiv 2405.18628)."""
MAX_NODES = 32
"""Rows of a step, at most."""
WIDTH = 10
"""Guesses of a step that trees choose from."""
VALUED = (4, 8, 16, 32)
"""Rows of a step for which the values of its states are fitted."""


class TransferSteps(GuessingHeads):
    """The projections in training: step k (from 0) guesses, at position p, token p + k + 2.

    Args:
        head_Vd, vocabulary_V, vocab_size: see `GuessingHeads`.
        training: see `HiddenTransfer.Training`.
        layers: after which each step is inserted, ascending.
        backbone: its layers above them are run, frozen.

    Attributes:
        isolated: lets no step attend to the steps before its own: a comparison of the paper's, which cannot draft.
    """

    decay = DECAY

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, training: HiddenTransfer.Training, *,
        layers: Sequence[int], backbone: Backbone,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, heads=len(layers), output=training.output)
        d, steps, self.rank = head_Vd.shape[1], len(layers), training.rank
        self.layers, self.taps, self.isolated = list(layers), (layers[0],), False
        if self.rank:
            self.down_Krd = nn.Parameter(torch.randn(steps, self.rank, d) / d**0.5)
            self.up_Kdr = nn.Parameter(torch.zeros(steps, d, self.rank))
        else:
            self.weight_Kdd = nn.Parameter(torch.zeros(steps, d, d))
        self.bias_Kd = nn.Parameter(torch.zeros(steps, d))
        self.adapter_rank, above = training.adapters, backbone.config.layers - layers[0]
        if self.adapter_rank:
            self.adapter_down_Lrd = nn.Parameter(torch.randn(above, self.adapter_rank, d) / d**0.5)
            self.adapter_up_Ldr = nn.Parameter(torch.zeros(above, d, self.adapter_rank))
        self._backbone = backbone

    def matrices(self) -> Tensor:
        """W_k of each step, [K, d, d]; what is learnt, and stored, is their distance from the identity."""
        learnt_Kdd = self.up_Kdr @ self.down_Krd if self.rank else self.weight_Kdd
        return torch.eye(self.bias_Kd.shape[1], device=learnt_Kdd.device) + learnt_Kdd

    @cached_property
    def frozen(self) -> FrozenLayers:
        """The layers above the first step."""
        return FrozenLayers(self._backbone, self.layers[0])

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        frozen, matrices_Kdd, tokens = self.frozen, self.matrices(), batch.tokens_BT.shape[1]
        blocks, c = Blocks.of(sources_P, tokens), frozen.config
        cosine, sine = frozen.angles(tokens + self.heads)
        real_BTd = batch.states[self.layers[0]].float().clone()  # it changes in place
        pseudo_XSKd = real_BTd.new_zeros(*blocks.position_XS.shape, 0, c.hidden)
        for index in range(self.layers[0], c.layers):
            begins = [k for k, layer in enumerate(self.layers) if layer == index]
            if begins:
                source_XSd = real_BTd[blocks.conversation_X[:, None], blocks.position_XS]
                begun = [self._projected(source_XSd, matrices_Kdd[k], self.bias_Kd[k], frozen.dtype) for k in begins]
                pseudo_XSKd = torch.cat([pseudo_XSKd, torch.stack(begun, 2)], 2)
            entered_XSKd = pseudo_XSKd
            keys_values = frozen.run_layer(index, real_BTd, cosine[:tokens], sine[:tokens])
            places_XSK = blocks.places(pseudo_XSKd.shape[2])
            queried = frozen.projected(index, pseudo_XSKd, cosine[places_XSK], sine[places_XSK])
            mixed = blocks.attend(queried, keys_values, c.windows[index], self.isolated)
            pseudo_XSKd = frozen.finished(index, pseudo_XSKd, mixed)
            if self.adapter_rank:
                adapter = index - self.layers[0]
                pseudo_XSKd = pseudo_XSKd + beside(
                    entered_XSKd, self.adapter_down_Lrd[adapter], self.adapter_up_Ldr[adapter]
                )
        states_XSKd = frozen.norm(pseudo_XSKd, frozen.final_norm_d).float()
        return states_XSKd[blocks.filled_XS].transpose(0, 1)

    @staticmethod
    def _projected(x: Tensor, weight_dd: Tensor, bias_d: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(x.to(dtype), weight_dd.to(dtype)).float() + bias_d

    def fitted(self, ranks: Sequence[Ranks], log_probs: Sequence[Floats], scales: Sequence[Scale]) -> dict[str, Any]:
        found = {rows: fit_values(ranks, log_probs, scales, rows) for rows in VALUED}
        return {
            "values": {rows: values for rows, (values, _) in found.items()},
            "tokens_per_step": {rows: round(tokens, 4) for rows, (_, tokens) in found.items()},  # by the chain
        }

    @torch.no_grad()
    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if (arch["layers"], arch["rank"], arch["adapters"]) != (self.layers, self.rank, self.adapter_rank):
            layers = ",".join(map(str, arch["layers"]))
            raise UsageError(
                f"It is made with other options; train with `layers={layers}`, `steps={len(arch['layers'])}`, "
                f"`rank={arch['rank']}` and `adapters={arch['adapters']}`."
            )
        for name, weight in self._weights().items():
            weight.copy_(tensors[name])
        self.start_outputs(tensors)

    def _weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor]
        found = {"down": self.down_Krd, "up": self.up_Kdr} if self.rank else {"weight": self.weight_Kdd}
        if self.adapter_rank:
            found |= {"adapter_down": self.adapter_down_Lrd, "adapter_up": self.adapter_up_Ldr}
        return found | {"bias": self.bias_Kd}

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        options = {"steps": self.heads, "rank": self.rank, "adapters": self.adapter_rank, "output": self.output}
        return self.stored(self._weights()), {"heads": self.heads, "layers": self.layers, **options}


class HiddenTransfer(Drafter):
    """Drafts from pseudo rows of the pass that verified the last tree.

    Args:
        arch, tensors: as `TransferSteps.checkpoint` gave them.
        size: (rows, context) -> rows of a step, drafted nodes and pseudo rows together; 1 drafts nothing.
        tokens_per_step: rows of a step -> tokens per step on held-out text.
        values: rows of a step -> what each number of levels that it leaves is worth (`trees.pseudo_rows`).
        scales: calibration of each step.
    """

    method, usual_cost = "hidden_transfer", 0.1
    node_cost = 0.7  # three rows of five besides the root are inserted, half-way up by default

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        nodes: int = option(
            0, "Rows of a step, guesses and pseudo rows together; by default what pays most at the step costs here.",
            low=0,
        )  # fmt: skip

    @dataclass(frozen=True)
    class Training(SeveralHeadsTraining):
        soft: float = option(
            1.0, "Share of the loss against the model's whole distribution instead of the written token.", low=0, high=1
        )
        steps: int = option(3, "Tokens ahead that pseudo rows guess.", low=1, high=8)
        layers: tuple[int, ...] | None = option(
            None, "After which layer pseudo rows begin: one, or one for each step; by default half of the layers."
        )
        rank: int = option(0, "Rank of the projections beside the identity; 0 for whole matrices.", low=0, high=1024)
        adapters: int = option(
            0, "Rank of an adapter beside each layer, which pseudo rows alone pass; 0 for none.", low=0, high=4096
        )
        output: str = option(
            "shared", "Output matrix: the model's own, as in the paper, or a trained copy.", choices=("shared", "tied")
        )

    def __init__(
        self, backbone: Backbone, arch: dict[str, Any], tensors: dict[str, Tensor], size: TreeSize,
        tokens_per_step: dict[int, float] | None = None, values: dict[int, list[float]] | None = None,
        scales: Sequence[Sequence[float]] = (),
    ):  # fmt: skip
        layers, rank, d = check_layers(arch["layers"], backbone), arch["rank"], backbone.config.hidden
        shapes = _shapes(len(layers), rank, d, backbone.config.layers - layers[0], arch["adapters"])
        check_shapes(tensors, shapes | output_shape(arch, d, len(tensors["vocabulary"])))
        self.layers, self.cuts, self.size = layers, tuple(dict.fromkeys(layers)), size
        self.tokens_per_step, self._scales = tokens_per_step or {}, read_scales(scales, len(layers))
        self._values = values or {MAX_NODES: [0.5 * step for step in range(len(layers) + 1)]}
        if not all(len(each) == len(layers) + 1 and all(map(math.isfinite, each)) for each in self._values.values()):
            raise ValueError("values")
        self._vocabulary_V = tensors["vocabulary"].long().numpy()
        shared = arch["output"] == "shared"
        output_Vd = backbone.head_rows(tensors["vocabulary"].long()) if shared else tensors["head"][0]
        self._head = kernels_for(backbone).heads([], [output_Vd])
        learnt_Kdd = tensors["up"].float() @ tensors["down"].float() if rank else tensors["weight"].float()
        weight_Kdd = torch.eye(d) + learnt_Kdd
        self._steps = {cut: [k for k, layer in enumerate(layers) if layer == cut] for cut in self.cuts}
        self._project = {
            cut: backbone.linear(weight_Kdd[steps].flatten(0, 1), tensors["bias"][steps].flatten().float())
            for cut, steps in self._steps.items()
        }
        if arch["adapters"]:
            self.adapters = adapters_of(backbone, tensors["adapter_down"], tensors["adapter_up"], layers[0])
        self.parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
        self._clear()

    @classmethod
    def build(cls, backbone: Backbone, options: Options, loaded: Loaded | None = None) -> HiddenTransfer:
        """See `Drafter.build`, and `TrainableMethod.build` for `loaded`."""
        found, tensors = loaded or find(cls.method, backbone, options.checkpoint, options.any_backbone)
        size = tree_size(
            backbone, options.nodes, found.tokens_per_step, cls.method, cls.usual_cost, MAX_NODES, cls.node_cost
        )
        with damage_named(options.checkpoint or f"The {cls.method} drafter that ships with foretell"):
            values = {int(rows): list(map(float, each)) for rows, each in found.fitted["values"].items()}
            return cls(backbone, found.arch, tensors, size, found.tokens_per_step, values, found.calibration)

    @classmethod
    def trainable(
        cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Path | None = None
    ) -> TransferSteps:
        """Returns fresh projections; see `TrainableMethod`."""
        layers, steps = tuple(training.layers or [backbone.config.layers // 2]), training.steps
        if len(layers) not in (1, steps):
            raise UsageError(f"layers names {len(layers)} layers for {steps} steps; name one, or {steps} of them.")
        layers = check_layers(layers * steps if len(layers) == 1 else layers, backbone)
        outputs = draft_outputs(backbone, counts_V, training.draft_vocab)
        return TransferSteps(*outputs, training, layers=layers, backbone=backbone)

    @property
    def max_nodes(self) -> int:
        return MAX_NODES

    @property
    def extra_nodes(self) -> int:
        return MAX_NODES - 1

    def bind(self, cache: KVCache) -> None:
        self._clear()

    def _clear(self) -> None:
        self._states: dict[int, Tensor] = {}  # slot -> of the pseudo rows behind the last accepted node, [S, d]
        self._rows: dict[int, int] = {}  # slot -> of the step that was drafted, at most: drafted nodes and pseudo rows
        self._values_now: list[float] = []
        # per tree of the pass: pseudo rows of each node, the newest row behind each, and each pseudo row's node
        self._counts: list[list[int]] = []
        self._tails: list[list[int]] = []
        self._inserted: list[list[int]] = []

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._states.pop(row.slot, None)

    # -- guesses ----------------------------------------------------------------------------------------------------

    def draft(self, rows: Sequence[Row]) -> Draft:
        self._rows = {}
        nodes = size_for(self.size, rows)
        if nodes == 1:
            return no_guesses(rows)
        self._values_now = self._values[min(self._values, key=lambda size: abs(size - nodes))]
        trees, tokens, probabilities = list[TokenTree](), list[list[int]](), list[list[float]]()
        for row, (log_probs_SR, ids_SR) in zip(rows, self._guesses(rows), strict=True):
            parents, guesses, path_p = most_probable_paths(log_probs_SR, nodes)
            count = drafted_nodes(parents, path_p, nodes, self._values_now)
            self._rows[row.slot] = nodes if row.budget > 1 else 0
            trees.append(TokenTree(tuple(parents[:count])))
            tokens.append([row.tokens[-1], *(ids_SR[level][rank] for level, rank in guesses[1:count])])
            probabilities.append([1.0, *(math.exp(log_probs_SR[level][rank]) for level, rank in guesses[1:count])])
        return Draft(trees, tokens, probabilities)

    def _guesses(self, rows: Sequence[Row]) -> list[tuple[list[list[float]], list[list[int]]]]:
        """Log-probabilities and ids of each level of each row, best first."""
        states = [self._states.get(row.slot) for row in rows]
        found: list[tuple[list[list[float]], list[list[int]]]] = [([], []) for _ in rows]
        store = [each for each in states if each is not None]
        if not store:
            return found
        levels = [(i, k) for i, each in enumerate(states) if each is not None for k in range(len(each))]
        which = np.arange(len(levels))[:, None].tolist()
        top = self._head.top(torch.cat(store), which, min(WIDTH, len(self._vocabulary_V)))
        log_probs_NR, best_NR = (each[:, 0].cpu().numpy() for each in top)
        for (i, k), log_probs_R, best_R in zip(levels, log_probs_NR, best_NR, strict=True):
            if self._scales:
                log_probs_R = calibrated(log_probs_R, self._scales[k])
            found[i][0].append(np.nan_to_num(np.minimum(log_probs_R, 0.0), nan=-math.inf).tolist())
            found[i][1].append(self._vocabulary_V[best_R].tolist())
        return found

    # -- pseudo rows ------------------------------------------------------------------------------------------------

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Nodes, draft: Draft) -> Insertion | None:
        if layer == self.cuts[0]:
            self._place(nodes, draft)
        steps = self._steps[layer]
        parents: list[list[int]] = []
        sources, places = list[int](), list[int]()  # of each new row: the node it begins from, and which step it is
        for tree, start, counts, tails, inserted in zip(
            nodes.trees, nodes.starts(), self._counts, self._tails, self._inserted, strict=True
        ):
            parents.append([])
            for node, count in enumerate(counts):
                for place in range(sum(k < count for k in steps)):
                    parents[-1].append(tails[node])
                    tails[node] = len(tree) + len(parents[-1]) - 1
                    sources.append(start + node)
                    places.append(place)
                    inserted.append(node)
        return Insertion(parents, self._begun(layer, hidden_Md, sources, places)) if sources else None

    def _place(self, nodes: Nodes, draft: Draft) -> None:
        """Chooses how many pseudo rows each node gets, of those that the tree leaves; lookup may have enlarged it."""
        self._counts, self._tails, self._inserted = [], [list(range(len(tree))) for tree in draft.trees], []
        for i, (slot, tree) in enumerate(zip(nodes.rows, draft.trees, strict=True)):
            rows, counts = self._rows[slot] - len(tree), [0] * len(tree)
            if rows > 0 and draft.probabilities:
                guesses = Guesses(tree, draft.tokens[i], draft.probabilities[i])
                counts = pseudo_rows(tree.parents, guesses.path_probabilities(), rows, self._values_now)
            self._counts.append(counts)
            self._inserted.append([])

    def _begun(self, layer: int, hidden_Md: Tensor, sources: Sequence[int], places: Sequence[int]) -> Tensor:
        """Streams [N, d] with which pseudo rows begin: of each source one of the steps that begin at this layer."""
        steps, index = len(self._steps[layer]), {node: i for i, node in enumerate(dict.fromkeys(sources))}
        every_step = self._project[layer](hidden_Md[torch.tensor(list(index))]).view(-1, hidden_Md.shape[1])
        rows_N = [index[node] * steps + place for node, place in zip(sources, places, strict=True)]
        return every_step[torch.tensor(rows_N)]

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        self.reset(rows)
        if features.extra is None:
            return
        begin = 0
        for row, path, inserted in zip(rows, features.paths, self._inserted, strict=True):
            mine = [begin + order for order, node in enumerate(inserted) if node == path[-1]]
            begin += len(inserted)
            if mine:
                self._states[row.slot] = features.extra[mine]


def _shapes(steps: int, rank: int, d: int, above: int, adapters: int) -> dict[str, tuple[int, ...]]:
    """Expected shape of each checkpoint tensor; the layers `above` the first step may have adapters."""
    found = {"down": (steps, rank, d), "up": (steps, d, rank)} if rank else {"weight": (steps, d, d)}
    if adapters:
        found |= {"adapter_down": (above, adapters, d), "adapter_up": (above, d, adapters)}
    return {**found, "bias": (steps, d)}


def check_layers(layers: Sequence[int], backbone: Backbone) -> tuple[int, ...]:
    """Returns the layers after which steps begin; refuses those that are not there, or out of order.

    Raises:
        UsageError: naming them and what is possible.
    """
    most = backbone.config.layers - 1
    fits = all(is_number(layer, whole=True) and 0 <= layer <= most for layer in layers)
    if not layers or not fits or list(layers) != sorted(layers):
        raise UsageError(
            f"Pseudo rows begin after layers {', '.join(map(str, layers))}; name layers from 0 to {most}, ascending."
        )
    return tuple(layers)
