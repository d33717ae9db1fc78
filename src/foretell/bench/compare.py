"""Two result folders side by side: what got slower, or is accepted less, beyond noise.

Speeds of two runs are compared through plain decoding of the same run, because machines change between runs; plain
itself is compared by tokens per second only where both ran on the same kind of machine. Noise is what the two runs
saw themselves: a drop counts when it exceeds a floor and both quartile ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SPEED_FLOOR, TOKENS_FLOOR = 0.03, 0.01
"""Relative drops that never count: of a speed-up, and of tokens per step where noise has no part."""


@dataclass(frozen=True)
class Change:
    """One figure of one contender in one setting, before and after."""

    contender: str
    setting: str
    figure: str
    before: float
    after: float
    worse: bool

    def __str__(self) -> str:
        change = self.after / self.before - 1 if self.before else 0.0
        verdict = "worse" if self.worse else "same within noise" if abs(change) < SPEED_FLOOR else "changed"
        return (
            f"{self.contender}, {self.setting}: {self.figure} {self.before:.3f} -> {self.after:.3f} "
            f"({change:+.1%}): {verdict}"
        )


def compare(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Every figure that both have."""
    old = {_key(row): row for row in before["table"]}
    for row in after["table"]:
        if (was := old.get(_key(row))) is None:
            continue
        setting = f"batch {row['batch']}, temperature {row['temperature']:g}"
        a, b = was["speedup"], row["speedup"]
        if row["contender"] != "plain":
            worse = b["high"] < a["low"] and b["median"] < a["median"] * (1 - SPEED_FLOOR)
            yield Change(row["contender"], setting, "speed against plain", a["median"], b["median"], worse)
        elif before["machine"] == after["machine"]:
            x, y = was["tokens_per_s"], row["tokens_per_s"]
            yield Change("plain", setting, "tokens/s", x, y, y < x * (1 - 5 * SPEED_FLOOR))
        if "tokens_per_step" in was and "tokens_per_step" in row:
            x, y = was["tokens_per_step"], row["tokens_per_step"]
            yield Change(row["contender"], setting, "tokens per step", x, y, y < x * (1 - TOKENS_FLOOR))
        if "same" in was and "same" in row:
            x, y = was["same"] / was["compared"], row["same"] / row["compared"]
            yield Change(row["contender"], setting, "share of answers with plain's ids", x, y, y < x)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["contender"], row["batch"], row["temperature"]
