"""Token trees: shapes, growth, search, calibration, merging."""

from foretell.trees.tree import Guesses, TokenTree, chain, from_paths, most_probable

__all__ = ["Guesses", "TokenTree", "chain", "from_paths", "most_probable"]
