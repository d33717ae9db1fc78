"""A drafter's own layer before its heads: it attends to all committed states of a row, once before each draft.

It has keys and values of its own. States wait until a draft needs them, so that steps without guesses cost nothing.
A fused layer reads more than those states: W·[other streams; the embedding of the token after each] is added to them,
each input divided by its root mean square (EAGLE-3's fusion, arXiv 2503.01840, §3.1).

Legend: M newly committed states, row after row, d hidden width, P inputs that are fused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.backbone.base import Backbone
from foretell.backbone.nodes import Nodes
from foretell.drafting.heads import normed
from foretell.drafting.waiting import WaitingStates
from foretell.loading.blocks import Blocks


class PrefixLayer:
    """The layer, operation by operation; a backbone may have one that does the same in one call.

    Args:
        backbone: its embedding and its kernels are used.
        layer: the layer, as `Backbone.own_layers` gives it.
        fuse_dP: W [d, P·d] of a fused layer, else None.
    """

    def __init__(self, backbone: Backbone, layer: Backbone, fuse_dP: Tensor | Blocks | None):
        self.layer, self._embed = layer, backbone.embed
        self._fuse = None if fuse_dP is None else backbone.linear(fuse_dP, None)
        self.fused, self.cache = fuse_dP is not None, layer.new_cache(1, 1)
        self._waiting = WaitingStates()

    def attached(self, rows: int) -> PrefixLayer:
        """Returns the same layer with an empty cache of its own."""
        own = copy.copy(self)
        own.cache, own._waiting = self.layer.new_cache(rows, 0), WaitingStates()
        return own

    def begin(self, row: int, reused: int, room: int) -> None:
        """Keeps at most `reused` states of a row (after an interruption it has fewer), and reserves `room` in all."""
        read = self._read(row)
        if not min(reused, read) and row < self.cache.rows:
            self.cache.release([row])
        self.cache.reserve({row: room})
        self.cache.rollback(row, min(reused, read))
        self._waiting.keep(row, max(0, reused - read))

    def forget(self, rows: Sequence[int]) -> None:
        """Frees the memory of these rows."""
        for row in rows:
            self._waiting.keep(row, 0)
        self.cache.release(rows)
        self.cache.trim()

    def wait(self, row: int, streams_SNd: Sequence[Tensor], begin: int, count: int) -> bool:
        """Keeps newly committed states of a row until they are read; returns whether it is time to read them."""
        return self._waiting.add(row, streams_SNd, begin, count)

    def waiting(self, row: int) -> int:
        return self._waiting.count(row)

    def length(self, row: int) -> int:
        """Returns the number of states of a row that were read, or wait."""
        return self._read(row) + self.waiting(row)

    def _read(self, row: int) -> int:
        return self.cache.lengths[row] if row < self.cache.rows else 0

    def read(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Reads the states of some rows that wait, one at least of each.

        Args:
            texts: the tokens of each row.

        Returns:
            The streams at the newest state of each row [streams, d]: the layer's output, then those that are not fused.
        """
        waiting = list(map(self._waiting.of, rows))
        counts = [streams.shape[1] for streams in waiting]
        states_Md, *others = torch.cat(waiting, 1)
        following = list[int]()  # the token after each state
        for row, count, text in zip(rows, counts, texts, strict=True):
            after = text[self._read(row) + 1 :][:count]  # fewer where a stop has cut the accepted tokens
            following += [*after, *([text[-1]] * (count - len(after)))]
        fused = (others, following) if self.fused else ((), ())
        newest = [out_Nd[-1:].clone() for out_Nd in self(rows, counts, states_Md, *fused).split(counts)]
        for row in rows:
            self._waiting.keep(row, 0)
        if self.fused:
            return newest
        return [torch.cat([out_1d, streams[1:, -1]]) for out_1d, streams in zip(newest, waiting, strict=True)]

    def __call__(
        self, rows: Sequence[int], counts: Sequence[int], states_Md: Tensor, others: Sequence[Tensor] = (),
        following: Sequence[int] = (),
    ) -> Tensor:  # fmt: skip
        """Returns the layer's output for newly committed states, `counts[i]` of cache row `rows[i]`: [M, d] float32.

        Args:
            others: P - 1 further streams [M, d] of a fused layer; following: the token after each state.
        """
        lengths = list(map(self._read, rows))
        self.cache.reserve({row: length + count for row, length, count in zip(rows, lengths, counts, strict=True)})
        stream_Md = self._run(rows, lengths, counts, states_Md, others, following)
        self.cache.commit(rows, [range(count) for count in counts])
        return stream_Md

    def _run(
        self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int], states_Md: Tensor,
        others: Sequence[Tensor], following: Sequence[int],
    ) -> Tensor:  # fmt: skip
        if self._fuse:
            inputs = [*others, self._embed(torch.tensor(following))]
            states_Md = states_Md + self._fuse(torch.cat(list(map(normed, inputs)), 1))
        return self.layer.run_layers(states_Md, Nodes.chains(rows, lengths, counts), self.cache)[0]
