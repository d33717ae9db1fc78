"""The run: every contender answers every question, taking turns, so that a machine that drifts drifts for all.

    bench.json       what is measured, on which machine: written first
    rounds.jsonl     one line per round, appended as it ends: an interrupted run goes on behind the last

A round is one group of questions, one turn of theirs, answered by each contender in an order drawn for the round. Plain
decoding is always among them: its answers are the history of later turns, so that all read the same prompts, and the
truth that ids are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from foretell.api import LLM, Message
from foretell.backbone import Nodes
from foretell.bench.contenders import Answer, System
from foretell.bench.peers import MissingPeerError
from foretell.bench.results import ABOUT, ROUNDS
from foretell.bench.suites import Question
from foretell.conversations import MAX_TURNS
from foretell.errors import ForetellError, UsageError
from foretell.files import exists, whole_lines, write_errors, write_json
from foretell.requests import SamplingParams

PLAIN = "plain"
SAME = "version", "commit", "machine", "contenders"
"""What must not change within a run besides its settings."""
WARM_UP = 24
"""Tokens that each contender writes before anything is timed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; two runs of the same settings can be compared, and one be gone on with by another."""

    model: str
    fingerprint: str
    dtype: str
    suite: str
    digest: str
    questions: list[str]
    contenders: list[str]
    new_tokens: int = 128
    repeats: int = 1
    batches: list[int] = field(default_factory=lambda: [1])
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    seed: int = 0


@dataclass(frozen=True)
class Round:
    """Questions of one group and a turn of theirs, in one repeat of one setting."""

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
    """
    Args:
        contenders: plain among them, under the name "plain".
        about: machine, versions, weights of a step, what is known of the contenders: kept beside the settings.
        bandwidth: measures bytes per second that this machine reads; before every round, since it drifts.
    """

    def __init__(
        self,
        llm: LLM,
        contenders: Sequence[System],
        questions: Sequence[Question],
        settings: Settings,
        folder: Path,
        about: dict[str, Any],
        bandwidth: Callable[[], float],
    ):
        self.llm, self.contenders, self.questions = llm, list(contenders), list(questions)
        self.settings, self.folder, self.bandwidth = settings, folder, bandwidth
        self.plain = next(each for each in contenders if each.name == PLAIN)
        self._place = {question.id: i for i, question in enumerate(questions)}
        self._said: dict[tuple[Any, ...], list[int]] = {}  # (temperature, batch, repeat, question, turn) -> plain's ids
        self.failed: dict[str, str] = {}  # contender -> when and why it ended; it takes no further part
        self._check()
        self.records = self._take_up(about)

    def rounds(self) -> list[Round]:
        """All that is to be done, repeats outermost: an early look sees every question once."""
        out = []
        for repeat in range(self.settings.repeats):
            for temperature in self.settings.temperatures:
                for batch in self.settings.batches:
                    for group, at in enumerate(range(0, len(self.questions), batch)):
                        asked = self.questions[at : at + batch]
                        for turn in range(max(len(question.turns) for question in asked)):
                            there = tuple(question for question in asked if len(question.turns) > turn)
                            out.append(Round(temperature, batch, repeat, group, turn, there))
        return out

    def run(self, progress: Callable[[int, int, int], None] = lambda *_: None) -> list[dict[str, Any]]:
        """Measures what is left to measure; returns every record."""
        rounds = self.rounds()
        done = {tuple(record["round"]) for record in self.records}
        left = [each for each in rounds if each.key not in done]
        if left:
            self._warm_up()
        self.sitting = 1 + max((record["sitting"] for record in self.records), default=0)
        tokens = 0
        for count, each in enumerate(left, start=len(rounds) - len(left) + 1):
            records = list(self._answers(each))
            tokens += sum(record["new_tokens"] for record in records)
            with write_errors(self.folder), (self.folder / ROUNDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(records) + "\n")
            self.records += records
            progress(count, len(rounds), tokens)
        return self.records

    def _check(self) -> None:
        """Refuses what would fail in the midst of a run."""
        for temperature in self.settings.temperatures:
            self._params(temperature, self.settings.new_tokens)
        for question in self.questions:
            self._fitting(self.llm.encode(question.turns[0]), question, 0)

    def _warm_up(self) -> None:
        prompt = self.llm.encode("Tell me something about the weather.")
        for temperature in self.settings.temperatures:
            for batch in self.settings.batches:
                params = self._params(temperature, WARM_UP)
                for contender in list(self.contenders):
                    self._answer(contender, [prompt] * batch, params, list(range(batch)), "while warming up")

    def _params(self, temperature: float, new_tokens: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=new_tokens, temperature=temperature, seed=self.settings.seed)

    # -- one round ------------------------------------------------------------------------------------------------

    def _answers(self, each: Round) -> Iterator[dict[str, Any]]:
        prompts = [self._prompt(each, question) for question in each.questions]
        bandwidth = self.bandwidth()
        keys = [self._place[question.id] * MAX_TURNS + each.turn for question in each.questions]
        params = self._params(each.temperature, self.settings.new_tokens)
        found: dict[str, tuple[list[Answer], int]] = {}
        order = list(self.contenders)
        Random(f"{self.settings.seed} {each.key}").shuffle(order)  # so that nobody always follows the same one
        for contender in order:
            where = f"at question {each.questions[0].id}"
            if (answers := self._answer(contender, prompts, params, keys, where)) is not None:
                found[contender.name] = answers, contender.peak_bytes
        truth = found[PLAIN][0]
        for question, answer in zip(each.questions, truth, strict=True):
            self._said[*each.key[:3], question.id, each.turn] = answer.ids
        for contender in self.contenders:
            answers, peak = found[contender.name]
            for question, prompt, answer, plain in zip(each.questions, prompts, answers, truth, strict=True):
                record = {
                    "contender": contender.name, "round": each.key, "question": question.id,
                    "category": question.category, "turn": each.turn, "prompt_tokens": len(prompt),
                    "new_tokens": len(answer.ids), "seconds": round(answer.seconds, 6),
                    "prefill_seconds": answer.prefill_seconds,
                    "arrivals": [(count, round(at, 5)) for count, at in answer.arrivals],
                    "peak_bytes": peak, "read_bytes_per_s": bandwidth, "sitting": self.sitting, **answer.statistics,
                }  # fmt: skip
                comparable = each.temperature == 0 or "drafter" in contender.about
                if comparable and contender is not self.plain:
                    record["same"] = answer.ids == plain.ids
                    if not record["same"]:
                        record["divergence"] = self._divergence(prompt, answer.ids, plain.ids, each.temperature)
                if not record.get("same"):
                    record["ids"] = answer.ids
                yield record

    def _answer(
        self, contender: System, prompts: list[list[int]], params: SamplingParams, keys: list[int], where: str
    ) -> list[Answer] | None:
        """Its answers; None where it fails, and then it takes no further part."""
        try:
            return contender.answer(prompts, params, keys)
        except MissingPeerError as error:
            self.contenders.remove(contender)
            self.failed[contender.name] = f"It ended {where}; its figures are of the rounds before. {error}"
            return None

    def _prompt(self, each: Round, question: Question) -> list[int]:
        """Token ids of a turn, after what plain decoding answered to those before it."""
        messages: list[Message] = []
        for turn in range(each.turn):
            said = self._said[*each.key[:3], question.id, turn]
            text = self.llm.tokenizer.decode(said, skip_special=True)
            messages += [{"role": "user", "content": question.turns[turn]}, {"role": "assistant", "content": text}]
        messages.append({"role": "user", "content": question.turns[each.turn]})
        return self._fitting(self.llm.encode(messages), question, each.turn)

    def _fitting(self, ids: list[int], question: Question, turn: int) -> list[int]:
        room = self.llm.backbone.config.max_positions - self.settings.new_tokens
        if len(ids) > room:
            raise UsageError(
                f"Question {question.id}, turn {turn + 1}, has {len(ids)} tokens, and {self.settings.new_tokens} "
                f"new ones exceed the model's context; leave it out, or lower --max-new-tokens."
            )
        return ids

    def _divergence(self, prompt: list[int], ids: list[int], truth: list[int], temperature: float) -> dict[str, Any]:
        """Where two answers part, and by how much plain decoding preferred its own token (logits)."""
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

    # -- taking up an interrupted run -----------------------------------------------------------------------------

    def _take_up(self, about: dict[str, Any]) -> list[dict[str, Any]]:
        path = self.folder / ABOUT
        ours = asdict(self.settings)
        if not exists(path):
            with write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if any(path.name != ".lock" for path in self.folder.iterdir()):
                    raise UsageError(f"{self.folder} holds other files; choose another --out.")
                write_json(path, {"settings": ours, **about})
            return []
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            theirs = begun["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ForetellError(f"{path} is damaged; choose another --out, or delete the folder.") from error
        differ = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        now = json.loads(json.dumps(about))
        differ += [name for name in SAME if begun.get(name) != now.get(name)]
        if differ:
            raise UsageError(
                f"{self.folder} holds a run with other {', '.join(differ)}; go on with the same, or choose another "
                "--out."
            )
        records = read_rounds(self.folder)
        for record in records:
            if record["contender"] == PLAIN:
                self._said[*record["round"][:3], record["question"], record["turn"]] = record["ids"]
        return records


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The records of all whole rounds."""
    path = folder / ROUNDS
    try:
        return [record for line in whole_lines(path) for record in json.loads(line)]
    except ValueError as error:
        raise ForetellError(f"{path} is damaged; delete {folder}, or choose another --out.") from error
