"""Which sublayers a draft may leave out, found while decoding (SWIFT, arXiv 2410.06916, §3.2 and §4.1).

A plan leaves out a fixed number of attention blocks and MLPs, never of the first and the last layer. Candidates are
scored by matchness: the share of the tokens just written by the whole model that the plan, run once over them, would
have written too. Most candidates are random; every so often a sampler (optuna's TPE) proposes one from all scores so
far; the best is kept. A search ends when a plan is good enough, or after many candidates without a better one.

Differences: the tokens are the latest, where the reference takes the first of an answer, and the sampler is not a
Gaussian process. The reference searches once; this search starts again when the text changes, that is, once drafts
are accepted clearly less often than after the plan was found.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from foretell.backbone import Backbone
from foretell.backbone.base import SKIP_ATTENTION, SKIP_MLP
from foretell.errors import ForetellError, UsageError, check_numbers
from foretell.files import read_json, write_errors, write_json
from foretell.loading.catalog import current

ENOUGH = 0.95
"""Matchness at which a search ends."""
TOLERANCE, TRIALS = 300, 1000
"""Candidates without improvement, and candidates in all, after which it ends."""
BAYES = 25
"""One candidate in so many comes from the sampler."""
USUAL, RECENT, DROP, SURE = 256, 128, 0.15, 4
"""Drafted tokens that give the usual, and the recent, acceptance; the least drop that means another kind of text, as a
share and in standard errors."""


@dataclass(frozen=True)
class Plan:
    """Layers (from 0) whose attention, and whose MLP, is left out."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    def bits(self, layers: int) -> bytes:
        """As `Backbone.run_layers` takes it."""
        both = zip(range(layers), range(layers), strict=True)
        return bytes(SKIP_ATTENTION * (a in self.attention) + SKIP_MLP * (m in self.mlp) for a, m in both)

    def save(self, path: Path, backbone: Backbone, score: float) -> None:
        content = {
            "backbone": backbone.fingerprint, "layers": backbone.config.layers, "matchness": round(score, 4),
            "attention": self.attention, "mlp": self.mlp,
        }  # fmt: skip
        with write_errors(path.parent):
            write_json(path, content)

    @classmethod
    def load(cls, path: Path, backbone: Backbone) -> tuple[Plan, float]:
        """Returns a saved plan and its matchness.

        Raises:
            ForetellError, UsageError: the file is damaged, or of another model.
        """
        raw = read_json(path)
        try:
            writer, layers, score = current(str(raw["backbone"])), raw["layers"], float(raw["matchness"])
            plan = cls(tuple(map(int, raw["attention"])), tuple(map(int, raw["mlp"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ForetellError(f"{path} is not a skip plan; name another file with `plan=`.") from error
        if (writer, layers) != (backbone.fingerprint, backbone.config.layers):
            raise UsageError(
                f"{path} was found for another model (fingerprint {writer}, {layers} layers), not for this one "
                f"({backbone.fingerprint}, {backbone.config.layers}); let one be found under another name."
            )
        inner = range(1, layers - 1)
        if not set(plan.attention) | set(plan.mlp) <= set(inner):
            raise ForetellError(f"{path} skips layers outside 1 to {layers - 2}; name another file with `plan=`.")
        return plan, score


class PlanSearch:
    """Proposes plans, records their scores, and keeps the best.

    Args:
        ratio: share of the sublayers between first and last layer that are left out.
        plan, score: the first plan and its matchness; by default both sublayers of every second layer.
        enabled: whether to search at all.

    Attributes:
        plan: the best so far; score: its matchness when it was found, -1 if unknown.
        searching: whether the search goes on; trials: candidates scored.
    """

    def __init__(
        self, layers: int, ratio: float = 0.45, plan: Plan | None = None, score: float = -1.0, enabled: bool = True,
        seed: int = 1,
    ):  # fmt: skip
        check_numbers(SimpleNamespace(ratio=ratio), [("ratio", 0, 1)])
        if layers < 3:
            raise UsageError(f"A model of {layers} layers has none between its first and last that could be skipped.")
        odd = tuple(range(1, layers - 1, 2))
        self.layers, self.skipped, self.enabled = layers, int(2 * (layers - 2) * ratio), enabled
        self.plan, self.score, self.searching = plan or Plan(odd, odd), score, enabled and plan is None
        self.trials = self._without_gain = 0
        self._rng, self._seed = np.random.default_rng(seed), seed
        self._pending: tuple[Plan, Any] | None = None
        self._study: Any = None
        self._recent: deque[bool] = deque()
        self._usual: float | None = None  # acceptance after the search ended

    def candidate(self) -> Plan:
        """Returns the next plan to be scored; a search starts with the present one."""
        trial = None
        if self.score < 0:
            plan = self.plan
        elif (self.trials + 1) % BAYES == 0:
            trial = self._sampler().ask(self._distributions())
            plan = self._plan_of(np.array([trial.params[str(i)] for i in range(2 * (self.layers - 2))]))
        else:
            plan = self._plan_of(self._rng.random(2 * (self.layers - 2)))
        self._pending = plan, trial
        return plan

    def record(self, score: float) -> bool:
        """Takes the last candidate's score; returns whether it is the best now."""
        assert self._pending is not None
        (plan, trial), self._pending = self._pending, None
        self.trials += 1
        if trial is not None:
            self._sampler().tell(trial, score)
        else:
            self._remember(plan, score)
        better = score > self.score
        self._without_gain = 0 if better else self._without_gain + 1
        if better:
            self.plan, self.score = plan, score
        if self.score > ENOUGH or self._without_gain > TOLERANCE or self.trials > TRIALS:
            self.searching = False
        return better

    def record_acceptance(self, accepted: int, verified: int) -> None:
        """Takes a step's accepted and verified guesses; the search starts again if acceptance drops."""
        if self.searching or not self.enabled:
            return
        self._recent += [True] * accepted + [False] * (accepted < verified)
        if self._usual is None and len(self._recent) >= USUAL:
            self._usual = sum(self._recent) / len(self._recent)
            self._recent = deque(maxlen=RECENT)
        if self._usual is None or len(self._recent) < RECENT:
            return
        error = math.sqrt(self._usual * (1 - self._usual) * (1 / USUAL + 1 / RECENT))
        if sum(self._recent) / RECENT < self._usual - max(DROP, SURE * error):
            self._restart()

    def _restart(self) -> None:
        """Discards the scores of the previous text."""
        self.searching, self.score, self.trials, self._without_gain = True, -1.0, 0, 0
        self._study, self._usual = None, None
        self._recent = deque()

    def _plan_of(self, values: Any) -> Plan:
        """The plan that leaves out the sublayers with the largest values."""
        chosen = np.sort(np.argsort(-values, kind="stable")[: self.skipped])
        inner = self.layers - 2
        return Plan(
            tuple(int(i) + 1 for i in chosen if i < inner), tuple(int(i) - inner + 1 for i in chosen if i >= inner)
        )

    def _sampler(self) -> Any:
        if self._study is None:
            try:
                import optuna
            except ImportError as error:
                raise UsageError(
                    "A search for plans needs optuna (pip install 'foretell[search]'); or name a plan found earlier "
                    "with `plan='FILE'` and `search=False`."
                ) from error
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            sampler = optuna.samplers.TPESampler(seed=self._seed, n_startup_trials=0)
            self._study = optuna.create_study(direction="maximize", sampler=sampler)
        return self._study

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import FloatDistribution

        return {str(i): FloatDistribution(0.0, 1.0) for i in range(2 * (self.layers - 2))}

    def _remember(self, plan: Plan, score: float) -> None:
        """Adds a random candidate's score to the sampler's trials."""
        study = self._sampler()
        from optuna.trial import create_trial

        inner = range(1, self.layers - 1)
        bits = [*(layer in plan.attention for layer in inner), *(layer in plan.mlp for layer in inner)]
        values = {str(i): float(bit) for i, bit in enumerate(bits)}
        study.add_trial(create_trial(params=values, distributions=self._distributions(), value=score))
