"""Counts the tokens per step of drafters by tree size, kind of question and wording: docs/results/breadth.json.

    python tools/breadth_figures.py --questions FILE [--before DRAFTER ...] [--after DRAFTER ...] [--sizes 4 8 16 32]

A DRAFTER is a method whose heads ship with foretell, or METHOD:FOLDER for other heads of it. What is measured under
`--before` and under `--after` stands side by side in docs/training.md, and so do runs at different times.

Greedy answers are plain decoding's whatever drafts them. So plain decoding writes them once, one pass gives all states
that heads read of them, and the drafters' steps over them are counted by `replay`, which takes the steps that decoding
takes where arithmetic is canonical: minutes for all drafters and sizes, and no quiet machine.

Questions are asked as the suite words them and, where it uses fixed words for a kind, in other words too (`rewording`).
Answers that `foretell distill` would call repetitive are counted, and left out in a figure of their own; it judges
longer answers than are counted here, so plain decoding writes those. An interrupted run resumes after the last size
that was counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import core_figures as core
import torch
from breadth_tables import digest
from rewording import reworded

import foretell
from foretell import drafters
from foretell.api import LLM
from foretell.backbone import Backbone
from foretell.bench.suites import Question, load_suite
from foretell.contracts import Drafter
from foretell.drafting import checkpoint
from foretell.drafting.learning.trainable import TrainingBatch
from foretell.engine import SpeculativeDecoder, run
from foretell.errors import ForetellError
from foretell.requests import Request, SamplingParams, Statistics
from foretell.train.data import Distilled
from foretell.train.distill import REPETITIVE, unfit
from foretell.train.features import ComputedFeatures, decoded_states, side_by_side
from foretell.train.replay import replay

SIDES = ("before", "after")
JUDGED = 256
"""Tokens of an answer by which it is called repetitive or not: as many as `distill` writes by default."""


@dataclass(frozen=True)
class Asked:
    """A question in one wording.

    Attributes:
        fixed: whether the suite has fixed words for it.
        reworded: whether it is asked in other words than those.
        repetitive: whether plain decoding's answer runs in circles.
    """

    kind: str
    fixed: bool
    reworded: bool
    prompt: list[int]
    repetitive: bool = False


GROUPS: dict[str, Callable[[Asked], bool]] = {
    "all": lambda asked: not asked.reworded,
    "fixed words": lambda asked: asked.fixed and not asked.reworded,
    "reworded": lambda asked: asked.reworded,
    "own words": lambda asked: not asked.fixed,
}
"""Groups of answers -> whether a question in one wording belongs there. `reworded` holds the questions of `fixed words`
in other words."""


def both_wordings(llm: LLM, questions: Sequence[Question]) -> list[Asked]:
    """Returns the first turn of every question, then those of them that can be reworded."""
    others = [reworded(question.category, question.turns[0]) for question in questions]
    worded = [
        Asked(question.category, other is not None, False, llm.encode(question.turns[0]))
        for question, other in zip(questions, others, strict=True)
    ]
    again = [
        Asked(question.category, True, True, llm.encode(other))
        for question, other in zip(questions, others, strict=True)
        if other is not None
    ]
    return worded + again


def answered(
    backbone: Backbone, prompts: Sequence[list[int]], new_tokens: int, rows: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:  # fmt: skip
    """Returns plain decoding's greedy answers to the prompts, written `rows` at a time.

    Raises:
        ForetellError: an answer failed.
    """
    decoder = SpeculativeDecoder(backbone, drafters.build("plain", backbone), max_rows=rows)
    params, out = SamplingParams(max_new_tokens=new_tokens), list[list[int]]([] for _ in prompts)
    done = 0
    for index, event in run(decoder, [Request(prompt, params) for prompt in prompts]):
        if event.error:
            raise ForetellError(event.error)
        out[index] += event.tokens
        if event.finish_reason:
            done += 1
            progress(done)
    return out


@dataclass(frozen=True)
class Answers:
    """Plain decoding's answers, and what drafters read of them: decoding's own states, not rounded ones.

    Attributes:
        batches: of one conversation each, by its index in `features.data`.
        new_tokens: to which the answers were limited.
    """

    features: ComputedFeatures
    batches: dict[int, TrainingBatch]
    new_tokens: int

    @classmethod
    def of(
        cls, backbone: Backbone, prompts: Sequence[list[int]], ids: Sequence[list[int]], new_tokens: int,
        taps: Collection[int], progress: Callable[[int], None] = lambda done: None,
    ) -> Answers:  # fmt: skip
        pairs, batches = zip(prompts, ids, strict=True), dict[int, TrainingBatch]()
        data = [Distilled(i, prompt + new, [(len(prompt), len(prompt + new))]) for i, (prompt, new) in enumerate(pairs)]
        for index, talk in enumerate(data):
            batches[index] = states(backbone, talk, taps)
            progress(index + 1)
        return cls(ComputedFeatures(backbone, data, sorted(taps)), batches, new_tokens)

    def steps(self, drafter: Drafter, progress: Callable[[int], None] = lambda done: None) -> list[Statistics]:
        """Returns what a drafter's steps over each answer count."""
        return replay(drafter, self.features, range(len(self.batches)), progress, self.batches, self.new_tokens)


def states(backbone: Backbone, talk: Distilled, taps: Collection[int]) -> TrainingBatch:
    """Returns the states of a conversation, and no teacher's distribution."""
    tokens_BT, supervised_BT = side_by_side([talk])
    none_BT0 = torch.zeros(*tokens_BT.shape, 0)
    found = {tap: states_Td[None].float() for tap, states_Td in decoded_states(backbone, [talk], taps).items()}
    return TrainingBatch(tokens_BT, supervised_BT, found, none_BT0.long(), none_BT0)


# -- figures -----------------------------------------------------------------------------------------------------------


def grouped(asked: Sequence[Asked], counted: Sequence[Statistics]) -> dict[str, Any]:
    """Returns the figures of each group of answers."""
    pairs = list(zip(asked, counted, strict=True))
    found = {name: [pair for pair in pairs if belongs(pair[0])] for name, belongs in GROUPS.items()}
    return {name: figures(group) for name, group in found.items() if group}


def figures(pairs: Sequence[tuple[Asked, Statistics]]) -> dict[str, Any]:
    """Returns tokens per step of some answers, of those among them that are not repetitive, by kind and by depth."""
    sound = [pair for pair in pairs if not pair[0].repetitive]
    kinds = dict.fromkeys(asked.kind for asked, _ in pairs)
    return {
        "tokens_per_step": tokens_per_step(pairs),
        "without_repetitive": tokens_per_step(sound),
        "by_kind": {kind: tokens_per_step([pair for pair in pairs if pair[0].kind == kind]) for kind in kinds},
        "accepted_by_depth": accepted_by_depth([counted for _, counted in pairs]),
    }


def answers(asked: Sequence[Asked]) -> dict[str, Any]:
    """Returns the number of answers of each group and how many are repetitive, and the number of each kind."""
    groups = {name: [each for each in asked if belongs(each)] for name, belongs in GROUPS.items()}
    kinds = [each.kind for each in groups["all"]]
    return {
        name: {"answers": len(group), "repetitive": sum(each.repetitive for each in group)}
        for name, group in groups.items()
    } | {"by_kind": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}}


def tokens_per_step(pairs: Sequence[tuple[Asked, Statistics]]) -> float | None:
    """Returns all tokens over all steps; None where there are no answers."""
    steps = sum(counted.steps for _, counted in pairs)
    return round(sum(counted.new_tokens for _, counted in pairs) / steps, 4) if steps else None


def accepted_by_depth(each: Sequence[Statistics]) -> list[float]:
    """Returns, by depth, the share of the steps with a guess there that accepted one."""
    depths = [statistics.by_depth for statistics in each]
    deepest = max(map(len, depths), default=0)
    sums = [[sum(of[at][i] for of in depths if at < len(of)) for i in (0, 1)] for at in range(deepest)]
    return [round(kept / offered, 3) for offered, kept in sums]


# -- drafters ----------------------------------------------------------------------------------------------------------


def folder_of(method: str, folder: str, backbone: Backbone) -> Path | None:
    """Returns the folder of a method's heads: the one named, else the one that ships; None for a method without."""
    return Path(folder) if folder else checkpoint.shipped(backbone).get(method)


def section(
    backbone: Backbone, side: str, method: str, folder: str, asked: Sequence[Asked], known: Answers, args: Any
) -> None:
    """Counts one drafter at every size, without and with lookup merged, and saves after each."""
    of = {
        "model": args.model, "heads": digest(folder_of(method, folder, backbone)), "questions": args.suite.digest,
        "answers": answers(asked), "new_tokens": args.new_tokens,
    }  # fmt: skip
    name = f"{method} {side}"
    before = core.read().get(name, {}).get("result", {})
    result = of | {"sizes": before["sizes"] if {key: before.get(key) for key in of} == of else {}}
    for size in args.sizes:
        for lookup in (False, True):
            label = f"{size} with lookup" if lookup else f"{size}"
            if label in result["sizes"]:
                continue
            drafter, began = built(backbone, method, folder, lookup=lookup, nodes=size), time.perf_counter()
            counted = known.steps(drafter, shown(f"{name}, {label}", len(asked)))
            result["sizes"][label] = grouped(asked, counted)
            core.save(name, result, shown=False)
            figure = result["sizes"][label]["all"]["tokens_per_step"]
            print(f"{name}, {label}: {figure:.3f} tokens per step, {time.perf_counter() - began:.0f} s", flush=True)


def built(backbone: Backbone, method: str, folder: str, **options: Any) -> Drafter:
    return drafters.build(method, backbone, **options, **({"checkpoint": folder} if folder else {}))


def shown(what: str, total: int) -> Callable[[int], None]:
    """Returns a function that shows the progress of a run on a terminal."""

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done} of {total} answers", end="\r" if done < total else "\n", file=sys.stderr)

    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--before", nargs="+", default=[], metavar="DRAFTER")
    parser.add_argument("--after", nargs="+", default=[], metavar="DRAFTER")
    parser.add_argument("--model", default=core.MODEL)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16, help="answers written side by side")
    parser.add_argument("--results", type=Path, default=core.RESULTS.with_name("breadth.json"))
    args = parser.parse_args()
    if not args.before + args.after:
        parser.error("name a drafter: --after hydra++, or --before hydra++:FOLDER for other heads.")
    core.RESULTS, args.suite = args.results, load_suite(args.questions)
    named = [(side, *drafter.split(":", 1), "")[:3] for side in SIDES for drafter in getattr(args, side)]
    llm = foretell.load(args.model, dtype="bf16", weights="bf16")
    backbone = llm.backbone
    if backbone.nondeterminism:
        raise ForetellError(f"One pass does not give decoding's states here: {backbone.nondeterminism}.")
    asked = both_wordings(llm, args.suite.chosen(args.every, args.limit).questions)
    prompts, longest = [each.prompt for each in asked], max(args.new_tokens, JUDGED)
    written = answered(backbone, prompts, longest, args.rows, shown("plain decoding", len(prompts)))
    asked = [
        replace(each, repetitive=unfit(ids[:JUDGED]) == REPETITIVE) for each, ids in zip(asked, written, strict=True)
    ]
    print(json.dumps(answers(asked)), flush=True)
    taps = {tap for _, method, folder in named for tap in built(backbone, method, folder).taps}
    kept, progress = [ids[: args.new_tokens] for ids in written], shown("states", len(prompts))
    known = Answers.of(backbone, prompts, kept, args.new_tokens, taps, progress)
    for side, method, folder in named:
        section(backbone, side, method, folder, asked, known, args)


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"error: {error}")
