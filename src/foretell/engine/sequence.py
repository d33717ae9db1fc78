"""The truth about one sequence in the batch, and what is counted about it."""

from __future__ import annotations

import time
from collections.abc import Callable

from foretell.engine.text_stream import TextStream
from foretell.requests import Event, SamplingParams, Statistics, TokenLogprob

NO_NUMBERS = (
    "tokens the model's logits are not finite numbers: its weights are damaged, or overflow in this number type; fetch "
    "the model again, or load it as fp32."
)


class Sequence:
    """One row of the batch; what drafters see of it is `contracts.Row`."""

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
        self.reused = self.observed = 0  # tokens whose cache was there before; whose states the drafter has seen
        self.finished = False
        self.statistics = Statistics(prompt_tokens=len(prompt))
        self._ends, self._stream_of = ends, stream_of
        self._stream: tuple[TextStream, int] | None = None  # and how many tokens were shown to it
        self._started = 0.0

    @property
    def budget(self) -> int:
        return self.params.max_new_tokens - (len(self.tokens) - self.prompt_length)

    def start(self, slot: int, reused: int) -> None:
        self.slot, self.reused, self.observed, self._started = slot, reused, reused, time.perf_counter()
        self.statistics.reused_tokens = reused

    def emit(self, guessed: list[int], bonus: int | None, said: list[TokenLogprob]) -> Event:
        """What the next tokens show, up to the first that ends the output; the engine makes them the row's.

        Args:
            guessed: accepted guesses; bonus: the token after them, None where the model's logits say nothing.
        """
        event, before = Event(self.request, [], [], ""), len(self.tokens) - self.prompt_length
        try:
            stream = self._stream_behind(before)
            for token, drafted in [*((token, True) for token in guessed), *([] if bonus is None else [(bonus, False)])]:
                self._say(event, stream, token, drafted)
                if event.finish_reason:
                    break
            if bonus is None and not event.finish_reason:
                event.finish_reason, event.error = "error", f"After {len(self.tokens) + len(event.tokens)} {NO_NUMBERS}"
            if event.finish_reason:
                self._release_text(event, stream)
            self._stream = stream, before + len(event.tokens)
        except Exception as error:  # a tokenizer that cannot read its own tokens ends this request, not the others
            event.finish_reason, event.error = "error", f"The text cannot be decoded ({error!r}); ask for ids only."
        event.logprobs = said[: len(event.tokens)]
        event.text = "".join(text for text, _ in event.pieces)
        return self._counted(event) if event.finish_reason else event

    def refused(self, sentence: str) -> Event:
        """The only event of a request that could not be admitted."""
        return self._counted(Event(self.request, [], [], "", finish_reason="error", error=sentence))

    def _stream_behind(self, shown: int) -> TextStream:
        """The text behind so many tokens: begun anew where an interrupt came after others were shown to it."""
        stream, known = self._stream or (self._stream_of(), 0)
        self._stream = None
        if known != shown:
            stream = self._stream_of()
            for token in self.tokens[self.prompt_length :]:
                stream.push(token)
        return stream

    def _say(self, event: Event, stream: TextStream, token: int, drafted: bool) -> None:
        event.tokens.append(token)
        event.drafted.append(drafted)
        ended = token in self._ends
        event.pieces.append(("" if ended else stream.push(token), drafted))
        if ended or stream.stopped:
            event.finish_reason = "stop"
        elif self.budget == len(event.tokens):
            event.finish_reason = "length"

    @staticmethod
    def _release_text(event: Event, stream: TextStream) -> None:
        """What was held back; the last characters may complete a stop string."""
        rest = stream.finish()
        if rest:
            event.pieces.append((rest, event.drafted[-1] if event.drafted else False))
        if stream.stopped and not event.error:
            event.finish_reason = "stop"

    def _counted(self, event: Event) -> Event:
        """Stops the clock."""
        self.statistics.seconds = time.perf_counter() - self._started if self._started else 0.0
        self.statistics.seed = self.params.seed
        event.statistics = self.statistics
        return event
