"""The loop: draft -> verify -> commit -> observe.

Rows join and leave between steps. A row that joins first runs its prompt, all but the last token, in chunks; then
the last prompt token is the root of its first tree, like any newest token after it. The cache of a finished row
stays until its slot is needed: a request that begins with the same tokens (the next turn of a chat) takes it over.

Legend: M nodes of all rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL, Draft, Drafter, Event, Features, SamplingParams, TokenLogprob, Verdict
from foretell.engine import state
from foretell.engine.governor import Governor
from foretell.engine.stream import Decodes, TextStream
from foretell.errors import UsageError
from foretell.trees.tree import ROOT
from foretell.verify import Typical, draws, process, typical, walk

PREFILL_NODES = 256
"""Prompt tokens per step, over all rows: a long prompt must not stall the others."""


class SpeculativeDecoder:
    """Decodes any number of requests, `max_rows` at a time, with one drafter.

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
        self.backbone, self.drafter, self.tokenizer, self.rule = backbone, drafter, tokenizer, rule
        self.lossless = drafter.lossless and rule is None and backbone.inexact is None
        self.max_rows = max_rows
        self.undelivered: dict[int, list[Event]] = {}
        self.cache = backbone.new_cache(max_rows, 0)
        self._bind()
        self.governor = Governor(adapt and drafter.lossless and rule is None)
        self._waiting: deque[state.Sequence] = deque()
        self._rows: list[state.Sequence] = []
        self._parked: dict[int, list[int]] = {}  # slot -> tokens its cache holds
        self._requests = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def submit(self, prompt: Sequence[int], params: SamplingParams, key: int | None = None) -> int:
        c, room = self.backbone.config, self.backbone.config.max_positions
        if not prompt:
            raise UsageError("The prompt is empty; give at least one token.")
        unknown = next((token for token in prompt if not 0 <= token < c.vocab), None)
        if unknown is not None:
            raise UsageError(f"The prompt holds token {unknown}; this model's ids lie between 0 and {c.vocab - 1}.")
        if any(not 0 <= token < c.vocab for token in chain(params.logit_bias, params.stop_ids)):
            raise UsageError(f"logit_bias or stop_ids name a token outside 0..{c.vocab - 1}.")
        if len(prompt) + params.max_new_tokens > room:
            raise UsageError(
                f"A prompt of {len(prompt)} tokens and {params.max_new_tokens} new ones exceed this model's context of "
                f"{room}; shorten the prompt or lower max_new_tokens to at most {max(0, room - len(prompt))}."
            )
        ends = frozenset(params.stop_ids) | frozenset(() if params.ignore_eos else c.eos_ids)
        stream = TextStream(self.tokenizer, params.stop, prompt)
        key = self._requests if key is None else key
        self._waiting.append(state.Sequence(self._requests, key, list(prompt), params, stream, ends))
        self._requests += 1
        return self._requests - 1

    def cancel(self, request: int) -> None:
        """Forgets a request; unknown and finished ones are ignored."""
        self.undelivered.pop(request, None)
        self._waiting = deque(row for row in self._waiting if row.request != request)
        for row in [row for row in self._rows if row.request == request]:
            self._leave(row)

    def forget(self) -> None:
        """Frees the caches of finished requests, from which a next one that begins alike would profit."""
        for slot in self._parked:
            self.cache.free(slot)
        self._parked.clear()
        if not self._rows:
            self._bind()

    def step(self) -> list[Event]:
        """One chunk of prompts for the rows that still read theirs, and one step for the others."""
        if self.drafter.bound is not self.cache:  # another engine has used it since
            self._bind()
        self._admit()
        reading = [row for row in self._rows if self.cache.lengths[row.slot] < row.prompt_length - 1]
        if reading:
            self._prefill(reading)
        ready = [row for row in self._rows if self.cache.lengths[row.slot] == len(row.tokens) - 1]
        return self._decode(ready) if ready else []

    def _bind(self) -> None:
        self.drafter.bind(self.cache)
        self.drafter.bound = self.cache

    # -- one step ---------------------------------------------------------------------------------------------------

    def _decode(self, rows: list[state.Sequence]) -> list[Event]:
        began = time.perf_counter()
        context = max(len(row.tokens) for row in rows)
        self.cache.reserve(context + self.drafter.most_nodes * (1 + self.drafter.extra_nodes))  # drafting may write too
        draft = self._draft(rows, context)
        drafted = time.perf_counter()
        states_Md, taps, extra = self._forward(rows, draft)
        verdict, logprobs = self._verify(rows, draft, states_Md)
        verified = time.perf_counter()
        for row in rows:
            row.statistics.draft_seconds += drafted - began
            row.statistics.verify_seconds += verified - drafted
        self.cache.commit([row.slot for row in rows], verdict.paths)
        events = self._emit(rows, draft, verdict, logprobs)
        kept = [start + node for start, path in zip(_starts(draft), verdict.paths, strict=True) for node in path]
        index = torch.tensor(kept, device=states_Md.device)
        counts = [len(path) for path in verdict.paths]
        kept_taps = {tap: states.index_select(0, index) for tap, states in taps.items()}  # see Backbone.rotation
        features = Features(counts, kept_taps, extra, verdict.paths)
        observed = time.perf_counter()
        self.drafter.observe(rows, features)
        for row in rows:
            row.statistics.draft_seconds += time.perf_counter() - observed
        guesses = sum(len(tree) - 1 for tree in draft.trees)
        emitted = sum(len(event.tokens) for event in events)
        self.governor.record(len(rows), context, guesses, time.perf_counter() - began, emitted)
        for row, event in zip(rows, events, strict=True):
            if event.finish_reason:
                self._leave(row)
        return events

    def _draft(self, rows: list[state.Sequence], context: int) -> Draft:
        """The drafter's guesses, checked, and no deeper than a row's budget lets it emit."""
        if not self.governor.speculate(len(rows), context):
            for row in rows:
                row.statistics.suspended_steps += self.governor.suspended
            return Draft([ROOT] * len(rows), [[row.tokens[-1]] for row in rows])
        draft = self.drafter.draft(rows)
        _check(draft, rows, self.drafter.most_nodes, self.backbone.config.vocab)
        for i, row in enumerate(rows):
            if draft.trees[i].height >= row.budget:
                kept = draft.trees[i].keep(row.budget - 1)
                if draft.resume and kept[: draft.resume.ran[i]] != list(range(draft.resume.ran[i])):
                    continue  # what ran holds the slots behind it
                draft.trees[i] = draft.trees[i].pruned(row.budget - 1)
                draft.tokens[i] = [draft.tokens[i][node] for node in kept]
        return draft

    def _forward(self, rows: list[state.Sequence], draft: Draft) -> tuple[Tensor, dict[int, Tensor], Tensor | None]:
        """One pass over all nodes: their final states [M, d], tapped states, and what a drafter's cuts inserted."""
        backbone, drafter = self.backbone, self.drafter
        nodes = Nodes(draft.trees, [row.slot for row in rows], [self.cache.lengths[row.slot] for row in rows])
        layer, hidden_Md, taps = self._begun(rows, draft)
        whole, real = nodes, None
        for cut in dict.fromkeys((*drafter.cuts, backbone.config.layers)):
            wanted = [tap for tap in drafter.taps if tap not in taps and layer <= tap <= cut]
            hidden_Md, tapped = backbone.run_layers(hidden_Md, whole, self.cache, layer, cut, taps=wanted)
            taps |= {tap: states if real is None else states[real] for tap, states in tapped.items()}
            layer = cut
            if cut in drafter.cuts:
                hidden_Md, whole = drafter.at_cut(cut, hidden_Md, whole)
                real = _real_index(nodes, whole)
        states_Md, extra = backbone.norm(hidden_Md), None
        if real is not None:
            inserted = torch.ones(len(whole), dtype=torch.bool)
            inserted[real] = False
            states_Md, extra = states_Md[real], states_Md[inserted]
        if FINAL in drafter.taps:
            taps[FINAL] = states_Md
        return states_Md, taps, extra

    def _begun(self, rows: list[state.Sequence], draft: Draft) -> tuple[int, Tensor, dict[int, Tensor]]:
        """All nodes at the layer that drafting has run, their streams [M, d] and what was tapped below it."""
        backbone, resume = self.backbone, draft.resume
        ran = resume.ran if resume else [0] * len(rows)
        rest = torch.tensor([t for ids, done in zip(draft.tokens, ran, strict=True) for t in ids[done:]])
        if resume is None:
            return 0, backbone.embed(rest), {}
        if not len(rest):
            return resume.layer, resume.hidden_Rd, dict(resume.taps)
        lengths = [self.cache.lengths[row.slot] for row in rows]
        nodes = Nodes(draft.trees, [row.slot for row in rows], lengths, ran)
        hidden_Rd, taps = backbone.run_layers(
            backbone.embed(rest), nodes, self.cache, 0, resume.layer, taps=list(resume.taps)
        )
        order: list[int] = []  # first what ran, then the rest, of each row
        begin, end = 0, sum(ran)
        for done, left in zip(ran, nodes.counts, strict=True):
            order += [*range(begin, begin + done), *range(end, end + left)]
            begin, end = begin + done, end + left
        index = torch.tensor(order, device=hidden_Rd.device)

        def joined(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat([one, other]).index_select(0, index)

        tapped = {tap: joined(states, taps[tap]) for tap, states in resume.taps.items()}
        return resume.layer, joined(resume.hidden_Rd, hidden_Rd), tapped

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
            verdict = typical(draft, self._path_logits(rows, draft, logits_MV), self.rule)
        elif not all(row.params.plain_greedy for row in rows):
            verdict = walk(draft, draws(draft, rows, [row.key for row in rows], logits_MV, starts))
        return verdict, [
            _logprobs(logits_MV, start, path, [*(draft.tokens[i][n] for n in path[1:]), bonus], row.params.logprobs)
            for i, (row, start, path, bonus) in enumerate(zip(rows, starts, verdict.paths, verdict.bonus, strict=True))
        ]

    def _path_logits(self, rows: list[state.Sequence], draft: Draft, logits_MV: Tensor) -> Callable[[int], Tensor]:
        """Logits of every node of a row, each edited with the history of its own path."""
        starts = _starts(draft)

        def of(i: int) -> Tensor:
            row, tree, ids = rows[i], draft.trees[i], draft.tokens[i]
            logits_NV = logits_MV[starts[i] : starts[i] + len(tree)]
            if not row.params.edits_logits:
                return logits_NV
            histories = [row.tokens + [ids[n] for n in tree.path(node)[1:]] for node in range(len(tree))]
            edited = [process(x, row.params, h, row.prompt_length) for x, h in zip(logits_NV, histories, strict=True)]
            return torch.stack(edited)

        return of

    @staticmethod
    def _emit(
        rows: list[state.Sequence], draft: Draft, verdict: Verdict, logprobs: list[list[TokenLogprob]]
    ) -> list[Event]:
        events = []
        for i, row in enumerate(rows):
            path, tree = verdict.paths[i], draft.trees[i]
            new = [*(draft.tokens[i][node] for node in path[1:]), verdict.bonus[i]]
            event = row.emit(new, [True] * (len(path) - 1) + [False], logprobs[i])
            row.statistics.count(tree.height, len(tree) - 1, len(event.tokens), sum(event.drafted))
            events.append(event)
        return events

    # -- rows join and leave ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        joined = []
        while self._waiting and len(self._rows) < self.max_rows:
            row = self._waiting.popleft()
            slot, reused = self._slot_for(row.tokens)
            row.start(slot, reused)
            row.statistics.exact = self.lossless
            self._rows.append(row)
            joined.append(row)
        if joined:
            needed = max(len(r.tokens) + min(r.params.max_new_tokens, 1024) for r in joined) + self.drafter.most_nodes
            self.cache.reserve(needed)
            self.drafter.reset(joined)

    def _slot_for(self, prompt: list[int]) -> tuple[int, int]:
        """A slot for a new row and how many of its tokens the slot's cache holds already.

        At least the last two tokens run again: the last is the root, and the one before gives the drafter its
        first features.
        """
        shared = {slot: self.drafter.holds(slot, _common(held, prompt[:-2])) for slot, held in self._parked.items()}
        best = max(shared, key=lambda slot: shared[slot], default=None)
        if best is not None and (shared[best] > 0 or not self.cache.has_free):
            del self._parked[best]
            self.cache.rollback(best, shared[best])
            return best, shared[best]
        return self.cache.allocate(), 0

    def _prefill(self, rows: list[state.Sequence]) -> None:
        began, left, part = time.perf_counter(), PREFILL_NODES, []
        for row in rows:
            done = self.cache.lengths[row.slot]
            count = min(left, row.prompt_length - 1 - done)
            if count > 0:
                part.append((row, done, count))
                left -= count
        chosen, lengths, counts = [r for r, _, _ in part], [d for _, d, _ in part], [c for _, _, c in part]
        slots = [row.slot for row in chosen]
        nodes = Nodes.chains(slots, lengths, counts)
        tokens = torch.tensor([t for row, done, count in part for t in row.tokens[done : done + count]])
        layers = [tap for tap in self.drafter.taps if tap != FINAL]
        hidden_Md, taps = self.backbone.run_layers(self.backbone.embed(tokens), nodes, self.cache, taps=layers)
        if FINAL in self.drafter.taps:
            taps[FINAL] = self.backbone.norm(hidden_Md)
        self.cache.commit(slots, [range(count) for count in counts])
        self.drafter.observe(chosen, Features(counts, taps))
        for row in chosen:
            row.statistics.prefill_seconds += time.perf_counter() - began

    def _leave(self, row: state.Sequence) -> None:
        """Parks the row: its cache may serve a request that begins with the same tokens."""
        self._rows.remove(row)
        held = min(self.cache.lengths[row.slot], len(row.tokens))  # a stop may have cut an accepted path short
        self.cache.rollback(row.slot, held)
        self._parked[row.slot] = row.tokens[:held]


def _check(draft: Draft, rows: Sequence[state.Sequence], most: int, vocab: int) -> None:
    """Refuses a draft that would break the promise instead of merely guessing badly."""
    if len(draft.trees) != len(rows):
        raise UsageError(f"The drafter gave {len(draft.trees)} trees for {len(rows)} rows.")
    for tokens, row in zip(draft.tokens, rows, strict=True):
        if len(tokens) > most:
            raise UsageError(f"The drafter gave a tree of {len(tokens)} nodes; its most_nodes allows {most}.")
        if tokens[0] != row.tokens[-1] or not 0 <= min(tokens) <= max(tokens) < vocab:
            raise UsageError(
                f"The drafter gave tokens {tokens}; the first must be the row's newest, {row.tokens[-1]}, and all must "
                f"lie in 0..{vocab - 1}."
            )


def _starts(draft: Draft) -> list[int]:
    """Index of each row's root among the M nodes."""
    starts = [0]
    for tree in draft.trees[:-1]:
        starts.append(starts[-1] + len(tree))
    return starts


def _real_index(nodes: Nodes, whole: Nodes) -> Tensor:
    """Where the drafted nodes stand once a cut has inserted rows after each tree."""
    spans = zip(whole.starts(), nodes.counts, strict=True)
    return torch.cat([torch.arange(start, start + count) for start, count in spans])


def _common(held: list[int], prompt: list[int]) -> int:
    """Length of the longest common beginning."""
    for i, (a, b) in enumerate(zip(held, prompt, strict=False)):
        if a != b:
            return i
    return min(len(held), len(prompt))


def _logprobs(
    logits_MV: Tensor, start: int, path: list[int], tokens: list[int], count: int | None
) -> list[TokenLogprob]:
    """Of each emitted token and its `count` strongest rivals, from the logits that chose it (before any edits)."""
    if count is None:
        return []
    out = []
    for node, token in zip(path, tokens, strict=True):
        log_p_V = logits_MV[start + node].float().log_softmax(-1)
        top = log_p_V.topk(min(count, len(log_p_V))) if count else None
        rivals = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        out.append(TokenLogprob(token, float(log_p_V[token]), rivals))
    return out
