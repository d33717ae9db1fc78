"""Hydra: heads that read the guesses before theirs, so that a path's tokens fit together.

A Medusa head guesses token p + k + 2 from position p alone; several of its guesses answer several first tokens, and
none knows which. Head k of Hydra reads the path's own tokens as well, [state; E(p + 1); ...; E(p + 1 + k)], and is
asked level by level, once for each node that may grow further: one batched call a level. arXiv 2402.05109.

`hydra++` puts a decoder layer of its own before the heads: it attends to every committed state, once a step, and its
stream takes the place of the state. Here the layer adds to that stream and starts at zero, as all blocks do, so that a
fresh drafter of either kind says what the output head says; the paper's blocks have a matrix in the place of
x in x + SiLU(W u + b), and its layer a norm behind it.

Trees grow best first: a node is as probable as its path, only nodes that may still be among the best are asked
(EAGLE-2, arXiv 2406.16858, §4); or they are static, made of rank paths.

Legend: B rows, K heads, d hidden width, P positions, T tokens, V draft vocabulary, F nodes that are asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.backbone.linear import DrafterHeads
from foretell.contracts import FINAL, Draft, Drafter, Features, Row
from foretell.drafters.checkpoint import find
from foretell.drafters.parts import (
    DecoderLayer,
    GuessingHeads,
    TrainingBatch,
    check_options,
    check_tree,
    draft_vocabulary,
    spread,
    tree_size,
)
from foretell.errors import ForetellError
from foretell.trees.tree import TokenTree

BEAM = 8
"""Nodes of a level that are asked for more, at most: rows that the kernels multiply at the price of one."""
WIDTH = 10
"""Guesses that each of them makes."""


class HydraHeads(GuessingHeads):
    """The heads while they learn; float32, multiplied in bfloat16.

    Args:
        head_Vd, vocabulary_V, whole, heads, output, soft: see `GuessingHeads`.
        layers: blocks of each head; the first reads the path, the others d numbers.
        tied: whether all but the first block of a head are one and the same.
        taps: layers whose streams are read besides the final state.
        grounded: whether heads read the tokens of their path; false makes them Medusa's.
        prefix: the layer before the heads, if there is one.
        dropout: of what every block reads.
    """

    def __init__(
        self, head_Vd: Tensor, vocabulary_V: Tensor, whole: int, *, heads: int, layers: int, output: str, soft: float,
        taps: Sequence[int], embed: Callable[[Tensor], Tensor], grounded: bool = True, tied: bool = False,
        prefix: DecoderLayer | None = None, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(head_Vd, vocabulary_V, whole, heads=heads, output=output, soft=soft)
        d = head_Vd.shape[1]
        self.taps, self.embed, self.grounded, self.prefix = (*taps, FINAL), embed, grounded, prefix
        self.tied, self.layers, self.dropout = tied, layers, dropout
        widths = [d * (len(self.taps) + grounded * (k + 1)) for k in range(heads)]
        self.first = nn.ParameterList([torch.zeros(d, width) for width in widths])
        self.first_bias_Kd = nn.Parameter(torch.zeros(heads, d))
        stored = min(1, layers - 1) if tied else layers - 1
        self.deep_KLdd = nn.Parameter(torch.zeros(heads, stored, d, d))
        self.deep_bias_KLd = nn.Parameter(torch.zeros(heads, stored, d))

    def blocks(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each block of head k."""
        deep = [0 if self.tied else layer for layer in range(self.layers - 1)]
        return [
            (self.first[k], self.first_bias_Kd[k]),
            *((self.deep_KLdd[k, layer], self.deep_bias_KLd[k, layer]) for layer in deep),
        ]

    def states(self, k: int, x_PI: Tensor) -> Tensor:
        """What the output matrix of head k reads, [P, d]; `x_PI` as `linear.side_by_side` gives it."""
        out_Pd = x_PI[:, : self.deep_KLdd.shape[-1]]
        for weight, bias in self.blocks(k):
            read = F.dropout(x_PI, self.dropout, self.training)
            out_Pd = x_PI = out_Pd + F.silu(F.linear(read.bfloat16(), weight.bfloat16()).float() + bias)
        return out_Pd

    def read(self, batch: TrainingBatch, sources_P: Tensor) -> Tensor:
        streams = [batch.states[tap].float() for tap in reversed(self.taps)]
        if self.prefix:
            streams[0] = self.prefix(streams[0])
        first, *others = (stream.flatten(0, 1)[sources_P] for stream in streams)
        parts = [first, *map(_normed, others)]  # as `side_by_side` does, each once
        tokens = batch.tokens_BT.flatten()
        out = []
        for k in range(self.heads):
            if self.grounded:  # beyond the end there is nothing to guess either
                parts.append(_normed(self.embed(tokens[(sources_P + k + 1).clamp(max=len(tokens) - 1)])))
            out.append(self.states(k, torch.cat(parts, 1)))
        return torch.stack(out)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {f"first.{k}": weight for k, weight in enumerate(self.first)}
        tensors |= {"first_bias": self.first_bias_Kd, "deep": self.deep_KLdd, "deep_bias": self.deep_bias_KLd}
        if self.prefix:
            tensors |= {f"prefix.{name}": weight for name, weight in self.prefix.named().items()}
        arch = {
            "heads": self.heads, "layers": self.layers, "output": self.output, "taps": list(self.taps[:-1]),
            "grounded": self.grounded, "tied": self.tied, "prefix": self.prefix is not None,
        }  # fmt: skip
        return self.stored(tensors), arch


def _normed(part_Pd: Tensor) -> Tensor:
    return F.rms_norm(part_Pd, part_Pd.shape[-1:], eps=1e-6)


Children = dict[tuple[int, ...], list[int]]
"""Rank path -> ranks of the guesses behind it, of those that have any."""


@dataclass
class _Growing:
    """What has been guessed for one row so far; node 0 is the root.

    Attributes:
        parts: what a head reads at each node that was asked.
        values: log-probability of each node's path; given: its own probability; ranks: its rank path.
        asked: nodes that the next level is asked at.
        floor: value of the least probable node that would be taken now; who is below need not be added.
    """

    tokens: list[int]
    state: list[Tensor]
    asked: list[int]
    floor: float = -math.inf
    parts: dict[int, list[Tensor]] = field(default_factory=dict)
    parents: list[int] = field(default_factory=lambda: [-1])
    given: list[float] = field(default_factory=lambda: [1.0])
    values: list[float] = field(default_factory=lambda: [0.0])
    ranks: list[tuple[int, ...]] = field(default_factory=lambda: [()])

    def add(self, parent: int, rank: int, token: int, said: float) -> None:
        self.parents.append(parent)
        self.tokens.append(token)
        self.given.append(math.exp(said))
        self.values.append(self.values[parent] + said)
        self.ranks.append((*self.ranks[parent], rank))

    def best(self, count: int) -> list[int]:
        """The most probable nodes, without the root. None is less probable than its child, and of equals the older
        come first: so they are a tree."""
        return sorted(range(1, len(self.parents)), key=lambda node: -self.values[node])[:count]

    def cut(self, nodes: Iterable[int]) -> tuple[TokenTree, list[int], list[float]]:
        """The root and these nodes."""
        kept = [0, *sorted(nodes)]
        place = {node: i for i, node in enumerate(kept)}
        tree = TokenTree((-1, *(place[self.parents[node]] for node in kept[1:])))
        return tree, [self.tokens[node] for node in kept], [self.given[node] for node in kept]


class Hydra(Drafter):
    """Drafts with trained heads.

    Args:
        arch, tensors: as `HydraHeads.checkpoint` gave them.
        paths: rank paths of static trees, prefixes first.
        size: (rows, context) -> nodes of the tree to draft, root included.
        earned: tree size -> tokens per step on held-out text, of static trees.
        grown: best first, or static.
    """

    method, plus = "hydra", False

    def __init__(
        self,
        backbone: Backbone,
        arch: dict[str, Any],
        tensors: dict[str, Tensor],
        paths: Sequence[Sequence[int]],
        size: Callable[[int, int], int],
        earned: dict[int, float] | None = None,
        grown: bool = True,
    ):
        self._earned, self.size, self.grown, self.paths = earned or {}, size, grown, [tuple(path) for path in paths]
        self.taps, self.grounded, self.heads = (*arch["taps"], FINAL), arch["grounded"], arch["heads"]
        self._embed, self._vocabulary = backbone.embed, tensors["vocabulary"].tolist()
        check_tree(self.paths, self.heads, len(self._vocabulary))
        shared = arch["output"] == "shared"
        outputs = backbone.head_rows(tensors["vocabulary"].long())[None] if shared else tensors["head"]
        most = max((rank for path in self.paths for rank in path), default=0) + 1
        self._width = min(WIDTH, len(self._vocabulary)) if grown else most
        self._levels: list[DrafterHeads] = []
        for k in range(self.heads):
            deep = [0 if arch["tied"] else layer for layer in range(arch["layers"] - 1)]
            pairs = [(tensors[f"first.{k}"], tensors["first_bias"][k].float())]
            pairs += [(tensors["deep"][k, layer], tensors["deep_bias"][k, layer].float()) for layer in deep]
            matrices: Any = self._levels[0] if k and len(outputs) == 1 else [outputs[k]]
            self._levels.append(backbone.heads([[pair] for pair in pairs], matrices))
        layer = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("prefix.")}
        self._prefix = backbone.layer(layer) if arch["prefix"] else None
        self._cache: KVCache | None = None
        self._parameters = sum(tensor.numel() for name, tensor in tensors.items() if name != "vocabulary")
        self._states: dict[int, list[Tensor]] = {}  # slot -> of the newest token but one: state, then streams

    @classmethod
    def build(
        cls, backbone: Backbone, checkpoint: str = "", nodes: int = 0, grown: bool = True, any_backbone: bool = False
    ) -> Hydra:
        """See `Drafter.build`.

        Args:
            checkpoint: folder of trained heads; by default those that came with foretell for this backbone.
            nodes: tree size; by default what `foretell tune` found best here, else 16.
            grown: grow each step's tree anew from what the heads say; false takes the one found for the heads.
            any_backbone: accept heads of another model of the same sizes.
        """
        found, tensors = find(cls.method, backbone, checkpoint, any_backbone)
        earned = {int(size): tokens for size, tokens in found.tokens_per_step.items()}
        size = tree_size(backbone, nodes, earned)
        try:
            return cls(backbone, found.arch, tensors, found.paths, size, earned, grown)
        except (KeyError, IndexError) as error:
            where = checkpoint or f"The {cls.method} drafter that came with foretell"
            raise ForetellError(f"{where} is damaged: it lacks {error}; copy or train it again.") from error

    @classmethod
    def trainable(
        cls, backbone: Backbone, counts_V: Tensor, *, heads: int = 4, layers: int = 0, output: str = "tied",
        draft_vocab: int = 8192, soft: float = 0.0, taps: int = 2, grounded: bool = True, tied: bool = False,
        dropout: float = 0.0,
    ) -> HydraHeads:  # fmt: skip
        """Fresh heads; see `parts.Method`.

        Args:
            layers: blocks of each head; by default 1, and 2 of hydra++.
            soft: share of the loss that is against the backbone's distribution instead of the written token.
            taps: how many streams part-way up are read, evenly spread over the layers.
            grounded: whether heads read the tokens of their path.
            tied: whether all but the first block of a head are one and the same.
        """
        layers = layers or 1 + cls.plus
        check_options(
            backbone, output, heads=heads, layers=layers, soft=soft, draft_vocab=draft_vocab, taps=taps, dropout=dropout
        )
        vocabulary_V = draft_vocabulary(counts_V, draft_vocab)
        return HydraHeads(
            backbone.head_rows(vocabulary_V).cpu(), vocabulary_V, len(counts_V), heads=heads, layers=layers,
            output=output, soft=soft, taps=spread(taps, backbone),
            embed=backbone.embed, grounded=grounded, tied=tied, dropout=dropout,
            prefix=DecoderLayer(backbone.config, backbone.rotation) if cls.plus else None,
        )  # fmt: skip

    @property
    def most_nodes(self) -> int:
        return 128

    @property
    def tokens_per_step(self) -> dict[int, float]:
        return self._earned

    @property
    def parameters(self) -> int:
        return self._parameters

    # -- what was committed -----------------------------------------------------------------------------------------

    def bind(self, cache: KVCache) -> None:
        if self._prefix:
            self._cache = self._prefix.new_cache(cache.rows, cache.slots)
        self._states.clear()

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._states.pop(row.slot, None)
            if self._cache:  # an interruption may have kept the layer from what the engine had committed
                self._cache.reserve(self._cache.slots, rows=row.slot + 1)
                self._cache.rollback(row.slot, min(row.reused, self._cache.lengths[row.slot]))

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        streams = [features.taps[tap] for tap in reversed(self.taps)]
        if self._prefix:
            streams[0] = self._attended([row.slot for row in rows], features.counts, streams[0])
        end = 0
        for row, count in zip(rows, features.counts, strict=True):
            end += count
            self._states[row.slot] = [stream[end - 1] for stream in streams]

    def _attended(self, slots: list[int], counts: list[int], states_Md: Tensor) -> Tensor:
        """The prefix layer over newly committed states; it keeps their keys and values."""
        assert self._prefix and self._cache
        self._cache.reserve(self._cache.slots, rows=max(slots) + 1)
        lengths = [self._cache.lengths[slot] for slot in slots]
        self._cache.reserve(max(length + count for length, count in zip(lengths, counts, strict=True)))
        stream_Md, _ = self._prefix.run_layers(states_Md, Nodes.chains(slots, lengths, counts), self._cache)
        self._cache.commit(slots, [range(count) for count in counts])
        return stream_Md

    # -- guesses ----------------------------------------------------------------------------------------------------

    def draft(self, rows: Sequence[Row]) -> Draft:
        count = min(self.size(len(rows), max(len(row.tokens) for row in rows)), self.most_nodes) - 1
        children = None if self.grown else _children(self.paths[:count])
        trees = []
        for row in rows:
            state = self._states.get(row.slot)  # none after a prompt of one token
            trees.append(_Growing([row.tokens[-1]], state or [], [0] if state and children != {} else []))
        for level in self._levels:
            asked = [(tree, node) for tree in trees for node in tree.asked]
            if not asked:
                break
            before = [len(tree.parents) for tree in trees]
            self._ask(level, asked, children)
            for tree, begin in zip(trees, before, strict=True):
                if children is None:
                    best = tree.best(count)
                    tree.floor = tree.values[best[-1]] if len(best) == count else -math.inf
                    tree.asked = [node for node in best if node >= begin][:BEAM]
                else:
                    tree.asked = [node for node in range(begin, len(tree.parents)) if tree.ranks[node] in children]
        cut = [tree.cut(tree.best(count) if children is None else range(1, len(tree.parents))) for tree in trees]
        return Draft([tree for tree, _, _ in cut], [tokens for _, tokens, _ in cut], [given for _, _, given in cut])

    def _ask(
        self,
        level: DrafterHeads,
        asked: Sequence[tuple[_Growing, int]],
        children: dict[tuple[int, ...], list[int]] | None,
    ) -> None:
        """One call of a level's head for all nodes that are asked; its guesses become their children."""
        if self.grounded:
            embedded_Fd = self._embed(torch.tensor([tree.tokens[node] for tree, node in asked]))
            for (tree, node), embedded in zip(asked, embedded_Fd, strict=True):
                tree.parts[node] = [*(tree.parts[tree.parents[node]] if node else tree.state), embedded]
        said_FKR, best_FKR = level.top([tree.parts.get(node, tree.state) for tree, node in asked], self._width)
        for (tree, node), said, best in zip(asked, said_FKR[:, 0].tolist(), best_FKR[:, 0].tolist(), strict=True):
            for rank in range(self._width) if children is None else children[tree.ranks[node]]:
                log_p = min(0.0, said[rank])  # no number counts as certain
                if tree.values[node] + log_p <= tree.floor:
                    break  # nor will the next: they come best first
                tree.add(node, rank, self._vocabulary[best[rank]], log_p)


def _children(paths: Sequence[tuple[int, ...]]) -> Children:
    found: Children = {}
    for path in paths:
        found.setdefault(path[:-1], []).append(path[-1])
    return found


class HydraPlus(Hydra):
    """With a layer before the heads."""

    method, plus = "hydra++", True
