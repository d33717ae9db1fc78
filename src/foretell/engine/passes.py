"""One verification pass: all nodes of a draft through the model, from wherever drafting has run them to.

Legend: M nodes of all rows, R nodes that drafting has run, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import FINAL_NORM, Draft, Drafter, Row

Pass = tuple[Tensor, dict[int, Tensor], Tensor | None]
"""The nodes' final states [M, d], tapped states [M, d], and what the drafter's cuts inserted."""


def run_pass(backbone: Backbone, drafter: Drafter, cache: KVCache, rows: Sequence[Row], draft: Draft) -> Pass:
    """Runs the nodes of a draft, in the cache rows of their sequences."""
    nodes = Nodes(draft.trees, [row.slot for row in rows], [cache.lengths[row.slot] for row in rows])
    layer, hidden_Md, taps = _begun(backbone, cache, rows, draft)
    whole, real = nodes, None
    for cut in dict.fromkeys((*drafter.cuts, backbone.config.layers)):
        wanted = [tap for tap in drafter.taps if tap not in taps and layer <= tap <= cut]
        hidden_Md, tapped = backbone.run_layers(hidden_Md, whole, cache, layer, cut, taps=wanted)
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
    if FINAL_NORM in drafter.taps:
        taps[FINAL_NORM] = states_Md
    return states_Md, taps, extra


def _begun(
    backbone: Backbone, cache: KVCache, rows: Sequence[Row], draft: Draft
) -> tuple[int, Tensor, dict[int, Tensor]]:
    """All nodes at the layer that drafting has run, their streams [M, d] and what was tapped below it."""
    resume = draft.resume
    ran = resume.ran if resume else [0] * len(rows)
    rest = torch.tensor([t for ids, done in zip(draft.tokens, ran, strict=True) for t in ids[done:]])
    if resume is None:
        return 0, backbone.embed(rest), {}
    if not len(rest):
        return resume.layer, resume.hidden_Rd, dict(resume.taps)
    nodes = Nodes(draft.trees, [row.slot for row in rows], [cache.lengths[row.slot] for row in rows], ran)
    hidden_Rd, taps = backbone.run_layers(backbone.embed(rest), nodes, cache, 0, resume.layer, taps=list(resume.taps))
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


def _real_index(nodes: Nodes, whole: Nodes) -> Tensor:
    """Where the drafted nodes stand once a cut has inserted rows after each tree."""
    spans = zip(whole.starts(), nodes.counts, strict=True)
    return torch.cat([torch.arange(start, start + count) for start, count in spans])
