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
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from torch import Tensor

from foretell.errors import UsageError, check_numbers, is_number
from foretell.trees import TokenTree

if TYPE_CHECKING:
    from foretell.backbone import Backbone, KVCache

FINAL = -1
"""Tap of the final norm's output: what the output head reads. Tap l >= 0 is the residual stream after l layers."""

MOST_BIAS = 1000
"""Far beyond any logit, and far from where float32 loses the logit beside it."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is decoded; checked at construction.

    Attributes:
        max_new_tokens: token budget, never exceeded.
        temperature: 0 chooses the most probable token; above 0 samples from softmax(logits / temperature).
        top_p, top_k, min_p: truncations of that distribution (1, 0 and 0 switch them off), applied in the order
            top-k, top-p, min-p; ties at a threshold are all kept.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, from tokens in the output.
        logit_bias: token id -> number added to its logit.
        seed: with the request's index and position it fixes every draw; None draws one, see `Statistics.seed`.
        stop: strings that end the output (not part of the text); stop_ids: token ids that do.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logprobs: None, or how many of the most probable tokens to report beside each chosen one.

    Raises:
        UsageError: naming the value, its range and the remedy.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, **given: Any) -> SamplingParams:
        """From what a caller typed: an unknown name is a `UsageError` too."""
        names = [each.name for each in fields(cls)]
        for name in given:
            if name not in names:
                near = get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UsageError(f"Unknown sampling option {name!r}: {hint}the options are {', '.join(names)}.")
        return cls(**given)

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", 1, 2**31 - 1), ("temperature", 0, 100), ("top_p", 1e-9, 1), ("top_k", 0, 2**31 - 1),
            ("min_p", 0, 1), ("repetition_penalty", 1e-3, 1e3),
            ("presence_penalty", -100, 100), ("frequency_penalty", -100, 100),
        )  # fmt: skip
        seeds = [("seed", -(2**63), 2**63 - 1)] * (self.seed is not None)
        check_numbers(self, [*ranges, *seeds], whole=("max_new_tokens", "top_k", "seed"))
        bias = self.logit_bias
        if not isinstance(bias, dict) or not all(is_number(t, True) and is_number(b) for t, b in bias.items()):
            raise UsageError(f"logit_bias is {bias!r}; it must map token ids to numbers.")
        if not all(abs(value) <= MOST_BIAS for value in bias.values()):
            raise UsageError(f"logit_bias is {bias}; its values must lie between -{MOST_BIAS} and {MOST_BIAS}.")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop is {self.stop!r}; it must be a tuple of non-empty strings.")
        if not isinstance(self.stop_ids, tuple | list) or not all(is_number(token, True) for token in self.stop_ids):
            raise UsageError(f"stop_ids is {self.stop_ids!r}; it must be a tuple of token ids.")
        if self.logprobs is not None and not (is_number(self.logprobs, True) and 0 <= self.logprobs <= 100):
            raise UsageError(f"logprobs is {self.logprobs!r}; it must be a whole number between 0 and 100.")

    def seeded(self) -> SamplingParams:
        """The same with a seed if it samples: one drawn from the system's entropy where none was given."""
        drawn = self.temperature and self.seed is None
        return replace(self, seed=secrets.randbits(32)) if drawn else self

    @property
    def plain_greedy(self) -> bool:
        """Whether a step needs nothing of the logits but where their greatest lies."""
        return self.temperature == 0 and not self.edits_logits

    @property
    def edits_logits(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


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
    """Where verification may go on: drafting has run the lower layers over the first nodes of each tree.

    Their keys and values lie in the slots of these nodes. The engine runs the others up to the same layer.

    Attributes:
        layer: layers that were run.
        ran: per row how many nodes, the root first; 0 for none.
        hidden_Rd: the streams that they ended in, float32, row after row.
        taps: tap -> states [R, d] of the same nodes, for those of the drafter's taps that lie below `layer`.
    """

    layer: int
    ran: list[int]
    hidden_Rd: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Draft:
    """Guesses for B rows.

    Attributes:
        trees: one per row.
        tokens: ids node by node, one list per row; the root holds the row's newest token.
        probabilities: per row how probable each node is given its parent (1 for the root), or None where that is
            not known. Verification never needs them; trees that are merged or cut keep the most probable guesses.
        resume: given when the drafter has already run lower layers over some of the nodes.
        held: whether the drafter guessed nothing because no tree pays at what steps cost here.
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
    """What survived verification, per row: the accepted path (the root first) and the token that follows it.

    The accepted tokens are the path's without the root; `bonus` is the target's own choice after them and becomes
    the next root. A step therefore emits len(path) tokens: the acceptance length.
    """

    paths: list[list[int]]
    bonus: list[int]


@dataclass
class Features:
    """What the pass computed for the nodes that were committed; B rows one after another.

    Attributes:
        counts: committed nodes of each row, the old root first; their tokens are known to the rows.
        taps: tap -> hidden states [sum of counts, d] float32, in committed order.
        extra: what the drafter's `at_cut` inserted, as it left the final norm: float32 [rows inserted, d], or None.
        paths: the accepted path of each row (empty while a prompt is prefilled).
    """

    counts: list[int]
    taps: dict[int, Tensor]
    extra: Tensor | None = None
    paths: list[list[int]] = field(default_factory=list)


class Drafter(ABC):
    """One method. Subclasses live in one file under `drafters/` and have one row in its table.

    Attributes:
        taps: hidden states to hand to `observe` (see `FINAL`).
        cuts: layers after which `at_cut` may add rows to the verification pass.
        lossless: whether the output equals plain decoding's under exact verification.
        depth: layers of the backbone that drafting runs, in the engine's cache (see `bind`).
        usual_cost: what drafting takes, as a share of a plain step, where nobody has measured it.
        parameters: numbers that it adds to the model.
        tokens_per_step: what its tree of each size earned on held-out text, where that was measured.
    """

    taps: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    lossless: bool = True
    depth: int = 0
    usual_cost: float = 0.15
    parameters: int = 0
    tokens_per_step: Mapping[int, float] = MappingProxyType({})

    @classmethod
    def build(cls, backbone: Backbone, *args: Any, **options: Any) -> Drafter:
        """Makes the drafter for a backbone; options come from the command line or from `foretell.load`."""
        return cls(**options)

    @property
    def most_nodes(self) -> int:
        """The largest tree it will draft, root included: the engine reserves that many cache slots."""
        return 64

    @property
    def extra_nodes(self) -> int:
        """The most rows that `at_cut` adds per drafted node."""
        return 0

    def attached(self, cache: KVCache) -> Self:
        """A drafter for the rows of one engine: it shares the weights, and what it keeps of rows is its own."""
        own = copy.copy(self)
        own.bind(cache)
        return own

    def bind(self, cache: KVCache) -> None:  # noqa: B027
        """Begins anew with the rows of an engine's cache, where methods that run layers while drafting run them.

        What is kept of rows is assigned, not emptied: engines that share the drafter have shallow copies of it.
        """

    def holds(self, slot: int, tokens: int) -> int:
        """How many of the first `tokens` in a slot's cache need not come to `observe` again.

        The rest is computed anew for the next request, which shares these tokens and may differ from there on.
        """
        return tokens

    def reset(self, rows: Sequence[Row]) -> None:  # noqa: B027
        """New sequences have taken these slots: forget what was there, and make room for all of theirs.

        A `ForetellError` refuses the request, and the others go on.
        """

    @abstractmethod
    def draft(self, rows: Sequence[Row]) -> Draft:
        """Guesses for every row. A root-only tree is always allowed."""

    def observe(self, rows: Sequence[Row], features: Features) -> None:  # noqa: B027
        """What was committed, after every chunk of a prompt and after every step."""

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Any) -> tuple[Tensor, Any]:
        """After `layer` layers of verification: returns hidden states and nodes with rows inserted.

        `Nodes.extended` appends guesses to each row's tree and says where the old nodes went; an inserted row
        attends to its ancestors and itself, and no drafted node attends to it.
        """
        return hidden_Md, nodes


@dataclass(frozen=True)
class TokenLogprob:
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Statistics:
    """Of one request. `seconds` runs from admission to the end, prefill included.

    Attributes:
        steps: verification passes that emitted tokens for it; plain_steps: those that carried no guess for it;
            suspended_steps: those of them in which speculation was held back because it loses here, as measured.
        seed: what fixed the draws of sampling.
        exact: whether the output is plain decoding's, token for token: drafter and rule are lossless, and a probe
            found this machine's arithmetic canonical.
        drafted: guesses verified; accepted: guesses kept, budget and stops applied.
        draft_seconds, verify_seconds: parts of the steps, what drafters do with what was committed counted as drafting;
            what neither covers is prefill, commit and text.
        by_depth: how many steps offered, and how many accepted, a guess at depth 1, 2, ...
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    steps: int = 0
    plain_steps: int = 0
    suspended_steps: int = 0
    seed: int | None = None
    exact: bool = True
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0
    by_depth: list[tuple[int, int]] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Tokens per step, bonus included."""
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def count(self, height: int, nodes: int, emitted: int, accepted: int) -> None:
        """Adds one step that drafted a tree of `nodes` guesses and emitted `emitted` tokens."""
        self.steps += 1
        self.plain_steps += nodes == 0
        self.drafted += nodes
        self.new_tokens += emitted
        self.accepted += accepted
        self.by_depth += [(0, 0)] * (height - len(self.by_depth))
        for depth in range(height):
            offered, kept = self.by_depth[depth]
            self.by_depth[depth] = (offered + 1, kept + (depth < accepted))


@dataclass
class Event:
    """What one step emitted for one request.

    Attributes:
        tokens: new token ids; drafted: for each, whether a drafter had guessed it.
        text: the text that became certain (a character or stop string in the making is held back).
        pieces: the same text token by token, with the drafted mark, for display.
        finish_reason: "stop", "length" or "error" on a request's last event, which carries its statistics too.
        error: the sentence that says why, if that is "error".
    """

    request: int
    tokens: list[int]
    drafted: list[bool]
    text: str
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    statistics: Statistics | None = None


@runtime_checkable
class Decoder(Protocol):
    """What the API, the server and the benchmark drive; the speculative engine is one, HAMburger will be another."""

    lossless: bool

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        ...

    def submit(self, prompt: Sequence[int], params: SamplingParams, key: int | None = None) -> int:
        """Queues a request and returns its number, from 0 in order of submission.

        With the seed and the position, `key` (by default that number) fixes the noise of sampling: give one where
        the order of submission may vary.
        """
        ...

    def step(self) -> list[Event]:
        """Advances every admitted row once, and returns what was emitted for any of them: for a sole caller."""
        ...

    def events(self, requests: Collection[int]) -> list[Event]:
        """What was emitted for these requests, else what a step emits: for callers that share the decoder."""
        ...

    def cancel(self, request: int) -> None: ...
