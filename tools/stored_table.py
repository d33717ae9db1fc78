"""The figures of docs/results/stored.json in words: a sentence for each section, a line for each model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def sentences(results: dict[str, Any]) -> list[str]:
    """Returns the figures of weights that are multiplied as they are stored, machine by machine and model by model."""
    lines = []
    for machine in dict.fromkeys(value["machine"] for value in results.values()):
        here = {key: value["result"] for key, value in results.items() if value["machine"] == machine}
        lines += [f"Weights as stored, on {machine} (docs/results/stored.json has commands and commits):", ""]
        for name in dict.fromkeys(key.split()[1] for key in here):
            found = {key.split()[0]: result for key, result in here.items() if key.split()[1] == name}
            lines.append(f"- {name}: {' '.join(STORED[key](found[key]) for key in STORED if key in found)}")
        lines.append("")
    return lines


def start(r: dict[str, Any]) -> str:
    return (
        f"The first token comes {r['first_token_seconds_beyond_torch']} s after PyTorch is imported; "
        f"{r['resident_mb_after_500_tokens']:,} MB are resident after 500 tokens."
    )


def steps(r: dict[str, Any]) -> str:
    costs = (
        f"{keys} keys " + ", ".join(f"{size} nodes {each['relative'][size]}" for size in ("4", "8", "16"))
        for keys, each in r["steps"].items()
    )
    return f"A step relative to one node: {'; '.join(costs)}."


def floats(r: dict[str, Any]) -> str:
    kinds = (
        f"{kind} " + ", ".join(f"{size} nodes {each['relative'][size]}" for size in ("4", "8", "16")) + "; a "
        f"plain step reads at {each['plain_reads_of_bandwidth']:.0%} of the bandwidth, one of 16 multiplies "
        f"{each['gmac_per_s_at_16']:.0f} billion pairs of numbers a second (PyTorch's largest product of float32: "
        f"{each['gmac_per_s_of_pytorch']:.0f})"
        for kind, each in r.items()
    )
    return f"Unpacked, relative to one node at 300 keys: {'; '.join(kinds)}."


def quality(r: dict[str, Any]) -> str:
    return (
        f"Perplexity of {r['tokens']} tokens of human texts: {r['stored']['perplexity']:.2f}, in float32 "
        f"{r['float32']['perplexity']:.2f}, llama.cpp's {r['llama.cpp']['perplexity']:.2f}; "
        f"{r['stored']['agrees_with_float32']:.1%} of the most probable tokens are those of float32 "
        f"(llama.cpp: {r['llama.cpp']['agrees_with_float32']:.1%})."
    )


def busy(r: dict[str, Any]) -> str:
    return (
        f"Beside a process that keeps a core busy a plain step takes {r['busy']} of its time "
        f"({r['busy_with_all_threads']} if no thread gives way)."
    )


def heads(r: dict[str, Any]) -> str:
    kept = ", ".join(f"{name} {each['ratio']:.3f}" for name, each in r.items())
    return f"Tokens per step of heads trained on the unpacked model, against those on it: {kept}."


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


STORED: dict[str, Callable[[dict[str, Any]], str]] = {
    "start": start, "steps": steps, "floats": floats, "quality": quality,
    "heads": heads, "busy": busy, "exactness": exactness,
}  # fmt: skip
"""Section of stored.json -> its sentence."""
