"""Exact verification: descend from the root as long as a child holds the target's own token.

The target's token at a node is the argmax, or the one draw that the noise of that position selects (see `targets`).
The walk ends at the first token that no child holds; that token is the bonus. So the output is what plain decoding
would have written, token for token, whatever the tree was.
"""

from __future__ import annotations

from collections.abc import Sequence

from foretell.contracts import Draft, Verdict


def walk(draft: Draft, targets: Sequence[Sequence[int]]) -> Verdict:
    """Follows the target through each row's tree.

    Args:
        targets: per row, the target's token after each node, or `DAMAGED`, which no child holds.

    Returns:
        Per row the accepted path (at least the root) and the bonus token that follows it, or `DAMAGED`.
    """
    paths, bonus = [], []
    for tree, tokens, target in zip(draft.trees, draft.tokens, targets, strict=True):
        path, token = [0], target[0]
        while child := next((child for child in tree.children[path[-1]] if tokens[child] == token), 0):
            path.append(child)
            token = target[child]
        paths.append(path)
        bonus.append(token)
    return Verdict(paths, bonus)
