"""Rewords questions of Spec-Bench, of which whole kinds begin or end with the same words.

Heads that learnt from prompts with those very words may do better on the suite than on what users write. A rule finds
the fixed words of a kind; its texts say the same in words that are rare or absent in the prompts that the heads learnt
from. The content stays as it is, letter by letter.
"""

from __future__ import annotations

import re
from zlib import crc32

RULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "translation": (
        r"Translate German to English: (?P<text>.+)",
        (
            "What is the English for the following German sentence?\n\n{text}",
            "{text}\n\nPut the German above into English, please.",
            "My German is poor, so tell me in English what this says:\n\n{text}",
        ),
    ),
    "summarization": (
        r"Summarize: (?P<text>.+)",
        (
            "{text}\n\nWhat are the key points of this article?",
            "Tell me briefly what this news story is about:\n\n{text}",
            "I have no time to read all of this. What does it say, in short?\n\n{text}",
        ),
    ),
    "rag": (  # passages, and the question as the last line
        r"(?P<text>.+)\n(?P<question>[^\n]+)",
        (
            "{question}\n\nThese excerpts may help:\n\n{text}",
            "I looked this up and came across the text below.\n\n{text}\n\nWith that in mind: {question}",
            "Background:\n\n{text}\n\nMy question about it is this: {question}",
        ),
    ),
}
"""Kind of question -> the pattern of its fixed words, which names the parts to keep, and texts to say the same with."""


def reworded(kind: str, question: str) -> str | None:
    """Returns the question in other words, the same at every call; None where the suite has no fixed words for it."""
    if kind not in RULES:
        return None
    pattern, texts = RULES[kind]
    found = re.fullmatch(pattern, question, re.DOTALL)
    return texts[crc32(question.encode()) % len(texts)].format(**found.groupdict()) if found else None
