"""Distilled conversations on disk: one JSON line each, appended as they end.

    distill.json          format, model, fingerprint, settings, command, counts, seconds
    prompts.jsonl         prompts that the model wrote itself, if it did
    conversations.jsonl   {"line": 7, "tokens": [...], "answers": [[31, 120], ...]}
                          {"line": 8, "dropped": "repetitive"}

`tokens` is a whole conversation with its marks; `answers` are the half-open spans that the model wrote, end-of-turn
included: what a drafter learns from. `line` is the place among the prompts; `"more": true` says that the next
JSON line belongs to it too. What became of a prompt is there whole or not at all, so that an interruption costs what
was being answered and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError, UsageError
from foretell.files import complete_lines, one_line, read_json, write_errors, write_json
from foretell.loading.catalog import current

FORMAT = 1
REFUSED = ("rejected", "unfinished", "too long")
"""Finish reasons of a reply that is not kept: its conversation is kept up to it."""
MANIFEST, CONVERSATIONS, PACKED = "distill.json", "conversations.jsonl", "conversations.jsonl.xz"


@dataclass(frozen=True)
class Distilled:
    """One conversation; `answers` are half-open spans of `tokens`."""

    line: int
    tokens: list[int]
    answers: list[tuple[int, int]]

    @property
    def written(self) -> int:
        """Tokens that the model wrote."""
        return sum(end - start for start, end in self.answers)


@dataclass
class Store:
    """A folder of distilled conversations, open for reading and appending."""

    folder: Path
    manifest: dict[str, Any]
    conversations: list[Distilled] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    lines: set[int] = field(default_factory=set)

    @classmethod
    def create(cls, folder: Path, manifest: dict[str, Any]) -> Store:
        """Opens a folder to add to; one that exists must have been made with the same settings.

        Raises:
            UsageError: it was made by another model or with other settings, or is packed.
        """
        manifest = {"format": FORMAT, **manifest}
        path = folder / MANIFEST
        if not path.exists():
            with write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            store = cls(folder, manifest)
            store.write_manifest()
            return store
        if (folder / PACKED).exists() and not (folder / CONVERSATIONS).exists():
            raise UsageError(f"{folder / PACKED} is packed; unpack it with xz -d to add to it.")
        store = cls.open(folder, cut=True)
        begun, ours = (
            {"fingerprint": m.get("fingerprint"), **m.get("settings", {})} for m in (store.manifest, manifest)
        )
        differ = [name for name in {**begun, **ours} if begun.get(name) != ours.get(name)]
        if differ:
            other = ", ".join(f"{name} {begun.get(name)} (not {ours.get(name)})" for name in differ)
            raise UsageError(f"{folder} was begun with {other}; go on with the same, or choose another folder.")
        return store

    @classmethod
    def open(cls, folder: Path, cut: bool = False) -> Store:
        """Reads what is there, without a last line cut short by an interruption; `cut` cuts it off the file too.

        Raises:
            ForetellError: no distilled data, or a damaged line.
        """
        if not (folder / MANIFEST).is_file():
            raise ForetellError(f"{folder} holds no distilled data (no {MANIFEST}); make some with foretell distill.")
        store = cls(folder, read_json(folder / MANIFEST))
        if store.manifest.get("format") != FORMAT:
            raise ForetellError(
                f"{folder} has data format {store.manifest.get('format')!r} where this version reads {FORMAT}."
            )
        if not store.manifest.keys() >= {"model", "fingerprint"}:
            raise ForetellError(f"{folder / MANIFEST} does not say who wrote the data; distill it again.")
        store.manifest["fingerprint"] = current(str(store.manifest["fingerprint"]))
        path = folder / CONVERSATIONS
        if path.exists() or not (folder / PACKED).exists():
            lines = complete_lines(path, unfinished=b'"more": true', cut=cut)
        else:
            path = folder / PACKED
            lines = _unpacked(path)
        for number, line in enumerate(lines):
            store._add(line, f"{path}, line {number + 1}")
        return store

    def _add(self, line: bytes, where: str) -> None:
        try:
            raw = json.loads(line)
            number = int(raw["line"])
            if "dropped" in raw:
                self.dropped[raw["dropped"]] += 1
            else:
                tokens, spans = raw["tokens"], [(int(start), int(end)) for start, end in raw["answers"]]
                if set(map(type, tokens)) != {int} or min(tokens) < 0:
                    raise ValueError("tokens")
                if not all(0 <= start < end <= len(tokens) for start, end in spans):
                    raise ValueError("answers")
                self.conversations.append(Distilled(number, tokens, spans))
            self.lines.add(number)
        except (ValueError, KeyError, TypeError) as error:
            raise ForetellError(f"{where} is damaged; delete the line, and distill will answer it again.") from error

    def append(self, line: int, found: Iterable[Distilled | str]) -> None:
        """Adds what became of one prompt: conversations, or reasons why not; all of it or nothing."""
        items, text = list(found), ""
        for left, each in zip(range(len(items) - 1, -1, -1), items, strict=True):
            record: dict[str, Any] = {"line": line, "more": True} if left else {"line": line}
            record |= {"dropped": each} if isinstance(each, str) else {"tokens": each.tokens, "answers": each.answers}
            text += json.dumps(record) + "\n"
        with write_errors(self.folder), (self.folder / CONVERSATIONS).open("a", encoding="utf-8") as file:
            file.write(text)
        self.lines.add(line)
        self.dropped.update(each for each in items if isinstance(each, str))
        self.conversations += [each for each in items if isinstance(each, Distilled)]

    def write_manifest(self, seconds: float = 0.0) -> None:
        """Brings counts up to date, and adds to the seconds that all runs together took."""
        self.manifest["seconds"] = round(self.manifest.get("seconds", 0) + seconds)
        self.manifest["counts"] = {
            "conversations": len(self.conversations),
            "tokens": sum(len(each.tokens) for each in self.conversations),
            "written": sum(each.written for each in self.conversations),
            "dropped": dict(self.dropped),
        }
        write_json(self.folder / MANIFEST, self.manifest)


def _unpacked(path: Path) -> list[bytes]:
    """Lines of a packed file."""
    try:
        return lzma.decompress(path.read_bytes()).splitlines()
    except (OSError, lzma.LZMAError) as error:
        raise ForetellError(f"{path} is damaged ({one_line(error)}); copy it again.") from error


def digest(data: Sequence[Distilled]) -> str:
    """Tells conversations from others: what was made from them must not be taken for theirs."""
    return hashlib.sha256(json.dumps([[each.tokens, each.answers] for each in data]).encode()).hexdigest()[:16]
