"""Figures computed from records by pure functions, each as docs/benchmarks.md defines it.

Speed is reported twice: all tokens over all time, and Spec-Bench's mean of each question's own rate, whose ratio is its
speed-up (arXiv 2401.07851); with and without prefill. Spread is the quartiles of a ratio taken round by round, where
both sides ran within seconds of each other. `own` are the records of the system in question, `plain` those of plain
decoding in the same setting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any

Record = dict[str, Any]
PLAIN = "plain"


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns one row of figures per setting (temperature, batch size) and system, in the order they ran."""
    out = []
    for (temperature, batch), at_setting in _groups(records, lambda r: tuple(r["round"][:2])).items():
        plain = [r for r in at_setting if r["contender"] == PLAIN]
        for name, own in _groups(at_setting, lambda r: r["contender"]).items():
            out.append({"contender": name, "temperature": temperature, "batch": batch, **figures(own, plain)})
    return out


def by_category(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """Returns the same rows for each category of question."""
    return {name: table(own) for name, own in _groups(records, lambda r: r["category"]).items()}


def figures(own: Sequence[Record], plain: Sequence[Record]) -> dict[str, Any]:
    """Returns all figures of one system in one setting."""
    rounds, base = _rounds(own), _rounds(plain)
    tokens, seconds = sum(r["new_tokens"] for r in own), sum(its["seconds"] for its in rounds.values())
    rates, base_rates = _rates(own), _rates(plain)
    ratios = [its["rate"] / base[key]["rate"] for key, its in rounds.items() if base.get(key, its)["rate"]]
    out: dict[str, Any] = {
        "answers": len(own), "new_tokens": tokens, "seconds": round(seconds, 3),
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "mean_rate": mean(rates),
        "speedup": _quartiles(ratios),
        "spec_bench_speedup": mean(rates) / (mean(base_rates) or 1),
        "first_token_s": _percentiles([r["arrivals"][0][1] for r in own if r["arrivals"]]),
        "between_tokens_ms": _percentiles(1e3 * gap for r in own for gap in gaps(r["arrivals"])),
        "peak_bytes": max(r["peak_bytes"] for r in own),
    }  # fmt: skip
    if _one_by_one(own) and all(r["prefill_seconds"] is not None for r in own):
        decoding = seconds - sum(its["prefill"] for its in rounds.values())
        out["decode_tokens_per_s"] = tokens / decoding if decoding > 0 else 0.0
    out |= _steps(own, seconds)
    compared = [r for r in own if "same" in r]
    if compared:
        out["compared"], out["same"] = len(compared), sum(r["same"] for r in compared)
        out["margins"] = sorted(r["divergence"]["margin"] for r in compared if "margin" in r.get("divergence", {}))
    return out


def gaps(arrivals: Sequence[tuple[int, float]]) -> Iterable[float]:
    """Yields the seconds between one token and the next: 0 between tokens that arrive together."""
    for (_, before), (count, at) in pairwise(arrivals):
        yield at - before
        yield from [0.0] * (count - 1)


def histogram(by_depth: Sequence[Sequence[int]], steps: int) -> list[int]:
    """Counts the steps that emitted 1, 2, ... tokens, from the counts of (offered, accepted) guesses by depth."""
    reached = [steps, *(kept for _, kept in by_depth), 0]
    return [a - b for a, b in pairwise(reached)]


def _steps(own: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Returns the figures of speculation, for systems that report steps.

    `rows_per_step` are those of a sequence: its root, its guesses, and what was inserted to draft from.
    `suspended_steps` are those that the governor took plain: they count among `steps`, with one token each.
    `slots_per_token` is there where tokens share keys and values.
    """
    stepped = [r for r in own if r.get("steps")]
    if not stepped:
        return {}
    steps, tokens = sum(r["steps"] for r in stepped), sum(r["new_tokens"] for r in stepped)
    out: dict[str, Any] = {"steps": steps, "tokens_per_step": tokens / steps}
    if any("suspended_steps" in r for r in stepped):
        out["suspended_steps"] = sum(r.get("suspended_steps", 0) for r in stepped)
    if 0 < (slots := sum(r.get("slots", 0) for r in stepped)) < tokens:
        out["slots_per_token"] = slots / tokens
    if drafted := sum(r.get("drafted", 0) for r in own):
        out["accepted_share"] = sum(r.get("accepted", 0) for r in own) / drafted
        out["rows_per_step"] = 1 + (drafted + sum(r.get("inserted", 0) for r in own)) / steps
    depths = [r["by_depth"] for r in own if r.get("by_depth")]
    if depths:
        deepest = max(map(len, depths))
        sums = [
            [sum(d[depth][i] for d in depths if depth < len(d)) for i in (0, 1)] for depth in range(deepest)
        ]  # fmt: skip
        out["acceptance_by_depth"] = [kept / offered for offered, kept in sums]
        out["levels_per_step"] = sum(offered for offered, _ in sums) / steps
        out["tokens_of_steps"] = histogram(sums, steps)
    if _one_by_one(own) and all("draft_seconds" in r for r in own):
        shares = {
            f"{part}_share": sum(r[f"{part}_seconds"] or 0 for r in own) / seconds
            for part in ("draft", "verify", "prefill")
        }
        out |= shares | {"other_share": 1 - sum(shares.values())}
    return out


def _one_by_one(records: Sequence[Record]) -> bool:
    """True if each round had one row: with several, a round's time cannot be divided among them."""
    return len(_rounds(records)) == len(records)


def _rates(records: Sequence[Record]) -> list[float]:
    """Returns tokens per second of each question and repeat, all its turns together, as Spec-Bench counts them."""
    out = []
    for own in _groups(records, lambda r: (*r["round"][:3], r["question"])).values():
        seconds = sum(r["seconds"] for r in own)
        out.append(sum(r["new_tokens"] for r in own) / seconds if seconds else 0.0)
    return out


def _rounds(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, float]]:
    """Returns round -> seconds from the first request to the last token, tokens per second, prefill seconds."""
    out = {}
    for key, own in _groups(records, lambda r: tuple(r["round"])).items():
        seconds = max(r["seconds"] for r in own)
        tokens = sum(r["new_tokens"] for r in own)
        prefill = max(r["prefill_seconds"] or 0.0 for r in own)
        out[key] = {"seconds": seconds, "rate": tokens / seconds if seconds else 0.0, "prefill": prefill}
    return out


def _groups(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    out: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        out[key(record)].append(record)
    return out


def _quartiles(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {"low": ordered[len(ordered) // 4], "median": median(ordered), "high": ordered[-1 - len(ordered) // 4]}


def _percentiles(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {"p50": median(ordered), "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}
