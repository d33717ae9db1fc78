"""The composition root: a model, a drafter and an acceptance rule become an `LLM`.

import foretell
llm = foretell.load("smollm2-135m", drafter="prompt_lookup")
print(llm.generate("Why is the sky blue?").text)
for event in llm.stream("And at sunset?"):
    print(event.text, end="", flush=True)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast, overload

from foretell import drafters
from foretell.backbone import Backbone, assemble
from foretell.backbone.load import default_weights
from foretell.backbone.step_costs import costs_file
from foretell.contracts import Drafter
from foretell.engine import BatchDecoder, decoder_for, run
from foretell.errors import ForetellError, UsageError
from foretell.loading import ModelFolder, Tokenizer, resolve
from foretell.loading.resolve import is_offline
from foretell.requests import Event, Request, SamplingParams
from foretell.results import Result
from foretell.verify import Typical

__all__ = ["LLM", "Message", "Prompt", "Result", "load"]

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""
Prompt = str | list[Message] | list[int]
"""A user turn (or raw text), a conversation, or token ids."""


class LLM:
    """A loaded model with a drafter. Make one with `load`.

    Threads may share it: calls with the same batch size share one decoder and take turns step by step, so with
    batch size 1 requests run one after another. Calls with other batch sizes replace the decoder, see `decoder`.
    """

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, drafter: Drafter, folder: ModelFolder | None = None):
        self.backbone, self.tokenizer, self.drafter, self.folder = backbone, tokenizer, drafter, folder
        self.loading: dict[str, Any] = {}  # how `load` was called, so that another model can be loaded alike
        self._decoder: BatchDecoder | None = None
        self._decoder_options: tuple[int, Typical | None, bool] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        name, model = self.folder.name if self.folder else "model", self.backbone
        return f"<LLM {name}: {drafters.name_of(self.drafter)}, {str(model.dtype)[6:]} on {model.device}>"

    def encode(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """Returns the token ids of a prompt: text becomes a user turn under the chat template unless `raw`.

        Raises:
            UsageError: the prompt is empty, or neither text, nor a conversation, nor token ids.
        """
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
        items = cast("Sequence[Any]", prompt)
        if isinstance(items[0], dict):
            if odd := [item for item in items if not isinstance(item, dict)]:
                raise UsageError(
                    f"The conversation holds {odd[0]!r}, which is no message; "
                    'write {"role": "user", "content": "..."}.'
                )
            return self.tokenizer.chat(items)
        if odd := [item for item in items if not isinstance(item, Integral) or isinstance(item, bool)]:
            raise UsageError(f"The prompt holds {odd[0]!r}, which is no token id; give text, or nothing but ids.")
        return [int(token) for token in items]

    def decoder(self, max_rows: int = 1, rule: Typical | None = None, adapt: bool = True) -> BatchDecoder:
        """Returns the engine behind `generate`.

        The last decoder is kept for its cache, which the next turn of a conversation reuses. A call with other
        arguments replaces it, while calls in progress finish on the old one. Two threads that alternate between batch
        sizes would replace it at every call: give each one of its own (`engine.decoder_for`).
        """
        with self._lock:
            if self._decoder is None or self._decoder_options != (max_rows, rule, adapt):
                self._decoder = None  # frees the old cache before the new one is allocated
                self._decoder = decoder_for(
                    self.backbone, self.drafter, self.tokenizer, max_rows=max_rows, rule=rule, adapt=adapt
                )
                self._decoder_options = max_rows, rule, adapt
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
            rule: typical acceptance instead of exact verification (lossy). It has a temperature of its own and draws
                no tokens: `seed` has no effect, and another temperature or a truncation is refused.
            adapt: take plain steps where speculation measurably loses.
            sampling: fields of `SamplingParams`.

        Returns:
            One `Result` for one prompt, else a list in order; an answer that failed has its `error` set.

        Raises:
            UsageError: naming the bad value.
            ForetellError: the answer to the only prompt failed.
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
        for index, event in run(decoder, [Request(ids, params, key) for key, ids in enumerate(encoded)]):
            results[index].add(event)
        if single and results[0].error:
            raise ForetellError(results[0].error)
        return results[0] if single else results

    def stream(
        self, prompt: Prompt, *, raw: bool = False, rule: Typical | None = None, adapt: bool = True, **sampling: Any
    ) -> Iterator[Event]:
        """Answers one prompt, yielding what each step emitted; close the iterator to stop early.

        Args:
            prompt, raw, rule, adapt, sampling: see `generate`.

        Raises:
            UsageError: naming the bad value.
            ForetellError: the answer failed.
        """
        params = SamplingParams.of(**sampling)
        decoder = self.decoder(1, rule, adapt)
        for _, event in run(decoder, [Request(self.encode(prompt, raw), params, 0)]):
            yield event
            if event.error:
                raise ForetellError(event.error)


def load(
    model: str | Path = "smollm2-135m",
    drafter: str | type[Drafter] = "plain",
    *,
    lookup: bool = False,
    dtype: str | None = None,
    weights: str | None = None,
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
        drafter: a name from `foretell.drafters.table()`, "mine.py:Class", or a class; `options` are its own.
        lookup: merge candidates of prompt lookup into its trees.
        dtype, device, threads, kernel: see `foretell.backbone.assemble`.
        weights: what becomes of them: "stored" (the default), "bf16", "fp32", "q8_0" or "q4_k"; see
            `foretell.loading.choices`.
        cache_dir, offline: see `foretell.loading.resolve`.
        progress: called with (stage, fraction) while files are fetched or converted, and by what takes long in loading
            them: packing weights and checking arithmetic, mostly the first time.

    Raises:
        ForetellError, UsageError: one sentence with the remedy.
    """
    drafters.parsed(drafter, options)  # refuses what is mistyped before anything is downloaded
    computing: dict[str, Any] = {
        "dtype": dtype, "device": device, "threads": threads, "kernel": kernel, "cache_dir": cache_dir,
    }  # fmt: skip
    choice = weights or (None if is_offline(offline) else default_weights(device, kernel))
    folder = resolve(str(model), weights=choice, cache_dir=cache_dir, offline=offline, progress=progress)
    backbone = assemble(folder.path, **computing, progress=progress)
    backbone.costs = costs_file(backbone, cache_dir)
    tokenizer = Tokenizer.from_folder(folder.path)
    ends = dict.fromkeys((*backbone.config.eos_ids, *tokenizer.ends))
    backbone.config = replace(backbone.config, eos_ids=tuple(ends))
    llm = LLM(backbone, tokenizer, drafters.build(drafter, backbone, lookup=lookup, **options), folder)
    llm.loading = {**computing, "weights": weights, "offline": offline}
    return llm
