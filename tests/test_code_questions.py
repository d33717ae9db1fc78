"""Our own questions about code: what `data/CODE_QUESTIONS.md` says of them."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from foretell.bench.suites import Question, load_suite

SUITE = load_suite(str(Path(__file__).parent.parent / "data" / "code_questions.jsonl"))
every_question = pytest.mark.parametrize("question", SUITE.questions, ids=lambda question: question.id)


def test_there_are_forty_of_two_kinds() -> None:
    assert Counter(question.category for question in SUITE.questions) == {"complete": 24, "edit": 16}
    assert len({question.turns[0].partition("```")[0] for question in SUITE.questions}) == 40


@every_question
def test_a_question_is_a_request_and_a_file_that_python_reads(question: Question) -> None:
    [turn] = question.turns
    found = re.fullmatch(r"(\S[^\n]+)\n\n```python\n(.+\n)```", turn, re.DOTALL)
    assert found
    assert "`" * 3 not in found[2]
    assert 30 <= found[2].count("\n") <= 120
    assert max(map(len, found[2].splitlines())) <= 120
    ast.parse(found[2])


@every_question
def test_there_is_something_to_complete(question: Question) -> None:
    """A function without a body of its own: nothing but its docstring, `...`, `pass`, or an exception."""

    def is_empty(node: ast.FunctionDef) -> bool:
        body = [each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
        return all(ast.unparse(each) in ("raise NotImplementedError", "pass") for each in body)

    code = question.turns[0].partition("```python\n")[2].removesuffix("```")
    empty = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef) and is_empty(node)]
    assert bool(empty) == (question.category == "complete")
