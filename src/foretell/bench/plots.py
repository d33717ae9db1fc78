"""Plots, where a reader would rather look than read. The only file that imports matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError


def training_curves(log: Path, out: Path) -> None:
    """Draws the loss by term and the held-out figures of a training log.

    Raises:
        ForetellError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ForetellError("Plots need matplotlib; pip install 'foretell[train]'.") from error

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
        earned = {int(size): tokens for size, tokens in report["tokens_per_step"].items()}
        axes[2].plot(list(earned), list(earned.values()), "o-", label=f"epoch {report['epoch']:g}")
    axes[2].set(title="held-out tokens per step", xlabel="nodes of the tree", ylabel="by replay")
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)
