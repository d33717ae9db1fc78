"""Prompts to distill from: a file's, those that the model writes itself, and tasks about texts that it has written.

With no prompts at hand the model writes them: given its chat prefix up to where a user's turn begins, it continues as
the user (temperature 1, top-p 0.95).

Users also paste texts. A model that is asked for a summary or a translation copies, shortens and names what stands in
the prompt, and drafts of that are learnt only from such conversations. No collection of documents is needed: the
answers distilled so far are the texts. Later tasks take the answers of earlier tasks too, so that texts in another
language are translated back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

from foretell.api import LLM
from foretell.conversations import Conversation
from foretell.engine import run
from foretell.errors import ForetellError
from foretell.files import complete_lines, write_errors
from foretell.prompt_files import read_conversations
from foretell.requests import Request, SamplingParams
from foretell.results import Result

Progress = Callable[[int, int, int], None]
"""Called with (done, total, tokens written so far)."""

MIN_CHARACTERS = 8
"""Characters of a prompt that the model wrote itself."""
OWN_LINES = 1 << 20
"""Line of the first prompt that the model wrote: far from those of any file, since sampling noise follows the line."""

LANGUAGES = ("German", "French", "Spanish", "Italian")
ABOUT = (
    "Summarize: {text}",
    "Summarize the following text in a few sentences.\n\n{text}",
    "{text}\n\nGive a short summary of the text above.",
    "What are the main points of this text?\n\n{text}",
    "Rewrite this text in other words: {text}",
    "Correct the mistakes in this text.\n\n{text}",
    "Read the text and ask three questions about it.\n\n{text}",
    "Find a title for this text and explain it: {text}",
    "Continue this text: {text}",
    "Extract the names, places and numbers from this text as a list.\n\n{text}",
)
TRANSLATE = ("Translate {source} to {target}: {text}", "Translate this text to {target}.\n\n{text}")
FOREIGN = "Write a few sentences in {target} about this: {text}"
PASSAGES = (
    "Answer the question with the help of these passages.\n\n{passages}\n\nQuestion: {question}",
    "{passages}\n\nUsing the text above, answer: {question}",
)
SHARES = (("about", 40), ("passages", 20), ("foreign", 15), ("translate", 25))
HUMAN_EVAL = {"task_id", "entry_point", "test"}
"""Fields of HumanEval's questions."""
SHORT, LONG = 300, 2400
"""Characters of a text to translate, and of any other text, at most; cut at the end of a sentence."""


def tasks(texts: Sequence[tuple[str, str]], count: int, rng: Random, first_line: int) -> list[Conversation]:
    """Makes `count` prompts about texts; `texts` and `rng` determine them.

    Args:
        texts: (prompt, the model's answer) pairs, some answers in other languages.
        first_line: line of the first prompt; the others follow.
    """
    foreign = [(language, text) for asked, text in texts if (language := _written_in(asked))]
    prompts = []
    kinds = rng.choices([kind for kind, _ in SHARES], [share for _, share in SHARES], k=count)
    for kind in kinds:
        asked, text = rng.choice(texts)
        target = rng.choice(LANGUAGES)
        if kind == "about":
            prompt = rng.choice(ABOUT).format(text=cut(text, LONG))
        elif kind == "foreign":
            prompt = FOREIGN.format(target=target, text=cut(asked, SHORT))
        elif kind == "translate":
            source = "English"
            if foreign and rng.random() < 0.7:
                (source, text), target = rng.choice(foreign), "English"
            prompt = rng.choice(TRANSLATE).format(source=source, target=target, text=cut(text, SHORT))
        else:
            others = [rng.choice(texts)[1] for _ in range(rng.randint(0, 3))]
            order = rng.sample([text, *others], 1 + len(others))
            passages = [cut(passage, LONG // len(order)) for passage in order]
            prompt = rng.choice(PASSAGES).format(passages="\n\n".join(passages), question=cut(asked, SHORT))
        prompts.append(prompt)
    return [Conversation((prompt,), first_line + i) for i, prompt in enumerate(prompts)]


def cut(text: str, max_length: int) -> str:
    """The beginning of a text: whole sentences, where one ends early enough."""
    text = text.strip()
    if len(text) <= max_length:
        return text
    end = max(text.rfind(mark, 0, max_length) for mark in (". ", ".\n", "? ", "! "))
    return text[: end + 1] if end > 0 else text[:max_length]


def _written_in(asked: str) -> str | None:
    """The language of the answer, if the prompt was made from `FOREIGN`."""
    return next((name for name in LANGUAGES if asked.startswith(FOREIGN.split("{text}")[0].format(target=name))), None)


# -- prompts of a file, and of the model ------------------------------------------------------------------------


def read_prompts(path: Path, every: int = 1, limit: int | None = None) -> list[Conversation]:
    """Reads a file of prompts (see `prompt_files.read_conversations`): every k-th line, `limit` at most.

    Raises:
        ForetellError: the file cannot be read, a line is malformed, or its questions are HumanEval's.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ForetellError(f"Cannot read {path}: {error}; check the path, and that it is UTF-8.") from error
    found = read_conversations(text, str(path), every=every, limit=limit)
    if any(prompt.record.keys() >= HUMAN_EVAL for prompt in found):
        raise ForetellError(f"{path} holds HumanEval, which is for measuring only; give other prompts to train on.")
    return found


def user_turn(llm: LLM) -> tuple[list[int], dict[str, Any]]:
    """Token ids of the chat template up to where a user's first turn begins, and the stop options that end it."""
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
    """Lets the model write user turns into `path`, one JSON object a line, until it holds `count` different ones.

    A turn that is too long, empty or a repetition is dropped, and the next seed writes another.

    Args:
        rows: turns that are written side by side.

    Raises:
        ForetellError: the model writes no turns, or none but repetitions.
    """
    seen = {prompt.turns[0] for prompt in read_prompts(path)} if complete_lines(path) else set()
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
                if event.finish_reason != "stop" or len(text) < MIN_CHARACTERS:
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
        if not turns or repeats > 2 * len(seen) + len(tries):  # a resumed run may first repeat all that is there
            raise ForetellError(
                f"The model does not write {'more ' if seen else ''}user turns of its own (in {len(tries)} attempts "
                f"none was {'new' if turns else 'whole'}); give it prompts with `prompts=`."
            )
        attempt += len(tries)
