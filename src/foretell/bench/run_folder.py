"""The folder of a run: what is measured, and the rounds measured so far.

    bench.json       settings, machine and versions: written first
    rounds.jsonl     one line per round, appended as it ends: an interrupted run resumes after the last complete line
    results.json     written last: the run is finished

A run resumes only with the same settings, versions and machine; a refusal names each difference with both values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError, UsageError
from foretell.files import complete_lines, exists, write_errors, write_json

ABOUT, ROUNDS, RESULTS = "bench.json", "rounds.jsonl", "results.json"
SAME = "version", "commit", "machine"
"""What must not change within a run besides its settings and its systems."""
NAMES = {"contenders": "systems", "new_tokens": "--max-new-tokens", "batches": "batch sizes", "digest": "suite file"}
"""Keys of the files -> how a message names them, where the key is not the word."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a measurement: runs with the same ones can be compared, and one can resume another."""

    model: str
    fingerprint: str
    dtype: str
    suite: str
    digest: str
    questions: list[str]
    systems: list[str]
    new_tokens: int = 128
    repeats: int = 1
    batches: list[int] = field(default_factory=lambda: [1])
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields as files hold them: systems stand under "contenders", as in the first published results."""
        return {"contenders" if name == "systems" else name: value for name, value in asdict(self).items()}


def begun(folder: Path) -> dict[str, Any] | None:
    """Reads what an earlier command began in the folder; None where there is nothing.

    Raises:
        ForetellError: the file is damaged.
    """
    path = folder / ABOUT
    if not exists(path):
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["settings"]["contenders"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ForetellError(f"{path} is damaged; choose another --out, or delete the folder.") from error
    return found


def take_up(folder: Path, settings: Settings, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Begins a run in the folder, or resumes the one there: returns the records of its complete rounds.

    Raises:
        UsageError: the folder holds another run, or other files.
    """
    wanted = json.loads(json.dumps({"settings": settings.to_json(), **about}))
    found = begun(folder)
    if found is None:
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(path.name != ".lock" for path in folder.iterdir()):
                raise UsageError(f"{folder} holds other files; choose another --out.")
            write_json(folder / ABOUT, wanted)
        return []
    if differ := list(differences(found, wanted)):
        raise UsageError(
            f"{folder} holds another run: {'; '.join(differ)}. Give its settings to resume it, or choose another --out."
        )
    return read_rounds(folder)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Describes each setting in which a run begun earlier differs from this one."""
    for name in dict.fromkeys([*found["settings"], *wanted["settings"]]):
        was, now = found["settings"].get(name), wanted["settings"].get(name)
        if was == now:
            continue
        if name == "questions":
            yield f"its questions are {_count(was)}, these {_count(now)}"
        else:
            yield f"its {NAMES.get(name, name)} {_value(was)}, now {_value(now)}"
    for name in SAME:
        if found.get(name) != wanted.get(name):
            yield f"its {name} {_value(found.get(name))}, now {_value(wanted.get(name))}"
    was, now = found.get("contenders", {}), wanted.get("contenders", {})
    for name in was:
        if name in now and was[name] != now[name]:
            keys = [key for key in {**was[name], **now[name]} if was[name].get(key) != now[name].get(key)]
            yield f"{name} had another {', '.join(keys)}"


def _value(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join("none" if one is None else str(one) for one in values)


def _count(questions: Any) -> str:
    """Number and first few of the question ids."""
    ids = [str(id) for id in questions or ()]
    return f"{len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Reads the records of all complete rounds.

    Raises:
        ForetellError: a line is damaged.
    """
    path = folder / ROUNDS
    try:
        return [record for line in complete_lines(path) for record in json.loads(line)]
    except ValueError as error:
        raise ForetellError(f"{path} is damaged; delete {folder}, or choose another --out.") from error
