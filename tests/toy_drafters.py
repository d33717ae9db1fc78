"""Drafters for tests: one that is always right, one that never is, random ones, and one for each use of the seam.

None of them is clever. Together they make the engine do everything a real method could ask of it: bushy trees,
states tapped at any layer, lower layers run by the drafter itself, rows inserted half-way up.
"""

import random
from collections.abc import Sequence
from itertools import product

import torch
from random_backbones import same
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import FINAL_NORM, Draft, Drafter, Features, Insertion, Resume, Row
from foretell.trees import Guesses, TokenTree, chain, from_paths, most_probable

Answers = dict[tuple[int, ...], list[int]]
"""Prompt -> what plain decoding writes after it."""


def union(tree: TokenTree, ids: list[int], other: TokenTree, other_ids: list[int]) -> tuple[TokenTree, list[int]]:
    """All that either tree guesses; the nodes of the first keep their places."""
    one, two = (Guesses(t, list(i), [1.0] * len(t)) for t, i in ((tree, ids), (other, other_ids)))
    both = most_probable(one, two, len(tree) + len(other))
    return both.tree, both.tokens


def upcoming(answers: Answers, row: Row, count: int) -> list[int]:
    """The next tokens of a recorded run."""
    answer = answers.get(tuple(row.tokens[: row.prompt_length]), [])
    done = len(row.tokens) - row.prompt_length
    return answer[done : done + count]


def cartesian(widths: Sequence[int]) -> TokenTree:
    """Every node of depth d has widths[d] children."""
    paths = [path for depth in range(1, len(widths) + 1) for path in product(*map(range, widths[:depth]))]
    return from_paths(paths)[0]


def random_tree(rng: random.Random, most: int) -> TokenTree:
    reach = rng.choice([1, 3, most])
    return TokenTree((-1, *(max(0, node - rng.randint(1, reach)) for node in range(1, rng.randint(1, most)))))


class RandomTrees(Drafter):
    """Any tree with any tokens, siblings alike included. With `answers` the right path is in it too, up to a point."""

    def __init__(self, vocab: int, most: int = 64, seed: int = 0, answers: Answers | None = None):
        self.vocab, self.most, self.answers, self.rng = vocab, most, answers or {}, random.Random(seed)

    @property
    def max_nodes(self) -> int:
        return self.most + 12

    def draft(self, rows: Sequence[Row]) -> Draft:
        trees, tokens = [], []
        for row in rows:
            tree = random_tree(self.rng, self.most)
            ids = [row.tokens[-1], *(self.rng.randrange(self.vocab) for _ in range(len(tree) - 1))]
            right = upcoming(self.answers, row, self.rng.randint(0, 12))
            if self.rng.random() < 0.5:
                tree, ids = union(tree, ids, chain(len(right)), [ids[0], *right])
            else:
                tree, ids = union(chain(len(right)), [ids[0], *right], tree, ids)
            trees.append(tree)
            tokens.append(ids)
        return Draft(trees, tokens)


class Oracle(Drafter):
    """A chain of the recorded tokens; `shift` makes every guess wrong."""

    def __init__(self, answers: Answers, vocab: int, length: int = 5, shift: int = 0):
        self.answers, self.vocab, self.length, self.shift = answers, vocab, length, shift

    def draft(self, rows: Sequence[Row]) -> Draft:
        right = [upcoming(self.answers, row, self.length) for row in rows]
        tokens = [
            [row.tokens[-1], *((token + self.shift) % self.vocab for token in guess)]
            for row, guess in zip(rows, right, strict=True)
        ]
        return Draft([chain(len(ids) - 1) for ids in tokens], tokens)


class EarlyExit(Drafter):
    """Runs the lower layers itself and grows its tree by what they predict; verification starts above them."""

    def __init__(self, backbone: Backbone, layer: int, levels: int = 3):
        self.backbone, self.layer, self.levels = backbone, layer, levels
        self.cache: KVCache | None = None

    def bind(self, cache: KVCache) -> None:
        self.cache = cache

    def draft(self, rows: Sequence[Row]) -> Draft:
        assert self.cache is not None
        slots, lengths = [row.slot for row in rows], [self.cache.lengths[row.slot] for row in rows]
        trees, first = [TokenTree()] * len(rows), [0] * len(rows)
        tokens = [[row.tokens[-1]] for row in rows]
        grown: list[list[Tensor]] = [[] for _ in rows]
        for level in range(self.levels + 1):
            nodes = Nodes(trees, slots, lengths, first)
            new = torch.tensor([t for ids, start in zip(tokens, first, strict=True) for t in ids[start:]])
            hidden, _ = self.backbone.run_layers(self.backbone.embed(new), nodes, self.cache, 0, self.layer)
            logits = self.backbone.logits(self.backbone.norm(hidden)).split(nodes.counts)
            for b, states in enumerate(hidden.split(nodes.counts)):
                grown[b].append(states)
                start, first[b] = first[b], len(trees[b])
                if level < self.levels:
                    best = logits[b].topk(1 + (level == 0)).indices  # two guesses after the root, then one each
                    trees[b] = TokenTree((*trees[b].parents, *(start + i for i, row in enumerate(best) for _ in row)))
                    tokens[b] = [*tokens[b], *best.flatten().tolist()]
        hidden_Rd = torch.cat([torch.cat(states) for states in grown])
        return Draft(trees, tokens, resume=Resume(self.layer, list(map(len, trees)), hidden_Rd))


class Inserter(Drafter):
    """Adds two rows under every node half-way up, reads them at the top, and guesses from them next time."""

    def __init__(self, backbone: Backbone, cut: int):
        self.backbone, self.cuts = backbone, (cut,)  # type: ignore[misc]
        generator = torch.Generator().manual_seed(0)
        self.embeddings_2d = torch.randn(2, backbone.config.hidden, generator=generator)
        self.guesses: dict[int, list[int]] = {}
        self.nodes: Nodes | None = None

    @property
    def extra_nodes(self) -> int:
        return 2 * self.max_nodes

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.guesses[row.slot] = []

    def draft(self, rows: Sequence[Row]) -> Draft:
        tokens = [[row.tokens[-1], *self.guesses[row.slot]] for row in rows]
        return Draft([TokenTree((-1, 0, 0)) if len(ids) == 3 else TokenTree() for ids in tokens], tokens)

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Nodes, draft: Draft) -> Insertion:
        assert nodes.trees == draft.trees
        assert layer == self.cuts[0]
        self.nodes = nodes
        parents = [[node for node in range(len(tree)) for _ in (0, 1)] for tree in nodes.trees]
        return Insertion(parents, (hidden_Md[:, None] + self.embeddings_2d).flatten(0, 1))

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        if features.extra is None:
            return
        assert self.nodes is not None
        assert len(features.extra) == 2 * len(self.nodes)
        for row, start, path in zip(rows, self.nodes.starts(), features.paths, strict=True):
            pair = features.extra[2 * (start + path[-1]) :][:2]
            self.guesses[row.slot] = self.backbone.logits(pair).argmax(-1).tolist()


class Checker(Drafter):
    """Wraps a drafter and holds every tapped state against a fresh prefill of the same tokens, bit for bit.

    After every step, or, where prefills are slow, only when `check` is called.
    """

    def __init__(self, inner: Drafter, backbone: Backbone, always: bool = True):
        self.inner, self.backbone, self.always, self.checked = inner, backbone, always, 0
        self.rows: dict[int, Row] = {}
        self.taps = (0, 1, backbone.config.layers, FINAL_NORM)  # type: ignore[misc]
        self.cuts, self.adapters = inner.cuts, inner.adapters
        self.seen: dict[int, dict[int, list[Tensor]]] = {}

    def attached(self, cache: KVCache) -> "Checker":
        """Itself: the test reads what it has checked."""
        self.inner = self.inner.attached(cache)
        return self

    @property
    def max_nodes(self) -> int:
        return self.inner.max_nodes

    @property
    def extra_nodes(self) -> int:
        return self.inner.extra_nodes

    def reset(self, rows: Sequence[Row]) -> None:
        self.inner.reset(rows)
        for row in rows:  # what a parked cache brings along was checked when it was written
            kept = {tap: [torch.cat(self.seen[row.slot][tap])[: row.reused]] for tap in self.taps if row.reused}
            self.seen[row.slot] = kept or {tap: [] for tap in self.taps}

    def draft(self, rows: Sequence[Row]) -> Draft:
        return self.inner.draft(rows)

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Nodes, draft: Draft) -> Insertion | None:
        return self.inner.at_cut(layer, hidden_Md, nodes, draft)

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        self.inner.observe(rows, features)
        for tap in self.taps:
            for row, states in zip(rows, features.taps[tap].split(features.counts), strict=True):
                self.seen[row.slot][tap].append(states)
        if self.always:
            for row in rows:
                self.check(row)
        self.rows |= {row.slot: row for row in rows}

    def check(self, row: Row) -> None:
        ours = {tap: torch.cat(states) for tap, states in self.seen[row.slot].items()}
        known = min(len(ours[FINAL_NORM]), len(row.tokens))  # a stop may have cut an accepted path short
        for tap, states in fresh_states(self.backbone, row.tokens[:known], self.taps).items():
            assert same(ours[tap][:known], states)
        self.checked += known


def fresh_states(backbone: Backbone, tokens: list[int], taps: Sequence[int]) -> dict[int, Tensor]:
    nodes, cache = Nodes.chains([0], [0], [len(tokens)]), backbone.new_cache(1, len(tokens))
    layers = [tap for tap in taps if tap != FINAL_NORM]
    hidden, states = backbone.run_layers(backbone.embed(torch.tensor(tokens)), nodes, cache, taps=layers)
    return states | {FINAL_NORM: backbone.norm(hidden)}
