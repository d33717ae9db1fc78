"""Distilled conversations on disk: one JSON line each, appended as they end.

    distill.json          format, model, fingerprint, settings, command, counts, seconds
    prompts.jsonl         prompts that the model wrote itself, if it did
    conversations.jsonl   {"line": 7, "tokens": [...], "answers": [[31, 120], ...]}
                          {"line": 8, "dropped": "repetitive"}

`tokens` is a whole conversation with the template's marks; `answers` are the half-open spans that the model wrote,
end-of-turn included: what a drafter learns from. `line` numbers the prompt; `"more": true` means that the next JSON
line belongs to the same prompt. The lines of a prompt are appended together or not at all, so that an interruption
costs only the answers that were being written.
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
MANIFEST, CONVERSATIONS, PACKED = "distill.json", "conversations.jsonl", "conversations.jsonl.xz"
REFUSED = ("rejected", "unfinished", "too long")
"""Finish reasons of a reply that is no answer: the conversation is kept up to it."""


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
class ConversationStore:
    """A folder of distilled conversations, open for reading and appending."""

    folder: Path
    manifest: dict[str, Any]
    conversations: list[Distilled] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    lines: set[int] = field(default_factory=set)

    @classmethod
    def create(cls, folder: Path, manifest: dict[str, Any]) -> ConversationStore:
        """Opens a folder to add to; one that exists must have been begun by the same model with the same settings.

        Raises:
            UsageError: it was begun by another model or with other settings, or is packed.
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
        saved, own = (
            {"fingerprint": m.get("fingerprint"), **m.get("settings", {})} for m in (store.manifest, manifest)
        )
        differ = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
        if differ:
            other = ", ".join(f"{name} {saved.get(name)} (not {own.get(name)})" for name in differ)
            raise UsageError(f"{folder} was begun with {other}; go on with the same, or choose another folder.")
        return store

    @classmethod
    def open(cls, folder: Path, cut: bool = False) -> ConversationStore:
        """Reads a folder.

        Args:
            cut: removes from the file a last line that an interruption cut short, which is never read.

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
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ForetellError(f"{where} is damaged; delete the line, and distill will answer it again.") from error

    def append(self, line: int, found: Iterable[Distilled | str]) -> None:
        """Appends the conversations that came of one prompt, or the reasons why they were dropped: all or nothing."""
        items, text = list(found), ""
        for left, item in zip(range(len(items) - 1, -1, -1), items, strict=True):
            record: dict[str, Any] = {"line": line, "more": True} if left else {"line": line}
            record |= {"dropped": item} if isinstance(item, str) else {"tokens": item.tokens, "answers": item.answers}
            text += json.dumps(record) + "\n"
        with write_errors(self.folder), (self.folder / CONVERSATIONS).open("a", encoding="utf-8") as file:
            file.write(text)
        self.lines.add(line)
        self.dropped.update(item for item in items if isinstance(item, str))
        self.conversations += [item for item in items if isinstance(item, Distilled)]

    def write_manifest(self, seconds: float = 0.0) -> None:
        """Writes the manifest with the present counts; `seconds` are added to those of earlier runs."""
        self.manifest["seconds"] = round(self.manifest.get("seconds", 0) + seconds)
        self.manifest["counts"] = {
            "conversations": len(self.conversations),
            "tokens": sum(len(talk.tokens) for talk in self.conversations),
            "written": sum(talk.written for talk in self.conversations),
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
    """A digest of conversations, by which files that were made from them are recognised."""
    return hashlib.sha256(json.dumps([[talk.tokens, talk.answers] for talk in data]).encode()).hexdigest()[:16]
