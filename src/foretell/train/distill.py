"""Self-distillation: the model answers prompts, its own or the user's, and its answers become training data.

A drafter has to predict what *this* model writes, so it learns from that. Answers are decoded in large batches, rows
joining as others end; given conversations are replayed turn by turn, each answer replaced by the model's own (Medusa,
arXiv 2401.10774, §3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING

from foretell.api import LLM
from foretell.conversations import Conversation, converse
from foretell.errors import ForetellError, UsageError
from foretell.requests import Event, SamplingParams
from foretell.results import Result
from foretell.train.data import REFUSED, ConversationStore, Distilled
from foretell.train.prompts import Progress, tasks

if TYPE_CHECKING:
    from foretell.train.endpoint import Endpoint

MIN_TOKENS = 4
"""Tokens of an answer that is worth learning from."""
MIN_TASK_TOKENS = 40
"""Tokens of an answer that is worth asking about."""
MIN_DISTINCT = 0.3
"""Share of different 4-grams among all in the second half of an answer: below it, the answer is repetitive."""
REPETITIVE = "repetitive"
TASK_LINES = 1 << 21
"""Line of the first task: far from the lines of any file, and from those of the model's own prompts."""


def distill(
    llm: LLM,
    conversations: Sequence[Conversation],
    store: ConversationStore,
    params: SamplingParams,
    *,
    rows: int,
    keep_repetitive: bool = False,
    endpoint: Endpoint | None = None,
    progress: Progress = lambda *_: None,
) -> None:
    """Answers the conversations that `store` does not hold yet, appending each as it ends.

    Args:
        rows: conversations side by side.
        keep_repetitive: keeps answers that run in circles.
        endpoint: answers in the place of `llm`.

    Raises:
        ForetellError: the model, or the endpoint, fails.
    """
    room = llm.backbone.config.max_positions - params.max_new_tokens
    todo, done, written = [], 0, 0
    for conversation in conversations:
        if conversation.line in store.lines:
            done += 1
        elif len(llm.encode([{"role": "user", "content": conversation.turns[0]}])) > room:
            store.append(conversation.line, ["too long"])
            done += 1
        else:
            todo.append(conversation)

    def count_event(index: int, event: Event) -> None:
        nonlocal written
        written += len(event.tokens)
        progress(done, len(conversations), written)

    def count_reply(reply: Result) -> None:
        nonlocal written
        written += len(reply.ids)

    def end_early(index: int, error: ForetellError) -> None:
        """Lets a conversation end before a turn that does not fit; `_kept` adds the reason."""
        if not isinstance(error, UsageError):
            raise error  # the model itself failed, and would again

    if endpoint:
        answers = endpoint.converse(llm, todo, params, rows=rows, on_reply=count_reply)
    else:
        answers = converse(llm, llm.decoder(rows), todo, params, rows=rows, on_event=count_event, on_error=end_early)
    with closing(answers):
        for index, replies in answers:
            store.append(todo[index].line, list(_kept(llm, todo[index], replies, keep_repetitive)))
            done += 1
            progress(done, len(conversations), written)


def _kept(
    llm: LLM, conversation: Conversation, replies: Sequence[Result], keep_repetitive: bool
) -> Iterator[Distilled | str]:
    """Yields one conversation as token sequences, and the reasons for what is dropped.

    All turns are one sequence as long as the chat template only appends to what was there.
    """
    messages: list[dict[str, str]] = []
    tokens: list[int] = []
    answers: list[tuple[int, int]] = []
    ended = "too long" if len(replies) < len(conversation.turns) else ""
    for turn, reply in zip(conversation.turns, replies, strict=False):
        if reply.finish_reason in REFUSED:
            ended = reply.finish_reason
            break
        messages.append({"role": "user", "content": turn})
        prompt = llm.encode(messages)
        if answers and prompt[: len(tokens)] != tokens:  # an answer's text may encode to other tokens
            yield Distilled(conversation.line, tokens, answers)
            answers = []
        tokens = [*prompt, *reply.ids]
        messages.append({"role": "assistant", "content": reply.text})
        reason = unfit(reply.ids)
        if reason and not (keep_repetitive and reason == REPETITIVE):
            yield reason
        else:
            answers.append((len(prompt), len(tokens)))
    if answers:
        yield Distilled(conversation.line, tokens, answers)
    if ended:
        yield ended


def unfit(ids: Sequence[int]) -> str | None:
    """Returns why an answer is not worth learning from; None if it is."""
    if len(ids) < MIN_TOKENS:
        return "empty"
    half = ids[len(ids) // 2 :]
    grams = [tuple(half[i : i + 4]) for i in range(len(half) - 3)]
    if len(grams) >= 24 and len(set(grams)) < MIN_DISTINCT * len(grams):
        return REPETITIVE
    return None


def next_tasks(
    llm: LLM, store: ConversationStore, asked: Sequence[Conversation], count: int, seed: int
) -> list[Conversation]:
    """Makes `count` tasks about the first turns of `asked` and the first answers to them that were kept.

    Returns:
        Nothing where no answer is long enough to ask about.
    """
    turns = {conversation.line: conversation.turns[0] for conversation in asked}
    answers = {talk.line: talk.tokens[slice(*talk.answers[0])] for talk in reversed(store.conversations)}
    texts = [
        (turns[line], llm.tokenizer.decode(ids, skip_special=True))
        for line, ids in sorted(answers.items())
        if line in turns and len(ids) >= MIN_TASK_TOKENS and not unfit(ids)
    ]
    if not texts:
        return []
    first = max([TASK_LINES - 1, *(line for line in turns)]) + 1
    return tasks(texts, count, Random(f"{seed} {first}"), first)
