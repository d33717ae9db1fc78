"""Self-distillation: the model answers prompts, its own or yours, and the answers become training data.

A drafter must foretell what *this* model writes, so that is what it learns from. With no prompts at hand the model
writes them too: given its chat prefix up to where a user would begin, it goes on as the user (temperature 1,
top-p 0.95). Answers are decoded in large batches, rows joining as others end; given conversations are replayed turn
by turn, each answer replaced by the model's own (Medusa, arXiv 2401.10774, §3.3).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from foretell.api import LLM, Result
from foretell.conversations import Conversation, converse
from foretell.engine import run
from foretell.errors import ForetellError, UsageError
from foretell.files import complete_lines, write_errors
from foretell.prompt_files import read_conversations
from foretell.requests import Event, Request, SamplingParams
from foretell.train.data import REFUSED, Distilled, Store
from foretell.train.prompts import tasks

if TYPE_CHECKING:
    from foretell.train.endpoint import Endpoint

Progress = Callable[[int, int, int], None]
"""Called with (done, total, tokens written so far)."""

SHORTEST = 4
"""Tokens of an answer worth learning from."""
DISTINCT = 0.3
"""Least share of different 4-grams among those of an answer's second half: below, the model runs in a circle."""
CIRCLES = "repetitive"
SHORTEST_TEXT = 40
"""Tokens of an answer worth asking about."""
OWN_LINES, TASK_LINES = 1 << 20, 1 << 21
"""Numbers of the first prompt that the model wrote, and of the first task: far from the lines of any file, for
sampling noise belongs to the line."""


# -- prompts from nothing --------------------------------------------------------------------------------------------


def user_turn(llm: LLM) -> tuple[list[int], dict[str, Any]]:
    """Token ids of the chat template up to where a user's first turn begins, and what ends that turn."""
    marker = "\u241f here the user begins \u241f"
    before, _, after = llm.tokenizer.render_chat([{"role": "user", "content": marker}]).partition(marker)
    mark = llm.tokenizer.encode(after)[:1]
    if mark and not llm.tokenizer.decode(mark, skip_special=True):
        ends: dict[str, Any] = {"stop_ids": tuple(mark)}
    else:
        ends = {"stop": tuple(after.split()[:1])}
    return llm.tokenizer.encode(before), ends


def write_prompts(
    llm: LLM, count: int, path: Path, *, seed: int, rows: int, progress: Progress = lambda *_: None
) -> None:
    """Lets the model write `count` different user turns into `path`, one JSON object a line; goes on where it was.

    What is no whole turn (too long, empty, said before) is written again by the next seed.
    """
    seen = {each.turns[0] for each in read_prompts(path)} if complete_lines(path) else set()
    prefix, ends = user_turn(llm)
    params = SamplingParams(max_new_tokens=384, temperature=1.0, top_p=0.95, seed=seed, **ends)
    decoder = llm.decoder(rows)
    attempt, written, repeats = len(seen), 0, 0
    while len(seen) < count:
        tries = [Request(prefix, params, key) for key in range(attempt, attempt + 4 * rows)]
        results, turns = [Result() for _ in tries], 0
        with closing(run(decoder, tries)) as events:
            for index, event in events:
                if event.error:
                    raise ForetellError(event.error)
                results[index].add(event)
                written += len(event.tokens)
                text = results[index].text.strip()
                if event.finish_reason != "stop" or len(text) < 8:
                    continue
                turns += 1
                repeats += 1
                if text not in seen:
                    repeats = 0
                    seen.add(text)
                    with write_errors(path.parent), path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"prompt": text}) + "\n")
                    progress(len(seen), count, written)
                if len(seen) == count:
                    return
        if not turns or repeats > 2 * len(seen) + len(tries):  # gone on with, it may repeat all that is there once
            raise ForetellError(
                f"The model does not write {'more ' if seen else ''}user turns of its own (in {len(tries)} attempts "
                f"none was {'new' if turns else 'whole'}); give it prompts with --prompts FILE.jsonl."
            )
        attempt += len(tries)


# -- answers ---------------------------------------------------------------------------------------------------------


def distill(
    llm: LLM,
    conversations: Sequence[Conversation],
    store: Store,
    params: SamplingParams,
    *,
    rows: int,
    circles: bool = False,
    endpoint: Endpoint | None = None,
    progress: Progress = lambda *_: None,
) -> None:
    """Answers the conversations that `store` does not hold yet, appending each as it ends.

    Args:
        circles: keep answers that run in circles.
        endpoint: who answers, if not `llm` itself.
    """
    room = llm.backbone.config.max_positions - params.max_new_tokens
    todo, done = [], 0
    for each in conversations:
        if each.line in store.lines:
            done += 1
        elif len(llm.encode([{"role": "user", "content": each.turns[0]}])) > room:
            store.append(each.line, ["too long"])
            done += 1
        else:
            todo.append(each)
    written = 0

    def hear(index: int, event: Event) -> None:
        nonlocal written
        written += len(event.tokens)
        progress(done, len(conversations), written)

    def full(index: int, error: ForetellError) -> None:
        """A later turn does not fit: the conversation ends there, and `_kept` says so."""
        if not isinstance(error, UsageError):
            raise error  # the model itself failed, and would again

    def told(reply: Result) -> None:
        nonlocal written
        written += len(reply.ids)

    if endpoint:
        answers = endpoint.converse(llm, todo, params, rows=rows, on_reply=told)
    else:
        answers = converse(llm, llm.decoder(rows), todo, params, rows=rows, on_event=hear, on_error=full)
    with closing(answers):
        for index, replies in answers:
            store.append(todo[index].line, list(_kept(llm, todo[index], replies, circles)))
            done += 1
            progress(done, len(conversations), written)


def _kept(llm: LLM, conversation: Conversation, replies: Sequence[Result], circles: bool) -> Iterator[Distilled | str]:
    """One conversation as token sequences: turns go on in one sequence as long as the template only appends."""
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
        if answers and prompt[: len(tokens)] != tokens:  # read back, an answer's text may become other tokens
            yield Distilled(conversation.line, tokens, answers)
            answers = []
        tokens = [*prompt, *reply.ids]
        messages.append({"role": "assistant", "content": reply.text})
        reason = unfit(reply.ids)
        if reason and not (circles and reason == CIRCLES):
            yield reason
        else:
            answers.append((len(prompt), len(tokens)))
    if answers:
        yield Distilled(conversation.line, tokens, answers)
    if ended:
        yield ended


def unfit(ids: Sequence[int]) -> str | None:
    """Why an answer is not worth learning from; None if it is."""
    if len(ids) < SHORTEST:
        return "empty"
    half = ids[len(ids) // 2 :]
    grams = [tuple(half[i : i + 4]) for i in range(len(half) - 3)]
    if len(grams) >= 24 and len(set(grams)) < DISTINCT * len(grams):
        return CIRCLES
    return None


def next_tasks(llm: LLM, store: Store, asked: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """`count` tasks about the first turns of `asked` and the first of the model's answers that was kept; none where no
    answer is long enough to ask about."""
    turns = {each.line: each.turns[0] for each in asked}
    answers = {each.line: each.tokens[slice(*each.answers[0])] for each in reversed(store.conversations)}
    texts = [
        (turns[line], llm.tokenizer.decode(ids, skip_special=True))
        for line, ids in sorted(answers.items())
        if line in turns and len(ids) >= SHORTEST_TEXT and not unfit(ids)
    ]
    if not texts:
        return []
    first = max([TASK_LINES - 1, *(line for line in turns)]) + 1
    return tasks(texts, count, Random(f"{seed} {first}"), first)


def read_prompts(path: Path, every: int = 1, limit: int | None = None) -> list[Conversation]:
    """Prompts of a file in the layout of `conversations.read_conversations`."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ForetellError(f"Cannot read {path}: {error}; check the path, and that it is UTF-8.") from error
    return read_conversations(text, str(path), every=every, limit=limit)
