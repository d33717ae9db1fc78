"""Comparison of two result folders: what got slower, or has fewer tokens per step, beyond noise.

Machines change between runs, so speeds are compared through plain decoding of the same round: each question's speed-up
after, over its speed-up before. Those ratios have a median and quartiles of their own, and a drop counts when both the
median is below a floor and even the upper quartile is a drop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from foretell.bench.metrics import PLAIN
from foretell.errors import UsageError
from foretell.loading.catalog import current

SPEED_FLOOR, TOKENS_FLOOR, MACHINE_FLOOR = 0.03, 0.02, 0.15
"""Relative drops that never count: of a speed-up, of tokens per step (the governor moves them), of plain's speed."""
ALIKE = "model", "fingerprint", "dtype", "digest", "new_tokens"
"""Settings that two results must share to be compared."""


@dataclass(frozen=True)
class Change:
    """One figure of one system in one setting, before and after."""

    system: str
    setting: str
    figure: str
    before: float
    after: float
    worse: bool

    def __str__(self) -> str:
        change = self.after / self.before - 1 if self.before else 0.0
        within = "better" if change > 0 else "less, which may be chance"
        verdict = "worse" if self.worse else "same within noise" if abs(change) < SPEED_FLOOR else within
        return (
            f"{self.system}, {self.setting}: {self.figure} {self.before:.3f} -> {self.after:.3f} "
            f"({change:+.1%}): {verdict}"
        )


def compare(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Yields every figure that both have.

    Raises:
        UsageError: they measured different things.
    """
    old, now = _settings(before), _settings(after)
    differ = [name for name in ALIKE if old.get(name) != now.get(name)]
    if differ:
        raise UsageError(f"The two results differ in {', '.join(differ)}; compare runs of one suite and model.")
    new, ups = {_key(row): row for row in after["table"]}, [_speedups(result) for result in (before, after)]
    for was in before["table"]:
        name, setting = was["contender"], f"batch {was['batch']}, temperature {was['temperature']:g}"
        row = new.get(_key(was))
        if row is None:
            yield Change(name, setting, "answers", was["answers"], 0, True)
            continue
        if name != PLAIN:
            shared = [key for key in ups[0] if key in ups[1] and key[0] == name and list(key[1][:2]) == _where(was)]
            ratios = sorted(ups[1][key] / ups[0][key] for key in shared)
            if ratios:
                worse = median(ratios) < 1 - SPEED_FLOOR and ratios[-1 - len(ratios) // 4] < 1
                figure = "speed-up over the first's, question by question"
                yield Change(name, setting, figure, 1.0, median(ratios), worse)
        elif before["machine"] == after["machine"]:
            x, y = was["tokens_per_s"], row["tokens_per_s"]
            yield Change(PLAIN, setting, "tokens/s", x, y, y < x * (1 - MACHINE_FLOOR))
        if "tokens_per_step" in was and "tokens_per_step" in row:
            x, y = was["tokens_per_step"], row["tokens_per_step"]
            yield Change(name, setting, "tokens per step", x, y, y < x * (1 - TOKENS_FLOOR))
        if "same" in was and "same" in row and after["contenders"][name].get("exact"):
            x, y = was["same"] / was["compared"], row["same"] / row["compared"]
            yield Change(name, setting, "share of answers with plain's ids", x, y, y < x)


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = result["settings"]
    return settings | {"fingerprint": current(str(settings.get("fingerprint")))}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["contender"], row["batch"], row["temperature"]


def _where(row: dict[str, Any]) -> list[Any]:
    return [row["temperature"], row["batch"]]


def _speedups(results: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    """Returns (system, round, question) -> tokens per second over plain's."""
    rates = {
        (answer["contender"], tuple(answer["round"]), answer["question"]): answer["new_tokens"] / answer["seconds"]
        for answer in results["requests"]
        if answer["seconds"] and answer["new_tokens"]
    }
    return {key: rate / rates[PLAIN, *key[1:]] for key, rate in rates.items() if (PLAIN, *key[1:]) in rates}
