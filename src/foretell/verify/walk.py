"""Exact verification: descend from the root as long as a child holds the target's own token.

The target's token at a node is the argmax, or the one draw that the noise of that position selects (see `targets`).
The walk ends at the first token that no child holds; that token is the bonus. So the output is what plain decoding
would have written, token for token, whatever the tree was.

A drafter with an early exit that is lossy names a probability above which its guesses are trusted: the walk takes the
most probable of them, whatever the target says.
"""

from __future__ import annotations

from collections.abc import Sequence

from foretell.contracts import Draft, Verdict
from foretell.errors import check
from foretell.verify.target import DAMAGED


def walk(draft: Draft, targets: Sequence[Sequence[int]], trust: Sequence[float | None] = ()) -> Verdict:
    """Follows the target through each row's tree.

    Args:
        targets: per row, the target's token after each node, or `DAMAGED`, which no child holds.
        trust: per row, the probability above which a guess is accepted unverified, or None, which verifies that row;
            without any every row is verified.

    Returns:
        Per row the accepted path (at least the root) and the bonus token that follows it, or `DAMAGED`.
    """
    paths, bonus = [], []
    for row, (tree, tokens, target) in enumerate(zip(draft.trees, draft.tokens, targets, strict=True)):
        trusted = _trusted(draft, row, trust[row]) if trust else {}
        path, token = [0], target[0]
        while token != DAMAGED:
            held = next((child for child in tree.children[path[-1]] if tokens[child] == token), 0)
            if not (child := trusted.get(path[-1], held)):
                break
            path.append(child)
            token = target[child]
        paths.append(path)
        bonus.append(token)
    return Verdict(paths, bonus)


def _trusted(draft: Draft, row: int, least: float | None) -> dict[int, int]:
    """Returns node -> its most probable guess, where that is more probable than `least`."""
    tree = draft.trees[row]
    if least is None or len(tree) == 1:
        return {}
    p_N = draft.probabilities[row] if draft.probabilities else []
    check(p_N, "A drafter whose guesses are trusted says how probable they are.")
    best = {parent: max(children, key=p_N.__getitem__) for parent, children in enumerate(tree.children) if children}
    return {parent: child for parent, child in best.items() if p_N[child] > least}
