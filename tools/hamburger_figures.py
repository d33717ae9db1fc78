"""Measures what fused decoding gains and loses; writes docs/results/hamburger.json.

    python tools/hamburger_figures.py --checkpoint FOLDER --data FOLDER --questions FILE [--every 5] [--new-tokens 128]

The model of the checkpoint and the one it was made from are compared. Perplexity of held-out answers and of human texts
(the references in FILE): the base and the changed model one token at a time, and the changed model in segments, cut by
the base's entropies as in training. For each confidence, on the questions, greedy: tokens of a macro step, slots a
token, the share of the tokens that one-token decoding of the same weights would choose, and their perplexity under the
base; ROUGE-L of summaries.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import core_figures as core
import torch
from quality_figures import log_p_and_best
from torch import Tensor

import foretell
from foretell.api import LLM
from foretell.backbone import Nodes
from foretell.contracts import FINAL_NORM, Fused
from foretell.drafters.hamburger.segments import SURE, entropy_at, segment
from foretell.drafting import checkpoint
from foretell.train.data import ConversationStore

CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9)


def entropies(llm: LLM, tokens: Sequence[int], start: int) -> list[float]:
    """Returns the entropy of the model's distribution of each of tokens[start:], in nats."""
    nodes = Nodes.chains([0], [0], [len(tokens) - 1])
    states = llm.backbone.forward(torch.tensor(tokens[:-1]), nodes, llm.backbone.new_cache(1, len(tokens)))
    log_p = llm.backbone.logits(states[start - 1 :]).log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1)).tolist()


def fused_log_p(llm: LLM, fused: Fused, tokens: Sequence[int], start: int, sizes: Sequence[int]) -> list[float]:
    """Returns the log-probability of each of tokens[start:], written in segments of these sizes."""
    backbone, ends = llm.backbone, list(accumulate(sizes, initial=start))
    segments = [
        *([token] for token in tokens[:start]),
        *(list(tokens[a:b]) for a, b in pairwise(ends)),
    ]
    positions = [*range(start), *(end - 1 for end in ends[1:])]
    nodes = Nodes.chains([0], [0], [len(segments)])
    nodes = Nodes(nodes.trees, [0], [0], positions=torch.tensor(positions))
    layers = [tap for tap in fused.taps if tap != FINAL_NORM]
    cache = backbone.new_cache(1, len(segments))
    hidden, taps = backbone.run_layers(fused.fuse(segments), nodes, cache, taps=layers)
    taps[FINAL_NORM] = backbone.norm(hidden)
    features = torch.stack([taps[tap] for tap in fused.taps], 1)
    own, found = fused.new_cache(1), list[float]()
    for index, written in enumerate(segments[start:]):
        states: Tensor = features[start - 1 + index : start + index, -1]
        micro = fused.begin(features[start - 1 + index : start + index], own)
        for place, token in enumerate(written):
            found.append(float(backbone.logits(states)[0].log_softmax(-1)[token]))
            if place + 1 < len(written):
                states = micro.run([0], [token])
    return found


def perplexities(base: LLM, changed: LLM, texts: Sequence[tuple[list[int], int]], rule: str) -> dict[str, float]:
    """Returns the perplexity of the end of each text, from the index given on, in three ways."""
    assert changed.drafter.fused
    sums, count, segments = dict.fromkeys(("base", "changed", "fused"), 0.0), 0, 0
    for tokens, start in texts:
        least = entropy_at(SURE, base.backbone.config.vocab)
        sizes = segment(entropies(base, tokens, start), changed.drafter.fused.most, rule, least)
        sums["base"] += log_p_and_best(base.backbone, tokens, start)[0]
        sums["changed"] += log_p_and_best(changed.backbone, tokens, start)[0]
        sums["fused"] += math.fsum(fused_log_p(changed, changed.drafter.fused, tokens, start, sizes))
        count, segments = count + len(tokens) - start, segments + len(sizes)
    found = {name: round(math.exp(-value / count), 4) for name, value in sums.items()}
    return found | {"tokens": count, "slots_per_token": round(segments / count, 4)}


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004)."""
    a, b = answer.lower().split(), reference.lower().split()
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
        above = row
    return 2 * above[-1] / (len(a) + len(b)) if a and b else 0.0


def decoded(base: LLM, changed: LLM, questions: Sequence[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    """Returns figures of greedy answers as `changed` decodes now."""
    tokens = steps = slots = chosen = 0
    log_p, rouge = 0.0, list[float]()
    for question in questions:
        prompt = changed.encode(question["turns"][0])
        result = changed.generate(prompt, max_new_tokens=new_tokens)
        stats = result.statistics
        tokens, steps, slots = tokens + stats.new_tokens, steps + stats.steps, slots + stats.slots
        chosen += log_p_and_best(changed.backbone, prompt + result.ids, len(prompt))[1]
        log_p += log_p_and_best(base.backbone, prompt + result.ids, len(prompt))[0]
        if question["category"] == "summarization":
            rouge.append(rouge_l(result.text, question["reference"][0]))
    return {
        "tokens_per_step": round(tokens / steps, 4), "slots_per_token": round(slots / tokens, 4),
        "agreement": round(chosen / tokens, 4), "perplexity_under_base": round(math.exp(-log_p / tokens), 4),
        "rouge_l": round(sum(rouge) / len(rouge), 4) if rouge else None, "tokens": tokens,
    }  # fmt: skip


def held_out(folder: Path, provenance: dict[str, Any], most: int) -> list[tuple[list[int], int]]:
    """Returns the first answers of conversations that the training has held out."""
    from foretell.train.trainer import Settings, held_out_of

    store = ConversationStore.open(folder)
    settings = Settings(**provenance["settings"])
    members = held_out_of(store.conversations, range(len(store.conversations)), settings)
    talks = [store.conversations[i] for i in members][:most]
    return [(talk.tokens[: talk.answers[0][1]], talk.answers[0][0]) for talk in talks if talk.answers[0][0]]


def figures(args: argparse.Namespace) -> dict[str, Any]:
    found, _ = checkpoint.load(
        args.checkpoint / "drafter" if (args.checkpoint / "drafter").is_dir() else args.checkpoint
    )
    base = foretell.load(args.base, weights="bf16")
    rule = found.provenance["options"]["rule"]
    given = {"checkpoint": str(args.checkpoint), "mode": "fused"}
    changed = foretell.load(found.backbone, "hamburger", **given)
    assert changed.drafter.fused
    questions = [json.loads(line) for line in args.questions.read_text().splitlines()][:: args.every]
    for question in questions:
        for key in ("turns", "reference"):
            if isinstance(question.get(key), str):
                question[key] = json.loads(question[key])
    human = [
        (base.encode(q["turns"][0]), q["reference"][0])
        for q in questions
        if isinstance((q.get("reference") or [0])[0], str)
    ]
    texts = {
        "held_out_answers": held_out(args.data, found.provenance, args.texts),
        "human_texts": [
            (prompt + told, len(prompt))
            for prompt, text in human if len(told := base.tokenizer.encode_raw(text)) > 1
        ][: args.texts],
    }  # fmt: skip
    out: dict[str, Any] = {"model": found.backbone, "perplexity": {
        name: perplexities(base, changed, those, rule) for name, those in texts.items()
    }}  # fmt: skip
    print(json.dumps(out, indent=1), flush=True)
    out["confidence"] = {}
    for confidence in (*CONFIDENCES, 1.01):
        changed.drafter.fused.confidence = confidence
        name = str(confidence) if confidence <= 1 else "one token a step"
        out["confidence"][name] = decoded(base, changed, questions, args.new_tokens)
        print(name, out["confidence"][name], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder that `foretell train hamburger` wrote")
    parser.add_argument("--base", default="smollm2-135m", help="the model before its training")
    parser.add_argument("--data", type=Path, required=True, help="the data that it was trained on")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with turns, category and reference")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--texts", type=int, default=60, help="of each kind")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--label", default="", help="appended to the section's name")
    args = parser.parse_args()
    core.RESULTS = core.RESULTS.with_name("hamburger.json")
    core.save(" ".join(filter(None, ["fused", args.label])), figures(args))


if __name__ == "__main__":
    main()
