"""`foretell generate`: one prompt streamed, or a file of prompts answered side by side.

A file is read and checked whole before the model is loaded, and answers come out in its order, each as soon
as those before it are out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.options import Loading, Sampling
from foretell.cli.paying import note_held_back
from foretell.cli.terminal import answer_progress, note
from foretell.errors import ForetellError, UsageError

if TYPE_CHECKING:
    from foretell.api import LLM, Result
    from foretell.conversations import Conversation
    from foretell.requests import Event


def generate(
    loading: Loading,
    sampling: Sampling,
    prompt: Annotated[str | None, typer.Argument(help="What to answer; - reads it from stdin.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help="JSON lines with `prompt` or `turns` (a conversation); - is stdin."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself: no chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Prompts side by side.")] = 1,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Answer at most so many lines.")] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Answer every K-th line only.")] = 1,
    stats: Annotated[bool, typer.Option("--stats", help="Say on stderr how fast it was.")] = False,
) -> None:
    """Answer a prompt, or a file of prompts."""
    if (prompt is None) == (prompts is None):
        raise UsageError("Give either a prompt (- reads it from stdin) or a file of prompts (--prompts FILE.jsonl).")
    if sampling.logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json, which prints them.")
    params, rule = sampling.params(), sampling.rule()
    asked = _asked(prompt, prompts, raw, every, limit)
    llm = loading.load()
    from foretell.conversations import converse

    rows = min(batch_size, len(asked))
    decoder = llm.decoder(rows, rule, not sampling.no_adapt)
    streamed = prompt is not None and not as_json
    done: list[Result] = []
    began = time.perf_counter()
    failed: dict[int, str] = {}

    def fail(index: int, error: ForetellError) -> None:
        failed[index] = str(error)
        note(f"error: {error}")

    with answer_progress(len(asked)) as progress:

        def hear(index: int, event: Event) -> None:
            if streamed:
                print(event.text, end="", flush=True)
            progress(len(event.tokens), False)

        answers = converse(llm, decoder, asked, params, rows=rows, raw=raw, on_event=hear, on_error=fail)
        for index, replies in in_order(answers):
            progress(0, True)
            done += replies
            if as_json:
                print(_line(asked[index], replies, failed.get(index)), flush=True)
            else:
                print("" if streamed else "\n\n".join(reply.text for reply in replies) + "\n", flush=True)
    if stats:
        _note_speed(llm, done, time.perf_counter() - began)
    if failed:
        raise ForetellError(f"{len(failed)} of {len(asked)} conversations could not be answered to their end.")


def _note_speed(llm: LLM, done: Sequence[Result], seconds: float) -> None:
    from foretell.conversations import total

    sums, seed = total(done), done[-1].statistics.seed if done else None
    note(
        f"{sums.new_tokens} tokens in {seconds:.2f} s, prompts included: {sums.new_tokens / seconds:.1f} "
        f"tokens/s, {sums.acceptance_length:.2f} tokens per step" + ("" if seed is None else f"; seed {seed}")
    )
    note_held_back(sums, llm.backbone)


def _line(asked: Conversation, replies: list[Result], error: str | None) -> str:
    """One conversation's JSON."""
    from foretell.conversations import fields

    turns = {"turns": [fields([reply]) for reply in replies]} if "turns" in asked.record else {}
    return json.dumps(fields(replies) | turns | ({"error": error} if error else {}))


def in_order(answers: Iterator[tuple[int, list[Result]]]) -> Iterator[tuple[int, list[Result]]]:
    """The same pairs by rising index: what is early waits for those before it."""
    early: dict[int, list[Result]] = {}
    following = 0
    for index, replies in answers:
        early[index] = replies
        while following in early:
            yield following, early.pop(following)
            following += 1


def _asked(prompt: str | None, prompts: str | None, raw: bool, every: int, limit: int | None) -> list[Conversation]:
    from foretell.conversations import Conversation, check_text, read_conversations

    if prompt is not None:
        text = _read("-") if prompt == "-" else prompt
        check_text(text, "the prompt")
        return [Conversation((text,))]
    assert prompts is not None
    name = "stdin" if prompts == "-" else prompts
    return read_conversations(_read(prompts), name, raw=raw, every=every, limit=limit)


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ForetellError(f"Cannot read {name}: {error.strerror}; check the path.") from error
    except UnicodeDecodeError as error:
        where = "stdin" if name == "-" else name
        raise ForetellError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8 text.") from error
