"""The loop: draft -> verify -> commit -> observe.

Rows join and leave between steps. A row that joins first runs its prompt, all but the last token, in chunks; then
the last prompt token is the root of its first tree, like any newest token after it. The cache of a finished row
stays until its slot is needed: a request that begins with the same tokens (the next turn of a chat) takes it over.

Whatever is raised inside a step, every row stays consistent: tokens are emitted before their keys and values are
committed, and a row whose cache holds less than its text reads the difference, like a prompt, at the next step. Events
emitted before the error wait in `_outbox` and are returned by the next call.

Legend: M nodes of all rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM, Draft, Drafter, Features, Verdict
from foretell.engine.checks import check_draft, check_request
from foretell.engine.clock import Clock
from foretell.engine.cost_learning import CostLearning
from foretell.engine.governor import Governor
from foretell.engine.passes import Pass, run_pass
from foretell.engine.row_state import RowState
from foretell.engine.text_stream import Decodes, TextStream
from foretell.errors import ForetellError, UsageError, check
from foretell.requests import Event, SamplingParams, TokenLogprob
from foretell.trees.tree import ROOT
from foretell.verify import DAMAGED, Typical, by_row, logprobs, path_logits, targets, typical, walk

logger = logging.getLogger(__name__)

PREFILL_NODES = 256
"""Prompt tokens per step, over all rows: a long prompt must not stall the others."""


class SpeculativeDecoder:
    """Decodes any number of requests, `max_rows` at a time, with one drafter.

    Threads may share it: every method holds its lock while it runs. Engines may share a drafter: each attaches a copy
    of its own (see `Drafter.attached`).

    Args:
        tokenizer: for text and stop strings; without one, events carry ids only.
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
        if max_rows < 1:
            raise UsageError(f"The batch needs at least one row, not {max_rows}.")
        check(drafter.trust is None or not drafter.lossless, "A drafter whose guesses are trusted is not lossless.")
        if drafter.trust is not None and rule is not None:
            raise UsageError("Typical acceptance verifies every guess; leave it out, or the drafter's `trust`.")
        self.backbone, self.tokenizer, self.rule = backbone, tokenizer, rule
        self.lossless = drafter.lossless and rule is None and backbone.nondeterminism is None
        self.max_rows = max_rows
        self.cache = backbone.new_cache(max_rows, 0)
        self.drafter = drafter.attached(self.cache)
        self.governor = Governor(adapt and drafter.lossless and rule is None)
        self._costs = CostLearning(backbone, drafter)
        self._waiting: deque[RowState] = deque()
        self._rows: list[RowState] = []
        self._parked: dict[int, list[int]] = {}  # slot of a finished request -> tokens that its cache holds
        self._requests = 0
        self._outbox: list[Event] = []  # emitted, not yet returned
        self._lock = threading.RLock()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows or self._outbox)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        check_request(prompt, params, self.backbone.config, self.rule)
        TextStream(self.tokenizer, params.stop)  # refuses stop strings that could never be met

    def submit(self, prompt: Sequence[int], params: SamplingParams, key: int | None = None) -> int:
        self.check(prompt, params)
        # typical acceptance draws nothing: its rows are greedy ones, to drafters as well
        params = params.seeded() if self.rule is None else replace(params, temperature=0.0)
        ends = frozenset(params.stop_ids) | frozenset(() if params.ignore_eos else self.backbone.config.eos_ids)
        stream_of = partial(TextStream, self.tokenizer, params.stop, list(prompt))
        with self._lock:
            request = self._requests
            self._requests += 1
            key = request if key is None else key
            self._waiting.append(RowState(request, key, list(prompt), params, stream_of, ends))
        return request

    def cancel(self, request: int) -> None:
        """Drops a request; unknown and finished ones are ignored."""
        with self._lock:
            self._outbox = [event for event in self._outbox if event.request != request]
            self._waiting = deque(row for row in self._waiting if row.request != request)
            for row in [row for row in self._rows if row.request == request]:
                self._leave(row)

    def forget(self) -> None:
        """Frees the caches of finished requests, which a next one that begins with the same tokens could reuse."""
        with self._lock:
            self._forget_finished()
            if not self._rows:
                self.drafter.bind(self.cache)

    def step(self) -> list[Event]:
        """Reads a chunk of the prompts that are not read yet, and decodes one step of the other rows."""
        with self._lock:
            self._advance()
            events, self._outbox = self._outbox, []
            return events

    def events(self, requests: Collection[int]) -> list[Event]:
        """Returns the events of these requests that wait, or those of one step if none do.

        Callers may share the decoder: what a step emits for the requests of others waits for them.
        """
        with self._lock:
            if not any(event.request in requests for event in self._outbox):
                self._advance()
            events = [event for event in self._outbox if event.request in requests]
            self._outbox = [event for event in self._outbox if event.request not in requests]
            return events

    def pending(self, requests: Collection[int]) -> bool:
        """True if any of these requests has events to come; cancelled ones have none."""
        with self._lock:
            unfinished = (row.request for row in chain(self._rows, self._waiting) if not row.finished)
            emitted = (event.request for event in self._outbox)
            return any(request in requests for request in chain(unfinished, emitted))

    def _advance(self) -> None:
        """Runs one step; its events go to the outbox."""
        for row in [row for row in self._rows if row.finished]:  # an error came before it left
            self._leave(row)
        self._admit()
        reading = [row for row in self._rows if self.cache.lengths[row.slot] < len(row.tokens) - 1]
        if reading:
            self._prefill(reading)
        ready = [row for row in self._rows if self.cache.lengths[row.slot] == len(row.tokens) - 1]
        if ready:
            self._decode(ready)

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
        accepted = [passed.draft.tokens[i][node] for node in path[1:]]
        event = row.event(accepted, None if bonus == DAMAGED else bonus, report)
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

    def _admit(self) -> None:
        """Waiting requests join while there are slots; one that finds no room is refused with an event."""
        while self._waiting and len(self._rows) < self.max_rows:
            row, *others = self._waiting
            rows, outbox, waiting = self._rows, self._outbox, deque(others)
            try:
                self._join(row)
                rows = [*rows, row]
            except Exception as error:  # it concerns this request, and must not end the others
                if not isinstance(error, ForetellError):
                    logger.exception("a request could not be admitted")
                outbox = [*outbox, row.refusal(str(error) or repr(error))]
            self._rows, self._outbox, self._waiting = rows, outbox, waiting  # after an interrupt all of it or nothing

    def _join(self, row: RowState) -> None:
        """Gives a request a slot, and reserves all that it may ever write there, drafted nodes included."""
        nodes = self.drafter.max_nodes + self.drafter.extra_nodes
        slot, reused = self._slot_for(row.tokens)
        row.start(slot, reused)
        row.statistics.exact = self.lossless
        room = {slot: len(row.tokens) + row.params.max_new_tokens + nodes}
        try:
            self.cache.reserve(room)
            self.drafter.reset([row])
        except ForetellError:
            if not self._parked:
                raise
            self._forget_finished()  # then there may be room
            return self._join(row)

    def _slot_for(self, prompt: list[int]) -> tuple[int, int]:
        """Chooses a slot for a new row; returns it with the number of prompt tokens that its cache holds already.

        At least the last two tokens run again: the last is the root, and the one before gives the drafter its
        first features.
        """
        shared = {
            slot: self.drafter.reusable_tokens(slot, _common(parked, prompt[:-2]))
            for slot, parked in self._parked.items()
        }
        best = max(shared, key=lambda slot: shared[slot], default=None)
        if best is not None and shared[best] > 0:
            del self._parked[best]
            self.cache.rollback(best, shared[best])
            return best, shared[best]
        running = {row.slot for row in self._rows}
        slots = [slot for slot in range(self.max_rows) if slot not in running]
        slot = next((slot for slot in slots if slot not in self._parked), slots[0])
        self._release(slot)
        return slot, 0

    def _release(self, slot: int) -> None:
        self._parked.pop(slot, None)
        self.cache.release([slot])

    def _forget_finished(self) -> None:
        """Frees the memory of every slot that no running row holds."""
        running = {row.slot for row in self._rows}
        slots = [slot for slot in range(self.max_rows) if slot not in running]
        self._parked.clear()
        self.cache.release(slots)
        self.cache.trim()
        self.drafter.forget(slots)

    def _prefill(self, rows: list[RowState]) -> None:
        """Runs the next chunk of prompts, at most `PREFILL_NODES` tokens of the first rows together."""
        left, chunks = PREFILL_NODES, list[tuple[RowState, int, int]]()  # (row, first token, tokens)
        for row in rows:
            first = self.cache.lengths[row.slot]
            count = min(left, len(row.tokens) - 1 - first)
            if count > 0:
                chunks.append((row, first, count))
                left -= count
        readers, firsts, counts = [row for row, _, _ in chunks], [f for _, f, _ in chunks], [c for _, _, c in chunks]
        clock, slots = Clock(readers), [row.slot for row in readers]
        nodes = Nodes.chains(slots, firsts, counts)
        tokens = torch.tensor([t for row, first, count in chunks for t in row.tokens[first : first + count]])
        layers = [tap for tap in self.drafter.taps if tap != FINAL_NORM]
        hidden_Md, taps = self.backbone.run_layers(self.backbone.embed(tokens), nodes, self.cache, taps=layers)
        if FINAL_NORM in self.drafter.taps:
            taps[FINAL_NORM] = self.backbone.norm(hidden_Md)
        self.cache.commit(slots, [range(count) for count in counts])
        self._observe(readers, Features(counts, taps))
        clock.lap("prefill_seconds")

    def _leave(self, row: RowState) -> None:
        """Ends a row. Its cache is parked: a request that begins with the same tokens may take it over."""
        self._rows.remove(row)
        if row.observed != self.cache.lengths[row.slot]:  # an error came before the drafter observed all of it
            self._release(row.slot)
            return
        length = min(row.observed, len(row.tokens))  # the output may have ended within an accepted path
        self.cache.rollback(row.slot, length)
        self._parked[row.slot] = row.tokens[:length]


def _roots(rows: Sequence[RowState]) -> Draft:
    """A draft without guesses: a plain step."""
    return Draft([ROOT] * len(rows), [[row.tokens[-1]] for row in rows], held=True)


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
