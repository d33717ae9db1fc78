"""Times the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, Protocol

from foretell.requests import Statistics

Part = Literal["prefill_seconds", "draft_seconds", "verify_seconds"]
"""A field of `Statistics`."""


class Timed(Protocol):
    """A row of the batch, as far as its clock is concerned."""

    statistics: Statistics


class Clock:
    """Times the laps of one step, and adds each to the statistics of all rows that take part."""

    def __init__(self, rows: Sequence[Timed]):
        self._rows = rows
        self._began = self._lap = time.perf_counter()

    def lap(self, part: Part | None = None) -> float:
        """Ends a lap, and adds it to `part` of the statistics if one is given; returns its seconds."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        if part:
            for row in self._rows:
                setattr(row.statistics, part, getattr(row.statistics, part) + seconds)
        return seconds

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._began
