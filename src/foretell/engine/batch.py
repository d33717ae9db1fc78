"""Rows of a batch: requests wait, join, leave, and hand out their events; what a step does is a subclass's.

Rows join and leave between steps. A row that joins first runs its prompt, all but the last token, in chunks; then
it decodes. The cache of a finished row stays until its slot is needed: a request that begins with the same tokens (the
next turn of a chat) takes it over.

Whatever is raised inside a step, every row stays consistent: tokens are emitted before their keys and values are
committed, and what a row's cache lacks is read at the next step. Events emitted before the error wait in `_outbox` and
are returned by the next call.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM, Features
from foretell.engine.checks import check_request
from foretell.engine.clock import Clock
from foretell.engine.row_state import RowState
from foretell.engine.text_stream import Decodes, TextStream
from foretell.errors import ForetellError, UsageError
from foretell.requests import Event, SamplingParams
from foretell.verify import Typical

logger = logging.getLogger(__name__)

PREFILL_NODES = 256
"""Prompt tokens per step, over all rows: a long prompt must not stall the others."""


class BatchDecoder(ABC):
    """Decodes any number of requests, `max_rows` at a time (see `requests.Decoder`).

    Threads may share it: every method holds its lock while it runs.

    Args:
        tokenizer: for text and stop strings; without one, events carry ids only.

    Attributes:
        lossless: whether the output is plain decoding's.
        rule: typical acceptance, or None.
        taps: states of the prompt that `_observe` gets.
    """

    lossless: bool
    rule: Typical | None = None
    taps: tuple[int, ...] = ()

    def __init__(self, backbone: Backbone, tokenizer: Decodes | None, max_rows: int):
        if max_rows < 1:
            raise UsageError(f"The batch needs at least one row, not {max_rows}.")
        self.backbone, self.tokenizer, self.max_rows = backbone, tokenizer, max_rows
        self.cache = backbone.new_cache(max_rows, 0)
        self._waiting: deque[RowState] = deque()
        self._rows: list[RowState] = []
        self._parked: dict[int, list[int]] = {}  # slot of a finished request -> tokens that its cache holds
        self._requests = 0
        self._outbox: list[Event] = []  # emitted, not yet returned
        self._lock = threading.RLock()

    # -- what subclasses do -----------------------------------------------------------------------------------------

    @abstractmethod
    def _decode(self, rows: list[RowState]) -> None:
        """Decodes one step of these rows, whose prompts were read."""

    @abstractmethod
    def _unread(self, row: RowState) -> int:
        """Tokens that the row's cache lacks, and has to read like a prompt before it decodes."""

    @abstractmethod
    def _room(self, row: RowState) -> int:
        """Slots that the row may ever need."""

    @abstractmethod
    def _held(self, row: RowState) -> list[int] | None:
        """The tokens of a row that leaves of which the cache can be reused, a slot each; None if it cannot."""

    def _reusable(self, slot: int, tokens: int) -> int:
        """Returns how many of the first `tokens` in a slot's cache may be reused."""
        return tokens

    def _joined(self, row: RowState) -> None:  # noqa: B027
        """A row has got its slot."""

    def _observe(self, rows: list[RowState], features: Features) -> None:  # noqa: B027
        """Tokens of these rows' prompts were read."""

    def _forgotten(self, slots: Sequence[int]) -> None:  # noqa: B027
        """The caches of these slots were freed."""

    # -- requests and their events ----------------------------------------------------------------------------------

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
        reading = [row for row in self._rows if self._unread(row)]
        if reading:
            self._prefill(reading)
        ready = [row for row in self._rows if not self._unread(row)]
        if ready:
            self._decode(ready)

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
        """Gives a request a slot, and reserves all that it may ever write there."""
        slot, reused = self._slot_for(row.tokens)
        row.start(slot, reused)
        row.statistics.exact = self.lossless
        try:
            self.cache.reserve({slot: self._room(row)})
            self._joined(row)
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
        shared = {slot: self._reusable(slot, _common(parked, prompt[:-2])) for slot, parked in self._parked.items()}
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
        self._forgotten(slots)

    def _prefill(self, rows: list[RowState]) -> None:
        """Runs the next chunk of prompts, at most `PREFILL_NODES` tokens of the first rows together."""
        left, chunks = PREFILL_NODES, list[tuple[RowState, int, int]]()  # (row, first token, tokens)
        for row in rows:
            first = self.cache.lengths[row.slot]
            count = min(left, self._unread(row))
            if count > 0:
                chunks.append((row, first, count))
                left -= count
        readers, firsts, counts = [row for row, _, _ in chunks], [f for _, f, _ in chunks], [c for _, _, c in chunks]
        clock, slots = Clock(readers), [row.slot for row in readers]
        nodes = Nodes.chains(slots, firsts, counts)
        tokens = torch.tensor([t for row, first, count in chunks for t in row.tokens[first : first + count]])
        layers = [tap for tap in self.taps if tap != FINAL_NORM]
        hidden_Md, taps = self.backbone.run_layers(self.backbone.embed(tokens), nodes, self.cache, taps=layers)
        if FINAL_NORM in self.taps:
            taps[FINAL_NORM] = self.backbone.norm(hidden_Md)
        self.cache.commit(slots, [range(count) for count in counts])
        self._observe(readers, Features(counts, taps))
        clock.lap("prefill_seconds")

    def _leave(self, row: RowState) -> None:
        """Ends a row. Its cache is parked: a request that begins with the same tokens may take it over."""
        self._rows.remove(row)
        held = self._held(row)
        if held is None:
            self._release(row.slot)
            return
        self.cache.rollback(row.slot, len(held))
        self._parked[row.slot] = held


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
