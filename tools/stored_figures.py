"""Measures what weights multiplied as they are stored cost and what they keep; writes docs/results/stored.json.

    python tools/stored_figures.py steps|floats|start|busy|heads|exactness|quality MODEL [--questions FILE] [--every 5]

steps: the cost of a step by nodes and keys. floats: that of unpacked weights, beside what bounds it: reading them, and
multiplications a second. start: seconds to the first token and memory, in fresh processes. busy:
what a step takes beside another process, relative to a quiet one. heads: tokens per step of the shipped heads, against
the unpacked weights. exactness: ids, log-probabilities and cache bytes of drafters against plain decoding's. quality:
perplexity of human texts (the references in FILE), and how often the most probable token is that of float32; with
llama.cpp's on the same file, where it is installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import core_figures as core
import torch
from quality_figures import scored

import foretell
from foretell import drafters
from foretell.api import LLM
from foretell.backbone import assemble
from foretell.backbone.step_costs import measure
from foretell.bench.gguf_files import gguf_file
from foretell.bench.limits import read_bandwidth, step_bytes
from foretell.bench.peers import environment
from foretell.engine import SpeculativeDecoder
from foretell.loading import resolve
from foretell.requests import SamplingParams

RESULTS = Path(core.__file__).parents[1] / "docs/results/stored.json"
HEADS = ("medusa", "hydra", "hydra++", "kangaroo")


def section_steps(args: argparse.Namespace) -> Any:
    """Sizes take turns; medians of rounds."""
    backbone = assemble(resolve(args.model, weights="stored").path, dtype="bf16")
    costs = measure(backbone, (1,), (100, 300, 1000, 2000), (1, 2, 4, 8, 16, 32), repeats=args.repeats)
    return {
        "arithmetic": f"{backbone.kernels}, {backbone.quantized}",
        "steps": {
            keys: {
                "ms": {size: round(value * 1e3, 2) for size, value in seconds.items()},
                "relative": {size: round(value / seconds[1], 2) for size, value in seconds.items()},
            }
            for keys, seconds in costs.seconds[1].items()
        },
    }


def section_floats(args: argparse.Namespace) -> Any:
    """Sizes take turns at 300 keys; PyTorch's largest product of float32 says how fast this machine multiplies."""
    a, out = torch.rand(2048, 2048), dict[str, Any]()
    for kind in ("bf16", "fp32"):
        backbone = assemble(resolve(args.model, weights=kind).path, dtype=kind)
        seconds = measure(backbone, (1,), (300,), (1, 4, 8, 16, 32), repeats=args.repeats).seconds[1][300]
        torch.mm(a, a)
        products = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            torch.mm(a, a)
            products.append(time.perf_counter() - began)
        weights = step_bytes(backbone)
        products_in_all = 16 * weights / (2 if kind == "bf16" else 4)
        out[kind] = {
            "arithmetic": backbone.kernels,
            "ms": {size: round(value * 1e3, 2) for size, value in seconds.items()},
            "relative": {size: round(value / seconds[1], 2) for size, value in seconds.items()},
            "plain_reads_of_bandwidth": round(weights / seconds[1] / read_bandwidth(backbone), 2),
            "gmac_per_s_at_16": round(products_in_all / seconds[16] / 1e9, 1),
            "gmac_per_s_of_pytorch": round(2048**3 / median(products) / 1e9, 1),
        }
    return out


def section_start(args: argparse.Namespace) -> Any:
    """A warm start (the packed weights lie in their file) to the first token, and memory after 500 tokens."""
    code = f"""import json, resource, time, torch; began = time.perf_counter(); import foretell
llm = foretell.load({args.model!r}); loaded = time.perf_counter()
next(llm.stream("Why is the sky blue?")); first = time.perf_counter()
llm.generate("Write a long story.", max_new_tokens=500, ignore_eos=True)
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
print(json.dumps([loaded - began, first - began, held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))"""

    def run() -> list[float]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        result: list[float] = json.loads(done.stdout.splitlines()[-1])
        return result

    run()
    loaded, first, held, peak = (median(values) for values in zip(*(run() for _ in range(3)), strict=True))
    return {
        "loaded_seconds_beyond_torch": round(loaded, 2), "first_token_seconds_beyond_torch": round(first, 2),
        "resident_mb_after_500_tokens": round(held / 1e6), "peak_resident_mb": round(peak / 1e6),
    }  # fmt: skip


def section_busy(args: argparse.Namespace) -> Any:
    """Plain steps at 300 keys beside a process that keeps a core busy: with threads that give way, and with all."""
    code = f"""import statistics, time, torch
from foretell.backbone import Nodes, assemble
from foretell.loading import resolve
backbone = assemble(resolve({args.model!r}, weights="stored").path, dtype="bf16")
cache, seconds = backbone.new_cache(1, 400), []
backbone.forward(torch.arange(300), Nodes.chains([0], [0], [300]), cache)
cache.commit([0], [range(300)])
for _ in range(300):
    began = time.perf_counter()
    backbone.argmax(backbone.norm(backbone.forward(torch.tensor([5]), Nodes.chains([0], [300], [1]), cache)))
    seconds.append(time.perf_counter() - began)
print(statistics.mean(seconds))"""

    def run(busy: bool, **variables: str) -> float:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | variables
            )
        finally:
            if other:
                other.kill()
                other.wait()
        return float(done.stdout)

    runs = [(run(False), run(True), run(True, FORETELL_ALL_THREADS="1")) for _ in range(3)]
    quiet, busy, all_threads = (median(each) for each in zip(*runs, strict=True))
    return {
        "quiet_ms": round(quiet * 1e3, 2), "busy": round(busy / quiet, 2),
        "busy_with_all_threads": round(all_threads / quiet, 2),
    }  # fmt: skip


def section_heads(args: argparse.Namespace) -> Any:
    params, steps = SamplingParams(max_new_tokens=args.new_tokens), dict[str, dict[str, float]]()
    for weights in ("bf16", "stored"):
        llm = foretell.load(args.model, weights=weights)
        prompts = [llm.encode(question) for question in args.prompts]
        for name in HEADS:
            steps.setdefault(name, {})[weights] = round(tokens_per_step(llm, name, prompts, params), 4)
            print(weights, name, steps[name][weights], flush=True)
    return {name: each | {"ratio": round(each["stored"] / each["bf16"], 4)} for name, each in steps.items()}


def tokens_per_step(llm: LLM, name: str, prompts: list[list[int]], params: SamplingParams) -> float:
    """Decodes with trees of 16 nodes, whatever they cost."""
    decoder = SpeculativeDecoder(llm.backbone, drafters.build(name, llm.backbone, nodes=16), llm.tokenizer, adapt=False)
    tokens = steps = 0
    for prompt in prompts:
        decoder.submit(prompt, params)
        while decoder.busy:
            for event in decoder.step():
                tokens += len(event.tokens)
                if event.statistics:
                    steps += event.statistics.steps
    return tokens / steps


def section_exactness(args: argparse.Namespace) -> Any:
    heads = HEADS if args.model == core.MODEL else ()
    names = ("prompt_lookup", "random", "forced", "plain", *heads)
    return core.exactness(args.name, args, foretell.load(args.model), "stored", names)


# -- quality ---------------------------------------------------------------------------------------------------------

LISTED = 1000
LLAMA_CPP = """import json, sys, xllamacpp
gguf, threads, context, listed, texts = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = gguf, 1, context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.verbosity = -1
server = xllamacpp.Server(params)
for tokens in texts:
    for end in range(1, len(tokens)):
        kept = []
        server.handle_completions({"prompt": tokens[:end], "max_tokens": 1, "temperature": 0, "cache_prompt": True,
                                   "n_probs": listed, "stream": False, "verbose": True}, kept.append)
        found = kept[0]["__verbose"]["completion_probabilities"][0]["top_logprobs"]
        log_p = {each["id"]: each["logprob"] for each in found}
        print(json.dumps([log_p.get(tokens[end]), max(log_p, key=log_p.get)]), flush=True)
"""


def section_quality(args: argparse.Namespace) -> Any:
    """Every text's first `--new-tokens` tokens; with llama.cpp, the `LISTED` most probable ones count."""
    llm = foretell.load(args.model, weights="stored")
    records = [json.loads(line) for line in args.questions.read_text().splitlines()]
    references = [text for record in records for text in (record.get("reference") or [])[:1] if isinstance(text, str)]
    texts = [llm.encode(text, raw=True)[: args.new_tokens] for text in references if len(text) > 200]
    texts = texts[:: args.every][: args.limit]
    exact = assemble(resolve(args.model, weights="fp32").path, dtype="fp32")
    found = {
        name: [pair for tokens in texts for pair in scored(backbone, tokens)]
        for name, backbone in (("stored", llm.backbone), ("float32", exact))
    }
    if environment("llama.cpp").exists():
        found["llama.cpp"] = scored_by_llama_cpp(llm, texts)
        counted = [log_p is not None for log_p, _ in found["llama.cpp"]]
        found = {
            name: [pair for pair, counts in zip(each, counted, strict=True) if counts] for name, each in found.items()
        }
    best = [token for _, token in found["float32"]]
    return {"tokens": len(best), "texts": len(texts)} | {
        name: {
            "perplexity": round(math.exp(-sum(log_p for log_p, _ in each) / len(each)), 4),
            "agrees_with_float32": round(sum(a == b for (_, a), b in zip(each, best, strict=True)) / len(best), 4),
        }
        for name, each in found.items()
    }


def scored_by_llama_cpp(llm: LLM, texts: list[list[int]]) -> list[tuple[float, int]]:
    gguf = gguf_file(llm.folder, "q4_1")
    asked = [str(gguf), llm.backbone.threads, 1024, LISTED, texts]
    with subprocess.Popen(
        [environment("llama.cpp"), "-c", LLAMA_CPP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdin and peer.stdout
        json.dump(asked, peer.stdin)
        peer.stdin.close()
        return [tuple(json.loads(line)) for line in peer.stdout if line.startswith("[")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {name[8:]: function for name, function in globals().items() if name.startswith("section_")}
    parser.add_argument("section", choices=sections)
    parser.add_argument("model")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--label", default="", help="keeps the section beside the one of another machine")
    args = parser.parse_args()
    if args.section in ("heads", "exactness", "quality") and not args.questions:
        parser.error(f"{args.section} needs --questions FILE.")
    args.prompts = core.load_questions(args.questions, args.every, args.limit) if args.questions else []
    core.RESULTS = RESULTS
    args.name = f"{args.section} {args.model} {args.label}".rstrip()
    core.save(args.name, sections[args.section](args))


if __name__ == "__main__":
    main()
