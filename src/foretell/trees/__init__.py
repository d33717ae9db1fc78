"""Which futures are guessed: token trees, their named shapes, and how two of them merge."""

from foretell.trees.tree import TokenTree, cartesian, chain, from_paths, merge

__all__ = ["TokenTree", "cartesian", "chain", "from_paths", "merge"]
