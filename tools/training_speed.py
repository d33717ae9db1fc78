"""Measures how fast Medusa's heads learn in each number type and writes docs/results/training.json.

    python tools/training_speed.py DATA

On this processor as it is, and with the libraries limited to AVX2, so that its bfloat16 units are not used. With one
thread and by processor time, so that other work on the machine does not count.
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
"""Conversations of the data; tokens of a batch; seconds of measured steps, of which there are at least two."""


def learnt(data: Path, number_type: str) -> dict[str, Any]:
    """Returns the tokens trained per second of core time, prompts included, and the type chosen on this processor."""
    import core_figures as core
    import torch

    import foretell
    from foretell.drafters.medusa import Medusa
    from foretell.drafting.learning import number_types
    from foretell.train.data import ConversationStore
    from foretell.train.features import FeatureStore
    from foretell.train.recipe import token_counts
    from foretell.train.trainer import Settings, Trainer

    backbone = foretell.load(core.MODEL, dtype="bf16", threads=1).backbone
    talks = ConversationStore.open(data).conversations[:CONVERSATIONS]
    module = Medusa.trainable(backbone, Medusa.Training(), token_counts(talks, backbone.config.vocab))
    chosen, ends = number_types.chosen(torch.device("cpu")), list[float]()
    with tempfile.TemporaryDirectory() as folder, number_types.multiply_in(number_type):
        features = FeatureStore(backbone, talks, module.taps, Path(folder) / "features")
        features.prepare()
        run = Trainer(module, features, Settings(epochs=1000, batch_tokens=BATCH_TOKENS), Path(folder) / "run")
        tokens = [sum(len(talks[i].tokens) for i in batch) for batch in run._epoch(0)]
        with suppress(KeyboardInterrupt):  # raised when `stop` ends a run
            run.run(
                lambda *_: ends.append(time.process_time()),
                stop=lambda: len(ends) == len(tokens) or (len(ends) > 2 and ends[-1] - ends[0] > SECONDS),
            )
    return {"tokens_per_s": sum(tokens[1 : len(ends)]) / (ends[-1] - ends[0]), "steps": len(ends) - 1, "chosen": chosen}


def table(section: dict[str, Any], minutes: float) -> list[str]:
    """Returns the figures as Markdown, and what they predict for a training that took `minutes` here."""
    found = section["result"]
    chosen = {processor: found[processor]["chosen"] for processor in PROCESSORS}
    rate = {processor: found[processor][chosen[processor]] for processor in PROCESSORS}
    longer = rate["as it is"] / rate["held to AVX2"]
    return [
        "Training multiplies in float32 or in bfloat16, whichever is faster on the machine. Tokens per second of core "
        f"time in training Medusa's heads, prompts included, in batches of {BATCH_TOKENS} tokens, on one core of "
        f"{section['machine'].partition(' of ')[2]}: as it is, and with PyTorch's libraries limited to AVX2, which "
        "stands for a processor without more (none was measured); other work ran beside (commit "
        f"{section['commit']}, `{section['command']}`):",
        "",
        "| processor | float32 | bfloat16 | chosen |",
        "|---|---|---|---|",
        *(f"| {each} | {found[each]['float32']:,.0f} | {found[each]['bfloat16']:,.0f} | {chosen[each]} |"
          for each in PROCESSORS),
        "",
        f"So the training of `medusa-smollm2-135m`, {minutes:.0f} minutes with units for bfloat16, would take about "
        f"{minutes * longer:.0f} with AVX2 alone (calculated from the table, not measured).",
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
