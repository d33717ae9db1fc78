"""The loop: draft -> verify -> commit -> observe.

The last prompt token is the root of a row's first tree, like any newest token after it. How rows join and leave is told
in `batch.py`.

Legend: M nodes of all rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from foretell.backbone import Backbone
from foretell.contracts import Draft, Drafter, Features, Verdict
from foretell.engine.batch import BatchDecoder
from foretell.engine.checks import check_draft
from foretell.engine.clock import Clock
from foretell.engine.cost_learning import CostLearning
from foretell.engine.governor import Governor
from foretell.engine.passes import Pass, run_pass
from foretell.engine.row_state import RowState
from foretell.engine.text_stream import Decodes
from foretell.errors import UsageError, check
from foretell.requests import Event, TokenLogprob
from foretell.trees.tree import ROOT
from foretell.verify import DAMAGED, Typical, by_row, logprobs, path_logits, targets, typical, walk


class SpeculativeDecoder(BatchDecoder):
    """Decodes any number of requests, `max_rows` at a time, with one drafter.

    Engines may share a drafter: each attaches a copy of its own (see `Drafter.attached`).

    Args:
        tokenizer, max_rows: see `BatchDecoder`.
        rule: typical acceptance (lossy) instead of exact verification.
        adapt: take plain steps where speculation measurably loses; not with a lossy drafter or rule, whose output
            would then depend on the clock.
    """

    def __init__(
        self,
        backbone: Backbone,
        drafter: Drafter,
        tokenizer: Decodes | None = None,
        *,
        max_rows: int = 1,
        rule: Typical | None = None,
        adapt: bool = True,
    ):
        check(drafter.trust is None or not drafter.lossless, "A drafter whose guesses are trusted is not lossless.")
        if drafter.trust is not None and rule is not None:
            raise UsageError("Typical acceptance verifies every guess; leave it out, or the drafter's `trust`.")
        check(drafter.fused is None, "A drafter that writes macro steps is for `engine.decoder_for`.")
        super().__init__(backbone, tokenizer, max_rows)
        self.rule, self.taps = rule, drafter.taps
        self.lossless = drafter.lossless and rule is None and backbone.nondeterminism is None
        self.drafter = drafter.attached(self.cache)
        self.governor = Governor(adapt and drafter.lossless and rule is None)
        self._costs = CostLearning(backbone, drafter)

    def forget(self) -> None:
        with self._lock:
            super().forget()
            if not self._rows:
                self.drafter.bind(self.cache)

    # -- one step ---------------------------------------------------------------------------------------------------

    def _decode(self, rows: list[RowState]) -> None:
        clock = Clock(rows)
        draft = self._draft(rows)
        drafting = clock.lap("draft_seconds")
        context = sum(self.cache.lengths[row.slot] for row in rows) // len(rows)
        passed, verdict, reports = self._verify(rows, draft)
        verifying = clock.lap("verify_seconds")
        events = [self._emit(row, passed, verdict, i, reports[i]) for i, row in enumerate(rows)]
        self.cache.commit([row.slot for row in rows], verdict.paths)
        features = passed.features(verdict.paths)
        clock.lap()
        self._observe(rows, features)
        drafting += clock.lap("draft_seconds")
        emitted = sum(len(event.tokens) for event in events)
        self.governor.record(len(rows), passed.size - len(rows), clock.seconds, emitted)
        if draft.resume is None:  # else a part of the pass came before
            self._costs.record(len(rows), context, passed.size, verifying, 0.0 if draft.held else drafting)
        for row in rows:
            if row.finished:
                self._leave(row)

    def _draft(self, rows: list[RowState]) -> Draft:
        """The drafter's guesses, checked, and no deeper than a row's budget lets it emit."""
        if not self.governor.speculate(len(rows)):
            for row in rows:
                row.statistics.suspended_steps += self.governor.suspended
            return _roots(rows)
        draft = self.drafter.draft(rows)
        check_draft(draft, rows, self.drafter.max_nodes, self.backbone.config.vocab)
        for i, row in enumerate(rows):
            row.statistics.suspended_steps += draft.held and len(draft.trees[i]) == 1
            draft.cut_below(i, row.budget - 1)
        return draft

    def _verify(self, rows: list[RowState], draft: Draft) -> tuple[Pass, Verdict, list[list[TokenLogprob]]]:
        """Runs the draft's nodes and compares them with the target; the pass may be of a draft without guesses.

        States that are not finite numbers, even a wrong guess's or an inserted row's, spoil the nodes beside them:
        where any were met, the step is run again without guesses.
        """
        passed = run_pass(self.backbone, self.drafter, self.cache, rows, draft)
        verdict, reports = self._verdict(rows, passed)
        if DAMAGED in verdict.bonus and passed.size > len(rows):
            passed = run_pass(self.backbone, self.drafter, self.cache, rows, _roots(rows))
            verdict, reports = self._verdict(rows, passed)
        return passed, verdict, reports

    def _verdict(self, rows: list[RowState], passed: Pass) -> tuple[Verdict, list[list[TokenLogprob]]]:
        """Returns the accepted path of each row and the log-probabilities that rows request."""
        draft, greedy = passed.draft, all(row.params.plain_greedy for row in rows) and self.rule is None
        if greedy:
            verdict = walk(draft, by_row(draft, self.backbone.argmax(passed.states_Md).tolist()), self._trust(rows))
            if all(row.params.logprobs is None for row in rows):
                return verdict, [[] for _ in rows]
        logits = self.backbone.logits(passed.states_Md).split(passed.nodes.counts)
        if self.rule is not None:
            verdict = typical(draft, path_logits(draft, rows, logits), self.rule)
        elif not greedy:
            chosen = targets(draft, rows, [row.key for row in rows], logits)
            verdict = walk(draft, chosen, self._trust(rows))
        reports = []
        for i, (row, path, bonus) in enumerate(zip(rows, verdict.paths, verdict.bonus, strict=True)):
            tokens = [*(draft.tokens[i][node] for node in path[1:]), bonus]
            reports.append(logprobs(logits[i], path, tokens, row.params.logprobs))
        return verdict, reports

    def _trust(self, rows: list[RowState]) -> list[float | None]:
        """A guess that is trusted is the likeliest token: rows that draw theirs, or edit logits, are verified."""
        trust = self.drafter.trust
        return [trust if row.params.plain_greedy else None for row in rows] if trust is not None else []

    def _emit(self, row: RowState, passed: Pass, verdict: Verdict, i: int, report: list[TokenLogprob]) -> Event:
        """Emits row i's accepted guesses and bonus; a failure ends that request with an event, and no other."""
        path, tree, bonus = verdict.paths[i], passed.draft.trees[i], verdict.bonus[i]
        written = [(passed.draft.tokens[i][node], True) for node in path[1:]]
        damaged = bonus == DAMAGED
        event = row.event(written if damaged else [*written, (bonus, False)], damaged, report)
        tokens, outbox, finished = row.tokens + event.tokens, [*self._outbox, event], bool(event.finish_reason)
        # assigned with no call between, so that an interrupt finds all of it done, or nothing
        row.tokens, row.finished, self._outbox = tokens, finished, outbox
        row.statistics.count(tree.height, len(tree) - 1, len(event.tokens), sum(event.drafted), passed.inserted_B[i])
        return event

    def _observe(self, rows: list[RowState], features: Features) -> None:
        self.drafter.observe(rows, features)
        for row, count in zip(rows, features.counts, strict=True):
            row.observed += count

    # -- rows join and leave ----------------------------------------------------------------------------------------

    def _unread(self, row: RowState) -> int:
        return len(row.tokens) - 1 - self.cache.lengths[row.slot]

    def _room(self, row: RowState) -> int:
        nodes = self.drafter.max_nodes + self.drafter.extra_nodes
        return len(row.tokens) + row.params.max_new_tokens + nodes

    def _reusable(self, slot: int, tokens: int) -> int:
        return self.drafter.reusable_tokens(slot, tokens)

    def _joined(self, row: RowState) -> None:
        self.drafter.reset([row])

    def _forgotten(self, slots: Sequence[int]) -> None:
        self.drafter.forget(slots)

    def _held(self, row: RowState) -> list[int] | None:
        if row.observed != self.cache.lengths[row.slot]:  # an error came before the drafter observed all of it
            return None
        return row.tokens[: row.observed]  # the output may have ended within an accepted path


def _roots(rows: Sequence[RowState]) -> Draft:
    """A draft without guesses: a plain step."""
    return Draft([ROOT] * len(rows), [[row.tokens[-1]] for row in rows], held=True)
