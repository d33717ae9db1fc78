"""The seam: draft -> verify -> commit -> observe.

A drafter guesses a tree of future tokens for each row; the engine verifies the trees in one forward pass, commits
the path that the target model agrees with, and lets the drafter observe what was committed. The engine, the server
and the benchmark know drafters only through this page.

Between steps, the cache of a row holds every committed token but the newest: the newest is the root of the next
tree and enters the model together with the guesses.

Legend: B rows, N nodes of one tree, M nodes of all trees, V vocabulary, d hidden width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from foretell.errors import UsageError
from foretell.requests import SamplingParams
from foretell.trees import TokenTree

if TYPE_CHECKING:
    from foretell.backbone import Backbone, KVCache

FINAL_NORM = -1
"""Tap of the final norm's output: what the output head reads. Tap l >= 0 is the residual stream after l layers."""


class Row(Protocol):
    """What a drafter sees of one sequence in the batch."""

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
    """Where verification goes on: drafting has run the lower layers over the first nodes of each tree.

    Their keys and values lie in the slots of these nodes. The engine runs the other nodes up to the same layer.

    Attributes:
        layer: layers that were run.
        ran: per row how many nodes, the root first; 0 for none.
        hidden_Rd: their streams after these layers, float32, row after row.
        taps: tap -> states [R, d] of the same nodes, for those of the drafter's taps that lie below `layer`.
    """

    layer: int
    ran: list[int]
    hidden_Rd: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)

    def selected(self, indices: Sequence[int], ran: list[int]) -> Resume:
        """Returns the same for some of the nodes: `indices` of their states, `ran` of them in each row."""
        index_R = torch.tensor(indices, dtype=torch.int64, device=self.hidden_Rd.device)
        taps = {tap: states.index_select(0, index_R) for tap, states in self.taps.items()}
        return Resume(self.layer, ran, self.hidden_Rd.index_select(0, index_R), taps)


@dataclass
class Draft:
    """Guesses for B rows.

    Attributes:
        trees: one per row.
        tokens: ids node by node, one list per row; the root holds the row's newest token.
        probabilities: per row the probability of each node given its parent (1 for the root), or None if unknown.
            Verification does not need them; trees that are merged or cut keep the most probable guesses.
        resume: set if the drafter has run lower layers over some of the nodes.
        held: whether nothing was guessed because no tree pays at the step costs of this machine.
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
    """States that the pass computed for the committed nodes; B rows one after another.

    Attributes:
        counts: committed nodes of each row, the old root first; their tokens are known to the rows.
        taps: tap -> hidden states [sum of counts, d] float32, in committed order.
        extra: the rows that the drafter's `at_cut` inserted, after the final norm: float32 [rows inserted, d], or None.
        paths: the accepted path of each row (empty while a prompt is prefilled).
    """

    counts: list[int]
    taps: dict[int, Tensor]
    extra: Tensor | None = None
    paths: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class NoOptions:
    """Options of a drafter that has none."""


class Drafter(ABC):
    """One method: a file under `drafters/` and a row in its table, or a class of the user's own.

    Options: a frozen dataclass whose fields are made by `drafting.options.option`; it is the only list of them.

    One engine calls its copy of a drafter (`attached`) from one thread at a time. `reset`, `draft` and `observe` get
    rows in any order, and `draft` and `observe` may get some of the engine's rows only; `row.slot` tells them apart,
    and a later row reuses the slot of one that has ended.

    Attributes:
        taps: hidden states that `observe` is given (see `FINAL_NORM`).
        cuts: layers after which `at_cut` may add rows to the verification pass.
        lossless: whether the output equals plain decoding's under exact verification.
        depth: layers of the backbone that drafting runs, in the engine's cache (see `bind`).
        usual_cost: drafting time as a share of a plain step, until it is measured.
        parameters: numbers that it adds to the model.
        tokens_per_step: tree size -> tokens per step on held-out text, if that was measured.
        backbone, options: what `build` was given.
    """

    Options: ClassVar[type[Any]] = NoOptions
    taps: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    lossless: bool = True
    depth: int = 0
    usual_cost: float = 0.15
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
        """The most rows that `at_cut` adds per drafted node."""
        return 0

    def attached(self, cache: KVCache) -> Self:
        """Returns a copy for the rows of one engine, with the same weights and with state of its own."""
        own = copy.copy(self)
        own.bind(cache)
        return own

    def bind(self, cache: KVCache) -> None:  # noqa: B027
        """Starts with empty state for the rows of an engine's cache, in which drafting may run layers.

        Assign new state rather than emptying the old: engines that share the drafter have shallow copies of it.
        """

    def reusable_tokens(self, slot: int, tokens: int) -> int:
        """How many of the first `tokens` in a slot's cache the next request may reuse without observing them again.

        The rest is computed anew for that request, which begins with the same tokens.
        """
        return tokens

    def forget(self, slots: Sequence[int]) -> None:  # noqa: B027
        """Frees what was kept of these slots: no later request will reuse their tokens."""

    def reset(self, rows: Sequence[Row]) -> None:  # noqa: B027
        """Begins new rows: drops the state of their slots, and reserves room for all of their tokens.

        A row's first `row.reused` tokens are those that its slot held already; they are not observed again.

        Raises:
            ForetellError: refuses the request; the others go on.
        """

    @abstractmethod
    def draft(self, rows: Sequence[Row]) -> Draft:
        """Returns guesses for each of these rows, which may be some of the engine's only.

        A tree of the root alone is always allowed.
        """

    def observe(self, rows: Sequence[Row], features: Features) -> None:  # noqa: B027
        """Takes in what was committed, after every chunk of a prompt and after every step."""

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Any) -> tuple[Tensor, Any]:
        """Returns hidden states and nodes with rows inserted after `layer` layers of verification.

        `Nodes.extended` appends guesses to each row's tree and says where the old nodes went; an inserted row
        attends to its ancestors and itself, and no drafted node attends to it.
        """
        return hidden_Md, nodes
