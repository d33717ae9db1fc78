"""The tables of docs/hidden-streams.md, from docs/results/hidden_streams.json and a benchmark's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cost_model

LAYERS = 30
"""Of the demo model."""
ROWS = ("8", "16")
SWEEPS = {
    "transfer": "Hidden Transfer by the layer after which pseudo rows begin, and Medusa's heads in the paper's form",
    "transfer adapted": "Hidden Transfer's pseudo rows with weights of their own in the layers that they pass",
    "transfer forms": "Other forms of Hidden Transfer",
    "streams": "M2R2 and Kangaroo in the paper's form by their exit, with about as many parameters",
}


def sweeps(found: dict[str, Any]) -> list[str]:
    """Returns the forms that were trained side by side, at equal data."""
    lines = [line for name, title in SWEEPS.items() if name in found for line in _sweep(title, found[name])]
    lines += _without_adapters(found["streams none"]) if "streams none" in found else []
    return lines + (_gates(found["gates"]) if "gates" in found else [])


def _sweep(title: str, section: dict[str, Any]) -> list[str]:
    r = section["result"]
    transfer = "transfer" in title.lower()
    tokens = (
        "Tokens per step of Hidden Transfer are those of the chain of states (`trees/pseudo_rows.py`) on the half of "
        "the conversations to which it was fitted; of Medusa, those of fixed trees on the other half."
        if transfer
        else "Tokens per step are those of fixed trees, searched on half of the conversations, on the other half."
    )
    lines = [
        f"{title}: all trained at once on the same {r['tokens'] / 1e3:.0f} thousand tokens (prompts included; learning "
        f"rate {r['settings']['learning_rate']:g}, batches of {r['settings']['batch_tokens']:,} tokens; commit "
        f"{section['commit']}, `{section['command']}`), measured on {r['held_out_conversations']} held-out "
        f"conversations. A guess is right if it is the written token. {tokens}",
        "",
        "| | trained parameters | guess 1 | 2 | 3 | cost of a pseudo row | tokens per step, 8 rows | 16 |"
        if transfer
        else "| | trained parameters | first guess right | among five | tokens per step, 8 nodes | 16 |",
        "|---|---|---|---|---|---|---|---|" if transfer else "|---|---|---|---|---|---|",
    ]
    for name, arm in r["arms"].items():
        lines.append(f"| {name} | {' | '.join((_transfer if transfer else _stream)(arm))} |")
    return [*lines, ""]


def _transfer(arm: dict[str, Any]) -> list[str]:
    right = [f"{level['top1']:.1%}" for level in arm["accuracy"]]
    if arm["method"] == "medusa":
        cost, tokens = "", arm["tokens_per_step_of_fixed_trees"]
    else:
        cost, tokens = f"{1 - arm['options']['layers'][0] / LAYERS:.0%} of a row", arm.get("tokens_per_step", {})
    return [f"{arm['parameters'] / 1e6:.2f} M", *right, cost, *_tokens(tokens)]


def _stream(arm: dict[str, Any]) -> list[str]:
    (level,) = arm["accuracy"]
    return [
        f"{arm['parameters'] / 1e6:.2f} M", f"{level['top1']:.1%}", f"{level['top5']:.1%}",
        *_tokens(arm["tokens_per_step_of_fixed_trees"]),
    ]  # fmt: skip


def _without_adapters(section: dict[str, Any]) -> list[str]:
    (arm,) = section["result"]["arms"].values()
    first, among = _stream(arm)[1:3]
    return [
        f"Without adapters, where the output matrix reads the model's own stream after layer {arm['options']['exit']}, "
        f"{first} of the first guesses are right, and {among} among five (commit {section['commit']}, "
        f"`{section['command']}`).",
        "",
    ]


def _gates(section: dict[str, Any]) -> list[str]:
    r = section["result"]
    precisions = list(next(iter(r["gates"].values()))["share_at_precision"])
    lines = [
        f"When to leave the model at M2R2's exit ({r['exit']}): {r['right']:.1%} of its guesses are right, of "
        f"{r['measured_on']:,} held-out ones; attention across depths (ARLA, {r['parameters'] / 1e6:.2f} M parameters) "
        f"learnt from {r['learnt_from']:,} others (commit {section['commit']}, `{section['command']}`).",
        "",
        f"| gate | area under ROC | {' | '.join(f'leaves, {float(p):.0%} right' for p in precisions)} |",
        f"|{'---|' * (2 + len(precisions))}",
    ]
    for name, gate in r["gates"].items():
        shares = [f"{share:.1%}" for share in gate["share_at_precision"].values()]
        lines.append(f"| {name} | {gate['area_under_roc']:.3f} | {' | '.join(shares)} |")
    return [*lines, ""]


def _tokens(of_sizes: dict[str, float | None]) -> Sequence[str]:
    return [f"{tokens:.2f}" if (tokens := of_sizes.get(size)) else "" for size in ROWS]


def at_other_sizes(results: dict[str, Any]) -> list[str]:
    """Returns what the tokens per step of a benchmark without the governor would gain at other sizes of model."""
    rows = {row["contender"]: row for row in results["table"]}
    transfer, stream = (rows.get(f"{method}:nodes=8,adapt=false") for method in ("hidden_transfer", "m2r2"))
    if not (transfer and stream):
        return []
    return [
        "At other sizes (`python tools/cost_model.py`): what these tokens per step would gain where a step costs "
        "exactly the reading of its weights, and what the papers' ratios need there.",
        "",
        *cost_model.hidden_streams(transfer["tokens_per_step"], stream["tokens_per_step"], stream["levels_per_step"]),
        "",
    ]
