"""Loads GGUF files that were damaged at random, and writes what became of them to docs/results/fuzz.json.

    python tools/fuzz_gguf.py [--count 10000] [--seed 0] [--only NUMBER]

A damaged file must load, or be refused in one sentence, in an address space that leaves room for little more than the
undamaged ones. Anything else is a finding, and the exit code is 1. A case is drawn from the seed and its number alone:
`--only` repeats it and prints the trace. What loads also writes a token, so that the kernels have read its weights.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf_damage import damaged, samples

import foretell
from foretell.errors import ForetellError, ForetellWarning

HEADROOM = 1 << 30
"""Bytes of address space beyond what the undamaged files took: threads reserve some hundred megabytes of it."""
SECONDS = 60
"""How long a case may take; then the process ends with a trace of where it was."""
MAX_SENTENCE = 500
"""Characters, without the path of the file."""


def outcome(path: Path, cache: Path, rng: random.Random) -> tuple[str, BaseException | None]:
    """Loads a file; returns "loaded" or the kind of the sentence that refuses it, or a finding and its exception."""
    options: dict[str, Any] = {"weights": rng.choice(("bf16", "stored")), "kernel": rng.choice((None, None, "eager"))}
    try:
        llm = foretell.load(path, cache_dir=cache, threads=1, **options)
        llm.generate([1, 2, 3], max_new_tokens=1)
    except ForetellError as refusal:
        sentence = str(refusal)
        if isinstance(refusal.__cause__, MemoryError) or "allocate" in sentence:
            return "FINDING: memory", refusal
        if "\n" in sentence or not sentence.endswith(".") or len(sentence) - len(str(path)) > MAX_SENTENCE:
            return "FINDING: not one sentence", refusal
        return kind(sentence, path), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return f"FINDING: {type(error).__name__}", error
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return "loaded", None


def kind(sentence: str, path: Path) -> str:
    """Returns a sentence without what differs from file to file."""
    text = re.sub(r"\S*" + re.escape(path.stem) + r"[^\s:;,]*", "FILE", sentence)
    for pattern, name in (
        (r"\b(blk\.[\w.]*\w|(token_embd|output|output_norm|rope_freqs)\.\w+|model\.[\w.]*\w)", "TENSOR"),
        (r"\b(llama|qwen\d|tokenizer|general|split)(\.\w+)+", "KEY"),
        (r"= .*? where", "= … where"),
        (r"codec can't decode [^)]*", "codec can't decode …"),
        (r"'.*?'|\".*?\"|\[.*?\]", "…"),
        (r"(of|as) [A-Z]\w+\d\w*( hold|, which)", r"\1 TYPE\2"),
        (r"that a \w+ model", "that a model"),
        (r"(?<![\w-])[-+]?\d[\d.e+]*\b|\b(None|nan|inf|True|False)\b", "N"),
    ):
        text = re.sub(pattern, name, text)
    return text


def run(folder: Path, seed: int, numbers: Sequence[int]) -> tuple[Counter[str], list[str]]:
    """Loads damaged files; returns how often each outcome was, and the findings."""
    files, outcomes, findings = samples(folder), Counter[str](), list[str]()
    for sample in files:  # whatever models need is loaded before memory is limited
        whole, error = outcome(folder / f"{sample.name}.gguf", folder / "cache", random.Random(0))
        assert whole == "loaded", (sample.name, error)
    with limited_address_space(HEADROOM):
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            path = folder / f"damaged{number}.gguf"
            path.write_bytes(damaged(rng.choice(files), rng))
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
            what, error = outcome(path, folder / "cache", rng)
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
            outcomes[what] += 1
            if error:
                findings.append(f"case {number}: {what}: {str(error)[:300]}")
                if len(numbers) == 1:
                    traceback.print_exception(error)
    return outcomes, findings


@contextmanager
def limited_address_space(more: int) -> Iterator[None]:
    """Lets this process reserve so many bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore", ForetellWarning)
    with tempfile.TemporaryDirectory() as folder:
        outcomes, findings = run(Path(folder), args.seed, range(args.count) if args.only is None else [args.only])
    print(*(f"{count:6} {what}" for what, count in outcomes.most_common()), *findings, sep="\n")
    if args.only is None:
        import core_figures as core

        core.RESULTS = core.RESULTS.with_name("fuzz.json")
        result = {
            "files": args.count, "seed": args.seed, "loaded": outcomes["loaded"], "findings": findings,
            "bytes_of_address_space_left": HEADROOM,
            "resident_bytes_at_most": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "outcomes": dict(outcomes.most_common()),
        }  # fmt: skip
        core.save("gguf", result, shown=False)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
