"""Finished requests: what was generated, and how it is summed up and written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from foretell.requests import Event, Statistics, TokenLogprob, shortened

_TOKENS = ("prompt_tokens", "new_tokens", "reused_tokens", "drafted", "accepted", "inserted", "slots")
_STEPS = ("steps", "plain_steps", "suspended_steps")
_SECONDS = ("prefill_seconds", "draft_seconds", "verify_seconds", "seconds")


@dataclass(repr=False)
class Result:
    """One finished request.

    Attributes:
        ids: generated token ids, an end-of-sequence token included.
        text: their text, without special tokens and without the stop string.
        finish_reason: "stop", "length" or "error".
        error: the sentence that says why, if that is "error".
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    error: str = ""
    statistics: Statistics = field(default_factory=Statistics)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Appends what one step emitted."""
        self.ids += event.tokens
        self.text += event.text
        self.logprobs += event.logprobs
        if event.finish_reason:
            self.finish_reason, self.error = event.finish_reason, event.error
            self.statistics = event.statistics or self.statistics

    def __repr__(self) -> str:
        state = f"error: {self.error}" if self.error else self.finish_reason or "unfinished"
        speed = f", {self.statistics}" if self.statistics.steps else ""
        return f"<Result {shortened(self.text)!r}: {len(self.ids)} tokens, {state}{speed}>"


def total(results: Sequence[Result]) -> Statistics:
    """Adds up the statistics of several requests, except `by_depth` and `seed`."""
    sums = {name: sum(getattr(result.statistics, name) for result in results) for name in _TOKENS + _STEPS + _SECONDS}
    return Statistics(**sums, exact=all(result.statistics.exact for result in results))


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """The summed statistics of one conversation's answers, for JSON; `finish_reason` is the last answer's."""
    sums = total(results)
    found: dict[str, Any] = {
        "finish_reason": results[-1].finish_reason,
        "acceptance_length": round(sums.acceptance_length, 4),
        "tokens_per_second": round(sums.tokens_per_second, 2),
        "exact": sums.exact,
    }
    found |= {name: getattr(sums, name) for name in (*_TOKENS, *_STEPS)}
    found |= {name: round(getattr(sums, name), 6) for name in _SECONDS}
    if results[-1].statistics.seed is not None:
        found["seed"] = results[-1].statistics.seed
    return found


def answer_json(prompt: str, result: Result) -> dict[str, Any]:
    """One prompt and its answer as a flat object for JSON."""
    found = {"prompt": prompt, "text": result.text, "ids": result.ids} | figures([result])
    if result.logprobs:
        found["logprobs"] = [asdict(logprob) for logprob in result.logprobs]
    return found


def conversation_json(prompts: Sequence[str], results: Sequence[Result]) -> dict[str, Any]:
    """A conversation for JSON: its turns, each as `answer_json` gives it, and the sums over them."""
    turns = [answer_json(prompt, result) for prompt, result in zip(prompts, results, strict=False)]
    return {"turns": turns} | (figures(results) if results else {})
