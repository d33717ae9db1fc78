"""Measures the drafters that ship for a model and writes their figures to docs/results/NAME.json, section by section.

    python tools/drafter_figures.py SECTION ... [--drafters medusa hydra hydra++] [--before hydra++:FOLDER]
                                    [--questions FILE] [--model MODEL]

Sections: sizes (tokens per step and per second by tree size: grown, one tree, with lookup merged, against plain, all in
one run), batches (by batch size, greedy and at temperature 1, as users get them after `foretell tune`: `foretell
bench`, results in docs/results/NAME_batches), tune (the cost of steps, and the time to measure it), exactness (ids,
log-probabilities and cache against plain). NAME is `heads`, or what MODEL adds to the demo model. METHOD:FOLDER after
--before stands for earlier heads, which run beside those that ship. Counts that need no quiet machine:
`breadth_figures`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import core_figures as core
import torch
from breadth_figures import accepted_by_depth, folder_of
from breadth_tables import digest
from exactness import compared, transcript

import foretell
from foretell import drafters
from foretell.api import LLM
from foretell.backbone.step_costs import StepCosts, measure
from foretell.requests import SamplingParams, Statistics

SIZES = (4, 8, 16, 32)
BATCHES, TEMPERATURES = (1, 2, 4, 8), (0, 1)
WARM_UP = "Hello there."


@dataclass
class Answer:
    """One prompt's answer; `possible` is the seconds that its steps would cost alone, at the middle of its context."""

    ids: list[int]
    seconds: float
    statistics: Statistics
    possible: float

    @property
    def decoding(self) -> float:
        return self.seconds - self.statistics.prefill_seconds


class Run:
    def __init__(self, llm: LLM, name: str, nodes: int = 1, **options: Any):
        drafter = drafters.build(name, llm.backbone, **({"nodes": nodes} if nodes > 1 else {}), **options)
        self.llm, self.nodes = LLM(llm.backbone, llm.tokenizer, drafter, llm.folder), nodes

    def __call__(self, ids: list[int], new_tokens: int, costs: StepCosts) -> Answer:
        # without the governor: the figures of the tree itself
        answer = self.llm.generate(ids, max_new_tokens=new_tokens, adapt=False)
        steps = answer.statistics.steps
        return Answer(answer.ids, answer.statistics.seconds, answer.statistics, steps * costs.of(1, 0, self.nodes))


def section_sizes(args: argparse.Namespace) -> Any:
    """Measures all drafters prompt by prompt, in turns, the cost of steps before each, since the machine drifts."""
    llm = foretell.load(args.model, dtype="bf16", weights="bf16")
    runs = {"plain": Run(llm, "plain"), "prompt_lookup": Run(llm, "prompt_lookup")}
    for drafter, method, options in _named(args):
        for size in args.sizes:
            runs[f"{drafter} {size}"] = Run(llm, method, size, **options)
            runs[f"{drafter} {size} with lookup"] = Run(llm, method, size, lookup=True, **options)
            if "grown" in {each.name for each in fields(drafters.drafter_class(method).Options)}:
                runs[f"{drafter} {size}, one tree"] = Run(llm, method, size, grown=False, **options)
    rows: dict[str, list[Answer]] = {name: [] for name in runs}
    for number, question in enumerate([WARM_UP, *args.prompts]):
        ids = llm.encode(question)
        middle = len(ids) + args.new_tokens // 2
        costs = measure(llm.backbone, rows=(1,), contexts=(middle,), nodes=(1, *args.sizes), repeats=5)
        for name, run in runs.items():
            rows[name].append(run(ids, args.new_tokens, costs))
        print(number, {n: round(len(r[-1].ids) / r[-1].seconds) for n, r in rows.items()}, flush=True)
    for answers in rows.values():
        del answers[0]  # warmed up
    plain = rows["plain"]
    different = [(name, i) for name, r in rows.items() for i, answer in enumerate(r) if answer.ids != plain[i].ids]
    out: dict[str, Any] = {"prompts": len(plain), "new_tokens": args.new_tokens, "different": different}
    out["heads"] = {drafter: digest(folder_of(drafter, "", llm.backbone)) for drafter in args.drafters}
    return out | {name: _figures(answers, plain, name) for name, answers in rows.items()}


def _named(args: argparse.Namespace) -> list[tuple[str, str, dict[str, str]]]:
    """Returns (name in the results, method, options) of the drafters that ship, and of the earlier ones after each."""
    earlier = [each.partition(":") for each in args.before]
    if unknown := [method for method, _, _ in earlier if method not in args.drafters]:
        raise SystemExit(f"error: --before has heads of {unknown[0]}, which is not among the --drafters.")
    found: list[tuple[str, str, dict[str, str]]] = []
    for drafter in args.drafters:
        found.append((drafter, drafter, {}))
        found += [(f"{drafter} before", drafter, {"checkpoint": folder}) for method, _, folder in earlier
                  if method == drafter]  # fmt: skip
    return found


def _figures(answers: list[Answer], plain: list[Answer], name: str) -> dict[str, Any]:
    tokens, steps = sum(len(a.ids) for a in answers), sum(a.statistics.steps for a in answers)
    seconds, decoding = sum(a.seconds for a in answers), sum(a.decoding for a in answers)
    speedup = sum(p.decoding for p in plain) / decoding
    out = {
        "tokens_per_step": round(tokens / steps, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "decode_tokens_per_s": round(tokens / decoding, 1),
        "median_speedup": round(median(p.seconds / a.seconds for p, a in zip(plain, answers, strict=True)), 3),
        "decode_speedup": round(speedup, 3),
        "draft_ms": round(1e3 * sum(a.statistics.draft_seconds for a in answers) / steps, 2),
        "verify_ms": round(1e3 * sum(a.statistics.verify_seconds for a in answers) / steps, 2),
        "step_ms": round(1e3 * decoding / steps, 2),
        "accepted_by_depth": accepted_by_depth([answer.statistics for answer in answers]),
    }
    if name != "prompt_lookup":  # its trees have no size of their own
        possible = sum(a.possible for a in answers)
        out["step_alone_ms"] = round(1e3 * possible / steps, 2)
        out["share_of_possible"] = round(speedup / (sum(p.possible for p in plain) / possible), 3)
    return out


def section_batches(args: argparse.Namespace) -> None:
    """Runs `foretell bench` for every batch size and temperature; resumable, and its results are kept when complete."""
    results = core.RESULTS.with_name(f"{core.RESULTS.stem}_batches")
    working = Path(core.__file__).parents[1] / "build" / results.name
    runs = []
    for _, method, options in _named(args):
        heads = ",".join(f"{key}={value}" for key, value in options.items())
        runs += [f"{method}:{heads}".rstrip(":"), f"{method}:lookup=true,{heads}".rstrip(",")]
    command = ["bench", "--model", args.model, "--suite", args.questions, "--every", args.every, "--out", working]
    command += [word for batch in BATCHES for word in ("-b", batch)]
    command += [word for temperature in TEMPERATURES for word in ("-t", temperature)]
    command += [word for run in runs for word in ("--run", run)]
    command += ["--max-new-tokens", args.new_tokens, *(["--limit", args.limit] if args.limit else [])]
    subprocess.run([sys.executable, "-m", "foretell", *map(str, command)], check=True)
    results.mkdir(exist_ok=True)
    shutil.copy(working / "results.json", results)
    shutil.rmtree(working)


def section_tune(args: argparse.Namespace) -> Any:
    """Measures the costs that `foretell tune` does, and the time that takes."""
    llm = foretell.load(args.model, dtype="bf16", weights="bf16")
    began = time.perf_counter()
    costs = measure(llm.backbone)
    seconds = time.perf_counter() - began
    relative = {
        f"{rows} rows, {context} keys": {n: round(cost / sizes[1], 2) for n, cost in sizes.items()}
        for rows, contexts in costs.seconds.items()
        for context, sizes in contexts.items()
    }
    return {"seconds": round(seconds), "relative_cost": relative}


def section_exactness(args: argparse.Namespace) -> Any:
    """Compares trained heads with plain decoding in every setting; resumable, as in core_figures."""
    out = json.loads(core.RESULTS.read_text()).get("exactness", {}).get("result", {}) if core.RESULTS.exists() else {}
    for dtype in args.dtypes:
        llm = foretell.load(args.model, dtype=dtype, weights="bf16")
        prompts = [llm.encode(q) for q in args.prompts]
        for temperature in (0.0, 1.0):
            runs = {
                f"{drafter} {dtype} T={temperature:g} batch {rows}": (drafter, rows)
                for drafter in args.drafters for rows in (1, 4)
            }  # fmt: skip
            if out.keys() >= runs.keys():
                continue
            params = SamplingParams(max_new_tokens=args.new_tokens, temperature=temperature, seed=7, logprobs=0)
            truth = transcript(llm, drafters.build("plain", llm.backbone), prompts, 1, params)
            for setting, (name, rows) in runs.items():
                drafter = drafters.build(name, llm.backbone, lookup=rows == 4, nodes=32)
                out[setting] = compared(truth, transcript(llm, drafter, prompts, rows, params))
                print(setting, out[setting], flush=True)
                core.save("exactness", out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sections = {name[8:]: f for name, f in globals().items() if name.startswith("section_")}
    parser.add_argument("sections", nargs="+", choices=sections)
    parser.add_argument("--drafters", nargs="+", default=["medusa", "hydra", "hydra++"])
    parser.add_argument("--before", nargs="+", default=[], metavar="METHOD:FOLDER")
    parser.add_argument("--model", default=core.MODEL)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--results", type=Path, help="where a trial's figures go instead")
    args = parser.parse_args()
    args.prompts = core.load_questions(args.questions, args.every, args.limit) if args.questions else []
    core.RESULTS = args.results or core.RESULTS.with_name(f"{args.model.partition('+')[2] or 'heads'}.json")
    torch.manual_seed(0)
    for section in args.sections:
        if result := sections[section](args):
            core.save(section, result)


if __name__ == "__main__":
    main()
