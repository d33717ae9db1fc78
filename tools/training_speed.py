"""Measures how fast drafters learn, features included, and writes docs/results/training.json.

    python tools/training_speed.py DATA

On this processor as it is, and with the kernels and libraries limited to AVX2, so that its bfloat16 units are not used;
methods one by one, and all at once. With one thread and by processor time, so that other work on the machine counts
little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HELD = {
    "FORETELL_KERNELS": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
PROCESSORS: dict[str, dict[str, str]] = {"as it is": {}, "held to AVX2": HELD}
BROAD = {"draft_vocab": 12288}
METHODS: dict[str, dict[str, Any]] = {
    "medusa": BROAD,
    "hydra": BROAD | {"linear_tail": True},
    "hydra++": BROAD | {"heads": 5, "linear_tail": True, "fuse_prefix": True},
    "kangaroo": BROAD | {"exit": 2, "mlp": True, "output": "tied"},
}
"""The methods and options of the heads that ship."""
TOGETHER = "all at once"
COUNTED, TOKENS, BATCH_TOKENS = 4000, 8192, 4096
"""Conversations of the data that the draft vocabulary is counted on; tokens that are learnt, and those of a batch."""


def learnt(data: Path, methods: list[str]) -> dict[str, Any]:
    """Returns the tokens learnt per second of core time, prompts and the backbone's passes included."""
    import core_figures as core

    import foretell
    from foretell.drafters import drafter_class
    from foretell.train.data import ConversationStore
    from foretell.train.features import ComputedFeatures
    from foretell.train.loop import train
    from foretell.train.recipe import token_counts
    from foretell.train.trainer import Settings, Trainer

    backbone = foretell.load(core.MODEL, dtype="bf16", weights="bf16", threads=1).backbone
    every = ConversationStore.open(data).conversations
    counts_V = token_counts(every[:COUNTED], backbone.config.vocab)
    talks, tokens = [], 0
    while tokens < TOKENS:
        talks.append(every[len(talks)])
        tokens += len(talks[-1].tokens)
    modules = []
    for method in methods:
        cls: Any = drafter_class(method)
        modules.append(cls.trainable(backbone, cls.Training(**METHODS[method]), counts_V))
    features = ComputedFeatures(backbone, talks, sorted({tap for module in modules for tap in module.taps}))
    settings = Settings(epochs=2, batch_tokens=BATCH_TOKENS, held_out=0)
    with tempfile.TemporaryDirectory() as folder:
        trainers = [Trainer(module, features, settings, Path(folder) / str(at)) for at, module in enumerate(modules)]
        ends: list[float] = []
        train(trainers, lambda *_: ends.append(time.process_time()))
    warm = len(ends) // 2  # products of every shape were made once by then
    return {"tokens_per_s": round(tokens / (ends[-1] - ends[warm - 1]), 1), "products": trainers[0].number_type}


def table(section: dict[str, Any]) -> list[str]:
    """Returns the figures as Markdown."""
    found = section["result"]
    rates = {each: {name: run["tokens_per_s"] for name, run in runs.items()} for each, runs in found.items()}
    for of in rates.values():
        of["one after the other"] = 1 / sum(1 / of[method] for method in METHODS)
    rows = [(name, [rates[each][name] for each in PROCESSORS]) for name in rates["as it is"]]
    return [
        "Training multiplies in float32 or in bfloat16, whichever is faster on the machine. Tokens learnt per second "
        f"of core time, prompts and the model's own passes included, in batches of {BATCH_TOKENS} tokens, on one core "
        f"of {section['machine'].partition(' of ')[2]}: as it is, and with the kernels and PyTorch's libraries limited "
        f"to AVX2, which stands for a processor without more (commit {section['commit']}, `{section['command']}`):",
        "",
        f"| method | {' | '.join(PROCESSORS)} |",
        f"|---|{'---|' * len(PROCESSORS)}",
        *(f"| {name} | {' | '.join(f'{rate:,.0f}' for rate in of)} |" for name, of in rows),
        "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of data of the demo model")
    parser.add_argument("--only", nargs="+", help="these methods at once, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(learnt(args.data, args.only)))
        return
    import core_figures as core

    out: dict[str, Any] = {}
    for processor, environment in PROCESSORS.items():
        out[processor] = {}
        for name, methods in {**{method: [method] for method in METHODS}, TOGETHER: list(METHODS)}.items():
            command = [sys.executable, __file__, str(args.data), "--only", *methods]
            ran = subprocess.run(
                command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            out[processor][name] = json.loads(ran.splitlines()[-1])
            print(processor, name, out[processor][name], flush=True)
    core.RESULTS = core.RESULTS.with_name("training.json")
    core.save("learning", out)


if __name__ == "__main__":
    main()
