"""The gate of docs/results/never_slower.json as a table: a row for each drafter, a column for each batch."""

from __future__ import annotations

from typing import Any


def sentence(results: dict[str, Any]) -> str:
    """Returns how many cells hold, over all models."""
    cells = [cell for section in results.values() for cell in section["result"]["cells"].items()]
    judged = [cell for name, cell in cells if not name.startswith("control ")]
    gate = min(section["result"]["gate"] for section in results.values())
    held = sum(cell["of_control"] >= gate for cell in judged)
    machines = "; ".join(dict.fromkeys(section["machine"] for section in results.values()))
    return (
        f"Never slower than plain decoding, untuned: {held} of {len(judged)} cells (drafter, batch, temperature) reach "
        f"{gate} of what plain decoding itself reaches beside plain decoding ({machines}; medians of groups of "
        "questions; [table](docs/benchmarks.md#never-slower))."
    )


def table(results: dict[str, Any]) -> list[str]:
    lines = ["### Never slower", ""]
    for name, section in results.items():
        cells = section["result"]["cells"]
        columns = list(dict.fromkeys(key.partition(" ")[2] for key in cells))
        gate = section["result"]["gate"]
        lines += [
            f"{name}, {section['machine']}, `{section['command']}`, commit {section['commit']}: speed over plain "
            f"decoding's, of runs that begin untuned and learn one table. Below {gate} of the control's it is bold.",
            "", f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}",
        ]  # fmt: skip
        for run in dict.fromkeys(key.partition(" ")[0] for key in cells):
            shown = [_shown(cells.get(f"{run} {column}"), gate) for column in columns]
            lines.append(f"| {run} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def _shown(cell: dict[str, Any] | None, gate: float) -> str:
    if cell is None:
        return ""
    return f"**{cell['gain']:.2f}**" if cell["of_control"] < gate else f"{cell['gain']:.2f}"
