"""Prompts about texts: what a user pastes, the model has written.

A model asked for a summary or a translation copies, shortens and names what stands above, and drafts of that are
learnt only from such conversations. No collection of documents is needed: the answers distilled so far are the texts.
Later tasks take earlier tasks' answers too, so that what was written in another language is translated back.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from foretell.conversations import Conversation

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
ABROAD = "Write a few sentences in {target} about this: {text}"
PASSAGES = (
    "Answer the question with the help of these passages.\n\n{passages}\n\nQuestion: {question}",
    "{passages}\n\nUsing the text above, answer: {question}",
)
SHARES = (("about", 40), ("passages", 20), ("abroad", 15), ("translate", 25))
SHORT, LONG = 300, 2400
"""Characters of a text to translate, and of any text; cut at the end of a sentence."""


def tasks(texts: Sequence[tuple[str, str]], count: int, rng: Random, first_line: int) -> list[Conversation]:
    """`count` prompts about texts; nothing but `texts` and `rng` decides them.

    Args:
        texts: (what was asked, what the model answered), some of it written abroad.
        first_line: number of the first prompt among all prompts.
    """
    foreign = [(language, text) for asked, text in texts if (language := _written_in(asked))]
    prompts = []
    kinds = rng.choices([kind for kind, _ in SHARES], [share for _, share in SHARES], k=count)
    for kind in kinds:
        asked, text = rng.choice(texts)
        target = rng.choice(LANGUAGES)
        if kind == "about":
            prompt = rng.choice(ABOUT).format(text=cut(text, LONG))
        elif kind == "abroad":
            prompt = ABROAD.format(target=target, text=cut(asked, SHORT))
        elif kind == "translate":
            source = "English"
            if foreign and rng.random() < 0.7:
                (source, text), target = rng.choice(foreign), "English"
            prompt = rng.choice(TRANSLATE).format(source=source, target=target, text=cut(text, SHORT))
        else:
            others = [rng.choice(texts)[1] for _ in range(rng.randint(0, 3))]
            passages = [cut(each, LONG // (1 + len(others))) for each in rng.sample([text, *others], 1 + len(others))]
            prompt = rng.choice(PASSAGES).format(passages="\n\n".join(passages), question=cut(asked, SHORT))
        prompts.append(prompt)
    return [Conversation((prompt,), first_line + i) for i, prompt in enumerate(prompts)]


def cut(text: str, longest: int) -> str:
    """The beginning of a text, whole sentences where there are any."""
    text = text.strip()
    if len(text) <= longest:
        return text
    end = max(text.rfind(mark, 0, longest) for mark in (". ", ".\n", "? ", "! "))
    return text[: end + 1] if end > 0 else text[:longest]


def _written_in(asked: str) -> str | None:
    """The language an answer was asked for in, if it was one of `ABROAD`."""
    return next((each for each in LANGUAGES if asked.startswith(ABROAD.split("{text}")[0].format(target=each))), None)
