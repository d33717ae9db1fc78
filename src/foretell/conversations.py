"""Conversations side by side: lists of user turns, answered by one decoder.

A turn is asked with everything said before it, so the turns of one conversation wait for each other;
conversations do not. The decoder holds as many of them as it has rows; a conversation's next turn goes in
before any new conversation does, while its row's cache still holds what was said, and one that ends makes
room for the next.

The noise of sampling belongs to (seed, key, position), and a turn's key is line * 1024 + turn: neither the
batch size nor the order in which rows finish changes a token.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from foretell.api import LLM, Message, Result
from foretell.errors import ForetellError, UsageError
from foretell.requests import Decoder, Event, SamplingParams, Statistics

MAX_TURNS = 1024


@dataclass(frozen=True)
class Conversation:
    """What will be asked.

    Attributes:
        turns: the user's turns, in order.
        line: which line of its file it was, from 0; fixes its sampling noise.
        where: how an error names it.
        record: the whole object of that line, for callers with columns of their own.
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
        name: what errors call the file.
        raw: no chat template will be used, so that a line holds one turn at most.
        every, limit: take every k-th line, then at most so many. All lines are checked, taken or not.

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


def check_text(text: str, what: str) -> None:
    """Refuses what no tokenizer could read; `what` names it in the error."""
    if not text.strip():
        raise ForetellError(f"{what} is empty; write something to answer.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ForetellError(
            f"{what} holds {text[error.start]!r}, which is no character (broken UTF-8, or half a surrogate "
            "pair); save the text as UTF-8."
        ) from error


def converse(
    llm: LLM,
    decoder: Decoder,
    conversations: Sequence[Conversation],
    params: SamplingParams,
    *,
    rows: int = 1,
    raw: bool = False,
    on_event: Callable[[int, Event], None] | None = None,
    on_error: Callable[[int, ForetellError], None] | None = None,
) -> Generator[tuple[int, list[Result]], None, None]:
    """Answers every conversation, `rows` at a time; yields (index, replies) as each one ends.

    First turns are checked before anything is decoded. Closing the iterator cancels what is left; the decoder
    stays usable.

    Args:
        raw: turns are plain text, with no chat template.
        on_event: called with (index, event) for all that the decoder emits.
        on_error: called with (index, error) when a later turn does not fit the model's context, or an answer ends
            before its time; the conversation ends with the replies it has, and the others go on. Without it, such a
            turn raises.

    Raises:
        UsageError: a turn that does not fit the model's context, naming the conversation.
        ForetellError: an answer ended before its time, likewise.
    """
    params = params.seeded()
    talks = [_Talk(llm, decoder, conversation, params, raw) for conversation in conversations]
    for talk in talks:
        decoder.cancel(talk.ask())  # the decoder's own check, before any work is done
    waiting = deque(enumerate(talks))
    asked: dict[int, tuple[int, _Talk]] = {}  # request -> (index, talk)
    try:
        while waiting or decoder.pending(asked):  # somebody else may have cancelled some
            while waiting and len(asked) < rows:
                index, talk = waiting.popleft()
                asked[talk.ask()] = index, talk
            for event in decoder.events(asked):
                index, talk = asked[event.request]
                if on_event:
                    on_event(index, event)
                if not talk.hear(event):
                    continue
                del asked[event.request]
                try:
                    talk.check(event)
                    if talk.left:
                        asked[talk.ask()] = index, talk
                        continue
                except ForetellError as error:
                    if on_error is None:
                        raise
                    on_error(index, error)
                yield index, talk.replies
    finally:
        for request in asked:
            decoder.cancel(request)


class _Talk:
    """One conversation in progress: what was said, and what is still to be asked."""

    def __init__(
        self, llm: LLM, decoder: Decoder, conversation: Conversation, params: SamplingParams, raw: bool
    ) -> None:
        self.llm, self.decoder, self.conversation = llm, decoder, conversation
        self.params, self.raw = params, raw
        self.messages: list[Message] = []
        self.replies: list[Result] = []
        self.reply = Result()

    @property
    def left(self) -> bool:
        return len(self.replies) < len(self.conversation.turns)

    def ask(self) -> int:
        """Submits the next turn; returns its request number."""
        turn = len(self.replies)
        text = self.conversation.turns[turn]
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.llm.encode(text, raw=True) if self.raw else self.llm.encode(messages)
        try:
            return self.decoder.submit(ids, self.params, self.conversation.line * MAX_TURNS + turn)
        except UsageError as error:
            raise UsageError(self._named(str(error), turn)) from error

    def check(self, event: Event) -> None:
        """Raises what ended the last answer before its time."""
        if event.error:
            raise ForetellError(self._named(event.error, len(self.replies) - 1))

    def _named(self, sentence: str, turn: int) -> str:
        where = self.conversation.where + (f", turn {turn + 1}" if turn else "")
        return f"{where}: {sentence}" if where else sentence

    def hear(self, event: Event) -> bool:
        """Takes in what was emitted; whether the turn is answered."""
        self.reply.add(event)
        if not event.finish_reason:
            return False
        self.messages += [
            {"role": "user", "content": self.conversation.turns[len(self.replies)]},
            {"role": "assistant", "content": self.reply.text},
        ]
        self.replies.append(self.reply)
        self.reply = Result()
        return True


# -- what was measured, as JSON ------------------------------------------------------------------------------

_TOKENS = ("prompt_tokens", "new_tokens", "reused_tokens", "drafted", "accepted")
_STEPS = ("steps", "plain_steps", "suspended_steps")
_SECONDS = ("prefill_seconds", "draft_seconds", "verify_seconds", "seconds")


def total(replies: Sequence[Result]) -> Statistics:
    """The statistics of several requests, added up (but for `by_depth`)."""
    sums = {name: sum(getattr(reply.statistics, name) for reply in replies) for name in (*_TOKENS, *_STEPS, *_SECONDS)}
    return Statistics(**sums, exact=all(reply.statistics.exact for reply in replies))


def fields(replies: Sequence[Result]) -> dict[str, Any]:
    """One conversation's replies as a flat object: sums and concatenations, the last finish reason."""
    sums = total(replies)
    found: dict[str, Any] = {
        "ids": [token for reply in replies for token in reply.ids],
        "text": "\n\n".join(reply.text for reply in replies),
        "finish_reason": replies[-1].finish_reason,
        "acceptance_length": round(sums.acceptance_length, 4),
        "exact": sums.exact,
    }
    found |= {name: getattr(sums, name) for name in (*_TOKENS, *_STEPS)}
    found |= {name: round(getattr(sums, name), 6) for name in _SECONDS}
    if replies[-1].statistics.seed is not None:
        found["seed"] = replies[-1].statistics.seed
    if any(reply.logprobs for reply in replies):
        found["logprobs"] = [asdict(logprob) for reply in replies for logprob in reply.logprobs]
    return found


# -- reading -------------------------------------------------------------------------------------------------


def parse_record(line: str, where: str) -> dict[str, Any]:
    """The object of one JSON line; `where` names it in errors."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise ForetellError(f"{where} is not valid JSON ({reason}); write one object a line.") from error
    if not isinstance(record, dict):
        raise ForetellError(f'{where} is {_kind(record)}, not an object; write {{"prompt": "..."}}.')
    return record


def turns_of(record: dict[str, Any], where: str, raw: bool = False) -> tuple[str, ...]:
    """The user's turns of such an object: its `prompt`, or its `turns`."""
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
        raise ForetellError(f"{where}: raw text has no turns; leave out --raw, or give one `prompt` a line.")
    return tuple(turns)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
