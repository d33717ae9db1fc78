"""Speculate only where it pays, measured while decoding.

A step with guesses costs more than one without, and emits more tokens. Speculation pays where its tokens per step
exceed its cost: the seconds of its latest steps over those of plain steps taken just before or after, so that neither
another process nor a growing context deceives anybody. Where it does not pay, steps stay plain for a while before the
next trial; where it does, a few plain steps renew the comparison now and then. How often either happens follows from
what it loses: losing trials may cost a hundredth of the time. Steps in which the drafter had nothing to guess count as
plain ones. Batches of each size are judged by themselves; one of a new size waits with the one before it, for a while.

Tokens never depend on its decisions: both kinds of step emit the same ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

PLAIN = 3
"""Plain steps that begin, and renew, a comparison."""
CLEAR_TRIAL, TRIAL = 4, 12
"""Speculative steps after which a trial may end that clearly loses, and after which any may."""
CLEAR = 0.75
"""Speculation clearly loses below this share of the plain rate."""
CLEAR_WIN = 1.4
"""And clearly wins above this one."""
RECENT = 32
"""Latest speculative steps, of this trial on, whose tokens count."""
PRIOR = 8
"""As how many steps the long mean counts beside them: lengths vary, and a short trial alone would decide by chance."""
LONG = 128
"""Steps over which the long mean is taken."""
LATEST = 8
"""Steps of each kind whose median is compared."""
TRIAL_SHARE, RENEWAL_SHARE = 0.01, 0.005
"""Shares of the time that trials that lose, and plain steps where speculation wins, may cost."""
SHORTEST, LONGEST = 32, 1024
"""Steps from one measurement to the next."""
LONGEST_SHARED = 256
"""Steps that a batch of a new size waits at most with the one before it: what loses there may win here."""


@dataclass
class _Batch:
    """Measurements of batches of about one size.

    Attributes:
        plain: seconds of the latest plain steps.
        speculative: seconds of the latest speculative steps.
        tokens: a row, of the latest speculative steps since the trial began.
        mean: of the tokens a row, over trials.
        seen: speculative steps that are in the mean, up to `LONG`.
        run: speculative steps since the last decision.
        opening: seconds of the first of them, in which the drafter reads what was committed since it drafted last.
        since_plain: speculative steps since the last plain one.
        patience: most of these before plain steps are timed again; doubled each time. Short at first, unless it clearly
            wins: the very first plain steps find caches cold.
        plain_left: plain steps until speculation goes on.
        doubted: how many speculative steps found that it loses; plain steps taken just after them confirm it, or not.
        held: whether plain steps are taken because it loses, not to measure.
        last: number of the last step.
    """

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    speculative: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    mean: float = 0.0
    seen: int = 0
    run: int = 0
    opening: float = 0.0
    since_plain: int = 0
    patience: int = TRIAL
    plain_left: int = PLAIN
    doubted: int = 0
    held: bool = False
    last: int = 0

    def enter(self, step: int) -> None:
        """Forgets timings that are not of the steps just before: batches of another size came between."""
        if step - self.last > TRIAL:
            self.plain.clear()
            self.speculative.clear()
            self.plain_left, self.doubted, self.run = max(self.plain_left, PLAIN), 0, 0
        self.last = step

    def add_plain(self, seconds: float) -> None:
        self.plain.append(seconds)
        self.since_plain = 0
        if not self.plain_left:
            return
        self.plain_left -= 1
        if self.doubted and not self.plain_left:
            earned, cost = self._rates()
            if earned < cost:
                # in plain steps, by a trial as long as this
                lost = self.doubted * (cost - min(earned, self.mean))
                lost += min(TRIAL, max(0.0, self.opening / (median(self.plain) or 1.0) - cost))
                self.held, self.plain_left, self.patience = True, _bounded(lost / TRIAL_SHARE), SHORTEST
            self.doubted = 0

    def add_speculative(self, seconds: float, tokens: float) -> None:
        if self.held:  # the first step of a trial
            self.held = False
            self.speculative.clear()
            self.tokens.clear()
        if not self.run:
            self.opening = seconds
        self.speculative.append(seconds)
        self.tokens.append(tokens)
        self.run += 1
        self.since_plain += 1
        self.seen = min(self.seen + 1, LONG)
        self.mean += (tokens - self.mean) / self.seen

    def decide(self) -> None:
        """Ends a stretch of speculative steps where it seems to lose, or where plain steps have to be timed again."""
        if len(self.plain) < PLAIN or self.run < CLEAR_TRIAL or not min(median(self.plain), median(self.speculative)):
            return
        earned, cost = self._rates()
        if earned > CLEAR_WIN * cost:
            self.patience = max(self.patience, SHORTEST)
        clear = earned < CLEAR * cost and fmean(self.tokens) < cost
        if clear or (earned < cost and self.run % TRIAL == 0):
            self.doubted = min(self.run, TRIAL)
        elif self.since_plain >= min(self.patience, _bounded(PLAIN * (earned / cost - 1) / (earned * RENEWAL_SHARE))):
            self.patience *= 2
        else:
            return
        self.plain.clear()
        self.plain_left, self.run = PLAIN, 0

    def _rates(self) -> tuple[float, float]:
        """Returns tokens of a speculative step, and its seconds in plain steps."""
        prior = PRIOR if self.seen > len(self.tokens) else 0
        earned = (sum(self.tokens) + prior * self.mean) / (len(self.tokens) + prior)
        return earned, median(self.speculative) / (median(self.plain) or 1.0)


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
        self._batches: dict[int, _Batch] = {}
        self._steps = 0

    def speculate(self, rows: int) -> bool:
        """True if the next step of so many rows should carry guesses."""
        if not self.enabled:
            return True
        batch = self._batch_of(rows)
        self.suspended = batch.held and batch.plain_left > 0
        return not batch.plain_left

    def record(self, rows: int, guesses: float, seconds: float, tokens: int) -> None:
        """Records one step.

        Args:
            guesses: what ran besides the roots, over all rows, inserted rows included; 0 for a plain step.
            seconds: its duration.
            tokens: emitted over all rows.
        """
        batch = self._batch_of(rows)
        self._steps += 1
        batch.enter(self._steps)
        if guesses:
            batch.add_speculative(seconds, tokens / rows)
            batch.decide()
        else:
            batch.add_plain(seconds)

    def _batch_of(self, rows: int) -> _Batch:
        """Measurements of batches of about so many rows.

        Rows join and leave one by one, and a trial at each size that they pass would cost more than the text is worth:
        where the last batch waits for its next trial, one of a size that is new waits with it for a while.
        """
        size = rows.bit_length()
        if size not in self._batches:
            last = max(self._batches.values(), key=lambda batch: batch.last, default=_Batch())
            waits = last.held and last.plain_left > PLAIN
            left = min(last.plain_left, LONGEST_SHARED) if waits else PLAIN
            self._batches[size] = _Batch(held=waits, plain_left=left)
        return self._batches[size]
