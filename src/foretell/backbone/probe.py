"""Is this arithmetic canonical here? A few milliseconds at load decide what the engine may promise.

Libraries choose kernels by processor, type and shape. The probe runs the model's first layers and its head over a
small tree, once all nodes together and once path by path, one node at a time, and compares bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foretell.backbone.base import Backbone
from foretell.backbone.cache import KVCache
from foretell.backbone.linear import MOST_ROWS
from foretell.backbone.nodes import Nodes
from foretell.errors import ForetellError
from foretell.trees import TokenTree, chain

TREE = TokenTree((-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 6, 8, 8, 11, 12, 3, 0))
PREFIX = MOST_ROWS
"""Committed tokens before the tree: more than one block of keys, and the most rows that one call multiplies."""

_SO = "depend on how many tokens share the pass, so that output may differ from plain decoding's"
STATES, LOGITS = f"On this machine a token's hidden states {_SO}.", f"On this machine a token's logits {_SO}."


def probe(backbone: Backbone, layers: int = 2) -> str | None:
    """None if the bits agree, else one sentence on what differs."""
    generator = torch.Generator().manual_seed(0)
    c, end = backbone.config, min(layers, backbone.config.layers)
    prompt = torch.randint(c.vocab, (PREFIX,), generator=generator)
    guesses = torch.randint(c.vocab, (len(TREE),), generator=generator)

    def run(cache: KVCache, tokens: Tensor, nodes: Nodes) -> Tensor:
        hidden, _ = backbone.run_layers(backbone.embed(tokens), nodes, cache, 0, end)
        return hidden

    cache = backbone.new_cache(1, PREFIX + len(TREE))
    chunk = run(cache, prompt, Nodes.chains([0], [0], [PREFIX]))
    together = run(cache, guesses, Nodes([TREE], [0], [PREFIX]))
    logits = backbone.logits(backbone.norm(together))
    if not logits.isfinite().all():
        raise ForetellError("The model's logits are not finite numbers: its weights are damaged; fetch it again.")
    alone = backbone.new_cache(1, PREFIX + len(TREE))
    for i in range(PREFIX):
        if not torch.equal(run(alone, prompt[i : i + 1], Nodes([chain(0)], [0], [i]))[0], chunk[i]):
            return STATES
    for leaf in TREE.leaves:
        for depth, node in enumerate(TREE.path(leaf)):
            hidden = run(alone, guesses[node : node + 1], Nodes([chain(0)], [0], [PREFIX + depth]))
            if not torch.equal(hidden[0], together[node]):
                return STATES
            if not torch.equal(backbone.logits(backbone.norm(hidden))[0], logits[node]):
                return LOGITS
    return None
