"""Speculate only where it pays, measured while decoding.

A step with guesses costs more than one without and emits more tokens; which wins depends on the machine, the batch
and the context. The governor keeps both rates per (rows, context) bucket. Where speculation loses, it goes back to
plain for a while and then tries again. Steps whose drafter had nothing to guess measure plain for free.

Tokens never depend on its decisions: both ways give the same ones.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean, median

TRIAL = 16
"""Speculative steps, and a quarter as many plain ones, before a bucket is judged."""
PATIENCE = 256
"""Steps that a verdict holds."""
MARGIN = 0.95
"""Speculation is dropped only when its rate is below this share of plain's."""


@dataclass
class _Bucket:
    seconds: dict[bool, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TRIAL)))
    tokens: dict[bool, deque[int]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TRIAL)))
    plain_until: int = 0
    judged_until: int = 0
    steps: int = 0

    def rate(self, guessed: bool) -> float:
        """Tokens per second; the median step keeps a hiccup of the machine from deciding."""
        return fmean(self.tokens[guessed]) / median(self.seconds[guessed])


class Governor:
    """Decides per step; `enabled=False` always speculates."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.suspended_steps = 0
        self._buckets: dict[tuple[int, int], _Bucket] = defaultdict(_Bucket)

    def speculate(self, rows: int, context: int) -> bool:
        """Whether the next step should carry guesses. `context`: committed tokens of the longest row."""
        if not self.enabled:
            return True
        bucket = self._bucket(rows, context)
        if bucket.steps < bucket.plain_until:
            self.suspended_steps += 1
            return False
        if bucket.steps < bucket.judged_until or len(bucket.seconds[True]) < TRIAL:
            return True
        return len(bucket.seconds[False]) >= TRIAL // 4  # else measure plain now

    def record(self, rows: int, context: int, guesses: int, seconds: float, tokens: int) -> None:
        """One step's cost and what it emitted over all rows; `guesses` 0 means it was plain."""
        bucket = self._bucket(rows, context)
        bucket.steps += 1
        bucket.seconds[guesses > 0].append(seconds)
        bucket.tokens[guesses > 0].append(tokens)
        measured = len(bucket.seconds[True]) == TRIAL and len(bucket.seconds[False]) >= TRIAL // 4
        if bucket.steps < max(bucket.judged_until, bucket.plain_until) or not measured:
            return
        if bucket.rate(True) < MARGIN * bucket.rate(False):
            bucket.plain_until = bucket.judged_until = bucket.steps + PATIENCE
            bucket.seconds[True].clear()  # the next trial starts afresh
            bucket.tokens[True].clear()
        else:
            bucket.judged_until = bucket.steps + PATIENCE

    def _bucket(self, rows: int, context: int) -> _Bucket:
        return self._buckets[rows.bit_length(), (context // 256).bit_length()]
