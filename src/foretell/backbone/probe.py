"""Is this arithmetic canonical here? What a token computes may depend on its path alone, never on its company.

Libraries choose kernels by processor, type and shape, so this is measured at load, before the engine promises
anything. The probe runs what the engine will run: trees of every size, two sequences in one pass, prompts, long
contexts. Each node must come out bit for bit as it does alone, which is how plain decoding computes it:

    the model    one tree through all layers; its logits must be finite
    the head     final norm, logits and argmax of every number of rows
    the layers   the first, a middle and the last one, and the first of each window, over random keys and values:
                 hidden states, and the keys and values that are written

Running a node alone costs as much as a step of plain decoding, so only the nodes of `SEED` are. Any other node of
`TREE` is a twin of one of them: it holds the same token, and so do its ancestors. All in all that is some sixty
steps and the reading of five hundred tokens, in three layers: about a second for a small model.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from foretell.backbone.base import Backbone
from foretell.backbone.eager.linear import MAX_ROWS
from foretell.backbone.kv_cache import KVCache
from foretell.backbone.nodes import Nodes
from foretell.errors import ForetellError
from foretell.loading.cache_dir import StageProgress
from foretell.trees import TokenTree, chain

ROWS = (*range(1, 17), 24, 32, 48, MAX_ROWS)
"""Nodes that share a pass."""
SEED = TokenTree((-1, 0, 1, 2, 3, 0, 1, 5, 0, 2, 6, 7, 1, 0, 3, 10, 9))
"""As heads draft it: a chain at first, then branches of all lengths."""
HEAD_SHARE = 0.4
"""Of the time of a small model's probe."""
PROMPT = chain(33)
"""Longer than a block of keys."""
START, NEAR, FAR = range(3)
"""Contexts of a sequence: none, or this many committed tokens:"""
AFTER, FAR_AFTER, WIDEST = 70, 1100, 4096
"""NEAR is no multiple of a block of keys; FAR lies beyond 1,024, and beyond windows up to WIDEST."""

Part = tuple[int, TokenTree, int]
"""One sequence of a pass: its context, its tree, and how many of the tree's nodes run."""
Computed = tuple[Tensor, Tensor, Tensor]
"""Results of a layer for some nodes: hidden states [N, d], keys and values [N, G, D]."""


def _with_twins(seed: TokenTree, size: int) -> tuple[TokenTree, Tensor]:
    """Returns the seed with twins of its nodes, and for each node the seed node that computes the same, int64 [N]."""
    parents, twins = list(seed.parents), list(range(len(seed)))
    while (at := len(parents)) < size:
        inner = [node for node, twin in enumerate(twins) if seed.children[twin]]
        parents.append(inner[7 * at % len(inner)])
        children = seed.children[twins[parents[-1]]]
        twins.append(children[at % len(children)])
    return TokenTree(tuple(parents)), torch.tensor(twins)


TREE, _tree_twins = _with_twins(SEED, MAX_ROWS)
TWINS = {TREE: _tree_twins, PROMPT: torch.arange(len(PROMPT))}
COMPANIES: tuple[tuple[Part, ...], ...] = (
    *(((NEAR, TREE, rows),) for rows in ROWS),
    ((FAR, TREE, 9),),
    ((NEAR, TREE, 1), (FAR, TREE, 1)),
    ((NEAR, TREE, 11), (FAR, TREE, 6)),
    ((FAR, TREE, 2), (NEAR, TREE, MAX_ROWS)),  # more rows than libraries multiply at once
    ((START, PROMPT, len(PROMPT)),),  # last: it writes over the tokens before NEAR
)


def probe(backbone: Backbone, progress: StageProgress = lambda fraction: None) -> str | None:
    """Returns None if all bits agree, else one sentence on what differs and where that was seen.

    Args:
        progress: called with the fraction that is done.

    Raises:
        ForetellError: the logits are not finite.
    """
    tokens_N = torch.randint(backbone.config.vocab, (len(PROMPT),), generator=torch.Generator().manual_seed(0))
    streams_Nd, where = _model(backbone, tokens_N)
    where = where or _head(backbone, streams_Nd[:3], progress) or _layers(backbone, tokens_N, progress)
    if where is None:
        return None
    return (
        f"On this machine what a token computes depends on what else shares the pass (seen in {where}), so that "
        "output may differ from plain decoding's."
    )


def _model(backbone: Backbone, tokens_N: Tensor) -> tuple[Tensor, str | None]:
    """Runs one tree through all layers, and a path's first nodes alone; returns the tree's streams too."""
    kv = backbone.new_cache(2, len(SEED))

    def run(nodes: Nodes, tokens_M: Tensor) -> Tensor:
        return backbone.run_layers(backbone.embed(tokens_M), nodes, kv)[0]

    together_Nd = run(Nodes([SEED], [0], [0]), tokens_N[: len(SEED)])
    if not backbone.logits(backbone.norm(together_Nd)).isfinite().all():
        raise ForetellError("The model's logits are not finite numbers: its weights are damaged; fetch it again.")
    for depth, node in enumerate((0, 1)):
        alone_1d = run(Nodes([chain(0)], [1], [depth]), tokens_N[node : node + 1])
        if not torch.equal(alone_1d[0], together_Nd[node]):
            return together_Nd, f"the model with {len(SEED)} rows"
    return together_Nd, None


def _head(backbone: Backbone, streams_Sd: Tensor, progress: StageProgress) -> str | None:
    """Runs final norm, logits and argmax over some streams alone, then over all rows, filled with them in turn."""
    alone = []
    for stream_1d in streams_Sd.split(1):
        state_1d = backbone.norm(stream_1d)
        logits_1V, best = backbone.logits(state_1d), int(backbone.argmax(state_1d))
        if logits_1V[0, best] != logits_1V.max():
            return "the choice of the most probable token"
        alone.append((state_1d, logits_1V, best))
    for rows in ROWS:
        progress(HEAD_SHARE * rows / MAX_ROWS)
        states_Md = backbone.norm(streams_Sd[torch.arange(rows) % len(alone)])
        logits_MV, best_M = backbone.logits(states_Md), backbone.argmax(states_Md)
        for first, (state_1d, logits_1V, best) in enumerate(alone):
            if not (states_Md[first :: len(alone)] == state_1d).all():
                return f"the final norm with {rows} rows"
            if not (logits_MV[first :: len(alone)] == logits_1V).all():
                return f"logits with {rows} rows"
            if not (best_M[first :: len(alone)] == best).all():
                return f"the choice of the most probable token with {rows} rows"
    return None


def _layers(backbone: Backbone, tokens_N: Tensor, progress: StageProgress) -> str | None:
    """Runs every company through each chosen layer; what enters it are embedded tokens."""
    c, inputs_Nd = backbone.config, backbone.embed(tokens_N)
    room = max(1, c.max_positions - len(PROMPT))
    widest = max((window for window in c.windows if window <= WIDEST), default=0)
    lengths = 0, min(AFTER, room), min(max(FAR_AFTER, widest + AFTER), room)
    kv = backbone.new_cache(2, lengths[FAR] + MAX_ROWS)
    windows = {c.windows.index(window) for window in c.windows}
    layers = sorted({0, c.layers // 2, c.layers - 1} | windows)
    for i, layer in enumerate(layers):

        def done(share: float, i: int = i) -> None:
            progress(HEAD_SHARE + (1 - HEAD_SHARE) * (i + share) / len(layers))

        if where := _Layer(backbone, layer, inputs_Nd, lengths, kv).differs(done):
            return f"layer {layer} with {where}"
    return None


class _Layer:
    """A layer and its single-node results.

    Args:
        inputs_Nd: its input, node by node of `SEED` or `PROMPT`.
        lengths: committed tokens at START, NEAR and FAR; their keys and values become random numbers.
    """

    def __init__(self, backbone: Backbone, layer: int, inputs_Nd: Tensor, lengths: tuple[int, int, int], kv: KVCache):
        self.backbone, self.layer, self.inputs_Nd, self.lengths, self.kv = backbone, layer, inputs_Nd, lengths, kv
        self._alone: dict[tuple[int, TokenTree], Computed] = {}
        generator = torch.Generator().manual_seed(layer)
        for context in (NEAR, FAR):
            for committed_GTD in self._held(context, 0, lengths[context]):
                committed_GTD.copy_(torch.randn(committed_GTD.shape, generator=generator))

    def differs(self, progress: StageProgress) -> str | None:
        """Returns the first combination of rows that changes a node's bits; None if there is none."""
        for done, company in enumerate(COMPANIES):
            progress(done / len(COMPANIES))
            alone = [self._run_alone(context, tree) for context, tree, _ in company]
            lengths = [self.lengths[context] for context, *_ in company]
            twins = [TWINS[tree][:count] for _, tree, count in company]
            trees = [_first(tree, count) for _, tree, count in company]
            nodes = Nodes(trees, [_row(context) for context, *_ in company], lengths)
            hidden_Md = self._run(torch.cat([self.inputs_Nd[twins_N] for twins_N in twins]), nodes)
            for i, hidden_Nd in enumerate(hidden_Md.split(nodes.counts)):
                together = self._computed(hidden_Nd, company[i][0], lengths[i])
                if not all(map(torch.equal, together, (computed[twins[i]] for computed in alone[i]))):
                    return " and ".join(
                        f"{n} rows after {t} tokens" for n, t in zip(nodes.counts, lengths, strict=True)
                    )
        return None

    def _run_alone(self, context: int, tree: TokenTree) -> Computed:
        """Runs the nodes that are not twins of others, each alone; depth first, so that ancestors precede a node."""
        if (context, tree) not in self._alone:
            most = max(count for company in COMPANIES for *which, count in company if which == [context, tree])
            first = _first(tree, min(most, len(TWINS[tree].unique())))
            found: dict[int, Computed] = {}
            left = [0]
            while left:
                node = left.pop()
                left += first.children[node]
                slot = self.lengths[context] + first.depths[node]
                hidden_1d = self._run(self.inputs_Nd[node : node + 1], Nodes([chain(0)], [_row(context)], [slot]))
                hidden_Nd, keys_NGD, values_NGD = self._computed(hidden_1d, context, slot)
                found[node] = hidden_Nd, keys_NGD.clone(), values_NGD.clone()  # the next one writes over them
            hidden, keys, values = zip(*(found[node] for node in range(len(first))), strict=True)
            self._alone[context, tree] = torch.cat(hidden), torch.cat(keys), torch.cat(values)
        return self._alone[context, tree]

    def _run(self, inputs_Md: Tensor, nodes: Nodes) -> Tensor:
        return self.backbone.run_layers(inputs_Md, nodes, self.kv, self.layer, self.layer + 1)[0]

    def _computed(self, hidden_Nd: Tensor, context: int, begin: int) -> Computed:
        """Returns these states, and the keys and values in as many slots."""
        keys_GND, values_GND = self._held(context, begin, begin + len(hidden_Nd))
        return hidden_Nd, keys_GND.transpose(0, 1), values_GND.transpose(0, 1)

    def _held(self, context: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values [G, T, D] in some slots of a sequence."""
        self.kv.lengths[_row(context)] = end
        keys_LGTD, values_LGTD = self.kv.read(_row(context))
        return keys_LGTD[self.layer, :, begin:], values_LGTD[self.layer, :, begin:]


def _row(context: int) -> int:
    """Returns the cache row of a sequence."""
    return int(context == FAR)


@cache
def _first(tree: TokenTree, count: int) -> TokenTree:
    """Returns the first nodes of a tree."""
    return TokenTree(tree.parents[:count])
