"""SWIFT: the model drafts with some of its sublayers left out; which ones is searched for while it decodes.

Nothing is trained. A draft is a chain: token by token all layers run under a plan of sublayers to skip (`skip_plan`),
until a token is less probable than a threshold. The sublayers that are kept attend to the keys that the whole model
wrote for the committed tokens, and to the draft's own, which verification writes anew. Each token of the chain has the
next best ones as siblings, more of them where the model was unsure: a comb, of which the chain takes the first slots.
SWIFT, arXiv 2410.06916, §4. Here trees have a size: the chain is kept, and the most probable siblings fill it.

Skipping half of the sublayers still costs half a step a token, so a plan must be right nine times in ten to pay; large
models have such plans, small ones hardly (docs/own-layers.md).

Legend: F frontier nodes, one a row; R guesses of a node.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foretell.backbone import Backbone, KVCache, Nodes
from foretell.contracts import Draft, Drafter, Features, Row
from foretell.drafting.kernels import kernels_for
from foretell.drafting.lower_layers import MAX_TREE_NODES, EarlyExitTrees
from foretell.drafting.options import option
from foretell.drafting.skip_plan import Plan, PlanSearch
from foretell.drafting.threshold import AcceptanceTracker, Threshold
from foretell.drafting.tree_size import tree_size
from foretell.errors import ForetellError, UsageError
from foretell.trees.calibration import Floats

SIBLINGS = ((0.95, 3), (0.8, 5), (0.5, 8), (0.0, 10))
"""(probability of a token of the chain above this, guesses at its position, itself included), greedy, §4.2."""


class Swift(Drafter):
    """Drafts with some of the sublayers.

    Args:
        search: for the plan.
        window: tokens that candidates are scored on; every: steps between two candidates.
        steps: most tokens of a chain; nodes: of a tree, root included.
        threshold: a chain ends after a token less probable than this.
        path: where the plan is kept.
    """

    usual_cost = 1.5  # some three tokens at half a step each

    @dataclass(frozen=True)
    class Options:
        plan: str = option("", "File that a plan is read from, and that a better one is written to.")
        search: bool = option(True, "Look for plans while decoding.")
        ratio: float = option(0.45, "Share of the sublayers that are skipped.", low=0, high=1)
        window: int = option(32, "Tokens that candidates are scored on.", low=1, high=1024)
        every: int = option(1, "Steps between two candidates.", low=1, high=1 << 20)
        nodes: int = option(0, "Tree size, root included; by default what would pay most here.", low=0)
        steps: int = option(25, "Tokens of a chain, at most.", low=0, high=MAX_TREE_NODES - 1)
        threshold: float = option(0.8, "A chain ends after a token less probable than this.", low=0, high=1)
        adaptive: bool = option(False, "Let the threshold follow how many drafts are accepted, as in Draft & Verify.")

    def __init__(
        self, backbone: Backbone, search: PlanSearch, window: int = 32, every: int = 1, steps: int = 25,
        nodes: int = 16, threshold: Threshold | None = None, path: Path | None = None,
    ):  # fmt: skip
        self._backbone, self.depth = backbone, backbone.config.layers
        self.search, self.window, self.every, self._path = search, window, every, path
        self.steps, self.nodes = steps, nodes
        self.tracker = AcceptanceTracker(threshold or Threshold(0.8))
        self._saved_score = search.score  # matchness of the plan in the file
        self._head = kernels_for(backbone).heads([], [backbone.head_rows(torch.arange(backbone.config.vocab))])
        self._width = min(SIBLINGS[-1][1], backbone.config.vocab)
        self._cache: KVCache | None = None
        self._round = 0
        self._scratch = backbone.new_cache(1, 0)  # for candidates
        self._searching = threading.Lock()  # engines share the search

    @classmethod
    def build(cls, backbone: Backbone, options: Options) -> Swift:
        """See `Drafter.build`."""
        path, search = Path(options.plan).expanduser() if options.plan else None, options.search
        found, score = Plan.load(path, backbone) if path and path.exists() else (None, -1.0)
        if path and not path.exists() and not search:
            raise UsageError(f"There is no plan {path}; let one be found (`search=True`), or name another file.")
        if path and search and not os.access(path.parent, os.W_OK):
            raise ForetellError(f"No plan can be kept in {path.parent}; name a file in a folder that can be written.")
        if search and find_spec("optuna") is None:
            if found is None:
                raise UsageError(
                    "A search for plans needs optuna (pip install 'foretell[search]'); or name a plan found earlier "
                    "with `plan='FILE'`."
                )
            search = False
        plans = PlanSearch(backbone.config.layers, options.ratio, found, score, search)
        nodes = tree_size(backbone, options.nodes, {}, "swift", cls.usual_cost, MAX_TREE_NODES)(1, 0)
        threshold = Threshold(options.threshold, options.adaptive)
        return cls(backbone, plans, options.window, options.every, options.steps, nodes, threshold, path)

    @property
    def max_nodes(self) -> int:
        return MAX_TREE_NODES

    def bind(self, cache: KVCache) -> None:
        self._cache, self._scratch = cache, self._backbone.new_cache(1, 0)
        self.tracker = self.tracker.attached()

    def observe(self, rows: Sequence[Row], features: Features) -> None:
        with self._searching:
            for accepted, verified in self.tracker.record_outcome(rows, features):
                self.search.record_acceptance(accepted, verified)

    def draft(self, rows: Sequence[Row]) -> Draft:
        assert self._cache is not None, "the engine binds its cache first"
        self._round += 1
        if self.search.searching and self._round % self.every == 0:
            self._score_candidate(rows)
        trees = EarlyExitTrees(self._backbone, self._cache, rows, skip=self.search.plan.bits(self.depth))
        count = self.nodes - 1
        thresholds = [self.tracker.threshold.value] * len(rows)
        draft = trees.grow(self.depth, self._guesses, count, min(self.steps, count), thresholds=thresholds)
        self.tracker.record_draft(rows, draft, min(self.steps, count))
        return draft

    def _guesses(self, hidden_Fd: Tensor, nodes: Nodes) -> tuple[Floats, list[list[int]]]:
        """The best tokens of each node, as many as `siblings` says."""
        which = np.arange(len(hidden_Fd))[:, None].tolist()
        log_probs_FKR, best_FKR = self._head.top(self._backbone.norm(hidden_Fd), which, self._width)
        log_probs_FR = log_probs_FKR[:, 0].cpu().numpy().copy()
        for log_probs_R in log_probs_FR:
            log_probs_R[siblings(float(np.exp(log_probs_R[0]))) :] = -np.inf
        return log_probs_FR, best_FKR[:, 0].tolist()

    def _score_candidate(self, rows: Sequence[Row]) -> None:
        """Scores one candidate on the newest tokens of the row with the longest answer."""
        row = max(rows, key=lambda row: len(row.tokens) - row.prompt_length)
        if len(row.tokens) - row.prompt_length <= self.window:
            return
        with self._searching:
            score = self.matchness(self.search.candidate(), row)
            if self.search.record(score) and self._path and score > self._saved_score:
                self.search.plan.save(self._path, self._backbone, score)
                self._saved_score = score

    def matchness(self, plan: Plan, row: Row) -> float:
        """Share of the last `window` tokens that the model also writes under a plan."""
        assert self._cache is not None
        backbone = self._backbone
        known = self._cache.lengths[row.slot]
        begin = known - min(self.window, known)
        self._scratch.copy(self._cache, row.slot, begin)
        self._scratch.reserve({0: known})
        nodes, ids = Nodes.chains([0], [begin], [known - begin]), torch.tensor(row.tokens[begin:known])
        hidden_Wd, _ = backbone.run_layers(backbone.embed(ids), nodes, self._scratch, skip=plan.bits(self.depth))
        which = np.arange(len(hidden_Wd))[:, None].tolist()
        best_W = self._head.top(backbone.norm(hidden_Wd), which, 1)[1].flatten().tolist()
        written = row.tokens[begin + 1 : known + 1]
        return sum(one == other for one, other in zip(best_W, written, strict=True)) / len(written)


def siblings(confidence: float) -> int:
    """Guesses at a position of the chain, the chain's own included."""
    return next(count for above, count in SIBLINGS if confidence > above or not above)
