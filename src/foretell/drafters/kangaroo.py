"""Kangaroo: the model's lower layers draft, followed by a trained adapter.

A guess costs the layers up to the exit, the adapter (one block of attention with a cache of its own, a norm before and
after it) and the output head, here over a draft vocabulary. The lower layers compute what verification would compute,
so it goes on above them. arXiv 2404.18911, §3.1; drafts that end where the adapter is unsure, §3.2.

As published, a draft is a chain: the adapter's best token, until its probability falls below a threshold, at most γ
tokens. Or it is a tree that grows best first (`trees.growing`): lower layers cost the same for one node and for
sixteen, and they run once more only if that is expected to gain more tokens than it costs.

The adapter begins as the identity and its last norm as the backbone's; in the paper both begin as PyTorch makes them.
It has the backbone's heads and key/value heads, where the paper's has one key/value head for each head.

Legend: B rows, F frontier nodes of all rows, P positions, d hidden width, V draft vocabulary, R guesses of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.backbone.base import SKIP_MLP
from foretell.contracts import Draft, Drafter, Features, Row
from foretell.drafting.checkpoint import (
    CheckpointOptions,
    Loaded,
    check_shapes,
    damage_named,
    find,
    output_shape,
    read_scales,
)
from foretell.drafting.kernels import kernels_for
from foretell.drafting.learning.decoder_layer import DecoderLayer
from foretell.drafting.learning.heads import GuessingHeads, HeadTraining, draft_outputs
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.drafting.lower_layers import (
    MAX_TREE_NODES,
    EarlyExitTrees,
    check_exit,
    grow_in_one_call,
    guesses_of,
    last_of_each,
)
from foretell.drafting.options import option, stored_options
from foretell.drafting.protocols import LowerLayerDrafting
from foretell.drafting.tree_size import DEFAULT_NODES, TreeSize, no_guesses, size_for, tree_size
from foretell.drafting.waiting import WaitingStates
from foretell.errors import UsageError
from foretell.loading.config import ModelConfig
from foretell.trees.calibration import Floats

BEAM, WIDTH = 8, 10
"""Nodes of a level that are expanded, at most, and guesses of each."""
OVERHEAD = 0.12
"""Cost of adapter, output matrix and calls in a level, as a share of a step."""


class KangarooAdapter(GuessingHeads):
    """The adapter in training: at position p it guesses token p + 1, as the output head does (§3.1).

    Args:
        head_Vd, vocabulary_V, vocab_size: see `GuessingHeads`.
        training: see `Kangaroo.Training`.
        exit: the layer after which it reads the stream.
    """

    ahead = 1

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, vocab_size: int, training: Kangaroo.Training, *, exit: int,
        config: ModelConfig, rotation: Callable[[Tensor], tuple[Tensor, Tensor]], norm_d: Tensor,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, vocab_size, training, heads=1, output=training.output)
        self.options, self.taps, self.exit = training, (exit,), exit
        self.layer, self.norm = DecoderLayer(config, rotation, training.mlp), nn.Parameter(norm_d.clone().float())
        self.eps = config.eps

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        stream_Pd = self.layer(batch.states[self.exit].float()).flatten(0, 1)[sources_P]
        return F.rms_norm(stream_Pd, stream_Pd.shape[-1:], self.norm, self.eps)[None]

    @torch.no_grad()
    def start(self, arch: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if arch["taps"] != list(self.taps):
            (exit,) = arch["taps"]
            raise UsageError(
                f"It reads the model after layer {exit}, not after layer {self.exit}; train with `exit={exit}`."
            )
        if arch["mlp"] > self.options.mlp:
            raise UsageError("It has an MLP, which this adapter would lack; train with `mlp=True`.")
        for name, weight in self.layer.named().items():
            if f"adapter.{name}" in tensors:
                weight.copy_(tensors[f"adapter.{name}"])
        self.norm.copy_(tensors["norm"])
        self.start_outputs(tensors)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"adapter.{name}": weight for name, weight in self.layer.named().items()} | {"norm": self.norm}
        return self.stored(tensors), {"heads": 1, "taps": [self.exit]} | stored_options(self.options)


class Kangaroo(Drafter):
    """Drafts with the lower layers and a trained adapter.

    Args:
        arch, tensors: as `KangarooAdapter.checkpoint` gave them.
        size: nodes of a tree, root included; 1 drafts nothing.
        tokens_per_step: tree size -> tokens per step on held-out text.
        chain: whether drafts are chains, as published.
        steps: γ, most tokens of a chain and levels of a tree.
        threshold: η, a chain ends after a token less probable than this.
        scales: calibration of the adapter, used when trees grow.
    """

    method, usual_cost = "kangaroo", 0.35

    @dataclass(frozen=True)
    class Options(CheckpointOptions):
        chain: bool = option(False, "Draft chains, as in the paper, instead of trees.")
        steps: int = option(
            6, "How often the lower layers are run for a draft, at most.", low=0, high=MAX_TREE_NODES - 1
        )
        threshold: float = option(
            0.6, "A chain ends after a token less probable than this: 0 never, 1 always.", low=0, high=1
        )

    @dataclass(frozen=True)
    class Training(HeadTraining):
        soft: float = option(
            1.0, "Share of the loss against the model's whole distribution instead of the written token.", low=0, high=1
        )
        exit: int = option(0, "Layers that draft; by default a tenth of them.")
        output: str = option(
            "shared", "Output matrix: the model's own, as in the paper, or a trained copy.",
            choices=("shared", "tied"), stored=True,
        )  # fmt: skip
        mlp: bool = option(False, "Whether an MLP follows the adapter's attention; not in the paper.", stored=True)

    def __init__(
        self, backbone: Backbone, arch: dict[str, Any], tensors: dict[str, Tensor], size: TreeSize,
        tokens_per_step: dict[int, float] | None = None, chain: bool = False, steps: int = 6, threshold: float = 0.6,
        scales: Sequence[Sequence[float]] = (),
    ):  # fmt: skip
        d = backbone.config.hidden
        check_shapes(tensors, {"norm": (d,)} | output_shape(arch, d, len(tensors["vocabulary"])))
        (self.exit,) = self.taps = (check_exit(arch["taps"][0], backbone),)
        self.depth, self._backbone, self.tokens_per_step, self.size = self.exit, backbone, tokens_per_step or {}, size
        self.chain, self.steps, self.threshold, self._scales = chain, steps, threshold, read_scales(scales, 1)
        self._vocabulary_V = tensors["vocabulary"].long().numpy()
        layer = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("adapter.")}
        self._adapter = kernels_for(backbone).own_layers([layer], tensors["norm"].float())
        self._skip = None if arch["mlp"] else bytes([SKIP_MLP])
        shared = arch["output"] == "shared"
        self._head = kernels_for(backbone).heads(
            [], [backbone.head_rows(tensors["vocabulary"].long()) if shared else tensors["head"][0]]
        )
        self._width = 1 if chain else min(WIDTH, len(self._vocabulary_V))
        self._one_call = kernels_for(backbone).lower_layers(LowerLayerDrafting(
            self._head, self._width, self._vocabulary_V, None if chain or not self._scales else self._scales[0],
            self._adapter, self._skip,
        ))  # fmt: skip
        self._min_gain = 2 * (self.exit / backbone.config.layers + OVERHEAD)  # at two tokens per step
        self.parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
        self._cache: KVCache | None = None
        self._own = self._adapter.new_cache(1, 1)
        self._waiting = WaitingStates()
        self._lost: set[int] = set()  # slots whose row was not observed from its beginning

    @classmethod
    def build(cls, backbone: Backbone, options: Options, loaded: Loaded | None = None) -> Kangaroo:
        """See `Drafter.build`, and `TrainableMethod.build` for `loaded`."""
        found, tensors = loaded or find(cls.method, backbone, options.checkpoint, options.any_backbone)
        nodes = options.nodes or (DEFAULT_NODES if options.chain else 0)  # chains have their steps
        size = tree_size(backbone, nodes, found.tokens_per_step, cls.method, cls.usual_cost, MAX_TREE_NODES)
        with damage_named(options.checkpoint or f"The {cls.method} drafter that ships with foretell"):
            return cls(
                backbone, found.arch, tensors, size, found.tokens_per_step, options.chain, options.steps,
                options.threshold, found.calibration,
            )  # fmt: skip

    @classmethod
    def trainable(
        cls, backbone: Backbone, training: Training, counts_V: Tensor, folder: Path | None = None
    ) -> KangarooAdapter:
        """Returns a fresh adapter; see `TrainableMethod`."""
        return KangarooAdapter(
            *draft_outputs(backbone, counts_V, training.draft_vocab), training,
            exit=check_exit(training.exit or max(1, round(backbone.config.layers / 10)), backbone),
            config=backbone.config, rotation=backbone.rotation,
            norm_d=backbone.norm(torch.ones(1, backbone.config.hidden, device=backbone.device))[0].cpu(),
        )  # fmt: skip

    @property
    def max_nodes(self) -> int:
        return MAX_TREE_NODES

    # -- committed states -----------------------------------------------------------------------------------------

    def bind(self, cache: KVCache) -> None:
        self._cache, self._own = cache, self._adapter.new_cache(cache.rows, 0)
        self._waiting, self._lost = WaitingStates(), set(range(cache.rows))

    def _known(self, slot: int) -> int:
        """Committed states of a slot, read by the adapter or waiting."""
        return self._own.lengths[slot] + self._waiting.count(slot)

    def reusable_tokens(self, slot: int, tokens: int) -> int:
        """None after an interruption that lost states."""
        return 0 if slot in self._lost else min(tokens, self._known(slot))

    def forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._waiting.keep(slot, 0)
        self._own.release(slots)
        self._own.trim()

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            length, reused = self._own.lengths[row.slot], min(row.reused, self._known(row.slot))
            self._lost.discard(row.slot)
            self._own.rollback(row.slot, min(length, reused))
            if not reused:
                self._own.release([row.slot])
            self._own.reserve({row.slot: len(row.tokens) + row.budget + MAX_TREE_NODES})
            self._waiting.keep(row.slot, max(0, reused - length))

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        begin = 0
        for row, count in zip(rows, features.counts, strict=True):
            if self._waiting.add(row.slot, [features.taps[self.exit]], begin, count):
                self._read([row.slot], [self._waiting.of(row.slot)[0]])
            begin += count

    def _read(self, slots: Sequence[int], states: Sequence[Tensor]) -> Tensor:
        """Runs committed states through the adapter and into its cache; returns its streams [P, d]."""
        lengths, counts = [self._own.lengths[slot] for slot in slots], list(map(len, states))
        # with room for the next tree: growth of the cache keeps committed states only, and the root is not committed
        ends = [length + count + MAX_TREE_NODES for length, count in zip(lengths, counts, strict=True)]
        self._own.reserve(dict(zip(slots, ends, strict=True)))
        stream_Pd = self._attend(torch.cat(list(states)), Nodes.chains(slots, lengths, counts))
        self._own.commit(slots, [range(count) for count in counts])
        for slot in slots:
            self._waiting.keep(slot, 0)
        return stream_Pd

    def _attend(self, states_Pd: Tensor, nodes: Nodes) -> Tensor:
        return self._adapter.run_layers(states_Pd, nodes, self._own, skip=self._skip)[0]

    # -- guesses ----------------------------------------------------------------------------------------------------

    def draft(self, rows: Sequence[Row]) -> Draft:
        assert self._cache is not None, "the engine binds its cache first"
        self._lost |= {row.slot for row in rows if self._known(row.slot) != self._cache.lengths[row.slot]}
        count, how = self.steps, dict[str, Any]({"thresholds": [self.threshold] * len(rows)})
        if not self.chain:
            unread = sum(self._waiting.count(row.slot) for row in rows)
            count = min(size_for(self.size, rows, unread), MAX_TREE_NODES) - 1
            how = {"beam": BEAM, "min_gain": self._min_gain}
            if not count:
                return no_guesses(rows)
        if self._one_call is None:
            return EarlyExitTrees(self._backbone, self._cache, rows).grow(
                self.exit, self._guesses, count, self.steps, **how
            )
        waiting = [row.budget > 1 and self._waiting.count(row.slot) > 0 for row in rows]
        states = [self._waiting.of(row.slot)[0] if some else None for row, some in zip(rows, waiting, strict=True)]
        known = [
            self._own.lengths[row.slot] + (0 if new is None else len(new))
            for row, new in zip(rows, states, strict=True)
        ]
        self._own.reserve({row.slot: length + MAX_TREE_NODES for row, length in zip(rows, known, strict=True)})
        draft = grow_in_one_call(
            self._one_call, self._cache, rows, self.exit, count, self.steps, own=self._own, waiting=states, **how
        )
        for row in rows:
            if row.budget > 1:
                self._waiting.keep(row.slot, 0)
        return draft

    def _guesses(self, hidden_Fd: Tensor, nodes: Nodes) -> tuple[Floats, list[list[int]]]:
        """Log-probabilities and tokens of the guesses after nodes that have passed the lower layers, best first."""
        slots = nodes.cache_rows.tolist()
        if not any(nodes.first):  # roots: the adapter reads them together with the states committed since
            states = [
                torch.cat([self._waiting.of(slot)[0], h_1d]) if self._waiting.count(slot) else h_1d
                for slot, h_1d in zip(slots, hidden_Fd.split(1), strict=True)
            ]
            stream_Fd = last_of_each(self._read(slots, states), list(map(len, states)))
            for slot in slots:  # the root is not committed yet
                self._own.rollback(slot, self._own.lengths[slot] - 1)
        else:
            lengths = [self._own.lengths[slot] for slot in slots]
            stream_Fd = self._attend(hidden_Fd, Nodes(nodes.trees, slots, lengths, nodes.first))
        scale = None if self.chain or not self._scales else self._scales[0]
        return guesses_of(self._head, self._adapter.norm(stream_Fd), self._width, self._vocabulary_V, scale)
