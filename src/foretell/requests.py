"""Sampling parameters, requests, events and statistics; the protocol of a decoder."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, Protocol, runtime_checkable

from foretell.errors import UsageError, check_numbers, is_number

MAX_BIAS = 1000
"""Far beyond any logit, and far from where float32 loses the logit beside it."""


def number(default: float | None, help: str, low: float, high: float, *, truncates: bool = False) -> Any:
    """Declares a numeric sampling option, which the command line offers too.

    Args:
        low, high: the smallest and the largest number allowed, both included; None is allowed where it is the default.
        truncates: whether it cuts off a part of the distribution, which typical acceptance cannot honour.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "truncates": truncates})


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one request, checked at construction.

    Attributes:
        max_new_tokens: token budget, never exceeded.
        temperature: 0 chooses the most probable token; above 0 samples from softmax(logits / temperature).
        top_p, top_k, min_p: truncations of that distribution (1, 0 and 0 switch them off), applied in the order
            top-k, top-p, min-p; ties at a threshold are all kept.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, from tokens in the output.
        logit_bias: token id -> number added to its logit.
        seed: with the request's index and position it fixes every draw; None draws one, see `Statistics.seed`.
        stop: strings that end the output and are not part of its text, or one such string; stop_ids: token ids that do.
        ignore_eos: continue past the model's end-of-sequence tokens.
        logprobs: None, or how many of the most probable tokens to report beside each chosen one.

    Raises:
        UsageError: naming the value, its range and the remedy.
    """

    max_new_tokens: int = number(256, "Maximum number of tokens of an answer.", 1, 2**31 - 1)
    temperature: float = number(0.0, "0 takes the most probable token; above 0 samples.", 0, 100)
    top_p: float = number(1.0, "Sample from the smallest set of this probability.", 1e-9, 1, truncates=True)
    top_k: int = number(0, "Sample from the K most probable tokens; 0 for all.", 0, 2**31 - 1, truncates=True)
    min_p: float = number(
        0.0, "Drop tokens less probable than this share of the most probable one.", 0, 1, truncates=True
    )
    repetition_penalty: float = number(
        1.0, "Above 1 makes tokens of the prompt and the answer less probable.", 1e-3, 1e3
    )
    presence_penalty: float = number(0.0, "Subtracted once from the logit of every token of the answer.", -100, 100)
    frequency_penalty: float = number(
        0.0, "Subtracted from a token's logit for each time that it occurs in the answer.", -100, 100
    )
    seed: int | None = number(
        None, "Seed of sampling; every drafter draws the same tokens by it. By default a new one each time.",
        -(2**63), 2**63 - 1,
    )  # fmt: skip
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, **options: Any) -> SamplingParams:
        """Makes them from a caller's keyword arguments, of which an unknown one is a `UsageError` too."""
        names = [known.name for known in fields(cls)]
        for name in options:
            if name not in names:
                near = get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UsageError(f"Unknown sampling option {name!r}: {hint}the options are {', '.join(names)}.")
        return cls(**options)

    def __post_init__(self) -> None:
        given = [option for option in numbers() if getattr(self, option.name) is not None or option.default is not None]
        check_numbers(
            self, [(option.name, option.metadata["low"], option.metadata["high"]) for option in given],
            whole=[option.name for option in given if str(option.type).startswith("int")],
        )  # fmt: skip
        bias = self.logit_bias
        if not isinstance(bias, dict) or not all(is_number(t, True) and is_number(b) for t, b in bias.items()):
            raise UsageError(f"logit_bias is {bias!r}; it must map token ids to numbers.")
        if not all(abs(value) <= MAX_BIAS for value in bias.values()):
            raise UsageError(f"logit_bias is {bias}; its values must lie between -{MAX_BIAS} and {MAX_BIAS}.")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
            raise UsageError(f"stop is {self.stop!r}; it must be a non-empty string, or a sequence of them.")
        if not isinstance(self.stop_ids, Sequence) or not all(is_number(token, True) for token in self.stop_ids):
            raise UsageError(f"stop_ids is {self.stop_ids!r}; it must be a sequence of token ids.")
        object.__setattr__(self, "stop", tuple(stops))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if self.logprobs is not None and not (is_number(self.logprobs, True) and 0 <= self.logprobs <= 100):
            raise UsageError(f"logprobs is {self.logprobs!r}; it must be a whole number between 0 and 100.")

    @property
    def truncations(self) -> list[str]:
        """Names of the options that truncate the distribution and are in force."""
        truncating = [option for option in numbers() if option.metadata["truncates"]]
        return [option.name for option in truncating if getattr(self, option.name) != option.default]

    def seeded(self) -> SamplingParams:
        """Returns these parameters with a seed if they sample: drawn from the system's entropy if none was given."""
        drawn = self.temperature and self.seed is None
        return replace(self, seed=secrets.randbits(32)) if drawn else self

    @property
    def plain_greedy(self) -> bool:
        """True if every token is the argmax of the model's own logits."""
        return self.temperature == 0 and not self.edits_logits

    @property
    def edits_logits(self) -> bool:
        """True if penalties or biases change the logits before a token is chosen."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


@cache
def numbers() -> tuple[Field[Any], ...]:
    """Returns the numeric options of `SamplingParams`, whose metadata `number` describes."""
    return tuple(option for option in fields(SamplingParams) if "help" in option.metadata)


@dataclass(frozen=True)
class Request:
    """A prompt to be decoded.

    Attributes:
        prompt: token ids, at least one.
        key: with the seed and the position it fixes the noise of sampling; None takes the request's number. Give one
            where the order of submission may vary.
    """

    prompt: Sequence[int]
    params: SamplingParams
    key: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's log-probability, and the most probable tokens beside it as (id, log-probability)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Statistics:
    """Counts and seconds of one request. `seconds` runs from admission to the end, prefill included.

    Attributes:
        steps: verification passes that emitted tokens for it; plain_steps: those that carried no guess for it;
            suspended_steps: plain steps in which speculation was held back because it measurably loses here.
        seed: fixed the draws of sampling.
        exact: whether the output is plain decoding's, token for token: drafter and rule are lossless, and a probe
            found this machine's arithmetic canonical.
        drafted: guesses verified; accepted: guesses kept, budget and stops applied; inserted: rows that the drafter ran
            in the same passes to draft from, some layers of them.
        slots: keys and values that the answer took in the cache: one a token, or fewer where some share one.
        draft_seconds, verify_seconds: parts of the steps; the drafter's `observe` counts as drafting. The rest of
            `seconds` is prefill, commit and text.
        by_depth: (steps that drafted a guess at this depth, steps that accepted one) for depth 1, 2, ...
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
    inserted: int = 0
    slots: int = 0
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
        """New tokens per second, prefill included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def held_back(self) -> float:
        """Share of the steps in which speculation was held back because it does not pay here."""
        return self.suspended_steps / self.steps if self.steps else 0.0

    @property
    def sharing(self) -> str:
        """Text on how many slots a token took, where tokens shared some; else empty."""
        shared = 0 < self.slots < self.new_tokens
        return f", {self.slots / self.new_tokens:.2f} slots per token" if shared else ""

    def __str__(self) -> str:
        held_back = f", speculation held back in {self.suspended_steps} of {self.steps} steps"
        return (
            f"{self.tokens_per_second:.1f} tokens/s, {self.acceptance_length:.2f} tokens per step"
            f"{held_back if self.suspended_steps else ''}{self.sharing}"
        )

    def count(self, height: int, nodes: int, emitted: int, accepted: int, inserted: int = 0) -> None:
        """Adds one step that verified a tree of `nodes` guesses, `height` deep, and emitted `emitted` tokens."""
        self.steps += 1
        self.plain_steps += nodes == 0
        self.drafted += nodes
        self.new_tokens += emitted
        self.accepted += accepted
        self.inserted += inserted
        self.slots += emitted
        self.by_depth += [(0, 0)] * (height - len(self.by_depth))
        for depth in range(height):
            offered, kept = self.by_depth[depth]
            self.by_depth[depth] = (offered + 1, kept + (depth < accepted))

    def count_fused(self, emitted: int) -> None:
        """Adds one step whose tokens, none of them verified, share a slot."""
        self.steps += 1
        self.plain_steps += emitted == 1
        self.new_tokens += emitted
        self.slots += 1


@dataclass(repr=False)
class Event:
    """Tokens and text that one step emitted for one request.

    Attributes:
        tokens: new token ids; drafted: for each, whether a drafter had guessed it.
        text: the text that became certain (an unfinished character, or the beginning of a stop string, is held back).
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

    def __repr__(self) -> str:
        end = f", error: {self.error}" if self.error else f", {self.finish_reason}" if self.finish_reason else ""
        return f"<Event of request {self.request}: {shortened(self.text)!r}, {len(self.tokens)} tokens{end}>"


def shortened(text: str, width: int = 40) -> str:
    """The beginning of a text, for display."""
    return text if len(text) <= width else text[: width - 3] + "..."


@runtime_checkable
class Decoder(Protocol):
    """Decodes any number of requests step by step; `engine.Driver` is how callers use one.

    Callers may share a decoder: each asks for the `events` of its own requests, and what a step emits for the others
    waits for them.
    """

    lossless: bool

    @property
    def busy(self) -> bool:
        """True if any request is unfinished."""
        ...

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuses what `submit` would, and queues nothing.

        Raises:
            ContextError: prompt and answer exceed the model's context.
            UsageError: anything else that could never be decoded.
        """
        ...

    def submit(self, prompt: Sequence[int], params: SamplingParams, key: int | None = None) -> int:
        """Queues a request (see `Request`) and returns its number, from 0 in order of submission.

        Raises:
            UsageError: as `check` does.
        """
        ...

    def events(self, requests: Collection[int]) -> list[Event]:
        """Returns the events of these requests that wait, or those of one step if none do."""
        ...

    def step(self) -> list[Event]:
        """Advances every admitted row once and returns all events: for a decoder that has one caller."""
        ...

    def pending(self, requests: Collection[int]) -> bool:
        """True if any of these requests has events to come; cancelled ones have none."""
        ...

    def cancel(self, request: int) -> None:
        """Drops a request; unknown and finished ones are ignored."""
        ...
