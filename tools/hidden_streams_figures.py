"""Trains Hidden Transfer and M2R2 in many forms beside others at equal data: docs/results/hidden_streams.json.

    python tools/hidden_streams_figures.py transfer --data FOLDER [--data FOLDER] --work FOLDER [--epochs 0.1]
    python tools/hidden_streams_figures.py streams --data FOLDER --work FOLDER

`transfer` sweeps the layer after which pseudo rows begin, with Medusa's heads beside them; `streams` sweeps the exit of
the fast stream, with Kangaroo's adapter of as many parameters beside it. One pass of the backbone feeds all arms of a
section, and each learns what it would learn alone. An interrupted run resumes in the same `--work`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import core_figures as core
import gated_lora

import foretell
from foretell.drafters.hidden_transfer import TransferSteps
from foretell.drafters.m2r2 import FastStream
from foretell.loading.config import ModelConfig
from foretell.train.recipe import Job, begin
from foretell.train.trainer import Settings

MODEL = "smollm2-135m"
VOCABULARY = {"draft_vocab": 8192}
Arms = dict[str, tuple[str, dict[str, Any]]]
"""Name -> method and options."""


def transfer_arms(layers: int) -> Arms:
    """Hidden Transfer at every depth, staggered and isolated, beside Medusa's heads as published and as they ship."""
    depths = [0, layers // 4, layers // 2, 3 * layers // 4, layers - 4]
    half = layers // 2
    arms: Arms = {f"after layer {depth}": ("hidden_transfer", {"layers": (depth,)}) for depth in depths}
    arms |= {
        f"after layers {half}, {half + 1}, {half + 2}": ("hidden_transfer", {"layers": (half, half + 1, half + 2)}),
        f"after layer {half}, isolated": ("hidden_transfer", {"layers": (half,)}),
        f"after layer {half}, rank 64": ("hidden_transfer", {"layers": (half,), "rank": 64}),
        f"after layer {half}, adapters 64": ("hidden_transfer", {"layers": (half,), "adapters": 64}),
        f"after layer {half}, LoRA 7": ("hidden_transfer_lora", {"layers": (half,), "lora": 7}),
        f"after layer {3 * half // 2}, adapters 128": (
            "hidden_transfer",
            {"layers": (3 * half // 2,), "adapters": 128},
        ),
        "Medusa-1": ("medusa", {"heads": 3, "layers": 1, "taps": 0, "root": False, "output": "shared", "soft": 1.0}),
        "Medusa-1, root": (
            "medusa",
            {"heads": 3, "layers": 1, "taps": 0, "root": True, "output": "shared", "soft": 1.0},
        ),
    }
    return arms


def stream_arms(c: ModelConfig) -> Arms:
    """M2R2 at every exit, aligned and without adapters too, beside Kangaroo's adapter of as many parameters."""
    adapter = 2 * c.hidden * c.q_width + 2 * c.hidden * c.kv_width
    arms: Arms = {}
    for exit in (2, 3, 4, 5, 7):
        rank = round(adapter / (2 * c.hidden * exit))
        arms[f"M2R2, exit {exit}"] = ("m2r2", {"exit": exit, "rank": rank})
        arms[f"Kangaroo, exit {exit}"] = ("kangaroo", {"exit": exit, "output": "shared"})
    a_rank = 2 * (c.hidden + c.q_width) + 3 * (c.hidden + c.mlp)  # parameters of LoRA, of one layer
    arms["M2R2, exit 3, LoRA"] = ("m2r2_lora", {"exit": 3, "rank": 1, "lora": round(adapter / (3 * a_rank))})
    arms["M2R2, exit 3, aligned"] = ("m2r2", {"exit": 3, "rank": round(adapter / (6 * c.hidden)), "alignment": 0.5})
    arms["no adapters, exit 3"] = ("m2r2", {"exit": 3, "rank": 1})
    return arms


def section(args: argparse.Namespace) -> dict[str, Any]:
    llm = foretell.load(MODEL, weights="bf16", threads=args.threads or None)
    c = llm.backbone.config
    arms = transfer_arms(c.layers) if args.section == "transfer" else stream_arms(c)
    if unknown := set(args.only or []).difference(arms):
        raise SystemExit(f"There are no arms {sorted(unknown)}; there are: {', '.join(arms)}.")
    arms = {name: arm for name, arm in arms.items() if not args.only or name in args.only}
    jobs = [
        Job(method=method, out=args.work / name.replace(" ", "_").replace(",", ""), options=VOCABULARY | options)
        for name, (method, options) in arms.items()
    ]
    settings = Settings(
        epochs=args.epochs, batch_tokens=args.batch_tokens, learning_rate=args.lr, held_out=args.held_out,
        save_seconds=120,
    )  # fmt: skip
    found: dict[str, Any] = {}
    with begin(jobs, llm, args.data, settings=settings) as begun:
        for run, name in zip(begun.runs, arms, strict=True):
            if "isolated" in name and isinstance(module := run.trainer.module, TransferSteps):
                module.isolated = True
        trainer = begun.runs[0].trainer
        data = trainer.features.data
        began = time.monotonic()
        begun.train(lambda done, total: print(f"\r{done}/{total} steps", end="", flush=True))
        print()
        for run, name in zip(begun.runs, arms, strict=True):
            print(f"measuring {name} ...", flush=True)
            if "no adapters" in name and isinstance(module := run.trainer.module, FastStream):
                module.up_Edr.requires_grad_(False).zero_()  # what it learnt is undone: the model's own lower layers
                module.down_Erd.requires_grad_(False)
            report = run.trainer.evaluate()
            found[name] = {
                "method": run.cls.method, "options": arms[name][1],
                "parameters": sum(p.numel() for p in run.trainer.module.parameters() if p.requires_grad),
                "loss": {term: round(loss, 4) for term, loss in report.loss.items()}, "accuracy": report.accuracy,
                "tokens_per_step_of_fixed_trees": report.tokens_per_step, **report.fitted,
            }  # fmt: skip
        learnt = round(args.epochs * sum(len(data[i].tokens) for i in trainer.training))
        held_out = len({data[i].line for i in trainer.held_out})
    return {
        "settings": asdict(settings), "tokens": learnt, "held_out_conversations": held_out, "arms": found,
        "seconds": round(time.monotonic() - began), "products": trainer.number_type,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("transfer", "streams"))
    parser.add_argument(
        "--data", type=Path, action="append", required=True, help="a folder that `foretell distill` wrote"
    )
    parser.add_argument("--work", type=Path, required=True, help="keeps the trainings")
    parser.add_argument("--only", action="append", help="an arm by its name")
    parser.add_argument("--label", default="", help="appended to the section's name")
    parser.add_argument("--epochs", type=float, default=0.1)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=float, default=0.003, help="share of the conversations")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    gated_lora.register()
    core.RESULTS = core.RESULTS.with_name("hidden_streams.json")
    core.save(" ".join(filter(None, [args.section, args.label])), section(args))


if __name__ == "__main__":
    main()
