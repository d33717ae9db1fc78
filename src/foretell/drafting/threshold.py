"""Where a chain ends: below a probability, fixed or adapted to how often guesses are accepted.

Draft & Verify, arXiv 2309.08168, §3.3, with its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foretell.contracts import Draft, Features, Row
from foretell.trees import TokenTree

ACCEPTED = 0.9
"""Share of the drafted tokens that shall be accepted."""
STEP = 0.01
SMOOTHING, OLD, NEW = 0.5, 0.9, 0.1
"""Weight of earlier values in the smoothed share; weights of the old and the wanted value in the threshold."""


@dataclass
class Threshold:
    """Probability below which a chain ends.

    Attributes:
        accepted: share of the drafted tokens that were accepted, smoothed.
    """

    value: float
    adaptive: bool = False
    accepted: float = 0.0

    def update(self, accepted: int, drafted: int, max_length: int) -> None:
        """Adapts to a chain of `drafted` tokens, of at most `max_length`, of which `accepted` were right."""
        if not self.adaptive or not drafted:
            return
        self.accepted = SMOOTHING * self.accepted + (1 - SMOOTHING) * accepted / drafted
        wanted = self.value
        if self.accepted < ACCEPTED:
            wanted += STEP
        elif drafted < max_length:
            wanted -= STEP
        self.value = min(1.0, max(0.0, OLD * self.value + NEW * wanted))


def main_chain(tree: TokenTree) -> list[int]:
    """The best guess after the root, the best after that, and so on: the first child is the most probable."""
    chain, node = [], 0
    while tree.children[node]:
        node = tree.children[node][0]
        chain.append(node)
    return chain


@dataclass(frozen=True)
class Chain:
    """The best guesses of a draft, one after the other, and how many there could have been."""

    tokens: list[int]
    max_length: int

    @classmethod
    def of(cls, tree: TokenTree, tokens: Sequence[int], max_length: int) -> Chain:
        return cls([tokens[node] for node in main_chain(tree)], max_length)

    def compare(self, emitted: Sequence[int]) -> tuple[int, int]:
        """Returns (accepted, verified). Guesses after the first rejection were not verified."""
        seen = min(len(self.tokens), len(emitted))
        pairs = enumerate(zip(self.tokens, emitted, strict=False))
        accepted = next((i for i, (guess, token) in pairs if guess != token), seen)
        return accepted, min(seen, accepted + 1)


class AcceptanceTracker:
    """Keeps each row's last draft until it has been verified, and adapts a threshold by the outcome."""

    def __init__(self, threshold: Threshold):
        self.threshold = threshold
        self._chains: dict[int, tuple[int, Chain]] = {}  # slot -> length of the text at the last draft, its chain

    def attached(self) -> AcceptanceTracker:
        """A tracker for another engine's rows, with a threshold of its own."""
        return AcceptanceTracker(replace(self.threshold))

    def record_draft(self, rows: Sequence[Row], draft: Draft, max_length: int) -> None:
        """Keeps a draft whose chains have at most `max_length` tokens."""
        for row, tree, tokens in zip(rows, draft.trees, draft.tokens, strict=True):
            self._chains[row.slot] = len(row.tokens), Chain.of(tree, tokens, min(max_length, row.budget - 1))

    def record_outcome(self, rows: Sequence[Row], features: Features) -> list[tuple[int, int]]:
        """Returns (accepted, verified) of each chain whose outcome is known now."""
        found = []
        for row, _ in zip(rows, features.paths, strict=False):  # a prompt has no paths
            if row.slot in self._chains:
                length, chain = self._chains.pop(row.slot)
                accepted, verified = chain.compare(row.tokens[length:])  # an answer's end cuts the accepted tokens
                drafted = len(chain.tokens) if accepted < verified else accepted
                self.threshold.update(accepted, drafted, chain.max_length)
                found.append((accepted, verified))
        return found
