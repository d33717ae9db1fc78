"""Drafting with layers of the model itself: trees whose nodes pass them while they grow.

Nodes are run level by level in the engine's own cache: their keys and values, and their streams after the last of these
layers, are bit for bit what verification would compute, so it goes on from there. A slot follows from a node's number:
nodes that ran come first, in the order in which they did, and move up where others of them are not drafted after all;
guesses that were never expanded come after them, and the engine runs them.

Legend: B rows, F frontier nodes of all rows, R guesses of a node, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import Draft, Resume, Row
from foretell.drafting.heads import DrafterHeads
from foretell.drafting.protocols import DraftRequest, LowerLayerDrafter
from foretell.errors import UsageError, check, is_number
from foretell.trees import TokenTree
from foretell.trees.calibration import Floats, Scale, calibrated
from foretell.trees.growing import GrowingTree

MAX_TREE_NODES = 64
"""Nodes of a tree, and nodes that run while it grows."""

Guess = Callable[[Tensor, Nodes], tuple[Floats, Sequence[Sequence[int]]]]
"""Streams [F, d] of nodes -> log-probabilities and tokens of what comes after each, [F, R], best first."""
Run = Callable[[Tensor, Nodes, int], Tensor]
"""Embeddings [F, d] of nodes -> their streams after so many layers."""


class EarlyExitTrees:
    """The trees of one draft.

    Args:
        cache: the engine's.
        taps: states of the nodes that run, which are kept for `observe`.
        skip: a plan of sublayers to leave out; verification then runs these layers again.
        run: runs the layers, and what the method runs beside them; by default the layers alone.

    Attributes:
        trees: one per row. Rows with a budget of one token are not expanded.
    """

    def __init__(
        self, backbone: Backbone, cache: KVCache, rows: Sequence[Row], taps: Sequence[int] = (),
        skip: bytes | None = None, run: Run | None = None,
    ):  # fmt: skip
        self._backbone, self._cache, self._rows, self._taps, self._skip = backbone, cache, rows, tuple(taps), skip
        check(run is None or not taps, "A method that runs the layers itself taps them itself.")
        self._run = run
        self.trees = [GrowingTree([row.tokens[-1]], [0] if row.budget > 1 else []) for row in rows]
        self._ran: list[list[int]] = [[] for _ in rows]  # nodes in the order in which they ran
        self._positions: list[list[int]] = [[] for _ in rows]  # index of their states among those of all rows
        self._hidden: list[Tensor] = []
        self._tapped: dict[int, list[Tensor]] = {tap: [] for tap in self._taps}
        self._layer = self._total = self.level = 0

    @property
    def active_rows(self) -> list[int]:
        """Rows whose frontier is not empty."""
        return [i for i, tree in enumerate(self.trees) if tree.frontier]

    def run(self, layers: int) -> tuple[Tensor, Nodes]:
        """Runs the frontier through the first `layers`; returns its streams [F, d], row after row."""
        rows, parents, first, tokens = self.active_rows, [], [], []
        for i in rows:
            tree, ran = self.trees[i], self._ran[i]
            first.append(len(ran))
            ran += tree.frontier
            index = {node: order for order, node in enumerate(ran)} | {-1: -1}
            parents.append(TokenTree(tuple(index[tree.parents[node]] for node in ran)))
            tokens += [tree.tokens[node] for node in tree.frontier]
            self._positions[i] += range(self._total, self._total + len(tree.frontier))
            self._total += len(tree.frontier)
        slots = [self._rows[i].slot for i in rows]
        nodes = Nodes(parents, slots, [self._cache.lengths[slot] for slot in slots], first)
        embedded_Fd, tapped = self._backbone.embed(torch.tensor(tokens)), dict[int, Tensor]()
        if self._run:
            hidden_Fd = self._run(embedded_Fd, nodes, layers)
        else:
            hidden_Fd, tapped = self._backbone.run_layers(
                embedded_Fd, nodes, self._cache, 0, layers, skip=self._skip, taps=self._taps
            )
        self._hidden.append(hidden_Fd)
        for tap, states in tapped.items():
            self._tapped[tap].append(states)
        self._layer, self.level = layers, self.level + 1
        return hidden_Fd, nodes

    def extend(self, log_probs_FR: Floats, tokens_FR: Sequence[Sequence[int]], count: int) -> list[int]:
        """Adds those guesses after the frontier that may be among the `count` best of their tree.

        Returns:
            Size of each row's tree before.
        """
        since, end = [len(tree.parents) for tree in self.trees], 0
        for i in self.active_rows:
            tree, begin = self.trees[i], end
            end += len(tree.frontier)
            tree.extend(log_probs_FR[begin:end], tokens_FR[begin:end], count)
        return since

    def select_frontier(self, since: Sequence[int], count: int, beam: int, min_gain: float) -> None:
        """Selects each tree's next frontier (see `GrowingTree.select_frontier`) while its row's budget allows."""
        for i in self.active_rows:
            room = MAX_TREE_NODES - len(self._ran[i])
            self.trees[i].select_frontier(count, since[i], min(beam, room), min_gain)
            self._stop_at_budget(i)

    def follow(self, since: Sequence[int], thresholds: Sequence[float]) -> None:
        """Extends each chain by its best guess if its probability is at least the row's threshold."""
        for i in self.active_rows:
            tree = self.trees[i]
            sure = len(tree.parents) > since[i] and tree.cond_probs[since[i]] >= thresholds[i]
            tree.frontier = [since[i]] if sure else []
            self._stop_at_budget(i)

    def grow(
        self, layers: int, guess: Guess, count: int, steps: int, thresholds: Sequence[float] = (), beam: int = 0,
        min_gain: float = 0.0,
    ) -> Draft:  # fmt: skip
        """Returns trees of at most `count` guesses; the first `layers` are run at most `steps` times.

        Args:
            guess: what a method makes of the nodes' streams.
            thresholds: per row the probability below which its chain ends; none make trees.
            beam, min_gain: of trees, see `GrowingTree.select_frontier`.
        """
        while self.active_rows and self.level < steps:
            since = self.extend(*guess(*self.run(layers)), count)
            if thresholds:
                self.follow(since, thresholds)
            elif self.level < steps:
                self.select_frontier(since, count, beam, min_gain)
        return self.draft(count, keep_chains=bool(thresholds))

    def _stop_at_budget(self, i: int) -> None:
        if self.level + 1 >= self._rows[i].budget:
            self.trees[i].frontier = []

    def draft(self, count: int, keep_chains: bool) -> Draft:
        """Returns trees of the best nodes, `count` besides the root.

        Args:
            keep_chains: keeps every node that ran, and the best guess after the last of them.
        """
        trees: list[TokenTree] = []
        tokens: list[list[int]] = []
        probabilities: list[list[float]] = []
        kept: list[list[int]] = []  # of the nodes that ran, by the order in which they did
        for tree, ran in zip(self.trees, self._ran, strict=True):
            chosen = {0, *tree.best(count)}
            if keep_chains:
                chain = {0, *ran}
                if ran and ran[-1] in tree.parents:
                    chain.add(tree.parents.index(ran[-1]))  # its best guess was added first
                others = [node for node in tree.best(len(tree.parents)) if node not in chain]
                chosen = chain.union(others[: max(0, count + 1 - len(chain))])
            kept.append([order for order, node in enumerate(ran) if node in chosen])
            nodes = [ran[order] for order in kept[-1]] or [0]
            nodes += sorted(chosen.difference(ran, [0]))
            index = {node: i for i, node in enumerate(nodes)} | {-1: -1}
            trees.append(TokenTree(tuple(index[tree.parents[node]] for node in nodes)))
            tokens.append([tree.tokens[node] for node in nodes])
            probabilities.append([tree.cond_probs[node] for node in nodes])
        return Draft(trees, tokens, probabilities, self._resume(kept))

    def _resume(self, kept: Sequence[Sequence[int]]) -> Resume | None:
        if self._skip is not None or not self._hidden:
            return None
        self._cache.gather([row.slot for row in self._rows], kept, self._layer)
        positions = [of_row[i] for of_row, orders in zip(self._positions, kept, strict=True) for i in orders]
        index_R = torch.tensor(positions, device=self._hidden[0].device)

        def select(levels: list[Tensor]) -> Tensor:
            return torch.cat(levels).index_select(0, index_R)

        taps = {tap: select(levels) for tap, levels in self._tapped.items()}
        return Resume(self._layer, list(map(len, kept)), select(self._hidden), taps)


def grow_in_one_call(
    drafter: LowerLayerDrafter, cache: KVCache, rows: Sequence[Row], layers: int, count: int, steps: int,
    thresholds: Sequence[float] = (), beam: int = 0, min_gain: float = 0.0, taps: Sequence[int] = (),
    own: KVCache | None = None, waiting: Sequence[Tensor | None] = (),
) -> Draft:  # fmt: skip
    """Returns what `EarlyExitTrees.grow` does, in one call of the kernels; `own`, `waiting`: see `DraftRequest`."""
    slots, roots, budgets = ([row.slot for row in rows], [row.tokens[-1] for row in rows], [row.budget for row in rows])
    request = DraftRequest(
        layers, slots, roots, budgets, count, steps, MAX_TREE_NODES, list(thresholds), beam, min_gain, list(taps),
        list(waiting),
    )  # fmt: skip
    found = drafter.grow_through_layers(request, cache, own)
    trees, tokens, probabilities = zip(*found.trees, strict=True)
    resume = Resume(layers, found.ran, found.hidden_Rd, found.taps) if any(found.ran) else None
    return Draft([TokenTree(tuple(parents)) for parents in trees], list(tokens), list(probabilities), resume)


def guesses_of(
    head: DrafterHeads, states_Fd: Tensor, width: int, vocabulary_V: NDArray[np.int64], scale: Scale | None = None
) -> tuple[Floats, list[list[int]]]:
    """Returns what a `Guess` does, of an output matrix that reads normed states.

    Args:
        scale: its calibration; None leaves probabilities unchanged.
    """
    top = head.top(states_Fd, np.arange(len(states_Fd))[:, None].tolist(), width)
    log_probs_FR, best_FR = (each[:, 0].cpu().numpy() for each in top)
    return calibrated(log_probs_FR, scale) if scale else log_probs_FR, vocabulary_V[best_FR].tolist()


def check_exit(exit: int, backbone: Backbone) -> int:
    """Returns the exit; refuses one that leaves no layer to draft with, or none to verify with.

    Raises:
        UsageError: naming the layers that are possible.
    """
    most = backbone.config.layers - 1
    if not is_number(exit, whole=True) or not 1 <= exit <= most:
        raise UsageError(f"The exit is layer {exit}; this model can leave after layer 1 to {most}.")
    return exit


def last_of_each(states_Md: Tensor, counts: Sequence[int]) -> Tensor:
    """The last state of each row [B, d], where rows of `counts` states follow one another."""
    return states_Md.index_select(0, torch.tensor(list(accumulate(counts)), device=states_Md.device) - 1)
