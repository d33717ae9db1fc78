"""Checks that speculation is never slower than plain decoding, untuned: docs/results/never_slower.json.

    python tools/never_slower.py --questions FILE [--model M] [--weights W] [--kernel K] [--runs R ...] [--batches B]

One `foretell bench` that knows nothing of the machine's costs when it begins. A control, plain decoding once more, says
how far apart equal things lie in that run. A cell (run, batch, temperature) holds if its median gain over plain
decoding, question by question, is at least `GATE` of the control's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import core_figures as core

from foretell.backbone.step_costs import costs_file
from foretell.bench.metrics import table
from foretell.bench.run_folder import ROUNDS

RESULTS = Path(core.__file__).parents[1] / "docs/results/never_slower.json"
CONTROL, GATE = "plain:adapt=false", 0.97
HEADS = ("medusa", "hydra", "hydra++", "kangaroo")
RUNS = ["prompt_lookup", *HEADS, *(f"{name}:lookup=true" for name in HEADS)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--every", type=int, default=15)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--model", default=core.MODEL)
    parser.add_argument("--weights", default="stored")
    parser.add_argument("--kernel", default="")
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0, 1])
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    core.RESULTS = RESULTS
    core.save(f"{args.model} {args.weights} {args.kernel or 'best build'}", cells(measured(args)))


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the bench, or what is left of it; returns its figures."""
    import foretell

    llm = foretell.load(args.model, weights=args.weights, kernel=args.kernel or None)
    costs = costs_file(llm.backbone)
    tuned = costs.read_bytes() if costs.exists() else b""
    costs.unlink(missing_ok=True)
    working = RESULTS.parents[2] / "build/never_slower"
    command = ["bench", "-m", args.model, "--weights", args.weights, "--suite", args.questions, "--every", args.every]
    command += ["--limit", args.limit, "--max-new-tokens", args.new_tokens, "--out", working]
    command += ["--kernel", args.kernel] if args.kernel else []
    command += [word for batch in args.batches for word in ("-b", batch)]
    command += [word for temperature in args.temperatures for word in ("-t", f"{temperature:g}")]
    command += [word for run in [CONTROL, *args.runs] for word in ("--run", run)]
    try:
        subprocess.run([sys.executable, "-m", "foretell", *map(str, command)], check=True)
    finally:
        if tuned:
            costs.write_bytes(tuned)
    records = [record for line in (working / ROUNDS).read_text().splitlines() for record in json.loads(line)]
    shutil.rmtree(working)
    return table(records)


def cells(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns each cell's gain over plain decoding, relative to the control's, and those below the gate."""
    gains = [
        ((row["temperature"], row["batch"]), row["speedup"]["median"]) for row in rows if row["contender"] == CONTROL
    ]
    control = dict(gains)
    found: dict[str, Any] = {}
    for row in rows:
        setting = row["temperature"], row["batch"]
        if row["contender"] in ("plain", CONTROL):
            continue
        found[f"{row['contender']} T={setting[0]:g} batch {setting[1]}"] = {
            "gain": round(row["speedup"]["median"], 3),
            "of_control": round(row["speedup"]["median"] / control[setting], 3),
            "tokens_per_step": round(row["tokens_per_step"], 2),
        }  # fmt: skip
    below = [name for name, cell in found.items() if cell["of_control"] < GATE]
    controls = {f"T={t:g} batch {b}": round(gain, 3) for (t, b), gain in control.items()}
    return {"control": controls, "gate": GATE, "below": below, "cells": found}


if __name__ == "__main__":
    main()
