"""The fused loop: a step writes several tokens, and the next one keeps them all in one slot.

A macro step runs the model once for each row, over one vector: what its last tokens were fused into. Its state gives
the next token as ever; micro steps write more, until their model says stop, and nobody verifies them. The vector stands
at the position of its last token, so positions leave gaps where slots have none. Prompts are read as they are, a slot
for each token. HAMburger, arXiv 2505.20438; the text is not the model's own, so this decoder is not lossless.

Legend: B rows, R rows that go on with a step, G segments that enter the model, F features, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM, Draft, Fused
from foretell.engine.batch import BatchDecoder
from foretell.engine.clock import Clock
from foretell.engine.row_state import RowState
from foretell.engine.text_stream import Decodes
from foretell.errors import UsageError
from foretell.requests import TokenLogprob
from foretell.trees import chain
from foretell.trees.tree import ROOT
from foretell.verify import DAMAGED, Typical, logprobs, targets


class _Step:
    """A macro step of one row: the row with what was written so far, as the target's rules see it.

    Attributes:
        tokens: of the row, those of this step included; emitted: these alone, `DAMAGED` last where logits are not
            finite.
    """

    def __init__(self, row: RowState):
        self.row, self.slot, self.reused = row, row.slot, row.reused
        self.prompt_length, self.params, self.tokens = row.prompt_length, row.params, list(row.tokens)
        self.emitted: list[int] = []
        self.report: list[TokenLogprob] = []

    @property
    def budget(self) -> int:
        return self.row.budget - len(self.emitted)

    @property
    def ended(self) -> bool:
        last = self.emitted[-1]
        return last == DAMAGED or last in self.row.ends or self.budget < 1


class FusedDecoder(BatchDecoder):
    """Decodes any number of requests, `max_rows` at a time, in macro steps.

    Args:
        fused: what fuses tokens and writes micro steps; engines may share it.
        tokenizer, max_rows: see `BatchDecoder`.
        rule: none is possible.

    Raises:
        UsageError: a rule is given.
    """

    lossless = False

    def __init__(
        self, backbone: Backbone, fused: Fused, tokenizer: Decodes | None = None, *, max_rows: int = 1,
        rule: Typical | None = None,
    ):  # fmt: skip
        if rule is not None:
            raise UsageError("Typical acceptance judges guesses, and fused decoding verifies none; leave it out.")
        super().__init__(backbone, tokenizer, max_rows)
        self.fused, self._micro_cache = fused, fused.new_cache(max_rows)
        self._layers = [tap for tap in fused.taps if tap != FINAL_NORM]

    # -- one step ---------------------------------------------------------------------------------------------------

    def _decode(self, rows: list[RowState]) -> None:
        clock = Clock(rows)
        features_BFd, counts = self._run(rows)
        clock.lap("verify_seconds")
        steps = [_Step(row) for row in rows]
        self._write(steps, features_BFd)
        clock.lap("draft_seconds")
        for step in steps:
            self._emit(step)
        self.cache.commit([row.slot for row in rows], [range(count) for count in counts])
        for row in rows:
            if row.finished:
                self._leave(row)

    def _run(self, rows: list[RowState]) -> tuple[Tensor, list[int]]:
        """Runs the segments that the cache lacks, mostly the last one alone: the features of each row's newest state
        [B, F, d], and how many segments ran."""
        segments, positions, counts = list[list[int]](), list[int](), list[int]()
        for row in rows:
            ends = list(accumulate(row.segments, initial=row.prompt_length - 1))
            first = self.cache.lengths[row.slot] - (row.prompt_length - 1)
            segments += [row.tokens[begin:end] for begin, end in zip(ends[first:], ends[first + 1 :], strict=False)]
            positions += [end - 1 for end in ends[first + 1 :]]
            counts.append(len(row.segments) - first)
        slots, trees = [row.slot for row in rows], [chain(count - 1) for count in counts]
        nodes = Nodes(trees, slots, [self.cache.lengths[slot] for slot in slots], positions=torch.tensor(positions))
        fused_Gd = self.fused.fuse(segments)
        hidden_Gd, taps = self.backbone.run_layers(fused_Gd, nodes, self.cache, taps=self._layers)
        newest_B = torch.tensor(list(accumulate(counts)), device=hidden_Gd.device) - 1
        taps[FINAL_NORM] = self.backbone.norm(hidden_Gd)
        return torch.stack([taps[tap].index_select(0, newest_B) for tap in self.fused.taps], 1), counts

    def _write(self, steps: list[_Step], features_BFd: Tensor) -> None:
        """Writes the tokens of a macro step: the first from the model's own state, the others by micro steps."""
        micro = self.fused.begin(features_BFd, self._micro_cache)
        going, states_Rd = list(range(len(steps))), features_BFd[:, -1]
        for index in range(self.fused.most):
            self._choose([steps[i] for i in going], states_Rd)
            if index + 1 == self.fused.most:
                return
            stops = self.fused.stops(states_Rd)
            going = [
                i for i, stop in zip(going, stops, strict=True)
                if not steps[i].ended and 1 - stop >= self.fused.confidence
            ]  # fmt: skip
            if not going:
                return
            states_Rd = micro.run(going, [steps[i].tokens[-1] for i in going])

    def _choose(self, steps: Sequence[_Step], states_Rd: Tensor) -> None:
        """Appends to each row the token that its parameters choose after a state."""
        reported = any(step.params.logprobs is not None for step in steps)
        if all(step.params.plain_greedy for step in steps) and not reported:
            tokens = self.backbone.argmax(states_Rd).tolist()
        else:
            logits = self.backbone.logits(states_Rd).split(1)
            draft = Draft([ROOT] * len(steps), [[step.tokens[-1]] for step in steps])
            chosen = targets(draft, steps, [step.row.key for step in steps], logits)
            tokens = [of_row[0] for of_row in chosen]
            for step, token, logits_1V in zip(steps, tokens, logits, strict=True):
                if token != DAMAGED:
                    step.report += logprobs(logits_1V, [0], [token], step.params.logprobs)
        for step, token in zip(steps, tokens, strict=True):
            step.emitted.append(token)
            step.tokens.append(token)

    def _emit(self, step: _Step) -> None:
        """Emits what a macro step wrote for a row; a failure ends that request with an event, and no other."""
        row, damaged = step.row, step.emitted[-1] == DAMAGED
        written = step.emitted[:-1] if damaged else step.emitted
        event = row.event([(token, index > 0) for index, token in enumerate(written)], damaged, step.report)
        tokens, segments = row.tokens + event.tokens, [*row.segments, len(event.tokens)]
        outbox, finished = [*self._outbox, event], bool(event.finish_reason)
        # assigned with no call between, so that an interrupt finds all of it done, or nothing
        row.tokens, row.segments, row.finished, self._outbox = tokens, segments, finished, outbox
        row.statistics.count_fused(len(event.tokens))

    # -- rows join and leave ----------------------------------------------------------------------------------------

    def _unread(self, row: RowState) -> int:
        return max(0, row.prompt_length - 1 - self.cache.lengths[row.slot])

    def _room(self, row: RowState) -> int:
        return len(row.tokens) + row.params.max_new_tokens

    def _held(self, row: RowState) -> list[int] | None:
        return row.tokens[: min(self.cache.lengths[row.slot], row.prompt_length - 1)]
