"""Measures what a backbone lost in training together with heads; writes docs/results/quality.json.

    python tools/quality_figures.py BASE+ADAPTER --questions FILE [--every 5] [--new-tokens 128]

On human texts (the references in FILE): perplexity of both models. On the base model's answers to the questions: the
share of tokens that the changed model would choose too, and its perplexity. On the GSM8K problems among the questions:
exact match of both models' answers, and perplexity of the reference solutions, since a small model may solve none.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import core_figures as core
import torch

import foretell
from foretell.api import LLM
from foretell.backbone import Backbone, Nodes
from foretell.bench.quality import judge
from foretell.bench.suites import SUMS, load_suite


def scored(backbone: Backbone, tokens: list[int], start: int = 1) -> list[tuple[float, int]]:
    """Returns for each of tokens[start:] its log-probability, and the most probable token in its place."""
    nodes = Nodes.chains([0], [0], [len(tokens) - 1])
    states_Md = backbone.forward(torch.tensor(tokens[:-1]), nodes, backbone.new_cache(1, len(tokens)))
    log_p_PV = backbone.logits(states_Md[start - 1 :]).log_softmax(-1)
    told_P = torch.tensor(tokens[start:], device=log_p_PV.device)
    return list(zip(log_p_PV.gather(1, told_P[:, None])[:, 0].tolist(), log_p_PV.argmax(1).tolist(), strict=True))


def log_p_and_best(backbone: Backbone, tokens: list[int], start: int) -> tuple[float, int]:
    """Returns the sum of the log-probabilities of tokens[start:], and how many of them are the most probable ones."""
    found = scored(backbone, tokens, start)
    return math.fsum(log_p for log_p, _ in found), sum(a == b for (_, a), b in zip(found, tokens[start:], strict=True))


def figures(llm: LLM, texts: dict[str, list[tuple[list[int], int]]]) -> dict[str, float]:
    """Returns by kind of text: perplexity per token, and the share of tokens that the model would choose.

    Args:
        texts: kind -> (tokens, index of the first that counts) of each text.
    """
    out = {}
    for name, those in texts.items():
        found = [log_p_and_best(llm.backbone, tokens, start) for tokens, start in those]
        count = sum(len(tokens) - start for tokens, start in those)
        out[f"{name}_perplexity"] = round(math.exp(-sum(log_p for log_p, _ in found) / count), 4)
        out[f"{name}_agreement"] = round(sum(best for _, best in found) / count, 4)
    return out


def answered(llm: LLM, question: str, answer: str) -> tuple[list[int], int]:
    """Returns the tokens of a question with its answer, and the index at which the answer begins."""
    prompt = llm.encode(question)
    return [*prompt, *llm.tokenizer.encode(answer)], len(prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--base", default=core.MODEL)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    core.RESULTS = core.RESULTS.with_name("quality.json")
    base = args.base
    questions = load_suite(str(args.questions)).questions
    models = {name: foretell.load(name, dtype="bf16", weights="bf16") for name in (base, args.model)}
    llm = models[base]
    prompts = [llm.encode(each.turns[0]) for each in questions[:: args.every]]
    answers = llm.generate(prompts, max_new_tokens=args.new_tokens)
    written = [([*prompt, *answer.ids], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
    records = [json.loads(line) for line in args.questions.read_text().splitlines()]
    references = [text for record in records for text in (record.get("reference") or [])[:1]]  # some list words
    texts = [llm.encode(text, raw=True) for text in references if isinstance(text, str) and text.strip()]
    human = [(tokens[:512], 1) for tokens in texts if len(tokens) > 1]
    sums = [each for each in records if "####" in (each.get("reference") or [""])[0]]
    problems = [SUMS.format(question=each["turns"][0]) for each in sums]
    solutions = [each["reference"][0] for each in sums]
    numbers = [solution.rpartition("####")[2].strip() for solution in solutions]
    solved = [answered(llm, question, solution) for question, solution in zip(problems, solutions, strict=True)]
    measured = {"human": human, "own": written, "sums": solved}
    out: dict[str, Any] = {"questions": len(prompts), "texts": len(human), "sums": len(sums)}
    for name, each in models.items():
        results = each.generate(problems, max_new_tokens=256)
        out[name] = figures(each, measured) | judge("number", [answer.text for answer in results], numbers)
    core.save(args.model, out)


if __name__ == "__main__":
    main()
