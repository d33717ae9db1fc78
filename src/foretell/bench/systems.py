"""The systems under measurement: drafters of this library in this process, peers in processes of their own.

    plain    medusa    medusa:nodes=16,lookup=true    medusa:typical=0.09    transformers:prompt_lookup    llama.cpp

A system takes token ids and returns token ids, so that all read the same prompt and one counter counts all tokens. It
also returns when tokens arrived and, where it knows them, the counts of its guesses. Result files name a system under
the key "contender", as the first published ones did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from foretell import drafters
from foretell.api import LLM
from foretell.backbone import Backbone
from foretell.bench.memory import peak_bytes, reset_peak
from foretell.engine import BatchDecoder, decoder_for, run
from foretell.errors import ForetellError
from foretell.recommendation import recommend
from foretell.requests import Request, SamplingParams, Statistics
from foretell.verify import Typical


@dataclass
class Answer:
    """The answer to one prompt.

    Attributes:
        seconds: from the request to its last token, prefill included.
        arrivals: (tokens, seconds since the request) of each arrival.
        prefill_seconds: None where a peer does not report it.
        statistics: steps, guesses and the time of their parts, as `Statistics` names them; of peers, those they report.
    """

    ids: list[int]
    seconds: float
    arrivals: list[tuple[int, float]]
    prefill_seconds: float | None = None
    statistics: dict[str, Any] = field(default_factory=dict)


class System(Protocol):
    """One way of decoding.

    Attributes:
        name: the text that requested it.
        lossless: whether its tokens must equal plain decoding's.
        about: versions, options and added parameters, for the report.
    """

    name: str
    lossless: bool
    about: dict[str, Any]

    def answer(self, prompts: Sequence[list[int]], params: SamplingParams, keys: Sequence[int]) -> list[Answer]:
        """Answers prompts in one batch; no state of an earlier call may be reused."""
        ...

    @property
    def peak_bytes(self) -> int:
        """Peak memory of its process since its last answer began."""
        ...

    def close(self) -> None: ...


class ForetellSystem:
    """A drafter of this library.

    Args:
        options: those of the drafter, and of the engine `lookup`, `adapt` (the governor, on by default: it holds
            speculation back where plain steps measure faster) and `typical`: true, or the threshold ε of typical
            acceptance (δ is its square root, as in the paper's sweep).
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
        self._decoders: dict[tuple[int, float], BatchDecoder] = {}
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
                answer.statistics = _counts(event.statistics)
        self._peak = peak_bytes(self.llm.backbone.device)
        return answers

    def _decoder(self, rows: int, temperature: float) -> BatchDecoder:
        """The decoder of this batch size, kept between calls so that its governor keeps its measurements."""
        if (rows, temperature) not in self._decoders:
            rule = replace(self.typical, temperature=temperature) if self.typical and temperature else self.typical
            self._decoders[rows, temperature] = decoder_for(
                self.llm.backbone, self.drafter, self.llm.tokenizer, max_rows=rows, rule=rule, adapt=self.adapt
            )
        return self._decoders[rows, temperature]

    @property
    def peak_bytes(self) -> int:
        return self._peak

    def close(self) -> None:
        self._decoders.clear()


def _thresholds(typical: bool | float) -> Typical | None:
    if typical is False:
        return None
    return Typical() if typical is True else Typical(typical, math.sqrt(max(typical, 0)))


def _counts(statistics: Statistics) -> dict[str, Any]:
    names = ("steps", "plain_steps", "suspended_steps", "drafted", "accepted", "inserted", "slots")
    seconds = ("draft_seconds", "verify_seconds")
    return {name: getattr(statistics, name) for name in (*names, *seconds)} | {"by_depth": statistics.by_depth}


def default_specs(backbone: Backbone) -> tuple[list[str], str]:
    """Returns the systems that run beside plain decoding if none is named, and one sentence on why.

    The recommended drafter depends on step costs measured on this machine, so it may change after `foretell tune`.
    """
    best = recommend(backbone)
    extra = [f"{best.name}:lookup=true"] if best.name != "prompt_lookup" else []
    return ["prompt_lookup", *extra], f"Chosen for this model and machine: {best}."
