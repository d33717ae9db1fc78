"""Times two checkouts of foretell against each other, turn by turn, and writes docs/results/before_after.json.

    python tools/before_after.py BEFORE [--kernel NAME] [--turns 5]

BEFORE is a checkout of an earlier commit with its kernels built. Each turn runs both in processes of their own, in
alternating order: plain decoding, hydra++ with lookup at 16 nodes, and steps of 1, 8 and 16 nodes. Ratios are of the
medians over the turns, after to before: above 1 is faster for tokens a second, and for steps as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

QUESTIONS = [
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarize in two sentences how rain forms, and why it falls.",
    "A shop sells pens at 3 dollars and books at 12. What do 4 pens and 2 books cost? Explain step by step.",
]
SIZES, CONTEXT, NEW = (1, 8, 16), 300, 96
HERE = Path(__file__).resolve().parents[1]


def measure(kernel: str | None) -> dict[str, float]:
    """Of the foretell that is imported: tokens a second of decoding, prompts left out, and milliseconds of steps."""
    import foretell
    from foretell import drafters
    from foretell.backbone.step_costs import measure as measure_steps

    llm = foretell.load("smollm2-135m", dtype="bf16", kernel=kernel)
    costs = measure_steps(llm.backbone, rows=(1,), contexts=(CONTEXT,), nodes=SIZES, repeats=40)
    found = {f"step of {size}": 1e3 * costs.seconds[1][CONTEXT][size] for size in SIZES}
    for name, drafter in (("plain", "plain"), ("hydra++, lookup", "hydra++")):
        options: dict[str, Any] = {"lookup": True, "nodes": 16} if drafter != "plain" else {}
        other = foretell.LLM(llm.backbone, llm.tokenizer, drafters.build(drafter, llm.backbone, **options))
        other.generate(QUESTIONS[0], max_new_tokens=16, adapt=False)
        results = [other.generate(each, max_new_tokens=NEW, ignore_eos=True, adapt=False) for each in QUESTIONS]
        seconds = sum(each.statistics.seconds - each.statistics.prefill_seconds for each in results)
        found[name] = sum(each.statistics.new_tokens for each in results) / seconds
    return found


def turn(checkout: Path, kernel: str | None) -> dict[str, float]:
    command = [sys.executable, __file__, str(checkout), "--measure", *(["--kernel", kernel] if kernel else [])]
    told = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(checkout / "src")}
    )
    return json.loads(told.stdout.splitlines()[-1])


def compared(before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians of both, and how many times as fast the later is."""
    out = {}
    for name in before[0]:
        old, new = (median(each[name] for each in those) for those in (before, after))
        ratio = old / new if name.startswith("step") else new / old
        out[name] = {"before": round(old, 3), "after": round(new, 3), "ratio": round(ratio, 3)}
    return out


def commit(checkout: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--kernel")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.kernel)))
        return
    import core_figures as core

    found: dict[Path, list[dict[str, float]]] = {args.before.resolve(): [], HERE: []}
    for number in range(args.turns):
        for checkout in list(found) if number % 2 else list(found)[::-1]:
            found[checkout].append(turn(checkout, args.kernel))
            print(checkout.name, {name: round(value, 2) for name, value in found[checkout][-1].items()}, flush=True)
    result = compared(*found.values())
    path = HERE / "docs/results/before_after.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    held[args.kernel or "best"] = {
        "command": "python tools/before_after.py BEFORE" + (f" --kernel {args.kernel}" if args.kernel else ""),
        "before": commit(args.before), "after": commit(HERE), "machine": core.machine(), "turns": args.turns,
        "unit": f"tokens/s of {len(QUESTIONS)} answers of {NEW} tokens; ms of steps behind {CONTEXT} tokens",
        "result": result,
    }  # fmt: skip
    path.write_text(json.dumps(held, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
