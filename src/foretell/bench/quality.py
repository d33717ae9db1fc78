"""Quality of answers against a suite's references: for modes whose answers are not plain decoding's.

number   GSM8K: the number after ####, else the last one, equals the reference's
code     HumanEval: the function passes the reference's tests (pass@1); only with --run-code
text     ROUGE-L and BLEU against the reference
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from foretell.bench.sandbox import finishes
from foretell.errors import ForetellError


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

_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def code(answers: Sequence[str], references: Sequence[dict[str, str]]) -> dict[str, float]:
    pairs = zip(answers, references, strict=True)
    return {"pass_at_1": mean(finishes(program(answer, reference)) for answer, reference in pairs)}


def program(answer: str, reference: dict[str, str]) -> tuple[str, ...]:
    """Returns what is run: the code before the question's function, the function as answered, its tests, their call.

    Args:
        answer: the function is taken from the first block of code that defines it. One that no block defines is read as
            its body alone.
    """
    prompt, test, entry = reference["prompt"], reference["test"], reference["entry"]
    definition = re.compile(rf"^def\s+{re.escape(entry)}\b", re.MULTILINE)
    blocks = _BLOCK.findall(answer) or [answer]
    written = next((block for block in blocks if definition.search(block)), prompt + blocks[0])
    return definition.split(prompt)[0], written, test, f"check({entry})"


JUDGES: dict[str, Callable[[Sequence[str], Sequence[Any]], dict[str, float]]] = {
    "number": numbers, "text": texts, "code": code,
}  # fmt: skip
