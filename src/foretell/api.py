"""The one place where backbone, drafter and acceptance rule meet.

import foretell
llm = foretell.load("smollm2-135m", drafter="prompt_lookup")
print(llm.generate("Why is the sky blue?").text)
for event in llm.stream("And at sunset?"):
    print(event.text, end="", flush=True)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast, overload

from foretell import drafters
from foretell.backbone import Backbone, assemble
from foretell.backbone.step_costs import costs_file
from foretell.contracts import Drafter
from foretell.engine import SpeculativeDecoder
from foretell.errors import ForetellError, UsageError
from foretell.loading import ModelFolder, Tokenizer, resolve
from foretell.requests import Event, SamplingParams, Statistics, TokenLogprob
from foretell.verify import Typical

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""
Prompt = str | list[Message] | list[int]
"""A user turn (or raw text), a conversation, or token ids."""


@dataclass
class Result:
    """One finished request.

    Attributes:
        ids: generated token ids, an end-of-sequence token included.
        text: their text, without special tokens and without the stop string.
        finish_reason: "stop", "length" or "error".
        error: what ended it before its time, in a sentence.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    error: str = ""
    statistics: Statistics = field(default_factory=Statistics)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.ids += event.tokens
        self.text += event.text
        self.logprobs += event.logprobs
        if event.finish_reason:
            self.finish_reason, self.error = event.finish_reason, event.error
            self.statistics = event.statistics or self.statistics


class LLM:
    """A loaded model with a drafter. Make one with `load`.

    Threads may share it: calls of the same batch size take turns step by step on one decoder, which holds a lock.
    """

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, drafter: Drafter, folder: ModelFolder | None = None):
        self.backbone, self.tokenizer, self.drafter, self.folder = backbone, tokenizer, drafter, folder
        self._decoder: SpeculativeDecoder | None = None
        self._asked: tuple[int, Typical | None, bool] | None = None  # what it was made for
        self._lock = threading.Lock()

    def encode(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """Token ids of a prompt: text becomes a user turn under the chat template unless `raw`."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UsageError("The prompt is empty; write something to answer.")
            if raw:
                return self.tokenizer.encode_raw(prompt)
            return self.tokenizer.chat([{"role": "user", "content": prompt}])
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
            raise UsageError(f"A prompt is text, a conversation or token ids, not {prompt!r}.")
        if not prompt:
            raise UsageError("The prompt is empty; write something to answer.")
        parts = cast("Sequence[Any]", prompt)
        if isinstance(parts[0], dict):
            if odd := [part for part in parts if not isinstance(part, dict)]:
                raise UsageError(
                    f"The conversation holds {odd[0]!r}, which is no message; "
                    'write {"role": "user", "content": "..."}.'
                )
            return self.tokenizer.chat(parts)
        if odd := [part for part in parts if not isinstance(part, Integral) or isinstance(part, bool)]:
            raise UsageError(f"The prompt holds {odd[0]!r}, which is no token id; give text, or nothing but ids.")
        return [int(token) for token in parts]

    def decoder(self, max_rows: int = 1, rule: Typical | None = None, adapt: bool = True) -> SpeculativeDecoder:
        """The engine behind `generate`; kept between calls, so that a conversation keeps its cache."""
        with self._lock:
            if self._decoder is None or self._asked != (max_rows, rule, adapt):
                self._decoder = None  # frees the old cache first
                self._decoder = SpeculativeDecoder(
                    self.backbone, self.drafter, self.tokenizer, max_rows=max_rows, rule=rule, adapt=adapt
                )
                self._asked = max_rows, rule, adapt
            return self._decoder

    @overload
    def generate(self, prompts: str | list[Message] | list[int], **options: Any) -> Result: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Result]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        raw: bool = False,
        batch_size: int = 8,
        rule: Typical | None = None,
        adapt: bool = True,
        **sampling: Any,
    ) -> Result | list[Result]:
        """Answers one prompt, or a list of them `batch_size` rows at a time.

        Args:
            prompts: text (a user turn under the chat template, or as it is with `raw`), a conversation, token ids,
                or a list of these.
            rule: typical acceptance instead of exact verification (lossy).
            adapt: go back to plain steps where speculation measurably loses.
            sampling: fields of `SamplingParams`.

        Returns:
            One `Result` for one prompt, else a list in order, in which an answer that ended before its time says so.

        Raises:
            UsageError: naming the bad value.
            ForetellError: the answer to the only prompt ended before its time.
        """
        if not isinstance(prompts, Sequence):
            raise UsageError(f"A prompt is text, a conversation or token ids, not {prompts!r}.")
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], (dict, Integral)))
        batch = cast("list[Prompt]", [prompts] if single else list(prompts))
        params = SamplingParams.of(**sampling).seeded()
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
        decoder = self.decoder(max(1, min(batch_size, len(batch))), rule, adapt)
        encoded = [self.encode(prompt, raw) for prompt in batch]
        results = [Result() for _ in batch]
        for index, event in self.run(decoder, [(ids, params, key) for key, ids in enumerate(encoded)]):
            results[index].add(event)
        if single and results[0].error:
            raise ForetellError(results[0].error)
        return results[0] if single else results

    def stream(
        self, prompt: Prompt, *, raw: bool = False, rule: Typical | None = None, adapt: bool = True, **sampling: Any
    ) -> Iterator[Event]:
        """Answers one prompt, yielding what each step emitted; close the iterator to stop early."""
        params = SamplingParams.of(**sampling)
        decoder = self.decoder(1, rule, adapt)
        for _, event in self.run(decoder, [(self.encode(prompt, raw), params, 0)]):
            yield event
            if event.error:
                raise ForetellError(event.error)

    @staticmethod
    def run(
        decoder: SpeculativeDecoder, requests: Sequence[tuple[list[int], SamplingParams, int]]
    ) -> Generator[tuple[int, Event], None, None]:
        """Submits (ids, params, key) triples and yields (index, event) until all are done.

        An interruption cancels what is left, and the decoder stays usable.
        """
        numbers: dict[int, int] = {}
        try:
            for index, (ids, params, key) in enumerate(requests):
                numbers[decoder.submit(ids, params, key)] = index
            left = set(numbers)
            while left:
                mine = decoder.events(left)
                if not (mine or decoder.pending(left)):
                    return  # somebody else cancelled the rest
                left -= {event.request for event in mine if event.finish_reason}
                for event in mine:
                    yield numbers[event.request], event
        finally:
            for number in numbers:
                decoder.cancel(number)


def load(
    model: str | Path = "smollm2-135m",
    drafter: str = "plain",
    *,
    lookup: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    kernel: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> LLM:
    """Loads a model and a drafter.

    Args:
        model: a catalogue name, a Hugging Face hub id, a local folder or a .gguf file.
        drafter: a name from `foretell.drafters.DRAFTERS`; `options` are its own.
        lookup: merge candidates of prompt lookup into its trees.
        dtype, device, threads, kernel: see `foretell.backbone.load`.
        cache_dir, offline: see `foretell.backbone.resolve`.
        progress: called with (stage, fraction) while files are fetched or converted.

    Raises:
        ForetellError, UsageError: one sentence with the remedy.
    """
    drafters.drafter_class(drafter)  # a typing mistake must not cost a download
    folder = resolve(str(model), cache_dir=cache_dir, offline=offline, progress=progress)
    backbone = assemble(folder.path, dtype=dtype, device=device, threads=threads, kernel=kernel, cache_dir=cache_dir)
    backbone.costs = costs_file(backbone, cache_dir)
    tokenizer = Tokenizer.from_folder(folder.path)
    ends = dict.fromkeys((*backbone.config.eos_ids, *tokenizer.ends))
    backbone.config = replace(backbone.config, eos_ids=tuple(ends))
    return LLM(
        backbone,
        tokenizer,
        drafters.build(drafter, backbone, lookup=lookup, **options),
        folder,
    )
