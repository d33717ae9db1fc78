"""The seam: draft -> verify -> commit -> observe.

A drafter guesses a tree of future tokens for each row; the engine verifies the trees in one forward pass, commits
the path that the target model agrees with, and lets the drafter observe what was committed. The engine and the
benchmark know drafters only through this file.

Between steps, the cache of a row holds every committed token but the newest: the newest is the root of the next
tree and enters the model together with the guesses.

Legend: B rows, N nodes of one tree, M nodes of all trees, V vocabulary, d hidden width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from foretell.errors import UsageError
from foretell.requests import SamplingParams
from foretell.trees import TokenTree

if TYPE_CHECKING:
    from foretell.backbone import Adapters, Backbone, KVCache, Nodes

FINAL_NORM = -1
"""Tap of the final norm's output: what the output head reads. Tap l >= 0 is the residual stream after l layers."""


class Row(Protocol):
    """One sequence of the batch, as a drafter sees it."""

    slot: int
    """Index of the row's cache; stable while the row lives, reused afterwards."""
    tokens: list[int]
    """Prompt and output so far; the last one is the root of the next tree."""
    prompt_length: int
    reused: int
    """Leading tokens whose cache, and whose features, this slot already had from an earlier request."""
    params: SamplingParams

    @property
    def budget(self) -> int:
        """Tokens that may still be emitted."""
        ...


@dataclass(frozen=True)
class Resume:
    """States from which verification resumes: drafting has run the lower layers over the first nodes of each tree.

    Their keys and values lie in the slots of these nodes. The engine runs the others through the same layers.

    Attributes:
        layer: number of layers that were run.
        ran: per row, how many nodes they were run over: the first ones of the tree, root included; 0 for none.
        hidden_Rd: residual streams of the R nodes after `layer` layers, float32, row after row.
        taps: tap -> states [R, d] of the same nodes, for those of the drafter's taps that lie below `layer`.
    """

    layer: int
    ran: list[int]
    hidden_Rd: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)

    def kept(self, nodes: Sequence[Sequence[int]]) -> Resume:
        """Keeps some of the nodes, which become the first ones of smaller trees.

        Args:
            nodes: per row, which of its first `ran` nodes, in their new order.
        """
        starts = accumulate(self.ran, initial=0)
        index = [start + node for start, those in zip(starts, nodes, strict=False) for node in those]
        pieces = {tap: [states] for tap, states in self.taps.items()}
        return self._selected([self.hidden_Rd], pieces, index, [len(those) for those in nodes])

    def joined(self, counts: Sequence[int], hidden_Od: Tensor, taps: Mapping[int, Tensor]) -> Resume:
        """Adds the O other nodes, which the engine has run: each row's nodes follow those that drafting ran.

        Args:
            counts: per row, how many others.
            hidden_Od: their residual streams after `layer` layers, row after row.
            taps: states [O, d] of the same nodes, for the taps of `self.taps`.
        """
        index: list[int] = []
        ran, other = 0, len(self.hidden_Rd)
        for before, count in zip(self.ran, counts, strict=True):
            index += [*range(ran, ran + before), *range(other, other + count)]
            ran, other = ran + before, other + count
        pieces = {tap: [states, taps[tap]] for tap, states in self.taps.items()}
        sums = [before + count for before, count in zip(self.ran, counts, strict=True)]
        return self._selected([self.hidden_Rd, hidden_Od], pieces, index, sums)

    def _selected(
        self, hidden: list[Tensor], taps: dict[int, list[Tensor]], index: list[int], ran: list[int]
    ) -> Resume:
        index_K = torch.tensor(index, dtype=torch.int64, device=self.hidden_Rd.device)

        def select(pieces: list[Tensor]) -> Tensor:
            return torch.cat(pieces).index_select(0, index_K)

        return Resume(self.layer, ran, select(hidden), {tap: select(pieces) for tap, pieces in taps.items()})


@dataclass
class Draft:
    """Guesses for B rows.

    Attributes:
        trees: one per row.
        tokens: ids node by node, one list per row; the root holds the row's newest token.
        probabilities: per row how probable each node is given its parent (1 for the root), or None where that is
            not known. Exact verification never needs them; trees that are merged or cut keep the most probable guesses.
        resume: given when the drafter has already run lower layers over some of the nodes.
        held: whether the drafter guessed nothing because no tree pays at what steps cost here, or for what is left, or
            was not asked; such a step inserts no rows either.
    """

    trees: list[TokenTree]
    tokens: list[list[int]]
    probabilities: list[list[float]] | None = None
    resume: Resume | None = None
    held: bool = False

    def __post_init__(self) -> None:
        for tree, ids in zip(self.trees, self.tokens, strict=True):
            if len(tree) != len(ids):
                raise UsageError(f"A draft has {len(ids)} tokens for a tree of {len(tree)} nodes; they must be equal.")

    def cut_below(self, row: int, height: int) -> None:
        """Drops a row's guesses deeper than `height` (at least 0), unless nodes that drafting ran would move."""
        tree = self.trees[row]
        if tree.height <= height:
            return
        kept = tree.keep(height)
        if self.resume and kept[: self.resume.ran[row]] != list(range(self.resume.ran[row])):
            return  # they hold the slots after those that would be cut
        self.trees[row] = tree.pruned(height)
        self.tokens[row] = [self.tokens[row][node] for node in kept]
        if self.probabilities:
            self.probabilities[row] = [self.probabilities[row][node] for node in kept]


@dataclass
class Verdict:
    """The outcome of verification, per row: the accepted path (the root first) and the token that follows it.

    The accepted tokens are the path's without the root; `bonus` is the target's own choice after them and becomes
    the next root. A step therefore emits len(path) tokens: the acceptance length.
    """

    paths: list[list[int]]
    bonus: list[int]


@dataclass
class Features:
    """States of the committed nodes, from the pass that verified them; B rows one after another.

    Attributes:
        counts: committed nodes of each row, the old root first; their tokens are known to the rows.
        taps: tap -> hidden states [sum of counts, d] float32, in committed order; they may be kept, not modified.
        extra: final-norm output of the rows that `at_cut` inserted, float32 [rows inserted, d], tree by tree, in the
            order in which they were inserted; None without any.
        paths: the accepted path of each row (empty while a prompt is prefilled).
    """

    counts: list[int]
    taps: dict[int, Tensor]
    extra: Tensor | None = None
    paths: list[list[int]] = field(default_factory=list)


class Insertion(NamedTuple):
    """Rows to insert behind trees: the parents of each tree's new rows, and their streams [N, d], tree by tree.

    A parent is a node of the tree, or a new row before its child.
    """

    parents: Sequence[Sequence[int]]
    streams_Nd: Tensor


@dataclass(frozen=True)
class NoOptions:
    """Options of a drafter that has none."""


class MicroSteps(Protocol):
    """The micro steps of one macro step of B rows."""

    def run(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Returns what the output head reads after the newest token of some of the B rows, [R, d]."""
        ...


class Fused(Protocol):
    """Grafts that let a model write several tokens a step and keep them in one slot (`engine.fused`).

    Attributes:
        taps: the states that micro steps read; the last is `FINAL_NORM`.
        most: tokens of a macro step, at most.
        confidence: micro steps go on while the probability that they should is at least this.
    """

    taps: tuple[int, ...]
    most: int
    confidence: float

    def fuse(self, segments: Sequence[Sequence[int]]) -> Tensor:
        """Returns the vector of each segment of tokens, [G, d] float32; of one token its embedding."""
        ...

    def new_cache(self, rows: int) -> KVCache:
        """Returns a cache for the micro steps of one engine, with room for so many rows."""
        ...

    def begin(self, features_BFd: Tensor, cache: KVCache) -> MicroSteps:
        """Begins a macro step of B rows, whose states these are, in the order of `taps`.

        Args:
            cache: what it holds is forgotten.
        """
        ...

    def stops(self, states_Rd: Tensor) -> list[float]:
        """Returns how probable it is that the token that follows each state is the last of its macro step."""
        ...


class Drafter(ABC):
    """One method: a file under `drafters/` and a row in its table, or a class of the user's own.

    Options: a frozen dataclass whose fields are made by `drafting.options.option`; it is the only list of them.

    One engine calls its copy of a drafter (`attached`) from one thread at a time. `reset`, `draft` and `observe` get
    rows in any order, and `draft` and `observe` may get some of the engine's rows only; `row.slot` tells them apart,
    and a later row reuses the slot of one that has ended.

    Attributes:
        taps: hidden states to hand to `observe` (see `FINAL_NORM`).
        cuts: layers after which `at_cut` may add rows to the verification pass.
        adapters: beside all layers above the first cut, for these rows alone; None without any.
        lossless: whether the output equals plain decoding's under exact verification.
        fused: what writes macro steps, for a method that verifies nothing; it then never drafts.
        trust: the probability above which its guesses are accepted unverified in greedy rows, which is lossy; None
            verifies all.
        depth: layers of the backbone that drafting runs, in the engine's cache (see `bind`).
        method: its name among measured costs of drafting; empty where these do not choose its trees.
        usual_cost: cost of drafting as a share of a plain step, used until it is measured on this machine.
        node_cost: what a node of a step costs besides the root, on average, as a share of one that runs through all
            layers: less than 1 where rows are inserted.
        parameters: number of parameters that it adds to the model.
        tokens_per_step: number of nodes of a tree -> tokens per step on held-out text, where that was measured.
        backbone, options: the arguments of `build`.
    """

    Options: ClassVar[type[Any]] = NoOptions
    taps: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    adapters: Adapters | None = None
    lossless: bool = True
    fused: Fused | None = None
    trust: float | None = None
    depth: int = 0
    method: str = ""
    usual_cost: float = 0.15
    node_cost: float = 1.0
    parameters: int = 0
    tokens_per_step: Mapping[int, float] = MappingProxyType({})

    backbone: Backbone
    options: Any

    def __init__(self, backbone: Any = None, options: Any = None):
        self.backbone, self.options = backbone, options

    @classmethod
    def build(cls, backbone: Backbone, options: Any) -> Drafter:
        """Returns the drafter for a backbone.

        Args:
            options: an instance of `Options`, whose values `drafting.options.parse` has checked.

        Raises:
            UsageError, ForetellError: it cannot be made for this backbone; the sentence names the remedy.
        """
        return cls(backbone, options)

    @property
    def max_nodes(self) -> int:
        """The largest tree it will draft, root included: the engine reserves that many cache slots."""
        return 64

    @property
    def extra_nodes(self) -> int:
        """The most rows that `at_cut` adds behind one tree: the engine reserves slots for them too."""
        return 0

    def attached(self, cache: KVCache) -> Self:
        """Returns a drafter for one engine, which shares the weights and has its own state of rows."""
        own = copy.copy(self)
        own.bind(cache)
        return own

    def bind(self, cache: KVCache) -> None:  # noqa: B027
        """Clears the state of all rows and takes an engine's cache, in which methods may run layers while drafting.

        Assign new containers instead of emptying the old ones: engines that share the drafter have shallow copies.
        """

    def reusable_tokens(self, slot: int, tokens: int) -> int:
        """Returns how many of the first `tokens` in a slot's cache need not be passed to `observe` again.

        The next request in this slot begins with these tokens; the engine runs those that are not reusable again.
        """
        return tokens

    def forget(self, slots: Sequence[int]) -> None:  # noqa: B027
        """Frees the state of these slots, whose caches no later request will reuse."""

    def reset(self, rows: Sequence[Row]) -> None:  # noqa: B027
        """Clears the state of slots that new rows have taken, and reserves memory for all that these may need.

        Raises:
            ForetellError: there is no memory for a row; the engine refuses that request, and continues with the others.
        """

    @abstractmethod
    def draft(self, rows: Sequence[Row]) -> Draft:
        """Returns guesses for each of these rows, in their order; they may be some of the engine's only.

        A tree of the root alone is always allowed.
        """

    def observe(self, rows: Sequence[Row], features: Features) -> None:  # noqa: B027
        """Receives what was committed: after every chunk of a prompt, and after every step."""

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Nodes, draft: Draft) -> Insertion | None:
        """Returns rows to insert after `layer` layers of verification; None for none.

        They follow the nodes of their tree. An inserted row attends to its ancestors and itself, no drafted node
        attends to it, and what it writes to the cache is forgotten.

        Args:
            hidden_Md: streams of all nodes, not to be modified.
            nodes: the drafted nodes, followed in each tree by what earlier cuts have inserted.
            draft: what is verified: what `draft` returned, less what no budget is left for, with the guesses of prompt
                lookup. Steps whose draft is `held` insert nothing.
        """
        return None
