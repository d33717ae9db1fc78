"""The truth about one sequence in the batch, and what is counted about it."""

from __future__ import annotations

import time

from foretell.contracts import Event, SamplingParams, Statistics, TokenLogprob
from foretell.engine.stream import TextStream


class Sequence:
    """One row of the batch; what drafters see of it is `contracts.Row`."""

    def __init__(
        self,
        request: int,
        key: int,
        prompt: list[int],
        params: SamplingParams,
        stream: TextStream,
        ends: frozenset[int],
    ):
        self.request, self.key, self.params = request, key, params
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self.slot = -1
        self.reused = 0
        self.statistics = Statistics(prompt_tokens=len(prompt))
        self._stream, self._ends = stream, ends
        self._started = 0.0

    @property
    def budget(self) -> int:
        return self.params.max_new_tokens - (len(self.tokens) - self.prompt_length)

    def start(self, slot: int, reused: int) -> None:
        self.slot, self.reused, self._started = slot, reused, time.perf_counter()
        self.statistics.reused_tokens = reused

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def emit(self, new: list[int], drafted: list[bool], logprobs: list[TokenLogprob]) -> Event:
        """Appends tokens one by one up to the first that ends the output, and returns what they show."""
        event = Event(self.request, [], [], "")
        for token, guessed in zip(new, drafted, strict=True):
            self.tokens.append(token)
            event.tokens.append(token)
            event.drafted.append(guessed)
            ended = token in self._ends
            piece = "" if ended else self._stream.push(token)
            event.pieces.append((piece, guessed))
            if ended or self._stream.stopped:
                event.finish_reason = "stop"
            elif self.budget == 0:
                event.finish_reason = "length"
            if event.finish_reason:
                break
        event.logprobs = logprobs[: len(event.tokens)]
        if event.finish_reason:
            self.close(event)
        event.text = "".join(text for text, _ in event.pieces)
        return event

    def close(self, event: Event) -> None:
        """Releases text held back, and stops the clock."""
        rest = self._stream.finish()
        if rest:
            event.pieces.append((rest, event.drafted[-1] if event.drafted else False))
        if self._stream.stopped:  # the last characters completed a stop string
            event.finish_reason = "stop"
        self.statistics.seconds = self.elapsed()
        event.statistics = self.statistics
