"""`foretell generate`: one prompt streamed, or a file of prompts answered side by side.

A file is read and checked completely before the model is loaded. Answers are printed in its order, each as soon as
those before it are.
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
from foretell.cli.speculation_notes import note_held_back
from foretell.cli.terminal import answer_progress, note
from foretell.cli.wording import note_error
from foretell.errors import ForetellError, UsageError

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.prompt_files import Conversation
    from foretell.requests import Event
    from foretell.results import Result


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
    conversations = _conversations(prompt, prompts, raw, every, limit)
    llm = loading.load()
    from foretell.conversations import converse

    rows = min(batch_size, len(conversations))
    decoder = llm.decoder(rows, rule, not sampling.no_adapt)
    streamed = prompt is not None and not as_json
    headed = len(conversations) > 1 or len(conversations[0].turns) > 1
    finished: list[Result] = []
    failed: dict[int, str] = {}
    began = time.perf_counter()

    def fail(index: int, error: ForetellError) -> None:
        failed[index] = str(error)
        note_error(error)

    with answer_progress(len(conversations)) as progress:

        def show(index: int, event: Event) -> None:
            if streamed:
                print(event.text, end="", flush=True)
            progress(len(event.tokens), False)

        answers = converse(llm, decoder, conversations, params, rows=rows, raw=raw, on_event=show, on_error=fail)
        for index, replies in in_order(answers):
            progress(0, True)
            finished += replies
            if as_json:
                print(_json(conversations[index], replies, failed.get(index)), flush=True)
            else:
                print("" if streamed else _text(conversations[index], replies, headed), flush=True)
    if finished:
        _note_speed(llm, finished, time.perf_counter() - began, stats)
    if failed:
        raise ForetellError(f"{len(failed)} of {len(conversations)} conversations could not be answered to their end.")


def _note_speed(llm: LLM, finished: Sequence[Result], seconds: float, stats: bool) -> None:
    """Prints figures if requested; at a terminal, also whether speculation was held back."""
    from foretell.results import total

    sums, seed = total(finished), finished[-1].statistics.seed
    if stats:
        note(
            f"{sums.new_tokens} tokens in {seconds:.2f} s, prompts included: {sums.new_tokens / seconds:.1f} "
            f"tokens/s, {sums.acceptance_length:.2f} tokens per step{sums.sharing}"
            + ("" if seed is None else f"; seed {seed}")
        )
    if stats or (sums.held_back > 0.5 and sys.stdout.isatty()):
        note_held_back(sums, llm.backbone)


def _json(conversation: Conversation, replies: list[Result], error: str | None) -> str:
    """One line of JSON: a prompt with its answer, or the turns of a conversation with theirs."""
    from foretell.results import answer_json, conversation_json

    line = {"line": conversation.line + 1} if conversation.where else {}
    prompts = conversation.turns
    single = "turns" not in conversation.record and replies
    answers = answer_json(prompts[0], replies[0]) if single else conversation_json(prompts, replies)
    return json.dumps(line | answers | ({"error": error} if error else {}))


def _text(conversation: Conversation, replies: list[Result], headed: bool) -> str:
    """Answers for a reader: with the line and the turns that they belong to, where there are several."""
    if not headed:
        return "".join(reply.text + "\n" for reply in replies)
    turns = [f"> {turn}\n{reply.text}\n" for turn, reply in zip(conversation.turns, replies, strict=False)]
    return "\n".join([f"== line {conversation.line + 1} ==", *turns])


def in_order(answers: Iterator[tuple[int, list[Result]]]) -> Iterator[tuple[int, list[Result]]]:
    """Yields the same pairs by rising index; those that come early wait."""
    waiting: dict[int, list[Result]] = {}
    following = 0
    for index, replies in answers:
        waiting[index] = replies
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def _conversations(
    prompt: str | None, prompts: str | None, raw: bool, every: int, limit: int | None
) -> list[Conversation]:
    """Reads the conversations to answer: the typed prompt, or the lines of a file."""
    from foretell.prompt_files import Conversation, check_text, read_conversations

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
