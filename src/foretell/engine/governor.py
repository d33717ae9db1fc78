"""Speculate only where it pays, measured while decoding.

A step with guesses costs more than one without and emits more tokens; which is faster depends on the machine, the
batch and the context. The governor measures both rates per (rows, context) bucket: a few plain steps first, then
speculative ones until the difference is clear. Where speculation loses, steps stay plain for a while before the next
trial. Steps in which the drafter had nothing to guess count as plain ones.

Tokens never depend on its decisions: both kinds of step emit the same ones.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean, median

BASELINE = 3
"""Plain steps at the beginning of a bucket."""
TRIAL = 12
"""Speculative steps of a trial; one that clearly loses ends after a third of them."""
PATIENCE, IMPATIENCE = 256, 32
"""Steps for which a decision holds. The first one against speculation holds for 32 only, twice as many each time it is
confirmed: a trial is short, and the lengths of its steps vary."""
MARGIN, CLEAR = 0.95, 0.75
"""Speculation is held back when its rate is below this share of the plain rate, at the end of a trial and during it."""


@dataclass
class _Bucket:
    seconds: dict[bool, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TRIAL)))
    tokens: dict[bool, deque[int]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TRIAL)))
    steps: int = 0
    verdict_until: int = 0
    plain: bool = False
    holds: int = IMPATIENCE

    def rate(self, guessed: bool) -> float:
        """Tokens per second; by the median step, so that one slow step decides nothing."""
        return fmean(self.tokens[guessed]) / median(self.seconds[guessed])


class Governor:
    """Decides for each step whether to speculate; with `enabled=False` always.

    Attributes:
        suspended: whether the last decision held speculation back because it loses, not to measure plain steps.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.suspended = False
        self._buckets: dict[tuple[int, int], _Bucket] = defaultdict(_Bucket)

    def speculate(self, rows: int, context: int) -> bool:
        """True if the next step should carry guesses.

        Args:
            rows: that take part.
            context: committed tokens of the longest one.
        """
        if not self.enabled:
            return True
        bucket = self._bucket(rows, context)
        self.suspended = bucket.plain and bucket.steps < bucket.verdict_until
        return not self.suspended and len(bucket.seconds[False]) >= BASELINE

    def record(self, rows: int, context: int, guesses: int, seconds: float, tokens: int) -> None:
        """Records one step.

        Args:
            guesses: nodes verified besides the roots, over all rows; 0 for a plain step.
            seconds: its duration.
            tokens: emitted over all rows.
        """
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
            samples[True].clear()  # the next trial is measured alone

    def _bucket(self, rows: int, context: int) -> _Bucket:
        return self._buckets[rows.bit_length(), (context // 256).bit_length()]
