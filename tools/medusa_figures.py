"""Measures Medusa's figures and writes them to docs/results/medusa.json, section by section.

    python tools/medusa_figures.py SECTION --questions FILE [--checkpoint FOLDER]

Sections: sizes (tokens per step and per second by tree size, with and without merged lookup, against plain),
exactness (ids, log-probabilities and cache against plain).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import core_figures as core
import torch
from exactness import compared, transcript

import foretell
from foretell import drafters
from foretell.backbone.costs import measure
from foretell.contracts import SamplingParams

core.RESULTS = core.RESULTS.with_name("medusa.json")
SIZES = (4, 8, 16, 32, 64)


class Run(core.Ours):
    adapt = False  # what a tree earns, not what the governor makes of it

    def __init__(self, llm: Any, name: str, **options: Any):
        self.llm, self.drafter = llm, drafters.build(name, llm.backbone, **options)


def section_sizes(args: argparse.Namespace) -> Any:
    """Prompt by prompt, each in turn; then the cost of a step, for the share of the possible that was reached."""
    llm = foretell.load(core.MODEL, dtype="bf16")
    runs: dict[str, Any] = {"plain": Run(llm, "plain"), "prompt_lookup": Run(llm, "prompt_lookup")}
    for size in SIZES:
        for lookup in (False, True):
            name = f"medusa {size}{' with lookup' if lookup else ''}"
            runs[name] = Run(llm, "medusa", checkpoint=args.checkpoint, nodes=size, lookup=lookup)
    runs["medusa 16, one tree"] = Run(llm, "medusa", checkpoint=args.checkpoint, nodes=16, grown=False)
    for run in runs.values():
        run(llm.encode("Hello there."), 16)
    rows: dict[str, list[tuple[int, float, float, int]]] = {name: [] for name in runs}
    different = []
    for number, question in enumerate(args.prompts):
        ids, outputs = llm.encode(question), {}
        for name, run in runs.items():
            outputs[name], seconds, prefill, steps = run(ids, args.new_tokens)
            rows[name].append((len(outputs[name]), seconds, prefill, steps))
        different += [(number, name) for name, output in outputs.items() if output != outputs["plain"]]
        print(number, {n: round(r[-1][0] / r[-1][1]) for n, r in rows.items()}, flush=True)
    costs = measure(llm.backbone, rows=(1,), contexts=(300,), nodes=(1, *SIZES))
    out: dict[str, Any] = {
        "prompts": len(args.prompts), "new_tokens": args.new_tokens, "different": different,
        "step_cost": {n: round(costs.of(1, 300, n) / costs.of(1, 300, 1), 3) for n in SIZES},
    }  # fmt: skip
    plain = [tokens / seconds for tokens, seconds, _, _ in rows["plain"]]
    plain_decode = sum(t for t, *_ in rows["plain"]) / sum(s - p for _, s, p, _ in rows["plain"])
    for name, values in rows.items():
        tokens, steps = sum(t for t, *_ in values), sum(s for *_, s in values)
        decode = tokens / sum(s - p for _, s, p, _ in values)
        out[name] = {
            "tokens_per_step": round(tokens / steps, 3),
            "tokens_per_s": round(tokens / sum(s for _, s, _, _ in values), 1),
            "decode_tokens_per_s": round(decode, 1),
            "median_speedup": round(median(t / s / p for (t, s, _, _), p in zip(values, plain, strict=True)), 3),
            "decode_speedup": round(decode / plain_decode, 3),
        }
        if name.startswith("medusa"):
            possible = tokens / steps / out["step_cost"][int(name.split()[1].strip(","))]
            out[name]["share_of_possible"] = round(decode / plain_decode / possible, 3)
    return out


def section_exactness(args: argparse.Namespace) -> Any:
    """Trained heads against plain, in every setting; resumable like the core's."""
    out = json.loads(core.RESULTS.read_text()).get("exactness", {}).get("result", {}) if core.RESULTS.exists() else {}
    for dtype in args.dtypes:
        llm = foretell.load(core.MODEL, dtype=dtype)
        prompts = [llm.encode(q) for q in args.prompts]
        for temperature in (0.0, 1.0):
            settings = [f"medusa {dtype} T={temperature:g} batch {rows}" for rows in (1, 4)]
            if all(setting in out for setting in settings):
                continue
            params = SamplingParams(max_new_tokens=args.new_tokens, temperature=temperature, seed=7, logprobs=0)
            truth = transcript(llm, drafters.build("plain", llm.backbone), prompts, 1, params)
            for rows, setting in zip((1, 4), settings, strict=True):
                drafter = drafters.build("medusa", llm.backbone, checkpoint=args.checkpoint, lookup=rows == 4, nodes=32)
                out[setting] = compared(truth, transcript(llm, drafter, prompts, rows, params))
                print(setting, out[setting], flush=True)
                core.save("exactness", out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sections = {name[8:]: f for name, f in globals().items() if name.startswith("section_")}
    parser.add_argument("section", choices=sections)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    args = parser.parse_args()
    args.prompts = core.load_questions(args.questions, args.every, args.limit)
    torch.manual_seed(0)
    core.save(args.section, sections[args.section](args))


if __name__ == "__main__":
    main()
