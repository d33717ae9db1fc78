"""Writes the figures of README.md and docs/training.md from docs/results; --check fails when they are stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- figures: written by tools/readme.py from docs/results -->"
END = "<!-- end of figures -->"


def render(results: dict[str, Any]) -> str:
    speed = results["speed"]["result"]
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
    lines += [
        "",
        *(f"- {sentence(results[name]['result'])}" for name, sentence in SENTENCES.items() if name in results),
    ]
    return "\n".join(lines)


def exactness(settings: dict[str, Any]) -> str:
    same = list(settings.values())
    agreed = all(v["same_ids"] == v["same_cache"] == v["same_logprobs"] == v["prompts"] for v in same)
    verdict = (
        "equal plain decoding's in every one" if agreed else "differ from plain decoding's somewhere: see the file"
    )
    return (
        f"Exactness: {len(same)} settings of drafter or random trees, number type, temperature and batch size, "
        f"{sum(v['tokens'] for v in same):,} tokens: ids, log-probabilities and cache bytes {verdict}."
    )


def machine(r: dict[str, Any]) -> str:
    return (
        f"A plain step takes {r['plain_ms_per_step_at_100_keys']} ms; reading the weights once at the measured "
        f"{r['read_gb_per_s']} GB/s takes {r['bound_ms_per_step']} ms."
    )


def step(r: dict[str, Any]) -> str:
    relative = r["bf16"]["300"]["relative"]
    cost = ", ".join(f"{size} nodes {relative[size]}" for size in ("8", "16", "32", "64"))
    return f"A step's cost relative to one node, at 300 keys: {cost}."


def batch(r: dict[str, Any]) -> str:
    ours, theirs = r["plain"]["tokens_per_s"], r["transformers"]["tokens_per_s"]
    return f"Batch of 32: {ours} tokens/s (transformers: {theirs})."


def startup(r: dict[str, Any]) -> str:
    first, peak = r["first_token_seconds_from_process_start"], r["peak_memory_gb"]
    return f"From process start to the first token {first} s; peak memory {peak} GB."


SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "exactness": exactness, "machine": machine, "step": step, "batch": batch, "startup": startup,
}  # fmt: skip
"""Section of the results -> its sentence; a section not measured yet has none."""


def medusa(results: dict[str, Any]) -> str:
    """Tokens per step and speed by tree size, and how the shipped heads were made."""
    sizes = results["sizes"]["result"]
    lines = [
        "## Measured",
        "",
        f"Heads for SmolLM2-135M-Instruct that come with foretell; {results['sizes']['machine']}; "
        f"{sizes['prompts']} Spec-Bench questions, {sizes['new_tokens']} new tokens, bfloat16, greedy, batch 1, all in "
        f"one interleaved run (commit {results['sizes']['commit']}, `{results['sizes']['command']}`).",
        "",
        "| | tokens per step | tokens/s, prefill included | against plain, median of prompts | with lookup merged: "
        "tokens per step | tokens/s | against plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (
        "plain",
        "prompt_lookup",
        *(each for each in sizes if each.startswith("medusa") and "with" not in each),
    ):
        row, merged = sizes[name], sizes.get(f"{name} with lookup")
        cells = [
            f"{each['tokens_per_step']} | {each['tokens_per_s']} | {each['median_speedup']}×"
            for each in (row, merged)
            if each
        ]
        lines.append(
            f"| {name.replace('medusa ', 'medusa, nodes: ')} | {' | '.join(cells)} |" + " | | |" * (not merged)
        )
    lines.append("")
    for config in sorted((ROOT / "src/foretell/drafters/trained").glob("medusa-*/config.json")):
        raw = json.loads(config.read_text())
        made, data = raw["provenance"], raw["provenance"]["data"]
        counts = data["counts"]
        heads = ", ".join(f"{head['top1']:.0%} / {head['top5']:.0%}" for head in made["accuracy"])
        lines += [
            f"`{config.parent.name}`: {counts['written']:,} tokens in {counts['conversations']:,} conversations "
            f"(`{data['command']}`), then `{made['command']}` ({made['seconds'] / 60:.0f} minutes after the features, "
            f"on the same kind of machine). Held-out accuracy by head, first / among five: {heads}.",
        ]
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Page -> its block of figures."""
    folder = ROOT / "docs/results"
    out = {ROOT / "README.md": render(json.loads((folder / "core.json").read_text()))}
    if (folder / "medusa.json").exists():
        out[ROOT / "docs/training.md"] = medusa(json.loads((folder / "medusa.json").read_text()))
    return out


def main() -> int:
    stale = 0
    for page, block in pages().items():
        text = page.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        fresh = f"{before}{BEGIN}\n{block}\n{END}{after}"
        if "--check" not in sys.argv:
            page.write_text(fresh)
        elif fresh != text:
            print(f"error: the figures of {page.name} are stale; run python tools/readme.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
