"""The tables of drafters that run the model's own layers: costs of steps, exits, skipped sublayers, DEL's statistics.

Each function turns a section of docs/results, or a benchmark's results, into lines of docs/own-layers.md.
"""

from __future__ import annotations

from typing import Any


def step_costs(results: dict[str, Any]) -> list[str]:
    """Returns the cost of a step of each drafter, by part, in plain steps, and the tokens that it needs to pay."""

    def seconds(row: dict[str, Any], share: float = 1.0) -> float:
        return share * row["seconds"] / row["steps"]

    rows = {row["contender"]: row for row in results["table"]}
    plain = seconds(rows["plain"], 1 - rows["plain"]["prefill_share"])
    lines = [
        "Steps by part. Steps in which the governor held speculation back are plain ones, and count here too. The "
        "difference between a row with `lookup=true` and the same without is due to lookup.",
        "",
        "| in plain steps | drafting | verification | the rest | tokens per step to break even | held back |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name != "plain" and "draft_share" in row:
            parts = [seconds(row, row[f"{part}_share"]) / plain for part in ("draft", "verify", "other")]
            held = sum(each["suspended_steps"] for each in results["requests"] if each["contender"] == name)
            cells = [*(f"{part:.2f}" for part in (*parts, sum(parts))), f"{held / row['steps']:.0%}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def exits(section: dict[str, Any]) -> list[str]:
    """Returns the figures of Kangaroo's adapter at each exit after the same short training."""
    r = section["result"]
    lines = [
        f"Kangaroo's exit from {r['model']} ({r['layers']} layers): adapters trained on {r['conversations']:,} "
        f"conversations ({r['tokens'] / 1e3:.0f} thousand tokens, prompts included; epochs: "
        f"{r['settings']['epochs']:g}; commit {section['commit']}, `{section['command']}`), in the "
        "paper's form and with additions; on held-out text. Trees get a level only where it pays: fewer from deeper "
        "exits.",
        "",
        "| adapter | trained parameters | top 1 | top 5 | tokens per step, 8 nodes | 16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in r.items():
        if isinstance(run, dict) and "top1" in run:
            tokens_per_step = " | ".join(f"{tokens:.2f}" for tokens in run["tokens_per_step"].values())
            cells = f"{run['parameters'] / 1e6:.1f} M | {run['top1']:.1%} | {run['top5']:.1%} | {tokens_per_step}"
            lines.append(f"| {name} | {cells} |")
    return [*lines, ""]


def spare(section: dict[str, Any]) -> list[str]:
    """Returns how well the model does without some of its sublayers, which SWIFT depends on."""
    r = section["result"]
    alone = sorted(share for kind in r["alone"].values() for share in kind)
    counts = (5, 10, 15, 20, 25)
    greedy = ", ".join(
        f"{count} {r['greedy'][count - 1]:.0%} ({r['cost'][f'{count} left out']:.0%})" for count in counts
    )
    lines = [
        f"Skipped sublayers of {r['model']} (matchness on {r['tokens']:,} tokens that it wrote; commit "
        f"{section['commit']}, `{section['command']}`): one of {r['sublayers']} sublayers skipped alone "
        f"{alone[0]:.0%} to {alone[-1]:.0%}, half of them {alone[len(alone) // 2]:.0%} or more; greedily "
        f"selected (and a token's cost then, as a share of a step): {greedy}. Both sublayers of every second layer, "
        f"where the search begins: {r['every second layer']:.0%}.",
        "",
    ]
    for name, plan in r["found"].items():
        lines += [
            f"The plan `{name}`, found by a search during decoding, skips {plan['skipped']} sublayers: matchness "
            f"{plan['matchness_then']:.0%} on the window that selected it, {plan['matchness']:.0%} on these "
            f"tokens, and a token costs {r['cost'][name]:.0%} of a step.",
            "",
        ]
    return [*lines, "![matchness by skipped sublayers, and what pays](images/spare.png)", ""]


def control(section: dict[str, Any]) -> list[str]:
    """Returns the cost of DEL's statistics, by which it selects an exit."""
    r = section["result"]
    lines = [
        f"The cost of DEL's statistics on {r['model']} ({r['questions']} development questions, {r['new_tokens']} new "
        f"tokens, a plain step {r['plain_step_ms']:.1f} ms; commit {section['commit']}, `{section['command']}`), per "
        "step: reading committed tokens at the exits (the end of a prompt not counted), and selecting one.",
        "",
        "| | exits | reading | selecting | of a plain step | tokens per step |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in r.items():
        if isinstance(run, dict):
            times = f"{run['observe_ms']:.2f} ms | {run['choose_ms']:.2f} ms | {run['share_of_a_plain_step']:.0%}"
            lines.append(f"| {name} | {run['exits']} | {times} | {run['tokens_per_step']:.2f} |")
    return [*lines, ""]
