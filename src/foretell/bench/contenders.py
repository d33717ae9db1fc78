"""Who runs: drafters of this library in this process, and peers in processes and environments of their own.

    plain    medusa    medusa:nodes=16,lookup=true    medusa:typical=0.09    transformers:prompt_lookup    llama.cpp

A contender answers token ids with token ids, so that everybody reads the same prompt and one counter counts all. It
also says when tokens arrived, and, if it knows, what it guessed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from foretell import drafters
from foretell.api import LLM
from foretell.bench.memory import peak_bytes, reset_peak
from foretell.engine import SpeculativeDecoder, run
from foretell.errors import ForetellError
from foretell.requests import Request, SamplingParams, Statistics
from foretell.verify import Typical


@dataclass
class Answer:
    """What became of one prompt.

    Attributes:
        seconds: from the request to its last token, prefill included.
        arrivals: (tokens, seconds since the request), each time some came.
        prefill_seconds: None where a peer does not say.
        statistics: of our own engine: steps, guesses, time of their parts; peers give what they know.
    """

    ids: list[int]
    seconds: float
    arrivals: list[tuple[int, float]]
    prefill_seconds: float | None = None
    statistics: dict[str, Any] = field(default_factory=dict)


class System(Protocol):
    """
    Attributes:
        name: as it was asked for.
        lossless: whether its tokens must equal plain decoding's.
        about: versions, options, added parameters: for the report.
    """

    name: str
    lossless: bool
    about: dict[str, Any]

    def answer(self, prompts: Sequence[list[int]], params: SamplingParams, keys: Sequence[int]) -> list[Answer]:
        """Answers prompts side by side; none may profit from an earlier call."""
        ...

    @property
    def peak_bytes(self) -> int:
        """Most memory of its process since its last answer began."""
        ...

    def close(self) -> None: ...


class ForetellSystem:
    """A drafter of this library.

    Args:
        options: of the drafter; and of the engine `lookup`, `adapt`, and `typical`: whether acceptance is typical, or
            with which threshold ε (δ being its root, as in the paper's sweep).
    """

    def __init__(self, llm: LLM, name: str, drafter: str, options: dict[str, Any]):
        options = dict(options)
        lookup, self.adapt = bool(options.pop("lookup", False)), bool(options.pop("adapt", True))
        self.typical = _thresholds(options.pop("typical", False))
        self.llm, self.name = llm, name
        self.drafter = drafters.build(drafter, llm.backbone, lookup=lookup, **options)
        self.lossless = self.drafter.lossless and self.typical is None
        self.about = {
            "drafter": drafter, "options": options, "lookup": lookup, "adapt": self.adapt,
            "typical": self.typical and {"epsilon": self.typical.epsilon, "delta": self.typical.delta},
            "added_parameters": self.drafter.parameters, "exact": self.lossless and llm.backbone.nondeterminism is None,
        }  # fmt: skip
        self._decoders: dict[tuple[int, float], SpeculativeDecoder] = {}
        self._peak = 0

    def answer(self, prompts: Sequence[list[int]], params: SamplingParams, keys: Sequence[int]) -> list[Answer]:
        decoder = self._decoder(len(prompts), params.temperature)
        decoder.forget()
        answers = [Answer([], 0.0, []) for _ in prompts]
        reset_peak(self.llm.backbone.device)
        began = time.perf_counter()
        requests = [Request(ids, params, key) for ids, key in zip(prompts, keys, strict=True)]
        for index, event in run(decoder, requests):
            if event.error:
                raise ForetellError(f"{self.name}: {event.error}")
            answer = answers[index]
            answer.ids += event.tokens
            answer.arrivals.append((len(event.tokens), time.perf_counter() - began))
            if event.finish_reason:
                assert event.statistics is not None
                answer.seconds = time.perf_counter() - began
                answer.prefill_seconds = event.statistics.prefill_seconds
                answer.statistics = _told(event.statistics)
        self._peak = peak_bytes(self.llm.backbone.device)
        return answers

    def _decoder(self, rows: int, temperature: float) -> SpeculativeDecoder:
        """One that lasts, for what its governor has learnt about this batch size."""
        if (rows, temperature) not in self._decoders:
            rule = replace(self.typical, temperature=temperature) if self.typical and temperature else self.typical
            self._decoders[rows, temperature] = SpeculativeDecoder(
                self.llm.backbone, self.drafter, self.llm.tokenizer, max_rows=rows, rule=rule, adapt=self.adapt
            )
        return self._decoders[rows, temperature]

    @property
    def peak_bytes(self) -> int:
        return self._peak

    def close(self) -> None:
        self._decoders.clear()


def _thresholds(asked: bool | float) -> Typical | None:
    if asked is False:
        return None
    return Typical() if asked is True else Typical(asked, math.sqrt(max(asked, 0)))


def _told(statistics: Statistics) -> dict[str, Any]:
    names = ("steps", "plain_steps", "suspended_steps", "drafted", "accepted", "draft_seconds", "verify_seconds")
    return {name: getattr(statistics, name) for name in names} | {"by_depth": statistics.by_depth}


def parse_spec(text: str) -> tuple[str, list[str]]:
    """ "name:key=value,flag" as a name and its parts."""
    name, _, rest = text.partition(":")
    return name, [part for part in rest.split(",") if part]
