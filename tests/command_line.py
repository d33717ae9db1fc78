"""Running the command line inside the test process, and a model small enough to be made for it."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny

from foretell.cli import main

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class Ran:
    """How a command left."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def turns_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers in a line of JSON: of each turn, or the only one."""
    answers: list[dict[str, Any]] = line.get("turns", [line])
    return answers


def ids_of(lines: list[dict[str, Any]]) -> list[list[list[int]]]:
    """The token ids of each answer in each line."""
    return [[turn["ids"] for turn in turns_of(line)] for line in lines]


Foretell = Callable[..., Ran]


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Foretell:
    """A function that runs the command line with the arguments and the stdin it is given."""

    def run(*arguments: str, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return Ran(int(left.value.code or 0), *capsys.readouterr())

    return run


def save_tiny_chat(folder: Path) -> None:
    """A random model of a few thousand weights that reads bytes and has a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    save_tiny(folder, vocab_size=257, max_position_embeddings=512, eos_token_id=256, tie_word_embeddings=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
