"""Conversations of `foretell chat` as files: one line of JSON each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError, UsageError
from foretell.files import atomic_write, exists, one_line
from foretell.prompt_files import check_text, parse_record

if TYPE_CHECKING:
    from foretell.api import Message


def save_conversation(path: Path, messages: list[Message]) -> None:
    """Writes a conversation as one line of JSON.

    `messages` is all of it, for /load; `turns` are the user's, which `foretell generate --prompts` asks again.

    Raises:
        UsageError: there is no turn yet, or the file exists and is not a saved conversation.
        ForetellError: the file cannot be written.
    """
    turns = [message["content"] for message in messages if message["role"] == "user"]
    if not turns:
        raise UsageError("There is nothing to save yet; write a turn first.")
    if exists(path):
        try:
            read_conversation(path)
        except ForetellError:
            raise UsageError(f"{path} exists and is not a saved conversation; choose another file.") from None
    with atomic_write(path, remedy="choose another file") as partial:
        line = json.dumps({"turns": turns, "messages": messages}, ensure_ascii=False)
        partial.write_text(f"{line}\n", encoding="utf-8")


def read_conversation(path: Path) -> list[Message]:
    """Reads the messages of a saved conversation: a system prompt or none, then turns and answers alternately.

    Raises:
        ForetellError: the file cannot be read or holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ForetellError(f"Cannot read {path} ({one_line(error)}); check the path.") from error
    messages: Any = parse_record(text, str(path)).get("messages")
    shape = f'{path} is not a saved conversation: "messages" must be a list of {{"role": ..., "content": "..."}}'
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages
    ):
        raise ForetellError(f"{shape}.")
    roles = [message.get("role") for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise ForetellError(f"{shape}, a user's and an assistant's in turn, with at most a system's before them.")
    for message in messages:
        if message["role"] != "assistant":  # an answer that was stopped at once is empty
            check_text(message["content"], f"{path}: a turn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
