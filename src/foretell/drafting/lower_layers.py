"""Drafting with layers of the model itself: trees whose nodes pass them while they grow.

Nodes are run level by level in the engine's own cache: their keys and values, and the streams that they ended in, are
what verification would compute, bit for bit, so it goes on from there. A slot follows from a node's number, so nodes
that ran come first, in the order in which they did, and move up where others of them are not drafted after all; guesses
that nobody asked come after them, and the engine runs them.

Legend: B rows, F nodes that are asked, A of them in one row, R guesses of a node, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import Draft, Features, Resume, Row
from foretell.drafting.protocols import DraftRequest, LowerLayerDrafter
from foretell.errors import UsageError, is_number
from foretell.trees import TokenTree
from foretell.trees.calibration import Floats
from foretell.trees.growing import Growing

MAX_TREE_NODES = 64
"""Nodes of a tree, and nodes that run while it grows."""

Guess = Callable[[Tensor, Nodes], tuple[Floats, Sequence[Sequence[int]]]]
"""Streams [F, d] of nodes -> log-probabilities and tokens of what comes after each, [F, R], best first."""


class EarlyExitTrees:
    """The trees of one draft.

    Args:
        cache: the engine's.
        taps: states that are to be kept of the nodes that run, for `observe`.
        skip: a plan of sublayers to leave out; what was run so verification has to run again.

    Attributes:
        trees: one per row. Nobody is asked in a row that may emit one token only.
    """

    def __init__(
        self, backbone: Backbone, cache: KVCache, rows: Sequence[Row], taps: Sequence[int] = (),
        skip: bytes | None = None,
    ):  # fmt: skip
        self._backbone, self._cache, self._rows, self._taps, self._skip = backbone, cache, rows, tuple(taps), skip
        self.trees = [Growing([row.tokens[-1]], [0] if row.budget > 1 else []) for row in rows]
        self._ran: list[list[int]] = [[] for _ in rows]  # nodes in the order in which they ran
        self._at: list[list[int]] = [[] for _ in rows]  # and where their states stand among all
        self._hidden: list[Tensor] = []
        self._tapped: dict[int, list[Tensor]] = {tap: [] for tap in self._taps}
        self._layer = self._total = self.level = 0

    @property
    def asking(self) -> list[int]:
        """Rows in which some node is asked."""
        return [i for i, tree in enumerate(self.trees) if tree.asked]

    def run(self, layers: int) -> tuple[Tensor, Nodes]:
        """Runs the nodes that are asked through the first `layers`: their streams [F, d], row after row."""
        rows, parents, first, tokens = self.asking, [], [], []
        for i in rows:
            tree, ran = self.trees[i], self._ran[i]
            first.append(len(ran))
            ran += tree.asked
            place = {node: at for at, node in enumerate(ran)} | {-1: -1}
            parents.append(TokenTree(tuple(place[tree.parents[node]] for node in ran)))
            tokens += [tree.tokens[node] for node in tree.asked]
            self._at[i] += range(self._total, self._total + len(tree.asked))
            self._total += len(tree.asked)
        slots = [self._rows[i].slot for i in rows]
        nodes = Nodes(parents, slots, [self._cache.lengths[slot] for slot in slots], first)
        hidden_Fd, tapped = self._backbone.run_layers(
            self._backbone.embed(torch.tensor(tokens)), nodes, self._cache, 0, layers, skip=self._skip, taps=self._taps
        )
        self._hidden.append(hidden_Fd)
        for tap, states in tapped.items():
            self._tapped[tap].append(states)
        self._layer, self.level = layers, self.level + 1
        return hidden_Fd, nodes

    def extend(self, log_probs_FR: Floats, tokens_FR: Sequence[Sequence[int]], count: int) -> list[int]:
        """Adds guesses behind the nodes that are asked, as far as they might be among the `count` best of their tree.

        Returns:
            Of each row, how many nodes its tree had before.
        """
        since, at = [len(tree.parents) for tree in self.trees], 0
        for i in self.asking:
            tree, mine = self.trees[i], slice(at, at + len(self.trees[i].asked))
            at = mine.stop
            tree.extend(log_probs_FR[mine], tokens_FR[mine], count)
        return since

    def select_frontier(self, since: Sequence[int], count: int, beam: int, least: float) -> None:
        """Selects the next frontier (see `Growing.select_frontier`) where the row may emit what it guesses."""
        for i in self.asking:
            self.trees[i].select_frontier(count, since[i], min(beam, MAX_TREE_NODES - len(self._ran[i])), least)
            self._stop_at_budget(i)

    def follow(self, since: Sequence[int], least: Sequence[float]) -> None:
        """Asks the best of a row's newest guesses, where it is at least so probable: a chain."""
        for i in self.asking:
            tree = self.trees[i]
            sure = len(tree.parents) > since[i] and tree.given[since[i]] >= least[i]
            tree.asked = [since[i]] if sure else []
            self._stop_at_budget(i)

    def grow(
        self, layers: int, guess: Guess, count: int, steps: int, thresholds: Sequence[float] = (), beam: int = 0,
        least: float = 0.0,
    ) -> Draft:  # fmt: skip
        """Trees of `count` guesses at most; the first `layers` are run `steps` times at most.

        Args:
            guess: what a method makes of the streams that nodes ended in.
            thresholds: per row the probability below which its chain ends; none make trees.
            beam, least: of trees, see `Growing.select_frontier`.
        """
        while self.asking and self.level < steps:
            since = self.extend(*guess(*self.run(layers)), count)
            if thresholds:
                self.follow(since, thresholds)
            elif self.level < steps:
                self.select_frontier(since, count, beam, least)
        return self.draft(count, whole=bool(thresholds))

    def _stop_at_budget(self, i: int) -> None:
        if self.level + 1 >= self._rows[i].budget:
            self.trees[i].asked = []

    def draft(self, count: int, whole: bool) -> Draft:
        """Trees of the best nodes, `count` besides the root; `whole` keeps chains, with their last guesses."""
        trees: list[TokenTree] = []
        tokens: list[list[int]] = []
        given: list[list[float]] = []
        kept: list[list[int]] = []  # of the nodes that ran, by the order in which they did
        for tree, ran in zip(self.trees, self._ran, strict=True):
            chosen = {0, *tree.best(count)}
            if whole:
                chain = {0, *ran}
                if ran and ran[-1] in tree.parents:
                    chain.add(tree.parents.index(ran[-1]))  # what the last one guessed first
                others = [node for node in tree.best(len(tree.parents)) if node not in chain]
                chosen = chain.union(others[: max(0, count + 1 - len(chain))])
            kept.append([at for at, node in enumerate(ran) if node in chosen])
            order = [ran[at] for at in kept[-1]] or [0]
            order += sorted(chosen.difference(ran, [0]))
            place = {node: at for at, node in enumerate(order)} | {-1: -1}
            trees.append(TokenTree(tuple(place[tree.parents[node]] for node in order)))
            tokens.append([tree.tokens[node] for node in order])
            given.append([tree.given[node] for node in order])
        return Draft(trees, tokens, given, self._resume(kept))

    def _resume(self, kept: Sequence[Sequence[int]]) -> Resume | None:
        if self._skip is not None or not self._hidden:
            return None
        self._cache.gather([row.slot for row in self._rows], kept, self._layer)
        places = [at[i] for at, those in zip(self._at, kept, strict=True) for i in those]
        index = torch.tensor(places, device=self._hidden[0].device)

        def chosen(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).index_select(0, index)

        taps = {tap: chosen(parts) for tap, parts in self._tapped.items()}
        return Resume(self._layer, list(map(len, kept)), chosen(self._hidden), taps)


def climbed(
    climber: LowerLayerDrafter, cache: KVCache, rows: Sequence[Row], layers: int, count: int, steps: int,
    thresholds: Sequence[float] = (), beam: int = 0, least: float = 0.0, taps: Sequence[int] = (),
    own: KVCache | None = None, waiting: Sequence[Tensor | None] = (),
) -> Draft:  # fmt: skip
    """Drafts what `EarlyExitTrees.grow` does, in one call of the kernels; `own`, `waiting`: see `DraftRequest`."""
    slots, roots, budgets = ([row.slot for row in rows], [row.tokens[-1] for row in rows], [row.budget for row in rows])
    asked = DraftRequest(
        layers,
        slots,
        roots,
        budgets,
        count,
        steps,
        MAX_TREE_NODES,
        list(thresholds),
        beam,
        least,
        list(taps),
        list(waiting),
    )
    found = climber.climb(asked, cache, own)
    trees, tokens, given = zip(*found.trees, strict=True)
    resume = Resume(layers, found.ran, found.hidden_Rd, found.taps) if any(found.ran) else None
    return Draft([TokenTree(tuple(parents)) for parents in trees], list(tokens), list(given), resume)


def main_chain(tree: TokenTree) -> list[int]:
    """The best guess behind the root, the best behind that, and so on: ranks follow the numbers of siblings."""
    chain, node = [], 0
    while tree.children[node]:
        node = tree.children[node][0]
        chain.append(node)
    return chain


@dataclass(frozen=True)
class Chain:
    """The best guesses of a draft, one behind the other, and how many there could have been."""

    tokens: list[int]
    most: int

    @classmethod
    def of(cls, tree: TokenTree, tokens: Sequence[int], most: int) -> Chain:
        return cls([tokens[node] for node in main_chain(tree)], most)

    def judged(self, came: Sequence[int]) -> tuple[int, int]:
        """How many of them came true, of how many that is known: behind what came nobody has looked."""
        seen = min(len(self.tokens), len(came))
        pairs = enumerate(zip(self.tokens, came, strict=False))
        kept = next((at for at, (ours, theirs) in pairs if ours != theirs), seen)
        return kept, min(seen, kept + 1)


@dataclass
class Threshold:
    """Probability below which a chain ends, fixed or adaptive: drafts shall be accepted as often as not to end early.

    Draft & Verify, arXiv 2309.08168, §3.3, with its numbers.
    """

    value: float
    adaptive: bool = False
    accepted: float = 0.0  # share of the drafted tokens, smoothed

    def told(self, kept: int, drafted: int, most: int) -> None:
        """Of a chain of `drafted` tokens, where `most` would have been allowed, so many were right."""
        if not self.adaptive or not drafted:
            return
        self.accepted = 0.5 * self.accepted + 0.5 * kept / drafted
        wanted = self.value
        if self.accepted < 0.9:
            wanted += 0.01
        elif drafted < most:
            wanted -= 0.01
        self.value = min(1.0, max(0.0, 0.9 * self.value + 0.1 * wanted))


class AcceptanceTracker:
    """Keeps what was drafted until it is known which of it came true, and tells a threshold."""

    def __init__(self, threshold: Threshold):
        self.threshold = threshold
        self._chains: dict[int, tuple[int, Chain]] = {}  # slot -> the last draft's, and how long the text was

    def attached(self) -> AcceptanceTracker:
        """One for another engine's rows, with a threshold of its own."""
        return AcceptanceTracker(replace(self.threshold))

    def drafted(self, rows: Sequence[Row], draft: Draft, most: int) -> None:
        """A draft whose chains have `most` tokens at most."""
        for row, tree, tokens in zip(rows, draft.trees, draft.tokens, strict=True):
            self._chains[row.slot] = len(row.tokens), Chain.of(tree, tokens, min(most, row.budget - 1))

    def observed(self, rows: Sequence[Row], features: Features) -> list[tuple[int, int]]:
        """Of each chain how many guesses were right, of how many that is known."""
        found = []
        for row, _ in zip(rows, features.paths, strict=False):  # a prompt has no paths
            if row.slot in self._chains:
                length, chain = self._chains.pop(row.slot)
                kept, known = chain.judged(row.tokens[length:])  # less than was accepted, where the answer has ended
                self.threshold.told(kept, len(chain.tokens) if kept < known else kept, chain.most)
                found.append((kept, known))
        return found


def check_exit(exit: int, backbone: Backbone) -> int:
    """Refuses an exit that leaves no layer to draft with, or none to verify with."""
    most = backbone.config.layers - 1
    if not is_number(exit, whole=True) or not 1 <= exit <= most:
        raise UsageError(f"The exit is layer {exit}; this model can leave after layer 1 to {most}.")
    return exit


def lasts(tensor_Md: Tensor, counts: Sequence[int]) -> Tensor:
    """The last of each row's states [B, d], where `counts` states of one follow those of another."""
    return tensor_Md.index_select(0, torch.tensor(list(accumulate(counts)), device=tensor_Md.device) - 1)
