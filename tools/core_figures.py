"""Measures the figures of the core and writes them to docs/results/core.json, section by section.

    python tools/core_figures.py SECTION [--questions FILE] [--every 5] [--limit N]

Sections: machine, step, attention, batch, startup, reference, exactness. Everything that is compared runs in
one process and interleaved, prompt by prompt, because machines drift. What drafters gain is measured by `foretell
bench`. Questions are JSON lines in Spec-Bench's layout (`turns` is a list; the first turn is asked).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from exactness import ForcedTrees, RandomTrees, compared, transcript

import foretell
from foretell import drafters
from foretell.backbone import Nodes, assemble
from foretell.backbone.cpu.linear import PackedLinear
from foretell.backbone.load import usable_cores
from foretell.backbone.step_costs import bush, measure
from foretell.contracts import Drafter
from foretell.engine import SpeculativeDecoder
from foretell.loading import resolve
from foretell.requests import SamplingParams

RESULTS = Path(__file__).parent.parent / "docs/results/core.json"
MODEL = "smollm2-135m"


def read() -> dict[str, Any]:
    """Returns the sections measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(section: str, result: Any, shown: bool = True) -> None:
    """Adds one section to the results, with its command, commit and machine, and prints it if it is to be shown."""
    whole = read()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    command = "python " + shlex.join(["tools/" + Path(sys.argv[0]).name, *map(without_folders, sys.argv[1:])])
    whole[section] = {"command": command, "commit": commit, "machine": machine(), "result": result}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
    if shown:
        print(json.dumps(result, indent=1)[:3000])


def without_folders(argument: str) -> str:
    """Returns an argument with every path in it cut to its last part, as in hydra++:FOLDER and MODEL+FOLDER."""
    return re.sub(r"(?<![^:=+])[^:=+]*/", "", argument.rstrip("/"))


def machine() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kinds = {"amx_bf16": "AVX512-BF16 and AMX ", "avx512_bf16": "AVX512-BF16 "}
    kinds |= {"avx512_vnni": "AVX512-VNNI ", "avx512f": "AVX512 ", "avx2": "AVX2 "}
    kind = next((name for flag, name in kinds.items() if f" {flag}" in flags), "")
    cores = "1 core" if usable_cores() == 1 else f"{usable_cores()} cores"
    return f"{cores} of an {kind}{platform.machine()} server CPU, torch {torch.__version__}"


def timed(function: Callable[[], Any], repeats: int) -> float:
    """Returns the median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def load_questions(path: Path, every: int, limit: int | None) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["turns"][0] for line in lines[::every]][:limit]


# -- the machine and one step ------------------------------------------------------------------------------------------


def read_bandwidth() -> float:
    """Measures bytes per second at which the linear kernel streams weights that it uses once: 226 MB, one row."""
    weight = torch.randn(4 * 49152, 576).bfloat16()
    linear, x = PackedLinear(weight), torch.randn(1, 576)
    return weight.numel() * 2 / timed(lambda: linear.argmax(x, usable_cores()), 15)


def section_machine(_: argparse.Namespace) -> Any:
    backbone = assemble(resolve(MODEL, weights="bf16").path, dtype="bf16")
    weights = 2 * 134_515_008
    bandwidth = max(read_bandwidth() for _ in range(3))
    seconds = measure(backbone, (1,), (100,), (1,), repeats=60).of(1, 100, 1)
    return {
        "weights_bytes": weights,
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "bound_ms_per_step": round(weights / bandwidth * 1e3, 2),
        "plain_ms_per_step_at_100_keys": round(seconds * 1e3, 2),
        "plain_share_of_bound": round(weights / bandwidth / seconds, 3),
        "kernels": backbone.kernels,
    }


def section_step(_: argparse.Namespace) -> Any:
    """Measures the cost of a step by nodes and keys, relative to one node; sizes take turns, medians of rounds."""
    out: dict[str, Any] = {}
    for dtype in ("bf16", "fp32"):
        backbone = assemble(resolve(MODEL, weights="bf16").path, dtype=dtype)
        costs = measure(backbone, (1,), (100, 200, 300, 600), (1, 2, 4, 8, 16, 32, 64), repeats=81)
        for keys, seconds in costs.seconds[1].items():
            out.setdefault(dtype, {})[keys] = {
                "ms": {size: round(value * 1e3, 2) for size, value in seconds.items()},
                "relative": {size: round(value / seconds[1], 2) for size, value in seconds.items()},
            }
    return out


def section_attention(_: argparse.Namespace) -> Any:
    """Compares canonical attention with PyTorch's fused, inexact one: microseconds a layer, thirty layers at a time.

    Each runs in a process of its own, in turns: within one, threads of the other library would spin on the same cores.
    """
    runs: dict[str, list[dict[str, float]]] = {"canonical": [], "sdpa": []}
    for _round in range(5):
        for name, results in runs.items():
            call = f"import runpy; runpy.run_path({__file__!r})['attention_microseconds']({name == 'canonical'})"
            done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    out = {}
    for setting in runs["sdpa"][0]:
        canonical, sdpa = (median(result[setting] for result in results) for results in runs.values())
        out[setting] = {
            "canonical_us": round(canonical, 1), "sdpa_us": round(sdpa, 1), "ratio": round(canonical / sdpa, 2),
        }  # fmt: skip
    return out


def attention_microseconds(canonical: bool) -> None:
    """Prints {"K keys, N nodes": microseconds a layer} of one of the two."""
    backbone: Any = assemble(resolve(MODEL, weights="bf16").path, dtype="bf16")
    cache, layers, out = backbone.new_cache(1, 1024), 30, {}
    backbone.forward(torch.arange(700), Nodes.chains([0], [0], [700]), cache)
    for keys in (100, 300, 600):
        for size in (1, 8, 16, 32, 64):
            tree, queries = bush(size), torch.randn(size, 9, 64).bfloat16()
            nodes, end = Nodes([tree], [0], [keys]), keys + size
            ancestors_NN = torch.tensor([[node in tree.path(row) for node in range(size)] for row in range(size)])
            mask = torch.cat([torch.ones(size, keys, dtype=torch.bool), ancestors_NN], 1)
            q, (k, v) = queries.transpose(0, 1)[None], (each[:1, :, :end] for each in cache.room(0))

            def fused(q: Any = q, k: Any = k, v: Any = v, mask: Any = mask) -> None:
                for _ in range(layers):
                    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

            def exact(queries: Any = queries, nodes: Any = nodes) -> None:
                backbone.attention(queries, nodes, cache, repeats=layers)

            function = exact if canonical else fused
            timed(function, 10)
            out[f"{keys} keys, {size} nodes"] = timed(function, 30) / layers * 1e6
    print(json.dumps(out))


# -- whole generations -------------------------------------------------------------------------------------------------


class ForetellSystem:
    adapt = True

    def __init__(self, llm: Any, name: str):
        self.llm, self.drafter = llm, drafters.build(name, llm.backbone)

    def __call__(self, ids: list[int], new: int) -> tuple[list[int], float, float, int]:
        decoder = SpeculativeDecoder(self.llm.backbone, self.drafter, self.llm.tokenizer, adapt=self.adapt)
        began = time.perf_counter()
        decoder.submit(ids, SamplingParams(max_new_tokens=new))
        out: list[int] = []
        while decoder.busy:
            for event in decoder.step():
                out += event.tokens
                statistics = event.statistics
        assert statistics is not None
        return out, time.perf_counter() - began, statistics.prefill_seconds, statistics.steps


class Transformers:
    def __init__(self, dtype: torch.dtype, **options: Any):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(resolve(MODEL, weights="bf16").path, dtype=dtype).eval()
        self.options = options

    def __call__(self, ids: list[int], new: int) -> tuple[list[int], float, float, int]:
        prompt = torch.tensor([ids])
        began = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, **self.options
            )
        return out[0, len(ids) :].tolist(), time.perf_counter() - began, 0.0, 0


def section_batch(args: argparse.Namespace) -> Any:
    """Measures 32 prompts in one batch, 256 tokens each (end of sequence ignored), three interleaved repeats."""
    llm = foretell.load(MODEL, dtype="bf16", weights="bf16")
    prompts = [llm.encode(q) for q in (args.prompts * 32)[:32]]
    peer = Transformers(torch.bfloat16).model
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    decoders = {
        name: SpeculativeDecoder(llm.backbone, drafters.build(name, llm.backbone), llm.tokenizer, max_rows=32)
        for name in ("plain", "prompt_lookup")
    }
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
    rates: dict[str, list[float]] = {}
    for _ in range(3):
        for name, decoder in decoders.items():
            began, tokens = time.perf_counter(), 0
            for ids in prompts:
                decoder.submit(ids, params)
            while decoder.busy:
                tokens += sum(len(event.tokens) for event in decoder.step())
            rates.setdefault(name, []).append(tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.inference_mode():
            out = peer.generate(
                padded, attention_mask=mask, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens,
                do_sample=False,
            )  # fmt: skip
        new = out[:, longest:].numel()
        rates.setdefault("transformers", []).append(new / (time.perf_counter() - began))
        print(rates, flush=True)
    return {name: {"tokens_per_s": round(median(r), 1), "all": [round(x, 1) for x in r]} for name, r in rates.items()}


def section_startup(_: argparse.Namespace) -> Any:
    """Fresh processes: import time beyond torch, warm start to the first token, peak memory of a generation."""

    def run(code: str) -> Any:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    beyond = """import time, torch; t = time.perf_counter(); import foretell; foretell.load; foretell.SamplingParams
print(time.perf_counter() - t)"""
    first = """import time; t = time.perf_counter(); import foretell, resource, json
llm = foretell.load("smollm2-135m", weights="bf16")
next(llm.stream("Why is the sky blue?")); first = time.perf_counter() - t
llm.generate("Tell me a long story.", max_new_tokens=256)
print(json.dumps([first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))"""
    imports = [run(beyond) for _ in range(5)]
    starts = [run(first) for _ in range(5)]
    return {
        "import_seconds_beyond_torch": round(median(imports), 3),
        "first_token_seconds_from_process_start": round(median(s for s, _ in starts), 2),
        "peak_memory_gb": round(median(m for _, m in starts) / 1e9, 3),
    }


def section_reference(args: argparse.Namespace) -> Any:
    """Compares plain decoding in float32 with transformers' greedy search in float32."""
    llm, peer = foretell.load(MODEL, dtype="fp32", weights="bf16"), Transformers(torch.float32)
    plain, differences, tokens = ForetellSystem(llm, "plain"), [], 0
    for number, question in enumerate(args.prompts):
        ids = llm.encode(question)
        own, others = plain(ids, args.new_tokens)[0], peer(ids, args.new_tokens)[0]
        tokens += len(others)
        if own != others:
            at = next(i for i, (a, b) in enumerate(zip(own, others, strict=False)) if a != b)
            with torch.inference_mode():
                top = peer.model(torch.tensor([ids + others[:at]])).logits[0, -1].topk(2).values
            differences.append({"prompt": number, "at": at, "top2_margin": float(top[0] - top[1])})
        print(number, len(others), "same" if own == others else differences[-1], flush=True)
    return {"prompts": len(args.prompts), "tokens": tokens, "differences": differences}


# -- exactness -------------------------------------------------------------------------------------------------------


def section_exactness(args: argparse.Namespace) -> Any:
    """Three drafters, in every number type."""
    for dtype in args.dtypes:
        llm = foretell.load(MODEL, dtype=dtype, weights="bf16")
        out = exactness("exactness", args, llm, dtype, ("prompt_lookup", "random", "forced", "plain"))
    return out


def exactness(section: str, args: argparse.Namespace, llm: Any, dtype: str, names: Sequence[str]) -> dict[str, Any]:
    """Compares ids, log-probabilities and cache bytes of drafters with plain decoding's; goes on where it was left."""
    out: dict[str, Any] = dict(read().get(section, {}).get("result", {}))
    prompts = [llm.encode(q) for q in args.prompts]
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_new_tokens=args.new_tokens, temperature=temperature, seed=7, logprobs=0)
        truth = transcript(llm, drafters.build("plain", llm.backbone), prompts, 1, params)
        for name in names:
            for rows in (1, 4):
                setting = f"{name} {dtype} T={temperature:g} batch {rows}"
                if setting in out or (name == "plain" and rows == 1):
                    continue
                drafter: Drafter
                if name == "random":
                    drafter = RandomTrees()
                elif name == "forced":
                    drafter = ForcedTrees()
                    drafter.answers = {tuple(p): t[0] for p, t in zip(prompts, truth, strict=True)}
                else:
                    # heads guess whether that pays or not
                    options = {} if name in ("plain", "prompt_lookup") else {"nodes": 16}
                    drafter = drafters.build(name, llm.backbone, **options)
                began = time.perf_counter()
                got = transcript(llm, drafter, prompts, rows, params)
                out[setting] = compared(truth, got)
                print(setting, out[setting], f"{time.perf_counter() - began:.0f} s", flush=True)
                save(section, out, shown=False)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sections = {name[8:]: f for name, f in globals().items() if name.startswith("section_")}
    parser.add_argument("section", choices=sections)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    args = parser.parse_args()
    args.prompts = load_questions(args.questions, args.every, args.limit) if args.questions else []
    save(args.section, sections[args.section](args))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
