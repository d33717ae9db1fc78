"""Measures what drafting with a model's own layers depends on; writes docs/results/layers.json, section by section.

    python tools/layer_figures.py spare DATA [--plans FILE ...]       which sublayers the demo model can do without
    python tools/layer_figures.py control QUESTIONS                   what DEL's statistics cost in a round

`spare` scores plans by matchness, as SWIFT does, on answers of DATA: each sublayer left out alone, then greedily one
more at a time (drawn in docs/images/spare.png), and plans that `foretell generate --drafter swift -o plan=FILE` found.
`control` decodes questions with DEL, which reads its exits every fourth step by default, and at every step: the trained
exits with their draft vocabulary, over the whole vocabulary, and with every layer as an exit.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import core_figures as core
import cost_model
import torch

import foretell
from foretell.api import LLM
from foretell.backbone import Backbone, Nodes
from foretell.bench.suites import load_suite
from foretell.cli.terminal import job_progress
from foretell.contracts import Drafter
from foretell.drafters.dynamic_exit import DEL
from foretell.drafting.early_exit import candidates
from foretell.drafting.kernels import kernels_for
from foretell.drafting.skip_plan import Plan
from foretell.train.data import ConversationStore

IMAGE = core.RESULTS.parents[1] / "images/spare.png"
WINDOW, TEXTS, TRIED = 32, 48, 24
"""Tokens of a text that a plan is scored on; texts; sublayers tried at each step of the greedy search."""


class Matchness:
    """Scores plans on the beginnings of answers that the model wrote."""

    def __init__(self, backbone: Backbone, data: Path):
        self.backbone, rng = backbone, random.Random(0)
        long = [
            each for each in ConversationStore.open(data).conversations if each.answers[0][1] - each.answers[0][0] > 60
        ]
        self.texts: list[list[int]] = []
        for each in rng.sample(long, TEXTS):
            start, end = each.answers[0]
            self.texts.append(each.tokens[: min(start + 10 + rng.randrange(20), end - WINDOW - 1) + WINDOW + 1])
        self.cache = backbone.new_cache(TEXTS, max(map(len, self.texts)) + 1)
        for slot, text in enumerate(self.texts):
            known = len(text) - WINDOW - 1
            backbone.run_layers(
                backbone.embed(torch.tensor(text[:known])), Nodes.chains([slot], [0], [known]), self.cache
            )
            self.cache.commit([slot], [range(known)])

    def __call__(self, plan: Plan) -> float:
        bits, right = plan.bits(self.backbone.config.layers), 0
        for at in range(0, TEXTS, 4):
            slots = list(range(at, min(at + 4, TEXTS)))
            nodes = Nodes.chains(slots, [self.cache.lengths[slot] for slot in slots], [WINDOW] * len(slots))
            ids = torch.tensor([token for slot in slots for token in self.texts[slot][-WINDOW - 1 : -1]])
            hidden_Fd, _ = self.backbone.run_layers(self.backbone.embed(ids), nodes, self.cache, skip=bits)
            guesses = self.backbone.argmax(self.backbone.norm(hidden_Fd)).tolist()
            written = [token for slot in slots for token in self.texts[slot][-WINDOW:]]
            right += sum(a == b for a, b in zip(guesses, written, strict=True))
        return round(right / (TEXTS * WINDOW), 4)


def plan_of(sublayers: Sequence[tuple[str, int]]) -> Plan:
    kinds = [tuple(sorted(layer for kind, layer in sublayers if kind == which)) for which in ("attention", "mlp")]
    return Plan(*kinds)


def pass_costs(backbone: Backbone, plans: dict[str, Plan], context: int = 300, repeats: int = 60) -> dict[str, float]:
    """Measures a token's cost under each plan, as a share of the whole model's; in turns, medians."""
    head = kernels_for(backbone).heads([], [backbone.head_rows(torch.arange(backbone.config.vocab))])
    cache = backbone.new_cache(1, context + 1)
    backbone.run_layers(backbone.embed(torch.arange(1, context + 1)), Nodes.chains([0], [0], [context]), cache)
    cache.commit([0], [range(context)])
    nodes, x_Fd = Nodes.chains([0], [context], [1]), backbone.embed(torch.tensor([5]))

    def whole() -> None:
        backbone.argmax(backbone.norm(backbone.run_layers(x_Fd, nodes, cache)[0]))

    def drafting(bits: bytes) -> Callable[[], None]:
        return lambda: head.top(backbone.norm(backbone.run_layers(x_Fd, nodes, cache, skip=bits)[0]), [[0]], 1) and None

    calls = {"whole": whole} | {name: drafting(plan.bits(backbone.config.layers)) for name, plan in plans.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: round(median(seconds[name]) / median(seconds["whole"]), 3) for name in plans}


def section_spare(args: argparse.Namespace) -> Any:
    backbone = foretell.load(args.model, dtype="bf16", weights="bf16").backbone
    matchness, layers = Matchness(backbone, args.path), backbone.config.layers
    sublayers = [(kind, layer) for kind in ("attention", "mlp") for layer in range(1, layers - 1)]
    alone = {each: matchness(plan_of([each])) for each in sublayers}
    chosen: list[tuple[str, int]] = []
    greedy = []
    with job_progress("sublayers left out", "") as progress:
        for number in range(25):
            left = sorted((each for each in sublayers if each not in chosen), key=lambda each: -alone[each])[:TRIED]
            scores = {each: matchness(plan_of([*chosen, each])) for each in left}
            chosen.append(max(left, key=lambda each: scores[each]))
            greedy.append(scores[chosen[-1]])
            progress(number + 1, 25, 0)
    counts = [1, 5, 10, 15, 20, 25]
    plans = {f"{count} left out": plan_of(chosen[:count]) for count in counts}
    odd = tuple(range(1, layers - 1, 2))
    found = {path.stem: Plan.load(path, backbone) for path in args.plans}
    costs = pass_costs(backbone, plans | {name: plan for name, (plan, _) in found.items()})
    result = {
        "model": args.model, "sublayers": len(sublayers), "tokens": TEXTS * WINDOW,
        "alone": {kind: [alone[kind, layer] for layer in range(1, layers - 1)] for kind in ("attention", "mlp")},
        "greedy": greedy, "order": [f"{kind} {layer}" for kind, layer in chosen],
        "every second layer": matchness(Plan(odd, odd)),
        "found": {
            name: {"skipped": len(plan.attention) + len(plan.mlp), "matchness_then": then, "matchness": matchness(plan)}
            for name, (plan, then) in found.items()
        },
        "cost": costs,
    }  # fmt: skip
    draw(result)
    return result


def draw(spare: dict[str, Any]) -> None:
    """Draws the matchness that plans reach, and what they need to pay."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = {int(name.split()[0]): cost for name, cost in spare["cost"].items() if name.endswith("left out")}
    figure, axes = plt.subplots(figsize=(6.5, 3.6))
    axes.plot(range(len(spare["greedy"]) + 1), [1.0, *spare["greedy"]], "o-", markersize=3, label="matchness reached")
    axes.plot(list(costs), list(costs.values()), "k--", label="needed to break even")  # what a token costs
    wanted = {count: cost_model.needed(1.3, cost) for count, cost in costs.items()}
    reachable = {count: share for count, share in wanted.items() if share <= 1}
    axes.plot(list(reachable), list(reachable.values()), "k:", label="needed for 1.3×")
    axes.set(
        xlabel=f"of {spare['sublayers']} sublayers left out, the most harmful last", ylabel="matchness", ylim=(0, 1.02)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(IMAGE, dpi=130)
    plt.close(figure)


class Timed:
    """A callable that sums the seconds of its calls."""

    def __init__(self, call: Callable[..., Any]):
        self.call, self.seconds = call, 0.0

    def where(self, counts: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a callable that times only calls whose arguments satisfy `counts`."""
        return lambda *args: self(*args) if counts(*args) else self.call(*args)

    def __call__(self, *args: Any) -> Any:
        began = time.perf_counter()
        try:
            return self.call(*args)
        finally:
            self.seconds += time.perf_counter() - began


def section_control(args: argparse.Namespace) -> Any:
    """Measures DEL's statistics (`observe`) and its choice of an exit, interleaved question by question."""
    llm = foretell.load(args.model, dtype="bf16", weights="bf16")
    backbone = llm.backbone
    ids_V, arch, _ = candidates(backbone, "", False)
    every, size = list(range(1, backbone.config.layers)), lambda *_: 16
    kinds: dict[str, Drafter] = {
        "the exits that learnt, every fourth step": DEL(backbone, ids_V, arch["exits"], size),
        "the same, every step": DEL(backbone, ids_V, arch["exits"], size, every=1),
        "over the whole vocabulary, every step": DEL(backbone, None, arch["exits"], size, every=1),
        "every layer an exit, every step": DEL(backbone, ids_V, every, size, every=1),
        "both, every step, as published": DEL(backbone, None, every, size, every=1),
    }
    runs = {"plain": llm} | {name: LLM(backbone, llm.tokenizer, each, llm.folder) for name, each in kinds.items()}
    clocks: dict[str, tuple[Timed, Timed]] = {}
    for name, drafter in kinds.items():
        assert isinstance(drafter, DEL)
        clocks[name] = [observed, chose] = Timed(drafter.observe), Timed(drafter.statistics.choose)
        drafter.observe = observed.where(lambda rows, features: features.paths)  # not while a prompt is read
        drafter.statistics.choose = chose
    rows: dict[str, list[Any]] = {name: [] for name in runs}
    questions = load_suite(str(args.path)).questions[:: args.every]
    with job_progress("questions", "") as progress:
        for number, question in enumerate(["Hello there.", *(each.turns[0] for each in questions)]):
            for name, run in runs.items():
                rows[name].append(run.generate(llm.encode(question), max_new_tokens=args.new_tokens, adapt=False))
                if not number:  # warmed up
                    rows[name].clear()
                    for clock in clocks.get(name, ()):
                        clock.seconds = 0.0
            progress(number + 1, len(questions) + 1, 0)
    plain = rows["plain"]
    step = (
        1e3 * sum(a.statistics.seconds - a.statistics.prefill_seconds for a in plain) / sum(len(a.ids) for a in plain)
    )
    out: dict[str, Any] = {
        "model": args.model, "questions": len(questions), "new_tokens": args.new_tokens,
        "plain_step_ms": round(step, 3),
        "same_ids": all(a.ids == b.ids for each in rows.values() for a, b in zip(each, plain, strict=True)),
    }  # fmt: skip
    for name, times in clocks.items():
        steps = sum(answer.statistics.steps for answer in rows[name])
        observed, chose = (1e3 * clock.seconds / steps for clock in times)
        out[name] = {
            "exits": len(kinds[name].taps) - 1,
            "tokens_per_step": round(sum(len(answer.ids) for answer in rows[name]) / steps, 3),
            "observe_ms": round(observed, 3), "choose_ms": round(chose, 3),
            "share_of_a_plain_step": round((observed + chose) / step, 3),
        }  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["spare", "control"])
    parser.add_argument("path", type=Path, help="folder of distilled data, or questions")
    parser.add_argument("--model", default="", help="by default the demo model, for `control` with its exits trained")
    parser.add_argument("--plans", type=Path, nargs="*", default=[])
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    args.model = args.model or core.MODEL + ("+layerskip" if args.section == "control" else "")
    torch.manual_seed(0)
    core.RESULTS = core.RESULTS.with_name("layers.json")
    core.save(args.section, {"spare": section_spare, "control": section_control}[args.section](args))


if __name__ == "__main__":
    main()
