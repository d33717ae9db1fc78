"""Writes the figures of the README from docs/results/core.json; --check fails when they are stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- figures: written by tools/readme.py from docs/results/core.json -->"
END = "<!-- end of figures -->"


def render(results: dict[str, Any]) -> str:
    speed, step, batch = (results[name]["result"] for name in ("speed", "step", "batch"))
    machine, startup, exact = (results[name]["result"] for name in ("machine", "startup", "exactness"))
    lines = [
        "## Measured",
        "",
        f"SmolLM2-135M-Instruct, bfloat16, {results['speed']['machine']}; {speed['prompts']} Spec-Bench questions, "
        f"{speed['new_tokens']} new tokens, greedy, batch 1, all in one interleaved run "
        f"(commit {results['speed']['commit']}, `{results['speed']['command']}`).",
        "",
        "| | tokens/s, prefill included | against transformers, median of prompts | tokens per step |",
        "|---|---|---|---|",
    ]
    for name, label in (
        ("transformers", "transformers `generate`"),
        ("transformers prompt lookup", "transformers, prompt lookup"),
        ("plain", "foretell, plain"),
        ("prompt_lookup", "foretell, prompt lookup"),
    ):
        row = speed[name]
        ratio = row["median_ratio_to_transformers"]
        lines.append(f"| {label} | {row['tokens_per_s']} | {ratio}× | {row.get('tokens_per_step', '')} |")
    relative = step["bf16"]["300"]["relative"]
    cost = ", ".join(f"{size} nodes {relative[size]}" for size in ("8", "16", "32", "64"))
    same = list(exact.values())
    tokens = sum(v["tokens"] for v in same)
    agreed = all(v["same_ids"] == v["same_cache"] == v["same_logprobs"] == v["prompts"] for v in same)
    lines += [
        "",
        f"- Exactness: {len(same)} settings (drafters and random trees, two types, two batch sizes, two temperatures), "
        f"{tokens:,} tokens: ids, log-probabilities and cache bytes "
        + (
            "equal plain decoding's in every one."
            if agreed
            else "differ from plain decoding's somewhere: see the file."
        ),
        f"- A plain step takes {machine['plain_ms_per_step_at_100_keys']} ms; reading the weights once at the measured "
        f"{machine['read_gb_per_s']} GB/s takes {machine['bound_ms_per_step']} ms.",
        f"- A step's cost relative to one node, at 300 keys: {cost}.",
        f"- Batch of 32: {batch['plain']['tokens_per_s']} tokens/s (transformers: "
        f"{batch['transformers']['tokens_per_s']}).",
        f"- From process start to the first token {startup['first_token_seconds_from_process_start']} s; peak memory "
        f"{startup['peak_memory_gb']} GB.",
    ]
    return "\n".join(lines)


def main() -> int:
    results = json.loads((ROOT / "docs/results/core.json").read_text())
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}\n{render(results)}\n{END}{after}"
    if "--check" in sys.argv:
        if fresh != text:
            print("error: the README's figures are stale; run python tools/readme.py", file=sys.stderr)
        return fresh != text
    readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
