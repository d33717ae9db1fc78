"""The truth about one sequence in the batch, and what is counted about it."""

from __future__ import annotations

import time

from foretell.contracts import Event, SamplingParams, Statistics, TokenLogprob
from foretell.engine.stream import TextStream

NO_NUMBERS = (
    "the model's logits are not finite numbers: its weights are damaged, or overflow in this number type; fetch the "
    "model again, or load it as fp32."
)


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
        self.reused = self.observed = 0  # tokens whose cache was there before; whose states the drafter has seen
        self.finished = False
        self.statistics = Statistics(prompt_tokens=len(prompt))
        self._stream, self._ends = stream, ends
        self._started = 0.0

    @property
    def budget(self) -> int:
        return self.params.max_new_tokens - (len(self.tokens) - self.prompt_length)

    def start(self, slot: int, reused: int) -> None:
        self.slot, self.reused, self.observed, self._started = slot, reused, reused, time.perf_counter()
        self.statistics.reused_tokens = reused

    def emit(self, event: Event, guessed: list[int], bonus: int | None, logprobs: list[TokenLogprob]) -> None:
        """Appends tokens one by one up to the first that ends the output, and writes what they show into the event.

        Args:
            guessed: accepted guesses; bonus: the token after them, None where the model's logits say nothing.
        """
        new = [(token, True) for token in guessed] + ([] if bonus is None else [(bonus, False)])
        try:
            for token, drafted in new:
                self._append(event, token, drafted)
                if event.finish_reason:
                    break
            if bonus is None and not event.finish_reason:
                event.finish_reason, event.error = "error", f"After {len(self.tokens)} tokens {NO_NUMBERS}"
            if event.finish_reason:
                self._close(event)
        except Exception as error:  # a tokenizer that cannot read its own tokens ends this request, not the others
            event.finish_reason, event.error = "error", f"The text cannot be decoded ({error!r}); ask for ids only."
            self._end(event)
        event.logprobs = logprobs[: len(event.tokens)]
        event.text = "".join(text for text, _ in event.pieces)

    def refused(self, sentence: str) -> Event:
        """The only event of a request that could not be admitted."""
        event = Event(self.request, [], [], "", finish_reason="error", error=sentence)
        self._end(event)
        return event

    def _append(self, event: Event, token: int, drafted: bool) -> None:
        self.tokens.append(token)
        event.tokens.append(token)
        event.drafted.append(drafted)
        ended = token in self._ends
        event.pieces.append(("" if ended else self._stream.push(token), drafted))
        if ended or self._stream.stopped:
            event.finish_reason = "stop"
        elif self.budget == 0:
            event.finish_reason = "length"

    def _close(self, event: Event) -> None:
        """Releases text held back, and stops the clock."""
        rest = self._stream.finish()
        if rest:
            event.pieces.append((rest, event.drafted[-1] if event.drafted else False))
        if self._stream.stopped and not event.error:  # the last characters completed a stop string
            event.finish_reason = "stop"
        self._end(event)

    def _end(self, event: Event) -> None:
        self.finished = True
        self.statistics.seconds = time.perf_counter() - self._started if self._started else 0.0
        self.statistics.seed = self.params.seed
        event.statistics = self.statistics
