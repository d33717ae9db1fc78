"""Collects the figures of several trainings in docs/results/ablation.json.

    python tools/ablation_figures.py FOLDER

Every FOLDER/NAME/drafter is one training: the same data, steps and start, other options.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import core_figures as core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    core.RESULTS = core.RESULTS.with_name("ablation.json")
    out = {}
    for config in sorted(
        parser.parse_args().folder.glob("*/drafter/config.json"), key=lambda path: path.stat().st_mtime
    ):
        raw = json.loads(config.read_text())
        made = raw["provenance"]
        out[config.parts[-3]] = {
            "command": made["command"],
            "tokens_per_step": raw["tokens_per_step"],
            "accuracy": [head["top1"] for head in made["accuracy"]],
            "loss": [round(loss, 3) for loss in made["loss"].values()],
        }
    core.save("ablation", out)


if __name__ == "__main__":
    main()
