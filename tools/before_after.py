"""Times two checkouts of foretell against each other, turn by turn, and writes docs/results/before_after.json.

    python tools/before_after.py BEFORE [--kernel NAME] [--turns 5]

BEFORE is a checkout of an earlier commit with its kernels built, in this layout or the former one.
Each turn runs both checkouts in processes of their own, in alternating order:

    import, help, first token    seconds of a whole process: `import foretell; foretell.load`, `foretell --help`, and
                                 loading the demo model, whose files are cached, up to the first token of an answer
    step of 1, 8, 16             milliseconds
    plain; hydra++, lookup       tokens a second; hydra++ drafts 16 nodes

Ratios are of the medians over the turns; above 1, the later checkout is faster. `torch` is the import of PyTorch alone,
which no commit changes: its ratio shows the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
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
STARTS = {
    "torch": "import torch",
    "import": "import foretell; foretell.load",
    "help": "from foretell.cli import main; main(['--help'])",
    "first token": "import foretell; llm = foretell.load('smollm2-135m', kernel={kernel!r}); next(llm.stream('Hello'))",
}
"""What a process does -> the program whose seconds, from start to end, are taken."""
MOVED = {"step_costs": ("foretell.backbone.step_costs", "foretell.backbone.costs")}
"""Modules that are measured with -> where they lie, the newest layout first."""
HERE = Path(__file__).resolve().parents[1]


def module(name: str) -> Any:
    """Imports a module from wherever the checkout's layout has it."""
    for path in MOVED[name]:
        try:
            return import_module(path)
        except ModuleNotFoundError as error:
            if not path.startswith(str(error.name)):  # a module that this one imports is missing
                raise
    raise ModuleNotFoundError(f"none of {', '.join(MOVED[name])}")


def measure(kernel: str | None) -> dict[str, float]:
    """Measures the foretell that is imported: milliseconds of steps; tokens a second of decoding, prompts left out."""
    import foretell
    from foretell import drafters

    llm = foretell.load("smollm2-135m", dtype="bf16", kernel=kernel)
    steps = module("step_costs").measure(llm.backbone, rows=(1,), contexts=(CONTEXT,), nodes=SIZES, repeats=40)
    found = {f"step of {size}": 1e3 * steps.seconds[1][CONTEXT][size] for size in SIZES}
    for name, drafter in (("plain", "plain"), ("hydra++, lookup", "hydra++")):
        options: dict[str, Any] = {"lookup": True, "nodes": 16} if drafter != "plain" else {}
        other = foretell.LLM(llm.backbone, llm.tokenizer, drafters.build(drafter, llm.backbone, **options))
        other.generate(QUESTIONS[0], max_new_tokens=16, adapt=False)
        results = [other.generate(text, max_new_tokens=NEW, ignore_eos=True, adapt=False) for text in QUESTIONS]
        seconds = sum(result.statistics.seconds - result.statistics.prefill_seconds for result in results)
        found[name] = sum(result.statistics.new_tokens for result in results) / seconds
    return found


def run(checkout: Path, *arguments: str) -> str:
    """Runs Python with a checkout's package; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=checkout).stdout


def turn(checkout: Path, kernel: str | None) -> dict[str, float]:
    """Measures a checkout once."""
    found = {}
    for name, program in STARTS.items():
        began = time.perf_counter()
        run(checkout, "-c", program.format(kernel=kernel))
        found[name] = time.perf_counter() - began
    printed = run(checkout, __file__, str(checkout), "--measure", *(["--kernel", kernel] if kernel else []))
    return found | json.loads(printed.splitlines()[-1])


def compared(before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians of both, and how many times as fast the later is."""
    out = {}
    for name in before[0]:
        old, new = (median(found[name] for found in turns) for turns in (before, after))
        ratio = old / new if name in STARTS or name.startswith("step") else new / old
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

    before = args.before.resolve()
    found: dict[Path, list[dict[str, float]]] = {before: [], HERE: []}
    for checkout in found:  # files into the page cache, bytecode onto the disk
        run(checkout, "-c", STARTS["first token"].format(kernel=args.kernel))
    for number in range(args.turns):
        for checkout in list(found) if number % 2 else list(found)[::-1]:
            found[checkout].append(turn(checkout, args.kernel))
            print(checkout.name, {name: round(value, 2) for name, value in found[checkout][-1].items()}, flush=True)
    result = compared(*found.values())
    path = HERE / "docs/results/before_after.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    held[args.kernel or "best"] = {
        "command": "python tools/before_after.py BEFORE" + (f" --kernel {args.kernel}" if args.kernel else ""),
        "before": commit(before), "after": commit(HERE), "machine": core.machine(), "turns": args.turns,
        "unit": f"s of {', '.join(STARTS)}; ms of steps behind {CONTEXT} tokens; tokens/s of {len(QUESTIONS)} answers "
        f"of {NEW} tokens",
        "result": result,
    }  # fmt: skip
    path.write_text(json.dumps(held, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
