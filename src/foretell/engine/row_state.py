"""The state of one request from its submission to its last event: its tokens, its text, its statistics."""

from __future__ import annotations

import time
from collections.abc import Callable

from foretell.engine.text_stream import TextStream
from foretell.requests import Event, SamplingParams, Statistics, TokenLogprob

NOT_FINITE = (
    "tokens the model's logits are not finite numbers: its weights are damaged, or overflow in this number type; fetch "
    "the model again, or load it as fp32."
)


class RowState:
    """One row of the batch, waiting or running; what drafters see of it is `contracts.Row`.

    Attributes:
        slot: of the cache; -1 while the request waits.
        reused: leading tokens whose cache the slot had before; observed: tokens whose states the drafter has got.
        finished: its last event was emitted.
        segments: tokens that share a slot, of the last prompt token and what follows it: all 1 but in fused decoding,
            which alone keeps them; ends: tokens that end the output.
    """

    def __init__(
        self,
        request: int,
        key: int,
        prompt: list[int],
        params: SamplingParams,
        stream_of: Callable[[], TextStream],
        ends: frozenset[int],
    ):
        self.request, self.key, self.params = request, key, params
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self.slot = -1
        self.reused = self.observed = 0
        self.finished = False
        self.statistics = Statistics(prompt_tokens=len(prompt))
        self.segments, self.ends = [1], ends
        self._stream_of = stream_of
        self._stream: tuple[TextStream, int] | None = None  # with the number of tokens pushed to it
        self._started = 0.0

    @property
    def budget(self) -> int:
        """Tokens that may still be emitted."""
        return self.params.max_new_tokens - (len(self.tokens) - self.prompt_length)

    def start(self, slot: int, reused: int) -> None:
        """Starts the clock: the request was given a slot, whose cache holds its first `reused` tokens."""
        self.slot, self.reused, self.observed, self._started = slot, reused, reused, time.perf_counter()
        self.statistics.reused_tokens = reused

    def event(self, tokens: list[tuple[int, bool]], damaged: bool, logprobs: list[TokenLogprob]) -> Event:
        """The event of one step: its tokens up to the first that ends the output. The row itself is not changed.

        Args:
            tokens: with each, whether it was guessed.
            damaged: the logits after them are not finite, which ends the output with an error.
            logprobs: of all these tokens, or empty.
        """
        event, before = Event(self.request, [], [], ""), len(self.tokens) - self.prompt_length
        try:
            stream = self._stream_after(before)
            for token, drafted in tokens:
                self._append(event, stream, token, drafted)
                if event.finish_reason:
                    break
            if damaged and not event.finish_reason:
                event.finish_reason, event.error = "error", f"After {len(self.tokens) + len(event.tokens)} {NOT_FINITE}"
            if event.finish_reason:
                self._append_rest(event, stream)
            self._stream = stream, before + len(event.tokens)
        except Exception as error:  # a tokenizer that cannot decode its own tokens ends this request, not the others
            event.finish_reason, event.error = "error", f"The text cannot be decoded ({error!r}); ask for ids only."
        event.logprobs = logprobs[: len(event.tokens)]
        event.text = "".join(text for text, _ in event.pieces)
        return self._final(event) if event.finish_reason else event

    def refusal(self, sentence: str) -> Event:
        """The only event of a request that could not be admitted."""
        return self._final(Event(self.request, [], [], "", finish_reason="error", error=sentence))

    def _stream_after(self, count: int) -> TextStream:
        """The text stream after `count` tokens; built again if an interrupted step has pushed others to it."""
        stream, pushed = self._stream or (self._stream_of(), 0)
        self._stream = None
        if pushed != count:
            stream = self._stream_of()
            for token in self.tokens[self.prompt_length :]:
                stream.push(token)
        return stream

    def _append(self, event: Event, stream: TextStream, token: int, drafted: bool) -> None:
        event.tokens.append(token)
        event.drafted.append(drafted)
        ended = token in self.ends
        event.pieces.append(("" if ended else stream.push(token), drafted))
        if ended or stream.stopped:
            event.finish_reason = "stop"
        elif self.budget == len(event.tokens):
            event.finish_reason = "length"

    @staticmethod
    def _append_rest(event: Event, stream: TextStream) -> None:
        """Appends the text that was held back; its last characters may complete a stop string."""
        rest = stream.finish()
        if rest:
            event.pieces.append((rest, event.drafted[-1] if event.drafted else False))
        if stream.stopped and not event.error:
            event.finish_reason = "stop"

    def _final(self, event: Event) -> Event:
        """Stops the clock and attaches the statistics."""
        self.statistics.seconds = time.perf_counter() - self._started if self._started else 0.0
        self.statistics.seed = self.params.seed
        event.statistics = self.statistics
        return event
