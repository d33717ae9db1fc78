"""Checks that speculation is never slower than plain decoding, untuned: docs/results/never_slower.json.

    python tools/never_slower.py --questions FILE [--model M] [--weights W] [--kernel K] [--runs R ...] [--batches B]

Nothing is known of the machine's costs at first; all runs learn one table, as drafters in one process do. They decode
the same questions at once, a step of each in turn, so that whatever slows the machine slows all of them: on a busy one,
answers timed one after the other differ by a tenth. A control, plain decoding once more, says how far apart equal
things lie. A cell (run, batch, temperature) holds if its median gain over plain decoding, group by group of questions,
is at least `GATE` of the control's.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import core_figures as core

import foretell
from foretell import drafters
from foretell.api import LLM
from foretell.backbone.step_costs import costs_file
from foretell.engine import SpeculativeDecoder
from foretell.requests import SamplingParams

RESULTS = Path(core.__file__).parents[1] / "docs/results/never_slower.json"
PLAIN, CONTROL, GATE = "plain", "control", 0.97
HEADS = ("medusa", "hydra", "hydra++", "kangaroo", "hidden_transfer", "m2r2")
GROUPS = 6
"""Of questions, at least, in each cell: a batch of eight would be judged by two otherwise."""
RUNS = ["prompt_lookup", *HEADS, *(f"{name}:lookup" for name in HEADS)]
WARM_UP, PROMPT = 24, "Tell me something about the weather."


class Run:
    """One way of decoding: its seconds, tokens and steps in a group of questions."""

    def __init__(self, llm: LLM, name: str, rows: int):
        method, _, lookup = name.partition(":")
        drafter = drafters.build(PLAIN if name == CONTROL else method, llm.backbone, lookup=bool(lookup))
        self.decoder = SpeculativeDecoder(llm.backbone, drafter, llm.tokenizer, max_rows=rows)
        self.tokens = self.steps = 0

    def begin(self, prompts: list[list[int]], params: SamplingParams) -> None:
        self.decoder.forget()
        self.ids: dict[int, list[int]] = {}
        self.seconds, self._first = 0.0, self.decoder.submit(prompts[0], params, key=0)
        for key, prompt in enumerate(prompts[1:], start=1):
            self.decoder.submit(prompt, params, key=key)

    def step(self) -> None:
        began = time.perf_counter()
        events = self.decoder.step()
        self.seconds += time.perf_counter() - began
        for event in events:
            self.ids.setdefault(event.request - self._first, []).extend(event.tokens)
            if event.statistics:
                self.steps += event.statistics.steps
                self.tokens += event.statistics.new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--least", type=int, default=12, help="questions of each cell")
    parser.add_argument("--model", default=core.MODEL)
    parser.add_argument("--weights", default="stored")
    parser.add_argument("--kernel", default="")
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0, 1])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--label", default="", help="appended to the section's name")
    args = parser.parse_args()
    core.RESULTS = RESULTS
    section = " ".join(filter(None, [args.model, args.weights, args.kernel or "best build", args.label]))
    llm = foretell.load(args.model, weights=args.weights, kernel=args.kernel or None)
    llm.backbone.costs = costs_file(llm.backbone).with_suffix(".untuned")
    llm.backbone.costs.unlink(missing_ok=True)
    cells: dict[str, Any] = {}
    try:
        for temperature in args.temperatures:
            for batch in args.batches:
                cells |= measured(llm, args, batch, temperature)
                core.save(section, judged(cells), shown=False)
    finally:
        llm.backbone.costs.unlink(missing_ok=True)
    core.save(section, judged(cells))


def measured(llm: LLM, args: argparse.Namespace, batch: int, temperature: float) -> dict[str, Any]:
    """Returns the gains of all runs at one batch size and temperature, group by group."""
    runs = {name: Run(llm, name, batch) for name in (PLAIN, CONTROL, *args.runs)}
    params = SamplingParams(max_new_tokens=args.new_tokens, temperature=temperature, seed=7)
    warm_up = SamplingParams(max_new_tokens=WARM_UP, temperature=temperature, seed=7)
    together(list(runs.values()), [llm.encode(PROMPT)] * batch, warm_up)
    groups = max(GROUPS, math.ceil(args.least / batch))
    questions = core.load_questions(args.questions, args.every, None)
    spread = questions[:: max(1, len(questions) // (groups * batch))]  # files are ordered by kind
    prompts = [llm.encode(question) for question in spread[: groups * batch]]
    gains: dict[str, list[float]] = {name: [] for name in runs if name != PLAIN}
    for run in runs.values():
        run.tokens = run.steps = 0
    for begin in range(0, len(prompts) - batch + 1, batch):
        together(list(runs.values()), prompts[begin : begin + batch], params)
        for name, run in runs.items():
            assert run.ids == runs[PLAIN].ids, f"{name} wrote other tokens than plain decoding"
            if name != PLAIN:
                gains[name].append(runs[PLAIN].seconds / run.seconds)
        print(f"T={temperature:g} batch {batch}", {n: round(g[-1], 2) for n, g in gains.items()}, flush=True)
    return {
        f"{name} T={temperature:g} batch {batch}": {
            "gain": round(median(of_run), 3), "of_control": round(median(of_run) / median(gains[CONTROL]), 3),
            "lowest": round(min(of_run), 3), "groups": len(of_run),
            "tokens_per_step": round(runs[name].tokens / runs[name].steps, 2),
        }
        for name, of_run in gains.items()
    }  # fmt: skip


def together(runs: list[Run], prompts: list[list[int]], params: SamplingParams) -> None:
    """Decodes the prompts in all runs, which take a step each in turn, in another order every time."""
    for run in runs:
        run.begin(prompts, params)
    order = Random(7)
    while busy := [run for run in runs if run.decoder.busy]:
        order.shuffle(busy)
        for run in busy:
            run.step()


def judged(cells: dict[str, Any]) -> dict[str, Any]:
    """Returns the cells, and the names of those below the gate."""
    below = [name for name, cell in cells.items() if cell["of_control"] < GATE]
    return {"gate": GATE, "below": below, "cells": cells}


if __name__ == "__main__":
    main()
