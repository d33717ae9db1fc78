"""What callers write, for a type checker: `test_types.py` runs mypy over it. Nothing here is executed."""

from collections.abc import Iterator
from typing import assert_type

import foretell
from foretell import LLM, Event, Result


def one_prompt(llm: LLM) -> None:
    assert_type(llm.generate("Why is the sky blue?"), Result)
    assert_type(llm.generate([1, 2, 3], max_new_tokens=8), Result)
    assert_type(llm.generate([{"role": "user", "content": "Hello"}]), Result)
    assert_type(llm.generate("Hello", temperature=0.7, seed=None).text, str)


def many_prompts(llm: LLM, texts: list[str], talks: list[list[dict[str, str]]], ids: list[list[int]]) -> None:
    assert_type(llm.generate(["one", "two"]), list[Result])
    assert_type(llm.generate(texts), list[Result])
    assert_type(llm.generate(tuple(texts)), list[Result])
    assert_type(llm.generate(talks), list[Result])
    assert_type(llm.generate(ids, batch_size=2), list[Result])
    assert_type(llm.generate(["text", [1, 2]]), list[Result])


def streamed(llm: LLM) -> None:
    assert_type(llm.stream("Hello"), Iterator[Event])


def loaded() -> None:
    assert_type(foretell.load("smollm2-135m", drafter="medusa", lookup=True), LLM)


def refused(llm: LLM) -> None:
    llm.generate(3)  # type: ignore[call-overload]
    llm.generate(None)  # type: ignore[call-overload]
    llm.generate({"role": "user"})  # type: ignore[call-overload]
