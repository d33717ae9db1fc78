"""One verification pass: all nodes of a draft through the model, from the layer that drafting has run them to.

Legend: M nodes of all rows, d hidden width, K nodes that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from foretell.backbone import Backbone, Beside, KVCache, Nodes
from foretell.contracts import FINAL_NORM, Draft, Drafter, Features, Insertion, Row
from foretell.errors import UsageError, check


@dataclass
class Pass:
    """Results of a forward pass over the M nodes of a draft.

    Attributes:
        states_Md: what the output head reads.
        taps: tap -> states [M, d], for the drafter.
        inserted: final states of the rows that the drafter's cuts inserted, if there are any; inserted_B: how many
            behind each tree.
        size: how many nodes ran; an inserted row counts by the share of the layers above its cut.
    """

    draft: Draft
    nodes: Nodes
    states_Md: Tensor
    taps: dict[int, Tensor]
    inserted: Tensor | None
    inserted_B: list[int]
    size: float

    def features(self, paths: list[list[int]]) -> Features:
        """The states of the accepted paths, for `Drafter.observe`."""
        kept = [start + node for start, path in zip(self.nodes.starts(), paths, strict=True) for node in path]
        if len(kept) == len(self.nodes):  # all, and in order, for parents come before their children
            return Features([len(path) for path in paths], self.taps, self.inserted, paths)
        index_K = torch.tensor(kept, device=self.states_Md.device)
        taps = {tap: states_Md.index_select(0, index_K) for tap, states_Md in self.taps.items()}
        return Features([len(path) for path in paths], taps, self.inserted, paths)


def run_pass(backbone: Backbone, drafter: Drafter, cache: KVCache, rows: Sequence[Row], draft: Draft) -> Pass:
    """Runs the nodes of a draft, in the cache rows of their sequences."""
    nodes = Nodes(draft.trees, [row.slot for row in rows], [cache.lengths[row.slot] for row in rows])
    layer, hidden_Md, taps = _lower_layers(backbone, cache, rows, draft)
    # the nodes with those that cuts insert, and where the drafted and the inserted ones are among them
    extended, drafted, inserted_N, beside = nodes, None, None, None
    size, layers, inserted_B = float(len(nodes)), backbone.config.layers, [0] * len(rows)
    cuts = () if draft.held else drafter.cuts
    for cut in dict.fromkeys((*cuts, layers)):
        wanted = [tap for tap in drafter.taps if tap not in taps and layer <= tap <= cut]
        hidden_Md, tapped = backbone.run_layers(hidden_Md, extended, cache, layer, cut, taps=wanted, beside=beside)
        taps |= {tap: states if drafted is None else states[drafted] for tap, states in tapped.items()}
        layer = cut
        insertion = drafter.at_cut(cut, hidden_Md, extended, draft) if cut in cuts else None
        if insertion and any(insertion.parents):
            extended, hidden_Md = _with(insertion, extended, hidden_Md)
            inserted_B = [len(now) - len(tree) for now, tree in zip(extended.trees, draft.trees, strict=True)]
            if (most := max(inserted_B)) > drafter.extra_nodes:
                allows = f"its extra_nodes allows {drafter.extra_nodes}"
                raise UsageError(f"The drafter inserted {most} rows behind a tree; {allows}.")
            size += len(insertion.streams_Nd) * (layers - cut) / layers
            drafted, inserted_N = extended.parted(nodes.counts)
            beside = Beside(drafter.adapters, inserted_N) if drafter.adapters else None
    states_Md, inserted = backbone.norm(hidden_Md), None
    if inserted_N is not None:
        states_Md, inserted = states_Md[drafted], states_Md[inserted_N]
    if FINAL_NORM in drafter.taps:
        taps[FINAL_NORM] = states_Md
    return Pass(draft, nodes, states_Md, taps, inserted, inserted_B, size)


def _lower_layers(
    backbone: Backbone, cache: KVCache, rows: Sequence[Row], draft: Draft
) -> tuple[int, Tensor, dict[int, Tensor]]:
    """Brings all nodes to the layer that drafting has run some of them to: layer, streams [M, d], taps below it."""
    resume = draft.resume
    if resume is None:
        return 0, backbone.embed(torch.tensor(list(chain.from_iterable(draft.tokens)))), {}
    others = [token for tokens, ran in zip(draft.tokens, resume.ran, strict=True) for token in tokens[ran:]]
    if others:
        lengths = [cache.lengths[row.slot] for row in rows]
        nodes = Nodes(draft.trees, [row.slot for row in rows], lengths, resume.ran)
        embedded = backbone.embed(torch.tensor(others))
        hidden_Od, taps = backbone.run_layers(embedded, nodes, cache, 0, resume.layer, taps=list(resume.taps))
        resume = resume.joined(nodes.counts, hidden_Od, taps)
    return resume.layer, resume.hidden_Rd, dict(resume.taps)


def _with(insertion: Insertion, nodes: Nodes, hidden_Md: Tensor) -> tuple[Nodes, Tensor]:
    """Nodes and their streams, the inserted ones among them."""
    wider = nodes.extended(insertion.parents)
    shape = (len(wider) - len(nodes), hidden_Md.shape[1])
    check(insertion.streams_Nd.shape == shape, f"Inserted rows need streams {shape}.")
    streams_Rd = torch.cat([hidden_Md, insertion.streams_Nd])
    if len(nodes.trees) > 1:  # the new rows of each tree follow its own
        places_R = torch.cat(wider.parted(nodes.counts)).to(streams_Rd.device)
        streams_Rd = torch.empty_like(streams_Rd).index_copy_(0, places_R, streams_Rd)
    return wider, streams_Rd
