"""The tables of docs/results/breadth.json: heads before and after another training, by size, kind, wording and depth.

A section of the file is one drafter on one side, "hydra++ before" (`breadth_figures`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SIDES = ("before", "after")
NODES = "16"
"""Size of the trees in the tables by kind, wording and depth."""
KINDS = {"qa": "questions", "rag": "retrieval", "math_reasoning": "sums (GSM8K)", "math": "mathematics"}
"""Kind in the suite -> its name on the page, where that differs."""


def tables(results: dict[str, Any], brief: bool = False) -> list[str]:
    """Returns all tables, or in brief those by size and depth, with what is needed to read them."""
    if not results:
        return []
    pairs = [f"{method} {side}" for method in methods(results) for side in SIDES]
    results = {name: results[name] for name in pairs if name in results}
    more = [] if brief else [*by_kind(results), *by_wording(results)]
    return [*heading(results, reworded=not brief), *by_size(results), *more, *by_depth(results)]


def heading(results: dict[str, Any], reworded: bool) -> list[str]:
    """Returns what was asked, and the commands."""
    found = next(iter(results.values()))["result"]
    asked, runs = found["answers"], dict[str, str]()
    for section in results.values():
        runs.setdefault(section["command"], section["commit"])
    commands = "; ".join(f"`{command}`, commit {commit}" for command, commit in runs.items())
    again = asked["reworded"]
    others = f", and {again['repetitive']} of the {again['answers']} that were reworded"
    machines = " and ".join(dict.fromkeys(section["machine"] for section in results.values()))
    return [
        "Tokens per step of heads before and after they learnt from [prompts of many kinds](#prompts-of-many-kinds): "
        f"{asked['all']['answers']} Spec-Bench questions, {found['new_tokens']} new tokens, bfloat16, greedy "
        f"({commands}; {machines}). {found['model']} answers {asked['all']['repetitive']} of these questions "
        f"repetitively by the rule of `foretell distill`{others if reworded else ''}.",
        "",
    ]


def by_size(results: dict[str, Any]) -> list[str]:
    """Returns one row for each method and side: tokens per step by tree size, without and with lookup."""
    every = sizes(results)
    labels = [*every, *(f"{size} with lookup" for size in every)]
    return [
        f"| nodes | {' | '.join(every)} | {' | '.join(f'{size}, lookup' for size in every)} |",
        "|---|" + "---|" * len(labels),
        *(
            f"| {name} | {' | '.join(number(figure(section, label)) for label in labels)} |"
            for name, section in results.items()
        ),
        "",
    ]


def by_kind(results: dict[str, Any]) -> list[str]:
    """Returns one row for each kind of question, as worded and reworded: for each method its figures before, after."""
    columns = [f"{method}{lookup}" for method in methods(results) for lookup in ("", " with lookup")]
    kinds = next(iter(results.values()))["result"]["answers"]["by_kind"]
    lines = [f"| {NODES} nodes | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for kind, count in kinds.items():
        for group, note in (("all", ""), ("reworded", ", reworded")):
            cells = [sides(results, column, group, kind) for column in columns]
            if any(cells):
                lines.append(f"| {KINDS.get(kind, kind)}{note} ({count}) | {' | '.join(cells)} |")
    return [*lines, ""]


def sides(results: dict[str, Any], column: str, group: str, kind: str) -> str:
    """Returns the figures of a kind before and after, as far as measured; the column is METHOD, or that with lookup."""
    method, lookup, _ = column.partition(" with lookup")
    sections = [results[name] for side in SIDES if (name := f"{method} {side}") in results]
    found = [figure(section, f"{NODES}{lookup}", group, "by_kind", kind) for section in sections]
    return " → ".join(number(value) for value in found if value is not None)


def by_wording(results: dict[str, Any]) -> list[str]:
    """Returns one row for each method and side: the questions with fixed words as they are and reworded; no loops."""
    counts = next(iter(results.values()))["result"]["answers"]
    columns = {
        f"all {counts['all']['answers']}": ("all", "tokens_per_step"),
        "without repetitive answers": ("all", "without_repetitive"),
        f"{counts['fixed words']['answers']} in the suite's fixed words": ("fixed words", "tokens_per_step"),
        "the same reworded": ("reworded", "tokens_per_step"),
        "reworded, without repetitive answers": ("reworded", "without_repetitive"),
        f"the other {counts['own words']['answers']}": ("own words", "tokens_per_step"),
    }
    lines = [f"| {NODES} nodes | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, section in results.items():
        for lookup in ("", " with lookup"):
            if figure(section, f"{NODES}{lookup}"):
                cells = [number(figure(section, f"{NODES}{lookup}", *path)) for path in columns.values()]
                lines.append(f"| {name}{lookup} | {' | '.join(cells)} |")
    return [
        *lines, "",
        "The suite words all its translations alike (“Translate German to English:”) and all its summaries "
        "(“Summarize:”), and puts a retrieval question after its passages. Reworded, they keep their content "
        "([tools/rewording.py](../tools/rewording.py)); their answers are others, so compare rows, not columns.", "",
    ]  # fmt: skip


def by_depth(results: dict[str, Any]) -> list[str]:
    """Returns, for each method and side, how often a step with a guess at a depth accepted one."""
    shares = {name: figure(section, NODES, "all", "accepted_by_depth") for name, section in results.items()}
    each = "; ".join(
        f"{name} {', '.join(f'{share:.0%}' for share in found)}" for name, found in shares.items() if found
    )
    lead = f"Of the steps with a guess at depth 1, 2, ..., the share that accepted one, {NODES} nodes: "
    return [f"{lead}{each}.", ""] if each else []


def digest(folder: Path | None) -> str:
    """Returns a digest of heads and all that decoding reads with them: other trees take other steps too."""
    if folder is None:
        return ""
    config = json.loads((folder / "config.json").read_text())
    read = json.dumps({name: value for name, value in config.items() if name != "provenance"}, sort_keys=True)
    return hashlib.sha256(read.encode() + (folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def figure(section: dict[str, Any], label: str, *path: str) -> Any:
    """Returns a figure of a section at a size, by default its tokens per step; None where it was not measured."""
    found: Any = section["result"]["sizes"].get(label, {})
    for key in path or ("all", "tokens_per_step"):
        found = (found or {}).get(key)
    return found


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def methods(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(" ")[0] for name in results))


def sizes(results: dict[str, Any]) -> list[str]:
    """Returns the sizes that were measured of any drafter, in their order."""
    labels = {label for section in results.values() for label in section["result"]["sizes"]}
    return sorted((label for label in labels if label.isdigit()), key=int)
