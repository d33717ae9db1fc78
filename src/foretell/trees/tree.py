"""A token tree is a list of parents; everything else about it follows.

Node 0 is the root: the newest committed token, which no layer has seen. Every other node guesses the token after
its parent's, parents come before children, and a path from the root is one possible future. Verifying a tree runs
all its nodes in one forward pass; each node attends to the committed prefix and to its own ancestors only.

Legend: N nodes, D depth of the deepest node (the root has depth 0).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from foretell.errors import UsageError


@dataclass(frozen=True)
class TokenTree:
    """A tree given by `parents`: parents[0] is -1 and 0 <= parents[i] < i.

    Raises:
        UsageError: if a parent does not come before its child.
    """

    parents: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise UsageError(f"A token tree starts at its root, whose parent is -1, but parents are {self.parents!r}.")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise UsageError(f"Node {node} of a token tree names parent {parent}; it must be one of 0..{node - 1}.")

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def height(self) -> int:
        """D: the most tokens one step can accept, bonus not counted."""
        return max(self.depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        return tuple(node for node, children in enumerate(self.children) if not children)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def pruned(self, height: int) -> TokenTree:
        """The tree without nodes deeper than `height`; see `keep` for which nodes those are."""
        kept = self.keep(height)
        index = {node: i for i, node in enumerate(kept)}
        return TokenTree(tuple(-1 if self.parents[n] < 0 else index[self.parents[n]] for n in kept))

    def keep(self, height: int) -> list[int]:
        """Nodes no deeper than `height`, in order."""
        return [node for node, depth in enumerate(self.depths) if depth <= height]


ROOT = TokenTree()


@lru_cache(maxsize=256)
def chain(length: int) -> TokenTree:
    """The root and `length` guesses in a row."""
    return TokenTree(tuple(range(-1, length)))


def from_paths(paths: Iterable[Sequence[int]]) -> tuple[TokenTree, list[tuple[int, ...]]]:
    """Returns the tree of Medusa's rank paths, sorted by (length, lexicographic).

    A path (i1, ..., ij) names the guess of rank ij under the guess (i1, ..., ij-1); ranks count from 0.

    Returns:
        The tree and, node by node, its rank path (the root's is empty).

    Raises:
        UsageError: if a path's own prefix is missing or a rank is negative.
    """
    ordered = sorted({tuple(path) for path in paths} | {()}, key=lambda path: (len(path), path))
    index = {path: node for node, path in enumerate(ordered)}
    parents = [-1]
    for path in ordered[1:]:
        if min(path) < 0:
            raise UsageError(f"The tree path {list(path)} holds a negative rank; ranks count from 0.")
        if path[:-1] not in index:
            raise UsageError(f"The tree path {list(path)} lacks its prefix {list(path[:-1])}; add it to the paths.")
        parents.append(index[path[:-1]])
    return TokenTree(tuple(parents)), ordered


@dataclass(frozen=True)
class Guesses:
    """A tree with its tokens and, node by node, the probability of each given its parent (1 for the root)."""

    tree: TokenTree
    tokens: list[int]
    probabilities: list[float]

    def path_probabilities(self) -> list[float]:
        """Returns the probability of each node's path from the root: how often a step emits its token."""
        return _path_probabilities(self.tree.parents, self.probabilities)

    def first(self, nodes: int) -> Guesses:
        """Returns the first nodes alone, the root among them."""
        tree = TokenTree(self.tree.parents[:nodes]) if nodes > 1 else ROOT
        return Guesses(tree, self.tokens[:nodes], self.probabilities[:nodes])


def _path_probabilities(parents: Sequence[int], probabilities: Sequence[float]) -> list[float]:
    """See `Guesses.path_probabilities`; parents come before their children."""
    found = [1.0]
    for parent, probability in zip(parents[1:], probabilities[1:], strict=True):
        found.append(found[parent] * probability)
    return found


def most_probable(one: Guesses, other: Guesses, size: int) -> Guesses:
    """Returns the `size` most probable nodes of the union of two trees over one root, the most probable first.

    Paths of the same tokens share their nodes, with the higher probability of the two. A node is as probable as its
    path, so that no path is cut off from its root; of equals, those of `one` stay.

    Raises:
        UsageError: the roots hold different tokens.
    """
    return merged(one, other, size, 1)[0]


def merged(one: Guesses, other: Guesses, size: int, first: int) -> tuple[Guesses, list[int]]:
    """Returns what `most_probable` does, with those of the first `first` nodes of `one` that are chosen coming first.

    They keep their order; a node whose earlier sibling holds the same token, and those after it, are not among them.

    Returns:
        The union, and which of these nodes are in it.
    """
    if one.tokens[0] != other.tokens[0]:
        raise UsageError(f"Trees with different roots cannot merge: token {one.tokens[0]} against {other.tokens[0]}.")
    parents, tokens, probabilities = [-1], [one.tokens[0]], [1.0]
    child: dict[tuple[int, int], int] = {}  # (node, token) -> its child that holds the token
    for source in (one, other):
        moved = [0] * len(source.tokens)
        for node, parent in enumerate(source.tree.parents[1:], start=1):
            key = (moved[parent], source.tokens[node])
            index = child.setdefault(key, len(parents))
            if index == len(parents):
                parents.append(key[0])
                tokens.append(key[1])
                probabilities.append(source.probabilities[node])
            probabilities[index] = max(probabilities[index], source.probabilities[node])
            moved[node] = index
            if source is one and index != node:  # a duplicate sibling: nodes from here on have other numbers
                first = min(first, node)
    first = min(first, len(one.tokens))
    values = _path_probabilities(parents, probabilities)
    chosen = [0, *sorted(range(1, len(parents)), key=lambda node: -values[node])[: size - 1]]
    kept = sorted(node for node in chosen if node < first)
    chosen = kept + [node for node in chosen if node >= first]
    new = {node: i for i, node in enumerate(chosen)}
    tree = TokenTree((-1, *(new[parents[node]] for node in chosen[1:])))
    return Guesses(tree, [tokens[node] for node in chosen], [probabilities[node] for node in chosen]), kept
