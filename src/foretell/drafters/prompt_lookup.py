"""Text repeats itself: guess what followed the last words the last times they occurred.

The newest n tokens are looked up in prompt and output, the longest n first; what followed each earlier occurrence
is a candidate, the longer the match the further, and candidates that begin alike share nodes of one tree. Costs no
parameters and no training; it wins where the answer quotes the question (summaries, edits, code). Prompt lookup:
Saxena 2023; n-gram chains as in transformers' `prompt_lookup_num_tokens`, here several of them verified at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from foretell.contracts import Draft, Drafter, Features, Row
from foretell.errors import UsageError
from foretell.trees import TokenTree, merge
from foretell.trees.tree import ROOT

if TYPE_CHECKING:
    from foretell.backbone import KVCache


@dataclass
class _Index:
    """Where each n-gram of a row ended, for every n looked up; grows with the row."""

    longest: int
    shortest: int
    seen: int = 0
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def extend(self, tokens: list[int]) -> None:
        """Indexes the n-grams that end before the last token: the last one has no continuation yet."""
        for end in range(self.seen + 1, len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self.ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self.seen = max(self.seen, len(tokens) - 1)

    def continuations(self, tokens: list[int], count: int) -> dict[int, int]:
        """Up to `count` places to copy from -> length of the match there: longer matches first, then later ones."""
        places: dict[int, int] = {}
        for n in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            for end in reversed(self.ends.get(tuple(tokens[-n:]), ())):
                places.setdefault(end, n)
                if len(places) == count:
                    return places
        return places


class PromptLookup(Drafter):
    """N-gram chains merged into a tree.

    Args:
        longest, shortest: lengths of the n-grams looked up.
        length: guesses copied from an occurrence, per token of its match. On 96 training prompts of the demo model,
            4 per token beat any fixed number.
        candidates: occurrences copied from.
        nodes: the largest tree, root included.
    """

    def __init__(self, longest: int = 4, shortest: int = 1, length: int = 4, candidates: int = 8, nodes: int = 16):
        if not 1 <= shortest <= longest <= 16:
            raise UsageError(f"Prompt lookup needs 1 <= shortest <= longest <= 16, not {shortest} and {longest}.")
        if not (1 <= length <= 64 and 1 <= candidates <= 64 and 2 <= nodes <= 256):
            raise UsageError(
                f"Prompt lookup takes length and candidates in 1..64 and nodes in 2..256, not {length}, {candidates}, "
                f"{nodes}."
            )
        self.longest, self.shortest, self.length = longest, shortest, length
        self.candidates, self.nodes = candidates, nodes
        self._indexes: dict[int, _Index] = {}

    @property
    def most_nodes(self) -> int:
        return self.nodes

    def reset(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._indexes[row.slot] = _Index(self.longest, self.shortest)

    def draft(self, rows: Sequence[Row]) -> Draft:
        trees, tokens = [], []
        for row in rows:
            tree, ids = self._tree(row)
            trees.append(tree)
            tokens.append(ids)
        return Draft(trees, tokens)

    def _tree(self, row: Row) -> tuple[TokenTree, list[int]]:
        """The trie of the continuations, earlier candidates first when the tree is full."""
        index, root = self._indexes[row.slot], row.tokens[-1]
        index.extend(row.tokens)
        parents, ids = [-1], [root]
        place: dict[tuple[int, int], int] = {}  # (node, token) -> its child
        for start, match in index.continuations(row.tokens, self.candidates).items():
            node = 0
            for token in row.tokens[start : start + self.length * match]:
                child = place.get((node, token))
                if child is None:
                    if len(parents) == self.nodes:
                        break
                    child = place[node, token] = len(parents)
                    parents.append(node)
                    ids.append(token)
                node = child
        return (TokenTree(tuple(parents)) if len(parents) > 1 else ROOT), ids


def with_lookup(drafter: Drafter) -> Drafter:
    """The drafter with candidates of prompt lookup merged into its trees; prompt lookup itself stays as it is."""
    return drafter if isinstance(drafter, PromptLookup) else WithLookup(drafter)


class WithLookup(Drafter):
    """Any drafter, its trees merged with candidates of prompt lookup: what the text repeats, no head foretells.

    The tree keeps its size: the last guesses of the inner drafter, its least valuable ones where it orders them,
    make room.

    Args:
        share: most of the tree that lookup may take.
    """

    def __init__(self, inner: Drafter, share: float = 0.5, **lookup: int):
        self.inner, self.share, self.lookup = inner, share, PromptLookup(**lookup)
        self.taps, self.cuts, self.lossless = inner.taps, inner.cuts, inner.lossless

    @property
    def most_nodes(self) -> int:
        return max(self.inner.most_nodes, self.lookup.nodes)

    @property
    def tokens_per_step(self) -> dict[int, float]:
        return self.inner.tokens_per_step

    @property
    def parameters(self) -> int:
        return self.inner.parameters

    @property
    def extra_nodes(self) -> int:
        return self.inner.extra_nodes

    def bind(self, cache: KVCache) -> None:
        self.inner.bind(cache)

    def reset(self, rows: Sequence[Row]) -> None:
        self.inner.reset(rows)
        self.lookup.reset(rows)

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        self.inner.observe(rows, features)

    def at_cut(self, layer: int, hidden_Md: Tensor, nodes: Any) -> tuple[Tensor, Any]:
        return self.inner.at_cut(layer, hidden_Md, nodes)

    def draft(self, rows: Sequence[Row]) -> Draft:
        draft, found = self.inner.draft(rows), self.lookup.draft(rows)
        if draft.resume is not None:
            raise UsageError("This drafter has run its trees through lower layers already; leave out --lookup.")
        draft.probabilities = None  # lookup has none
        for i in range(len(rows)):
            tree, tokens = draft.trees[i], draft.tokens[i]
            size = max(len(tree), self.lookup.nodes) if len(tree) == 1 else len(tree)
            other = min(len(found.trees[i]) - 1, int(size * self.share) if len(tree) > 1 else size - 1)
            kept = min(len(tree), size - other)
            draft.trees[i], draft.tokens[i] = merge(
                TokenTree(tree.parents[:kept]), tokens[:kept],
                TokenTree(found.trees[i].parents[: other + 1]), found.tokens[i][: other + 1],
            )  # fmt: skip
        return draft
