"""The run: every system answers every question, taking turns, so that a drifting machine slows all of them alike.

A round is one turn of one group of questions, answered by each system in an order drawn for the round. Plain decoding
is always among them: its answers are the history of later turns, so that all read the same prompts, and the truth that
ids are compared with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from foretell.api import LLM, Message
from foretell.backbone import Nodes
from foretell.bench.peers import MissingPeerError
from foretell.bench.run_folder import ROUNDS, Settings, take_up
from foretell.bench.suites import Question
from foretell.bench.systems import Answer, System
from foretell.conversations import MAX_TURNS
from foretell.errors import UsageError
from foretell.files import write_errors
from foretell.requests import SamplingParams

PLAIN = "plain"
WARM_UP, PROMPT = 24, "Tell me something about the weather."
"""Tokens that each system writes before anything is timed (half an answer at most), and the prompt."""


@dataclass(frozen=True)
class Round:
    """One turn of one group of questions, in one repeat of one setting."""

    temperature: float
    batch: int
    repeat: int
    group: int
    turn: int
    questions: tuple[Question, ...]

    @property
    def key(self) -> tuple[float, int, int, int, int]:
        return self.temperature, self.batch, self.repeat, self.group, self.turn


class Runner:
    """Measures what the settings describe, and resumes what the folder holds.

    Args:
        systems: plain among them, under the name "plain".
        about: machine, versions, bytes of a step's weights, descriptions of the systems: kept beside the settings.
        bandwidth: measures bytes per second that this machine reads; called before every round, since it drifts.
    """

    def __init__(
        self,
        llm: LLM,
        systems: Sequence[System],
        questions: Sequence[Question],
        settings: Settings,
        folder: Path,
        about: dict[str, Any],
        bandwidth: Callable[[], float],
    ):
        self.llm, self.systems, self.questions = llm, list(systems), list(questions)
        self.settings, self.folder, self.bandwidth = settings, folder, bandwidth
        self.plain = next(system for system in systems if system.name == PLAIN)
        self._index = {question.id: i for i, question in enumerate(questions)}
        self._plain_ids: dict[tuple[Any, ...], list[int]] = {}  # (temperature, batch, repeat, question, turn)
        self.failed: dict[str, str] = {}  # system -> when and why it ended; it takes no further part
        self._check()
        self.records = take_up(folder, settings, about)
        for record in self.records:
            if record["contender"] == PLAIN:
                self._plain_ids[*record["round"][:3], record["question"], record["turn"]] = record["ids"]

    def rounds(self) -> list[Round]:
        """Lists all rounds, repeats outermost: an early look sees every question once."""
        out = []
        for repeat in range(self.settings.repeats):
            for temperature in self.settings.temperatures:
                for batch in self.settings.batches:
                    for group, start in enumerate(range(0, len(self.questions), batch)):
                        grouped = self.questions[start : start + batch]
                        for turn in range(max(len(question.turns) for question in grouped)):
                            present = tuple(question for question in grouped if len(question.turns) > turn)
                            out.append(Round(temperature, batch, repeat, group, turn, present))
        return out

    def left(self) -> list[Round]:
        """The rounds that are not measured yet."""
        done = {tuple(record["round"]) for record in self.records}
        return [this_round for this_round in self.rounds() if this_round.key not in done]

    def estimate(self) -> float:
        """Seconds that the rounds left and their warm-up will take if every system is as fast as plain decoding.

        From one short answer of plain decoding at each batch size (its prompt and its steps, timed apart), and from one
        measurement of the read bandwidth, which precedes every round.
        """
        began = time.perf_counter()
        self.bandwidth()
        reading = (time.perf_counter() - began) * len(self.left())
        prompt, tokens = self.llm.encode(PROMPT), min(8, self.settings.new_tokens)
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        seconds = 0.0
        for batch in self.settings.batches:
            answers = self.plain.answer([prompt] * batch, params, list(range(batch)))
            longest = max(answers, key=lambda answer: answer.seconds)
            prefill = longest.prefill_seconds or 0.0
            per_prompt_token = prefill / (len(prompt) * batch)
            per_step = (longest.seconds - prefill) / max(1, tokens - 1)
            rounds = [this_round for this_round in self.left() if this_round.batch == batch]
            read = sum(
                self._expected_prompt(question, this_round.turn)
                for this_round in rounds
                for question in this_round.questions
            )
            steps = len(rounds) * self.settings.new_tokens
            if rounds:
                steps += self._warm_up_tokens * len(self.settings.temperatures)
            seconds += read * per_prompt_token + steps * per_step
        return seconds * len(self.systems) + reading

    def run(self, progress: Callable[[int, int, int], None] = lambda *_: None) -> list[dict[str, Any]]:
        """Measures the rounds left; returns every record.

        Args:
            progress: called after each round with (rounds done, rounds in all, new tokens so far).
        """
        left, total = self.left(), len(self.rounds())
        if left:
            self._warm_up()
        self.sitting = 1 + max((record["sitting"] for record in self.records), default=0)
        tokens = 0
        for count, this_round in enumerate(left, start=total - len(left) + 1):
            records = list(self._answers(this_round))
            tokens += sum(record["new_tokens"] for record in records)
            with write_errors(self.folder), (self.folder / ROUNDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(records) + "\n")
            self.records += records
            progress(count, total, tokens)
        return self.records

    def _check(self) -> None:
        """Refuses before anything is written what would fail in the middle of a run."""
        for temperature in self.settings.temperatures:
            self._params(temperature, self.settings.new_tokens)
        for question in self.questions:
            self._fitting(self.llm.encode(question.turns[0]), question, 0)

    @property
    def _warm_up_tokens(self) -> int:
        return max(1, min(WARM_UP, self.settings.new_tokens // 2))

    def _warm_up(self) -> None:
        prompt = self.llm.encode(PROMPT)
        for temperature in self.settings.temperatures:
            for batch in self.settings.batches:
                params = self._params(temperature, self._warm_up_tokens)
                for system in list(self.systems):
                    self._answer(system, [prompt] * batch, params, list(range(batch)), "while warming up")

    def _params(self, temperature: float, new_tokens: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=new_tokens, temperature=temperature, seed=self.settings.seed)

    # -- one round ------------------------------------------------------------------------------------------------

    def _answers(self, this_round: Round) -> Iterator[dict[str, Any]]:
        prompts = [self._prompt(this_round, question) for question in this_round.questions]
        bandwidth = self.bandwidth()
        keys = [self._index[question.id] * MAX_TURNS + this_round.turn for question in this_round.questions]
        params = self._params(this_round.temperature, self.settings.new_tokens)
        found: dict[str, tuple[list[Answer], int]] = {}
        order = list(self.systems)
        Random(f"{self.settings.seed} {this_round.key}").shuffle(order)  # so that no system always follows the same one
        for system in order:
            where = f"at question {this_round.questions[0].id}"
            if (answers := self._answer(system, prompts, params, keys, where)) is not None:
                found[system.name] = answers, system.peak_bytes
        truth = found[PLAIN][0]
        for question, answer in zip(this_round.questions, truth, strict=True):
            self._plain_ids[*this_round.key[:3], question.id, this_round.turn] = answer.ids
        for system in self.systems:
            answers, peak = found[system.name]
            for question, prompt, answer, plain in zip(this_round.questions, prompts, answers, truth, strict=True):
                record = {
                    "contender": system.name, "round": this_round.key, "question": question.id,
                    "category": question.category, "turn": this_round.turn, "prompt_tokens": len(prompt),
                    "new_tokens": len(answer.ids), "seconds": round(answer.seconds, 6),
                    "prefill_seconds": answer.prefill_seconds,
                    "arrivals": [(count, round(at, 5)) for count, at in answer.arrivals],
                    "peak_bytes": peak, "read_bytes_per_s": bandwidth, "sitting": self.sitting, **answer.statistics,
                }  # fmt: skip
                comparable = this_round.temperature == 0 or "drafter" in system.about
                if comparable and system is not self.plain:
                    record["same"] = answer.ids == plain.ids
                    if not record["same"]:
                        record["divergence"] = self._divergence(prompt, answer.ids, plain.ids, this_round.temperature)
                if not record.get("same"):
                    record["ids"] = answer.ids
                yield record

    def _answer(
        self, system: System, prompts: list[list[int]], params: SamplingParams, keys: list[int], where: str
    ) -> list[Answer] | None:
        """Returns the system's answers; None where it fails, and then it takes no further part."""
        try:
            return system.answer(prompts, params, keys)
        except MissingPeerError as error:
            self.systems.remove(system)
            self.failed[system.name] = f"It ended {where}; its figures are of the rounds before. {error}"
            return None

    def _prompt(self, this_round: Round, question: Question) -> list[int]:
        """Returns the token ids of a turn, after plain decoding's answers to the turns before it."""
        messages: list[Message] = []
        for turn in range(this_round.turn):
            ids = self._plain_ids[*this_round.key[:3], question.id, turn]
            text = self.llm.tokenizer.decode(ids, skip_special=True)
            messages += [{"role": "user", "content": question.turns[turn]}, {"role": "assistant", "content": text}]
        messages.append({"role": "user", "content": question.turns[this_round.turn]})
        return self._fitting(self.llm.encode(messages), question, this_round.turn)

    def _expected_prompt(self, question: Question, turn: int) -> int:
        """Tokens of a turn's prompt, if the answers before it are as long as they may be."""
        return sum(len(self.llm.encode(text)) for text in question.turns[: turn + 1]) + turn * self.settings.new_tokens

    def _fitting(self, ids: list[int], question: Question, turn: int) -> list[int]:
        room = self.llm.backbone.config.max_positions - self.settings.new_tokens
        if len(ids) > room:
            raise UsageError(
                f"Question {question.id}, turn {turn + 1}, has {len(ids)} tokens, and {self.settings.new_tokens} "
                f"new ones exceed the model's context; leave it out, or lower --max-new-tokens."
            )
        return ids

    def _divergence(self, prompt: list[int], ids: list[int], truth: list[int], temperature: float) -> dict[str, Any]:
        """Returns where two answers part, and by how much plain decoding preferred its own token (logits)."""
        shorter = min(len(ids), len(truth))
        at = next((i for i in range(shorter) if ids[i] != truth[i]), shorter)
        found: dict[str, Any] = {"at": at}
        if at < shorter and temperature == 0:
            backbone, read = self.llm.backbone, [*prompt, *truth[:at]]
            cache = backbone.new_cache(1, len(read))
            states_Md = backbone.forward(torch.tensor(read), Nodes.chains([0], [0], [len(read)]), cache)
            logits_V = backbone.logits(states_Md[-1:])[0]
            found["margin"] = round(float(logits_V[truth[at]] - logits_V[ids[at]]), 4)
        return found
