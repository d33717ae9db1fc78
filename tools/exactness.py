"""Drafters that test exactness, and what a run leaves: ids, log-probabilities and the bytes of its cache."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch

from foretell.contracts import Draft, Drafter, Row
from foretell.engine import SpeculativeDecoder
from foretell.requests import SamplingParams
from foretell.trees import TokenTree


class RandomTrees(Drafter):
    """Drafts trees of random shape with random tokens, up to `nodes`."""

    def __init__(self, nodes: int = 64, vocab: int = 49152):
        self.nodes, self.vocab, self.random = nodes, vocab, random.Random(0)

    @property
    def max_nodes(self) -> int:
        return self.nodes

    def draft(self, rows: Sequence[Row]) -> Draft:
        trees, tokens = [], []
        for row in rows:
            size = min(self.nodes, int(self.random.expovariate(1 / 6)) + 2)
            reach = self.random.choice((1, 3, 64))  # chains, bushes, stars
            tree = TokenTree((-1, *(self.random.randrange(max(0, i - reach), i) for i in range(1, size))))
            trees.append(tree)
            tokens.append([row.tokens[-1], *(self.random.randrange(self.vocab) for _ in range(size - 1))])
        return Draft(trees, tokens)


class ForcedTrees(RandomTrees):
    """Drafts random trees that contain the correct path, known from a plain run."""

    answers: dict[tuple[int, ...], list[int]]  # prompt -> its tokens

    def draft(self, rows: Sequence[Row]) -> Draft:
        draft = super().draft(rows)
        for i, row in enumerate(rows):
            prompt, done = tuple(row.tokens[: row.prompt_length]), len(row.tokens) - row.prompt_length
            tree, ids = draft.trees[i], draft.tokens[i]
            right = self.answers[prompt][done : done + self.random.randint(0, 6)]
            node = 0
            parents = list(tree.parents)
            for token in right:
                kids = [n for n, p in enumerate(parents) if p == node]
                if kids and self.random.random() < 0.5:
                    node = self.random.choice(kids)  # in the midst of the tree
                    ids[node] = token
                else:
                    parents.append(node)
                    ids.append(token)
                    node = len(parents) - 1
                for other in [n for n, p in enumerate(parents) if p == parents[node] and n != node]:
                    if ids[other] == token:
                        ids[other] = (token + 1) % self.vocab
            draft.trees[i] = TokenTree(tuple(parents))
        return draft

    @property
    def max_nodes(self) -> int:
        return self.nodes + 6


def transcript(llm: Any, drafter: Drafter, prompts: list[list[int]], rows: int, params: SamplingParams) -> list[Any]:
    """Returns for each prompt: ids, their log-probabilities, and a digest of the cache's bytes."""
    decoder = SpeculativeDecoder(llm.backbone, drafter, max_rows=rows, adapt=False)
    out: list[Any] = [None] * len(prompts)
    collected: dict[int, tuple[list[int], list[float]]] = {}
    for key, ids in enumerate(prompts):
        collected[decoder.submit(ids, params, key)] = ([], [])
    slots: dict[int, int] = {}
    while decoder.busy:
        events = decoder.step()
        slots |= {row.request: row.slot for row in decoder._rows}
        for event in events:
            ids, logprobs = collected[event.request]
            ids += event.tokens
            logprobs += [item.logprob for item in event.logprobs]
            if event.finish_reason:
                keys, values = decoder.cache.read(slots.get(event.request, _slot(decoder, prompts, event.request)))
                digest, entered = hashlib.sha256(), len(prompts[event.request]) + len(ids) - 1
                for tensor in (keys[:, :, :entered], values[:, :, :entered]):  # an accepted stop token entered too
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
                out[event.request] = (ids, logprobs, digest.hexdigest())
    return out


def _slot(decoder: SpeculativeDecoder, prompts: list[list[int]], request: int) -> int:
    """Finds the slot of a request that finished in its first step."""
    start = prompts[request][:-1]
    return next(slot for slot, held in decoder._parked.items() if held[: len(start)] == start)


def compared(truth: list[Any], got: list[Any]) -> dict[str, int]:
    """Counts the prompts that agree in ids, in log-probabilities and in the bytes of the cache."""
    same = [sum(a[i] == b[i] for a, b in zip(truth, got, strict=True)) for i in range(3)]
    return {
        "prompts": len(truth), "tokens": sum(len(t[0]) for t in truth),
        "same_ids": same[0], "same_logprobs": same[1], "same_cache": same[2],
    }  # fmt: skip
