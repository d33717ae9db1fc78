"""Plots of trainings and benchmarks. The only file that imports matplotlib."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError
from foretell.files import write_errors


def training_curves(log: Path, out: Path) -> None:
    """Draws the loss by term and the held-out figures of a training log.

    Raises:
        ForetellError: matplotlib is not installed, or the picture cannot be written.
    """
    plt = _pyplot()
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    reports = [line["held_out"] for line in lines if "held_out" in line]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for name in steps[-1]["loss"] if steps else ():
        axes[0].plot([s["epoch"] for s in steps], [s["loss"].get(name) for s in steps], label=name, linewidth=1)
    axes[0].set(title="training loss", xlabel="epochs", ylabel="weighted cross-entropy")
    for rank, style in (("top1", "o-"), ("top5", "o--")):
        for report in reports[-1:]:
            values = [head[rank] for head in report["accuracy"]]
            axes[1].plot(range(1, len(values) + 1), values, style, label=f"among the best {rank[3:]}")
    axes[1].set(title="held-out accuracy", xlabel="head", ylabel="share of tokens", ylim=(0, 1))
    for report in reports:
        tokens_per_step = {int(size): tokens for size, tokens in report["tokens_per_step"].items()}
        axes[2].plot(list(tokens_per_step), list(tokens_per_step.values()), "o-", label=f"epoch {report['epoch']:g}")
    axes[2].set(title="held-out tokens per step", xlabel="nodes of the tree", ylabel="by replay")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:  # a training of no epochs has no steps
            axis.legend(fontsize=7)
    figure.tight_layout()
    with write_errors(out.parent):
        figure.savefig(out, dpi=130)
    plt.close(figure)


def benchmark(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (caption, SVG) of a benchmark's plots; none where matplotlib is not installed."""
    try:
        plt = _pyplot()
    except ForetellError:
        return []
    batches = results["settings"]["batches"]
    rows = [row for row in results["table"] if (row["batch"], row["temperature"]) == _first(results)]
    drawn = [
        ("Speed against plain decoding by kind of question (median of rounds).", _by_category(plt, results)),
        ("Of the steps with a guess at each depth, the share that accepted one.", _by_depth(plt, rows)),
        ("Tokens emitted per step.", _histogram(plt, rows)),
    ]
    if swept := _swept(rows, results["contenders"]):
        drawn.append(("Speed and quality against the threshold of typical acceptance.", _by_threshold(plt, swept)))
    if len(batches) > 1:
        drawn.append(("Tokens per second of all rows by batch size.", _by_batch(plt, results)))
    return [(caption, svg) for caption, svg in drawn if svg]


def _first(results: dict[str, Any]) -> tuple[int, float]:
    """Returns the setting that most plots show: the first batch size and temperature."""
    return results["settings"]["batches"][0], results["settings"]["temperatures"][0]


def _by_category(plt: Any, results: dict[str, Any]) -> str:
    names = [name for name in results["settings"]["contenders"] if name != "plain"]
    categories = list(results["by_category"])
    if not names or not categories:
        return ""
    figure, axes = plt.subplots(figsize=(10, 3.6))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = []
        for category in categories:
            found = [
                row["speedup"]["median"]
                for row in results["by_category"][category]
                if row["contender"] == name and (row["batch"], row["temperature"]) == _first(results)
            ]
            heights.append(found[0] if found else 0.0)
        axes.bar([at + width * (i - (len(names) - 1) / 2) for at in range(len(categories))], heights, width, label=name)
    axes.axhline(1, color="#888", linewidth=0.8)
    axes.set_xticks(range(len(categories)), [name.replace("_", " ") for name in categories], rotation=30, ha="right")
    axes.set_ylabel("against plain")
    return _svg(plt, figure, axes)


def _by_depth(plt: Any, rows: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for row in rows:
        if shares := row.get("acceptance_by_depth"):
            axes.plot(range(1, len(shares) + 1), shares, "o-", label=row["contender"], markersize=3)
    axes.set(xlabel="depth of the guess", ylabel="accepted", ylim=(0, 1))
    return _svg(plt, figure, axes)


def _histogram(plt: Any, rows: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for row in rows:
        if counts := row.get("tokens_of_steps"):
            total = sum(counts)
            axes.plot(range(1, len(counts) + 1), [count / total for count in counts], "o-", label=row["contender"])
    axes.set(xlabel="tokens of a step", ylabel="share of the steps", ylim=(0, None))
    return _svg(plt, figure, axes)


def _by_batch(plt: Any, results: dict[str, Any]) -> str:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    temperature = results["settings"]["temperatures"][0]
    for name in results["settings"]["contenders"]:
        rows = [r for r in results["table"] if r["contender"] == name and r["temperature"] == temperature]
        if rows:
            axes.plot([r["batch"] for r in rows], [r["tokens_per_s"] for r in rows], "o-", label=name)
    axes.set(xlabel="rows", ylabel="tokens/s", ylim=(0, None))
    return _svg(plt, figure, axes)


def _swept(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Returns (ε, row) of systems that differ in ε alone; nothing if there are fewer than two."""
    alike: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        system = about[row["contender"]]
        if isinstance(system.get("typical"), dict):
            rest = {name: system[name] for name in ("drafter", "options", "lookup", "adapt")}
            alike.setdefault(str(rest), []).append((system["typical"]["epsilon"], row))
    for found in alike.values():
        if len(found) > 1:
            return sorted(found, key=lambda pair: pair[0])
    return []


def _by_threshold(plt: Any, swept: list[tuple[float, dict[str, Any]]]) -> str:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    epsilons = [epsilon for epsilon, _ in swept]
    axes.plot(epsilons, [row["tokens_per_s"] for _, row in swept], "o-", label="tokens/s")
    axes.set(xlabel="ε", ylabel="tokens/s", ylim=(0, None))
    scores = axes.twinx()
    scores.set(ylabel="score", ylim=(0, 1))
    for name in dict.fromkeys(name for _, row in swept for name in row["quality"]):
        values = [row["quality"].get(name) for _, row in swept]
        scores.plot(epsilons, values, "s--", label=name.replace("_", " "))
        axes.plot([], [], "s--", color=scores.lines[-1].get_color(), label=name.replace("_", " "))
    return _svg(plt, figure, axes)


def _svg(plt: Any, figure: Any, axes: Any) -> str:
    """Returns the figure as an SVG element for a page; empty if nothing was drawn."""
    if not axes.get_legend_handles_labels()[0]:
        plt.close(figure)
        return ""
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    text = StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ForetellError("Plots need matplotlib; pip install 'foretell[train]'.") from error
    return plt
