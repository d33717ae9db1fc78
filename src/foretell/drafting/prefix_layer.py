"""A drafter's own layer before its heads: it attends to all committed states of a row, once a step.

It has keys and values of its own. A fused layer reads more than those states: W·[other streams; the embedding of the
token after each] is added to them, each input divided by its root mean square (EAGLE-3's fusion, arXiv 2503.01840,
§3.1).

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


class PrefixLayer:
    """The layer, operation by operation; a backbone may have one that does the same in one call.

    Args:
        backbone: its embedding and its kernels are used.
        layer: the layer, as `Backbone.layer` gives it.
        fuse_dP: W [d, P·d] of a fused layer, else None.
    """

    def __init__(self, backbone: Backbone, layer: Backbone, fuse_dP: Tensor | None):
        self.layer, self._embed = layer, backbone.embed
        self._fuse = None if fuse_dP is None else backbone.linear(fuse_dP, None)
        self.fused, self.cache = fuse_dP is not None, layer.new_cache(1, 1)

    def attached(self, rows: int) -> PrefixLayer:
        """Returns the same layer with an empty cache of its own."""
        own = copy.copy(self)
        own.cache = self.layer.new_cache(rows, 0)
        return own

    def begin(self, row: int, reused: int, room: int) -> None:
        """Keeps at most `reused` states of a row (after an interruption it has fewer), and reserves `room` in all."""
        length = min(reused, self.length(row))
        if not length and row < self.cache.rows:
            self.cache.release([row])
        self.cache.reserve({row: room})
        self.cache.rollback(row, length)

    def length(self, row: int) -> int:
        """Returns the number of states of a row that it has read."""
        return self.cache.lengths[row] if row < self.cache.rows else 0

    def __call__(
        self, rows: Sequence[int], counts: Sequence[int], states_Md: Tensor, others: Sequence[Tensor] = (),
        following: Sequence[int] = (),
    ) -> Tensor:  # fmt: skip
        """Returns the layer's output for newly committed states, `counts[i]` of cache row `rows[i]`: [M, d] float32.

        Args:
            others: P - 1 further streams [M, d] of a fused layer; following: the token after each state.
        """
        self.cache.reserve({row: self.length(row) + count for row, count in zip(rows, counts, strict=True)})
        lengths = [self.cache.lengths[row] for row in rows]
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
