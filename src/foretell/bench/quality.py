"""Quality of answers against a suite's references: for modes whose answers are not plain decoding's.

number   GSM8K: the number after ####, else the last one, equals the reference's
code     HumanEval: the function passes the reference's tests (pass@1); only with --run-code
text     ROUGE-L and BLEU against the reference
"""

from __future__ import annotations

import math
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from foretell.errors import ForetellError

SECONDS, MEMORY_BYTES, FILE_BYTES = 10, 1 << 30, 1 << 20
"""Limits of a program that a model wrote: processor time, memory, size of a file."""


def judge(task: str, answers: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """Returns the scores of a list of answers, each in [0, 1]."""
    return JUDGES[task](answers, references)


def agreement(answers: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Returns how similar answers are to plain decoding's (ROUGE-L)."""
    return {"agreement_rouge_l": _rouge(answers, truth)}


# -- numbers -----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def numbers(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    pairs = zip(answers, references, strict=True)
    return {"exact_match": mean(_same_number(answer, reference) for answer, reference in pairs)}


def _same_number(answer: str, reference: str) -> bool:
    _, mark, after = answer.rpartition("####")
    found = _NUMBER.findall(after)[:1] if mark else _NUMBER.findall(answer)[-1:]
    return bool(found) and math.isclose(_value(found[0]), _value(reference))


def _value(text: str) -> float:
    return float(text.replace(",", "").strip().lstrip("$"))


# -- texts -------------------------------------------------------------------------------------------------------------


def texts(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    try:
        import sacrebleu
    except ImportError as error:
        raise ForetellError("Judging texts needs sacrebleu; pip install 'foretell[bench]'.") from error
    bleu = sacrebleu.corpus_bleu(list(answers), [list(references)]).score / 100
    return {"rouge_l": _rouge(answers, references), "bleu": bleu}


def _rouge(answers: Sequence[str], references: Sequence[str]) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ForetellError("Judging texts needs rouge-score; pip install 'foretell[bench]'.") from error
    scorer = RougeScorer(["rougeL"])
    pairs = zip(answers, references, strict=True)
    return mean(scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs)


# -- code --------------------------------------------------------------------------------------------------------------


def code(answers: Sequence[str], references: Sequence[dict[str, str]]) -> dict[str, float]:
    return {"pass_at_1": mean(passes(answer, reference) for answer, reference in zip(answers, references, strict=True))}


def program(answer: str, reference: dict[str, str]) -> str:
    """Returns the function in an answer, behind the prompt where only a body is given, followed by the tests."""
    block = re.search(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", answer, re.DOTALL | re.IGNORECASE)
    written = block[1] if block else answer
    if not re.search(rf"^\s*def\s+{re.escape(reference['entry'])}\b", written, re.MULTILINE):
        written = reference["prompt"] + written
    before = re.split(rf"^def\s+{re.escape(reference['entry'])}\b", reference["prompt"], flags=re.MULTILINE)[0]
    return f"{before}\n{written}\n\n{reference['test']}\n\ncheck({reference['entry']})\n"


def passes(answer: str, reference: dict[str, str]) -> bool:
    """Runs the tests in a process with an empty environment and limited time, memory and disk.

    It may start no process, open no connection, and write only in its own folder. That stops accidents, not an
    attacker: hence only on demand. It has passed if, after the tests, it prints a random word chosen for this run.
    """
    end = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(
            _LIMITED.format(memory=MEMORY_BYTES, seconds=SECONDS, file=FILE_BYTES)
            + program(answer, reference)
            + f"\nprint('\\n{end}')\n"
        )
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(path)], cwd=folder, env={}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=2 * SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0 and done.stdout.rstrip().endswith(end.encode())


_LIMITED = """
def _limit():
    import os, resource, sys
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
    resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file}, {file}))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    home, inside, writing = os.getcwd(), os.path.abspath, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    forbidden = (
        "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir",
        "os.truncate", "os.chmod", "os.link", "os.symlink", "shutil.", "subprocess.", "socket.", "ctypes.",
    )
    def deny(event, arguments):
        if event.startswith(forbidden):
            raise PermissionError(event)
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & writing:
            if not inside(arguments[0]).startswith(home):
                raise PermissionError(event)
    sys.addaudithook(deny)
_limit()
del _limit
"""

JUDGES: dict[str, Callable[[Sequence[str], Sequence[Any]], dict[str, float]]] = {
    "number": numbers, "text": texts, "code": code,
}  # fmt: skip
