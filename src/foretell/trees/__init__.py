"""Which futures are guessed: token trees, their named shapes, and how two of them merge."""

from foretell.trees.tree import Guesses, TokenTree, cartesian, chain, from_paths, most_probable

__all__ = ["Guesses", "TokenTree", "cartesian", "chain", "from_paths", "most_probable"]
