"""What a request asks for and what comes of it: sampling parameters, events, statistics, and whatever decodes them."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

from foretell.errors import UsageError, check_numbers, is_number

MAX_BIAS = 1000
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
        if not all(abs(value) <= MAX_BIAS for value in bias.values()):
            raise UsageError(f"logit_bias is {bias}; its values must lie between -{MAX_BIAS} and {MAX_BIAS}.")
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

    def pending(self, requests: Collection[int]) -> bool:
        """Whether anything of these requests is still to come: not of one that somebody has cancelled."""
        ...

    def cancel(self, request: int) -> None: ...
