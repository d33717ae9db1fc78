"""Files of prompts: JSON lines, each with a `prompt` or with the `turns` of a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from foretell.errors import ForetellError

MAX_TURNS = 1024
"""Most turns of one conversation."""


@dataclass(frozen=True)
class Conversation:
    """A user's part of a conversation.

    Attributes:
        turns: the user's turns, in order.
        line: its line in the file, from 0; fixes its sampling noise.
        where: its name in errors.
        record: the JSON object of that line, for callers with columns of their own.
    """

    turns: tuple[str, ...]
    line: int = 0
    where: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def read_conversations(
    text: str, name: str, *, raw: bool = False, every: int = 1, limit: int | None = None
) -> list[Conversation]:
    """Reads JSON lines, each an object with `prompt` (one turn) or `turns` (a list of them).

    Args:
        text: the file's content; blank lines are skipped.
        name: the file's name in errors.
        raw: no chat template will be used, so a line holds one turn at most.
        every, limit: take every k-th line, then at most `limit`. All lines are checked, taken or not.

    Raises:
        ForetellError: naming file, line and what is wrong with it.
    """
    found = []
    for number, line in enumerate(text.split("\n")):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            where = f"{name}, line {number + 1}"
            record = parse_record(line, where)
            found.append(Conversation(turns_of(record, where, raw), number, where, record))
    if not found:
        raise ForetellError(f"{name} holds no prompts; give one JSON object a line, with `prompt` or `turns`.")
    return found[::every][:limit]


def parse_record(line: str, where: str) -> dict[str, Any]:
    """Returns the object of one JSON line.

    Args:
        where: names the line in errors.

    Raises:
        ForetellError: the line is not a JSON object.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise ForetellError(f"{where} is not valid JSON ({reason}); write one object a line.") from error
    if not isinstance(record, dict):
        raise ForetellError(f'{where} is {_kind(record)}, not an object; write {{"prompt": "..."}}.')
    return record


def turns_of(record: dict[str, Any], where: str, raw: bool = False) -> tuple[str, ...]:
    """Returns the user's turns of a record: its `prompt`, or its `turns`.

    Raises:
        ForetellError: neither or both are given, or one is not text.
    """
    if ("prompt" in record) == ("turns" in record):
        has = "both `prompt` and `turns`" if "prompt" in record else "neither `prompt` nor `turns`"
        raise ForetellError(f"{where} has {has}; give one of them.")
    key = "prompt" if "prompt" in record else "turns"
    value = record[key]
    turns = [value] if key == "prompt" else value
    if not isinstance(turns, list):
        raise ForetellError(f"{where}: `turns` is {_kind(turns)}; it must be a list of strings.")
    if not 1 <= len(turns) <= MAX_TURNS:
        raise ForetellError(f"{where}: `turns` has {len(turns)} entries; it must have 1 to {MAX_TURNS}.")
    for turn in turns:
        if not isinstance(turn, str):
            must = "a string" if key == "prompt" else "a list of strings"
            raise ForetellError(f"{where}: `{key}` holds {_kind(turn)}; it must be {must}.")
        check_text(turn, f"{where}: the prompt")
    if raw and len(turns) > 1:
        raise ForetellError(f"{where}: raw text has no turns; leave out `raw=True`, or give one `prompt` a line.")
    return tuple(turns)


def check_text(text: str, what: str) -> None:
    """Refuses text that no tokenizer could read.

    Args:
        what: names the text in the error.

    Raises:
        ForetellError: the text is empty, or not valid Unicode.
    """
    if not text.strip():
        raise ForetellError(f"{what} is empty; write something to answer.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ForetellError(
            f"{what} holds {text[error.start]!r}, which is no character (broken UTF-8, or half a surrogate "
            "pair); save the text as UTF-8."
        ) from error


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
