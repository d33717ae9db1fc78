"""Trains a small Kangaroo adapter at each of several exits and writes docs/results/exits.json.

    python tools/exit_sweep.py DATA --exits 1,2,3,5,7,10 [--conversations 2500]

Each is trained on the same conversations, in the same order and for as many steps, in the paper's form (attention only,
the output head frozen) and, at one exit, with foretell's additions. The features of all exits are computed in one pass.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import core_figures as core
import torch

import foretell
from foretell.backbone import Backbone
from foretell.cli.terminal import job_progress
from foretell.drafters.kangaroo import Kangaroo
from foretell.train.data import ConversationStore
from foretell.train.features import FeatureStore
from foretell.train.loop import train
from foretell.train.recipe import to_replay, token_counts
from foretell.train.replay import tokens_per_step_by_size
from foretell.train.trainer import Settings, Trainer

NODES = (8, 16)
ADDED: dict[str, dict[str, Any]] = {
    "an MLP": {"mlp": True}, "an output matrix of its own": {"output": "tied"},
    "both": {"mlp": True, "output": "tied"},
}  # fmt: skip


def learnt(backbone: Backbone, features: FeatureStore, settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    """Trains an adapter; returns its accuracy and tokens per step on held-out text."""
    counts_V = token_counts(features.data, backbone.config.vocab)
    torch.manual_seed(settings.seed)
    module = Kangaroo.trainable(backbone, Kangaroo.Training(**options), counts_V)
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(module, features, settings, Path(folder), options)
        with job_progress(f"exit {options['exit']}", "") as progress:
            train([run], lambda step, steps: progress(step, steps, 0))
        report = run.evaluate()
    tensors, arch = module.checkpoint()
    drafter = Kangaroo(backbone, arch, tensors, lambda *_: NODES[0], scales=report.calibration)
    tokens_per_step = tokens_per_step_by_size(drafter, features, to_replay(report.replayed), NODES, lambda done: None)
    return {
        "options": options, "parameters": sum(each.numel() for each in module.parameters()),
        "top1": report.accuracy[0]["top1"], "top5": report.accuracy[0]["top5"],
        "tokens_per_step": {str(nodes): tokens for nodes, tokens in tokens_per_step.items()},
        "seconds": round(run.seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--exits", default="1,2,3,5,7,10", help="layers")
    parser.add_argument("--varied", type=int, default=2, help="the exit at which more is added to the adapter")
    parser.add_argument("--conversations", type=int, default=2500)
    parser.add_argument("--epochs", type=float, default=1.0)
    args = parser.parse_args()
    exits = [int(each) for each in args.exits.split(",")]
    if args.varied not in exits:
        parser.error(f"--varied {args.varied} is not one of the exits {args.exits}")
    backbone = foretell.load(core.MODEL, dtype="bf16", weights="bf16").backbone
    store = ConversationStore.open(args.data)
    name = f"features-{backbone.fingerprint}-{'-'.join(map(str, exits))}-{args.conversations}"
    features = FeatureStore(backbone, store.conversations[: args.conversations], exits, store.folder / name)
    with job_progress("features, %", "") as progress:
        features.prepare(lambda fraction: progress(round(fraction * 100), 100, 0))
    settings = Settings(epochs=args.epochs, batch_tokens=2048, learning_rate=2e-3)
    runs = {f"exit {exit}": {"exit": exit} for exit in exits}
    runs |= {f"exit {args.varied}, {added}": {"exit": args.varied, **more} for added, more in ADDED.items()}
    core.RESULTS = core.RESULTS.with_name("exits.json")
    out = {
        "model": core.MODEL, "layers": backbone.config.layers, "conversations": len(features.data),
        "tokens": sum(len(each.tokens) for each in features.data), "settings": asdict(settings),
    }  # fmt: skip
    core.save("exits", out | {name: learnt(backbone, features, settings, options) for name, options in runs.items()})


if __name__ == "__main__":
    main()
