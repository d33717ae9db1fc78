"""Speculate only where it pays, measured while decoding.

A step with guesses costs more than one without and emits more tokens; which wins depends on the machine, the batch
and the context. The governor keeps both rates per (rows, context) bucket: a few plain steps first, then speculative
ones until the case is clear. Where speculation loses, it stays plain for a while and then tries again. Steps whose
drafter had nothing to guess measure plain for free.

Tokens never depend on its decisions: both ways give the same ones.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean, median

BASELINE = 3
"""Plain steps that a bucket begins with."""
TRIAL = 12
"""Speculative steps before a bucket is judged; a clear loser is judged after a third of them."""
PATIENCE, IMPATIENCE = 256, 32
"""Steps that a verdict holds; but the first against speculation only 32, twice as many each time it is confirmed: a
trial is short, and its steps are of many lengths."""
MARGIN, CLEAR = 0.95, 0.75
"""Speculation is dropped when its rate is below this share of plain's, at the end of a trial or in the midst of it."""


@dataclass
class _Bucket:
    seconds: dict[bool, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TRIAL)))
    tokens: dict[bool, deque[int]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TRIAL)))
    steps: int = 0
    verdict_until: int = 0
    plain: bool = False
    holds: int = IMPATIENCE

    def rate(self, guessed: bool) -> float:
        """Tokens per second; the median step keeps a hiccup of the machine from deciding."""
        return fmean(self.tokens[guessed]) / median(self.seconds[guessed])


class Governor:
    """Decides per step; `enabled=False` always speculates.

    Attributes:
        suspended: whether the last decision held speculation back because it loses, not merely to measure plain.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.suspended = False
        self._buckets: dict[tuple[int, int], _Bucket] = defaultdict(_Bucket)

    def speculate(self, rows: int, context: int) -> bool:
        """Whether the next step should carry guesses. `context`: committed tokens of the longest row."""
        if not self.enabled:
            return True
        bucket = self._bucket(rows, context)
        self.suspended = bucket.plain and bucket.steps < bucket.verdict_until
        return not self.suspended and len(bucket.seconds[False]) >= BASELINE

    def record(self, rows: int, context: int, guesses: int, seconds: float, tokens: int) -> None:
        """One step's cost and what it emitted over all rows; `guesses` 0 means it was plain."""
        bucket = self._bucket(rows, context)
        bucket.steps += 1
        bucket.seconds[guesses > 0].append(seconds)
        bucket.tokens[guesses > 0].append(tokens)
        tried = len(bucket.seconds[True])
        if bucket.steps < bucket.verdict_until or len(bucket.seconds[False]) < BASELINE or tried < TRIAL // 3:
            return
        share = bucket.rate(True) / bucket.rate(False)
        if share >= CLEAR and tried < TRIAL:
            return
        bucket.plain = share < MARGIN
        bucket.verdict_until = bucket.steps + (bucket.holds if bucket.plain else PATIENCE)
        bucket.holds = min(PATIENCE, 2 * bucket.holds) if bucket.plain else IMPATIENCE
        for samples in (bucket.seconds, bucket.tokens):
            samples[True].clear()  # the next trial starts afresh

    def _bucket(self, rows: int, context: int) -> _Bucket:
        return self._buckets[rows.bit_length(), (context // 256).bit_length()]
