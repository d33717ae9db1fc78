"""Speculate only where it pays, measured while decoding.

A step with guesses costs more than one without, and emits more tokens. Speculation pays where its tokens per step
exceed its cost: the seconds of its latest steps over those of plain steps taken just before or after, so that neither
another process nor a growing context deceives anybody. Where it does not pay, steps stay plain for a while before the
next trial; where it does, a few plain steps renew the comparison now and then. How often either happens follows from
what it loses: measuring may cost a hundredth of the time. Steps in which the drafter had nothing to guess count as
plain ones.

Tokens never depend on its decisions: both kinds of step emit the same ones.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

PLAIN = 3
"""Plain steps that begin, and renew, a comparison."""
CLEAR_TRIAL, TRIAL = 4, 12
"""Speculative steps after which a trial may end that clearly loses, and after which any may."""
CLEAR = 0.75
"""Speculation clearly loses below this share of the plain rate."""
RECENT, PRIOR, LONG = 32, 16, 128
"""Speculative steps of this stretch whose tokens count; as how many the mean of former ones counts; and over how many
that is taken. Lengths of steps vary, so that a trial alone would often decide by chance."""
LATEST = 8
"""Steps of each kind whose median is compared."""
TRIAL_SHARE, RENEWAL_SHARE = 0.01, 0.005
"""Shares of the time that trials that lose, and plain steps where speculation wins, may cost."""
SHORTEST, LONGEST = 32, 1024
"""Steps from one measurement to the next."""


@dataclass
class _Batch:
    """Measurements of batches of about one size.

    Attributes:
        plain, speculative: seconds of the latest steps of each kind.
        tokens: a row, of the speculative steps of this stretch.
        mean: of the tokens a row of former steps as well; seen: how many.
        run: speculative steps of this stretch.
        plain_left: plain steps until speculation goes on; held: because it loses, not to measure.
    """

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    speculative: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    mean: float = 0.0
    seen: int = 0
    run: int = 0
    plain_left: int = PLAIN
    held: bool = False

    def add_plain(self, seconds: float) -> None:
        self.plain.append(seconds)
        self.plain_left = max(0, self.plain_left - 1)

    def add_speculative(self, seconds: float, tokens: float) -> None:
        if self.held:  # the first step of a trial
            self.held = False
            self.speculative.clear()
            self.tokens.clear()
        self.speculative.append(seconds)
        self.tokens.append(tokens)
        self.run += 1
        self.seen = min(self.seen + 1, LONG)
        self.mean += (tokens - self.mean) / self.seen

    def decide(self) -> None:
        """Ends a stretch of speculative steps where it loses, or where plain steps have to be timed again."""
        if len(self.plain) < PLAIN or self.run < CLEAR_TRIAL:
            return
        cost = median(self.speculative) / median(self.plain)
        prior = PRIOR if self.seen > len(self.tokens) else 0
        earned = (sum(self.tokens) + prior * self.mean) / (len(self.tokens) + prior)
        if earned < CLEAR * cost or (earned < cost and self.run % TRIAL == 0):
            self.held = True
            self._take_plain(CLEAR_TRIAL * (cost - min(earned, self.mean)) / TRIAL_SHARE)
        elif self.run >= _bounded(PLAIN * (earned / cost - 1) / (earned * RENEWAL_SHARE)):
            self.plain.clear()
            self._take_plain(PLAIN)

    def _take_plain(self, steps: float) -> None:
        self.plain_left = _bounded(steps) if self.held else PLAIN
        self.run = 0


def _bounded(steps: float) -> int:
    return round(min(LONGEST, max(SHORTEST, steps)))


class Governor:
    """Decides for each step whether to speculate; with `enabled=False` always.

    Attributes:
        suspended: whether the last decision held speculation back because it loses, not to measure plain steps.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.suspended = False
        self._batches: dict[int, _Batch] = defaultdict(_Batch)

    def speculate(self, rows: int) -> bool:
        """True if the next step of so many rows should carry guesses."""
        if not self.enabled:
            return True
        batch = self._batches[rows.bit_length()]
        self.suspended = batch.held and batch.plain_left > 0
        return not batch.plain_left

    def record(self, rows: int, guesses: int, seconds: float, tokens: int) -> None:
        """Records one step.

        Args:
            guesses: nodes verified besides the roots, over all rows; 0 for a plain step.
            seconds: its duration.
            tokens: emitted over all rows.
        """
        batch = self._batches[rows.bit_length()]
        if guesses:
            batch.add_speculative(seconds, tokens / rows)
            batch.decide()
        else:
            batch.add_plain(seconds)
