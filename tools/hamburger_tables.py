"""The tables of docs/hamburger.md, from docs/results/hamburger.json."""

from __future__ import annotations

from typing import Any

TEXTS = {"held_out_answers": "held-out answers", "human_texts": "human texts"}


def tables(found: dict[str, Any]) -> list[str]:
    """Returns what fused decoding loses, and what it gains at each confidence."""
    return [line for name, section in found.items() if name.startswith("fused") for line in _fused(section)]


def _fused(section: dict[str, Any]) -> list[str]:
    r = section["result"]
    lines = [
        f"What `{r['model']}` lost, and what fused decoding of it loses besides ({section['machine']}; commit "
        f"{section['commit']}, `{section['command']}`). Perplexity per token; segments are cut as in training.",
        "",
        "| | tokens | before training | after it | in segments | slots per token | against before |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, p in r["perplexity"].items():
        lines.append(
            f"| {TEXTS[name]} | {p['tokens']:,} | {p['base']:.2f} | {p['changed']:.2f} | {p['fused']:.2f} | "
            f"{p['slots_per_token']:.2f} | {p['fused'] / p['base']:.2f}× |"
        )
    lines += [
        "",
        "Greedy answers to development questions by confidence. Agreement is the share of the tokens that one-token "
        "decoding of the same weights would choose after the same text; perplexity is that of the answers under the "
        "model before training; ROUGE-L of the summaries among them is against the references.",
        "",
        "| confidence | tokens a step | slots per token | agreement | perplexity before training | ROUGE-L |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in r["confidence"].items():
        rouge = "" if c["rouge_l"] is None else f"{c['rouge_l']:.3f}"
        lines.append(
            f"| {name} | {c['tokens_per_step']:.2f} | {c['slots_per_token']:.2f} | {c['agreement']:.1%} | "
            f"{c['perplexity_under_base']:.2f} | {rouge} |"
        )
    return [*lines, ""]
