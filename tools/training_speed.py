"""Measures how fast Medusa's heads learn in each number type and writes docs/results/training.json.

    python tools/training_speed.py DATA

On this processor as it is, and with the libraries held to AVX2, so that none of its units for bfloat16 are used. One
thread, and what it takes of its core's time counts, so that other work on the machine does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HELD = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
PROCESSORS: dict[str, dict[str, str]] = {"as it is": {}, "held to AVX2": HELD}
CONVERSATIONS, BATCH_TOKENS, SECONDS = 40, 1024, 30.0
"""Of the data, of a batch, and of the steps that count (two at least)."""


def learnt(data: Path, number_type: str) -> dict[str, Any]:
    """Tokens that a second of one core learns, prompts included; and the type that would be taken here."""
    import core_figures as core
    import torch

    import foretell
    from foretell.drafters.medusa import Medusa
    from foretell.drafting.learning import products
    from foretell.train.data import ConversationStore
    from foretell.train.features import FeatureStore
    from foretell.train.recipe import token_counts
    from foretell.train.trainer import Settings, Trainer

    backbone = foretell.load(core.MODEL, dtype="bf16", threads=1).backbone
    talks = ConversationStore.open(data).conversations[:CONVERSATIONS]
    module = Medusa.trainable(backbone, Medusa.Training(), token_counts(talks, backbone.config.vocab))
    chosen, ends = products.chosen(torch.device("cpu")), list[float]()
    with tempfile.TemporaryDirectory() as folder, products.multiply_in(number_type):
        features = FeatureStore(backbone, talks, module.taps, Path(folder) / "features")
        features.prepare()
        run = Trainer(module, features, Settings(epochs=1000, batch_tokens=BATCH_TOKENS), Path(folder) / "run")
        tokens = [sum(len(talks[i].tokens) for i in batch) for batch in run._epoch(0)]
        with suppress(KeyboardInterrupt):  # how a run ends that is asked to
            run.run(
                lambda *_: ends.append(time.process_time()),
                stop=lambda: len(ends) == len(tokens) or (len(ends) > 2 and ends[-1] - ends[0] > SECONDS),
            )
    return {"tokens_per_s": sum(tokens[1 : len(ends)]) / (ends[-1] - ends[0]), "steps": len(ends) - 1, "chosen": chosen}


def table(section: dict[str, Any], minutes: float) -> list[str]:
    """The figures, and what they make of a training that took so many minutes on a processor as it is."""
    found = section["result"]
    chosen = {processor: found[processor]["chosen"] for processor in PROCESSORS}
    rate = {processor: found[processor][chosen[processor]] for processor in PROCESSORS}
    longer = rate["as it is"] / rate["held to AVX2"]
    return [
        "Training multiplies in float32 or in bfloat16, whichever the machine is faster at. Tokens that Medusa's heads "
        f"learn in a second of one core's time, prompts included, in batches of {BATCH_TOKENS} tokens, on one core of "
        f"{section['machine'].partition(' of ')[2]}: as it is, and with PyTorch's libraries held to AVX2, which stands "
        "for a processor that has no more (none was measured); other work ran beside (commit "
        f"{section['commit']}, `{section['command']}`):",
        "",
        "| processor | float32 | bfloat16 | taken |",
        "|---|---|---|---|",
        *(f"| {each} | {found[each]['float32']:,.0f} | {found[each]['bfloat16']:,.0f} | {chosen[each]} |"
          for each in PROCESSORS),
        "",
        f"So the training of `medusa-smollm2-135m`, {minutes:.0f} minutes with units for bfloat16, takes about "
        f"{minutes * longer:.0f} with AVX2 alone (reckoned from the table, not run).",
        "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of data of the demo model")
    parser.add_argument("--only", help="one number type, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(learnt(args.data, args.only)))
        return
    import core_figures as core

    out: dict[str, Any] = {}
    for processor, environment in PROCESSORS.items():
        out[processor] = {}
        for number_type in ("float32", "bfloat16"):
            command = [sys.executable, __file__, str(args.data), "--only", number_type]
            ran = subprocess.run(
                command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            one = json.loads(ran.splitlines()[-1])
            out[processor] |= {number_type: round(one["tokens_per_s"], 1), "chosen": one["chosen"]}
    core.RESULTS = core.RESULTS.with_name("training.json")
    core.save("medusa", out)


if __name__ == "__main__":
    main()
