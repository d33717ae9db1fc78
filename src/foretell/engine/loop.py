"""The loop: draft -> verify -> commit -> observe.

Rows join and leave between steps. A row that joins first runs its prompt, all but the last token, in chunks; then
the last prompt token is the root of its first tree, like any newest token after it. The cache of a finished row
stays until its slot is needed: a request that begins with the same tokens (the next turn of a chat) takes it over.

Whatever is raised inside a step, no row is left half way: tokens are emitted before their keys and values are
committed, and a row whose cache holds less than its text reads the difference, like a prompt, at the next step. What
was emitted before the error waits in `_outbox` and is returned by the next call.

Legend: M nodes of all rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM, Draft, Drafter, Features, Verdict
from foretell.engine import sequence as state
from foretell.engine.checks import check_draft, check_request
from foretell.engine.governor import Governor
from foretell.engine.passes import Pass, run_pass
from foretell.engine.text_stream import Decodes, TextStream
from foretell.errors import ForetellError, UsageError
from foretell.requests import Event, SamplingParams, TokenLogprob
from foretell.trees.tree import ROOT
from foretell.verify import DAMAGED, Typical, draws, logprobs, path_logits, typical, walk

logger = logging.getLogger(__name__)

PREFILL_NODES = 256
"""Prompt tokens per step, over all rows: a long prompt must not stall the others."""


class SpeculativeDecoder:
    """Decodes any number of requests, `max_rows` at a time, with one drafter.

    Threads may share it: every verb holds its lock while it runs. Engines may share a drafter: each attaches a copy of
    its own (see `Drafter.attached`).

    Args:
        tokenizer: for text and stop strings; without one, events carry ids only.
        rule: typical acceptance (lossy) instead of exact verification.
        adapt: go back to plain steps where speculation measurably loses; not with a lossy drafter or rule, whose
            output would then depend on the clock.
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
        self.backbone, self.tokenizer, self.rule = backbone, tokenizer, rule
        self.lossless = drafter.lossless and rule is None and backbone.nondeterminism is None
        self.max_rows = max_rows
        self.cache = backbone.new_cache(max_rows, 0)
        self.drafter = drafter.attached(self.cache)
        self.governor = Governor(adapt and drafter.lossless and rule is None)
        self._waiting: deque[state.Sequence] = deque()
        self._rows: list[state.Sequence] = []
        self._parked: dict[int, list[int]] = {}  # slot -> tokens its cache holds
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
        ends = frozenset(params.stop_ids) | frozenset(() if params.ignore_eos else self.backbone.config.eos_ids)
        stream_of = partial(TextStream, self.tokenizer, params.stop, list(prompt))
        with self._lock:
            request = self._requests
            self._requests += 1
            key = request if key is None else key
            self._waiting.append(state.Sequence(request, key, list(prompt), params.seeded(), stream_of, ends))
        return request

    def cancel(self, request: int) -> None:
        """Forgets a request; unknown and finished ones are ignored."""
        with self._lock:
            self._outbox = [event for event in self._outbox if event.request != request]
            self._waiting = deque(row for row in self._waiting if row.request != request)
            for row in [row for row in self._rows if row.request == request]:
                self._leave(row)

    def forget(self) -> None:
        """Frees the caches of finished requests, from which a next one that begins alike would profit."""
        with self._lock:
            self._forget_finished()
            if not self._rows:
                self.drafter.bind(self.cache)

    def step(self) -> list[Event]:
        """One chunk of prompts for the rows that still read theirs, and one step for the others."""
        with self._lock:
            self._advance()
            events, self._outbox = self._outbox, []
            return events

    def events(self, requests: Collection[int]) -> list[Event]:
        """The next events of these requests: those that wait, else theirs of one step.

        Several callers may share the decoder: what a step emits for another's requests waits for that caller.
        """
        with self._lock:
            if not any(event.request in requests for event in self._outbox):
                self._advance()
            mine = [event for event in self._outbox if event.request in requests]
            self._outbox = [event for event in self._outbox if event.request not in requests]
            return mine

    def pending(self, requests: Collection[int]) -> bool:
        """Whether anything of these requests is still to come."""
        with self._lock:
            unfinished = (row.request for row in chain(self._rows, self._waiting) if not row.finished)
            emitted = (event.request for event in self._outbox)
            return any(request in requests for request in chain(unfinished, emitted))

    def _advance(self) -> None:
        for row in [row for row in self._rows if row.finished]:  # an error has kept it from leaving
            self._leave(row)
        self._admit()
        reading = [row for row in self._rows if self.cache.lengths[row.slot] < len(row.tokens) - 1]
        if reading:
            self._prefill(reading)
        ready = [row for row in self._rows if self.cache.lengths[row.slot] == len(row.tokens) - 1]
        if ready:
            self._decode(ready)

    # -- one step ---------------------------------------------------------------------------------------------------

    def _decode(self, rows: list[state.Sequence]) -> None:
        began = time.perf_counter()
        context = max(len(row.tokens) for row in rows)
        draft = self._draft(rows, context)
        drafted = time.perf_counter()
        (states_Md, taps, extra), verdict, said = self._passed(rows, draft)
        if DAMAGED in verdict.bonus and any(len(tree) > 1 for tree in draft.trees):
            # even a wrong guess, if its states are no numbers, spoils the nodes beside it: the step without guesses
            draft = _roots(rows)
            (states_Md, taps, extra), verdict, said = self._passed(rows, draft)
        verified = time.perf_counter()
        for row in rows:
            row.statistics.draft_seconds += drafted - began
            row.statistics.verify_seconds += verified - drafted
        emitted = sum(len(self._emit(row, draft, verdict, i, said[i]).tokens) for i, row in enumerate(rows))
        self.cache.commit([row.slot for row in rows], verdict.paths)
        kept = [start + node for start, path in zip(_starts(draft), verdict.paths, strict=True) for node in path]
        index = torch.tensor(kept, device=states_Md.device)
        counts = [len(path) for path in verdict.paths]
        kept_taps = {tap: states.index_select(0, index) for tap, states in taps.items()}  # see Backbone.rotation
        observed = time.perf_counter()
        self._observe(rows, Features(counts, kept_taps, extra, verdict.paths))
        for row in rows:
            row.statistics.draft_seconds += time.perf_counter() - observed
        guesses = sum(len(tree) - 1 for tree in draft.trees)
        self.governor.record(len(rows), context, guesses, time.perf_counter() - began, emitted)
        for row in rows:
            if row.finished:
                self._leave(row)

    def _draft(self, rows: list[state.Sequence], context: int) -> Draft:
        """The drafter's guesses, checked, and no deeper than a row's budget lets it emit."""
        if not self.governor.speculate(len(rows), context):
            for row in rows:
                row.statistics.suspended_steps += self.governor.suspended
            return _roots(rows)
        draft = self.drafter.draft(rows)
        check_draft(draft, rows, self.drafter.max_nodes, self.backbone.config.vocab)
        for i, row in enumerate(rows):
            row.statistics.suspended_steps += draft.held and len(draft.trees[i]) == 1
            if draft.trees[i].height >= row.budget:
                kept = draft.trees[i].keep(row.budget - 1)
                if draft.resume and kept[: draft.resume.ran[i]] != list(range(draft.resume.ran[i])):
                    continue  # what ran holds the slots behind it
                draft.trees[i] = draft.trees[i].pruned(row.budget - 1)
                draft.tokens[i] = [draft.tokens[i][node] for node in kept]
        return draft

    def _passed(self, rows: list[state.Sequence], draft: Draft) -> tuple[Pass, Verdict, list[list[TokenLogprob]]]:
        """What the model computed for all nodes, and what it says of them."""
        passed = run_pass(self.backbone, self.drafter, self.cache, rows, draft)
        return passed, *self._verify(rows, draft, passed[0])

    def _verify(
        self, rows: list[state.Sequence], draft: Draft, states_Md: Tensor
    ) -> tuple[Verdict, list[list[TokenLogprob]]]:
        starts = _starts(draft)
        if self.rule is None and all(row.params.plain_greedy for row in rows):
            choices = self.backbone.argmax(states_Md).tolist()
            verdict = walk(draft, lambda row, node, _: choices[starts[row] + node])
            if all(row.params.logprobs is None for row in rows):
                return verdict, [[] for _ in rows]
        logits_MV = self.backbone.logits(states_Md)
        if self.rule is not None:
            verdict = typical(draft, path_logits(draft, rows, logits_MV, starts), self.rule)
        elif not all(row.params.plain_greedy for row in rows):
            verdict = walk(draft, draws(draft, rows, [row.key for row in rows], logits_MV, starts))
        return verdict, [
            logprobs(logits_MV, start, path, [*(draft.tokens[i][n] for n in path[1:]), bonus], row.params.logprobs)
            for i, (row, start, path, bonus) in enumerate(zip(rows, starts, verdict.paths, verdict.bonus, strict=True))
        ]

    def _emit(self, row: state.Sequence, draft: Draft, verdict: Verdict, i: int, said: list[TokenLogprob]) -> Event:
        """What row i of the step says; what cannot be said ends that request with an event, and no other."""
        path, tree, bonus = verdict.paths[i], draft.trees[i], verdict.bonus[i]
        guessed = [draft.tokens[i][node] for node in path[1:]]
        event = row.emit(guessed, None if bonus == DAMAGED else bonus, said)
        tokens, outbox, finished = row.tokens + event.tokens, [*self._outbox, event], bool(event.finish_reason)
        # stored with no call between, so that an interrupt finds all of it done, or nothing
        row.tokens, row.finished, self._outbox = tokens, finished, outbox
        row.statistics.count(tree.height, len(tree) - 1, len(event.tokens), sum(event.drafted))
        return event

    def _observe(self, rows: list[state.Sequence], features: Features) -> None:
        self.drafter.observe(rows, features)
        for row, count in zip(rows, features.counts, strict=True):
            row.observed += count

    # -- rows join and leave ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Rows join while there are slots; one that finds no room is refused alone, with an event."""
        while self._waiting and len(self._rows) < self.max_rows:
            row, *others = self._waiting
            rows, outbox, waiting = self._rows, self._outbox, deque(others)
            try:
                self._join(row)
                rows = [*rows, row]
            except Exception as error:  # whatever it is, it is about this request: nobody else must meet it
                if not isinstance(error, ForetellError):
                    logger.exception("a request could not be admitted")
                outbox = [*outbox, row.refused(str(error) or repr(error))]
            self._rows, self._outbox, self._waiting = rows, outbox, waiting  # all or, after an interrupt, none

    def _join(self, row: state.Sequence) -> None:
        """Takes a slot, and room for all that the request may ever write there: drafted nodes are written too."""
        nodes = self.drafter.max_nodes * (1 + self.drafter.extra_nodes)
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
            self._forget_finished()  # what finished requests left is worth less than this one
            return self._join(row)

    def _slot_for(self, prompt: list[int]) -> tuple[int, int]:
        """A slot for a new row and how many of its tokens the slot's cache holds already.

        At least the last two tokens run again: the last is the root, and the one before gives the drafter its
        first features.
        """
        shared = {
            slot: self.drafter.reusable_tokens(slot, _common(held, prompt[:-2])) for slot, held in self._parked.items()
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
        """Gives back the memory of every slot that no running row holds."""
        running = {row.slot for row in self._rows}
        slots = [slot for slot in range(self.max_rows) if slot not in running]
        self._parked.clear()
        self.cache.release(slots)
        self.cache.trim()
        self.drafter.forget(slots)

    def _prefill(self, rows: list[state.Sequence]) -> None:
        began, left, part = time.perf_counter(), PREFILL_NODES, []
        for row in rows:
            done = self.cache.lengths[row.slot]
            count = min(left, len(row.tokens) - 1 - done)
            if count > 0:
                part.append((row, done, count))
                left -= count
        chosen, lengths, counts = [r for r, _, _ in part], [d for _, d, _ in part], [c for _, _, c in part]
        slots = [row.slot for row in chosen]
        nodes = Nodes.chains(slots, lengths, counts)
        tokens = torch.tensor([t for row, done, count in part for t in row.tokens[done : done + count]])
        layers = [tap for tap in self.drafter.taps if tap != FINAL_NORM]
        hidden_Md, taps = self.backbone.run_layers(self.backbone.embed(tokens), nodes, self.cache, taps=layers)
        if FINAL_NORM in self.drafter.taps:
            taps[FINAL_NORM] = self.backbone.norm(hidden_Md)
        self.cache.commit(slots, [range(count) for count in counts])
        self._observe(chosen, Features(counts, taps))
        for row in chosen:
            row.statistics.prefill_seconds += time.perf_counter() - began

    def _leave(self, row: state.Sequence) -> None:
        """Parks the row: its cache may serve a request that begins with the same tokens."""
        self._rows.remove(row)
        if row.observed != self.cache.lengths[row.slot]:  # an error kept states from the drafter
            self._release(row.slot)
            return
        held = min(row.observed, len(row.tokens))  # a stop may have cut an accepted path short
        self.cache.rollback(row.slot, held)
        self._parked[row.slot] = row.tokens[:held]


def _roots(rows: Sequence[state.Sequence]) -> Draft:
    """No guesses: a plain step."""
    return Draft([ROOT] * len(rows), [[row.tokens[-1]] for row in rows])


def _starts(draft: Draft) -> list[int]:
    """Index of each row's root among the M nodes."""
    starts = [0]
    for tree in draft.trees[:-1]:
        starts.append(starts[-1] + len(tree))
    return starts


def _common(held: list[int], prompt: list[int]) -> int:
    """Length of the longest common beginning."""
    for i, (a, b) in enumerate(zip(held, prompt, strict=False)):
        if a != b:
            return i
    return min(len(held), len(prompt))
