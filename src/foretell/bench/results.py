"""A finished run as `results.json`: settings, machine, every answer, and the figures computed from them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import foretell
from foretell.backbone import Backbone
from foretell.bench import quality
from foretell.bench.limits import limits
from foretell.bench.metrics import PLAIN, Record, by_category, table
from foretell.bench.run_folder import ABOUT, RESULTS
from foretell.bench.suites import Question
from foretell.errors import ForetellError
from foretell.files import atomic_write, exists, one_line

FORMAT = 1


def machine(backbone: Backbone) -> str:
    """Describes the kind of hardware, without its name."""
    if backbone.device.type == "cuda":
        return f"one {torch.cuda.get_device_name(backbone.device)}, torch {torch.__version__}"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    kind = "AVX512-BF16 and AMX " if "amx_bf16" in flags else "AVX512-BF16 " if "avx512_bf16" in flags else ""
    return (
        f"{backbone.threads} cores of an {kind}{platform.machine()} CPU, kernels {backbone.kernels}, "
        f"torch {torch.__version__}"
    )


def commit() -> str:
    """Returns the commit of the checkout that this library runs from, or its version where it is installed."""
    folder = Path(foretell.__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return foretell.__version__
    return done.stdout.strip() or foretell.__version__


def collect(
    about: dict[str, Any],
    records: Sequence[Record],
    questions: Sequence[Question],
    decode: Callable[[list[int]], str],
    run_code: bool = False,
) -> dict[str, Any]:
    """Returns the content of results.json; the arrival times of tokens stay in rounds.jsonl.

    Args:
        about: as the run's folder keeps it in bench.json.
        decode: token ids -> text, for suites with references.
        run_code: run programs that the model wrote, where the suite is judged by tests.
    """
    bandwidths = {tuple(record["round"]): record["read_bytes_per_s"] for record in records}
    added = {name: system.get("added_parameters") for name, system in about["contenders"].items()}
    try:
        scores, unjudged = _scores(records, questions, decode, run_code), {}
    except ForetellError as error:  # a missing library must not discard what was measured
        scores, unjudged = {}, {"quality": str(error)}
    rows = table(records)
    for row in rows:
        row["added_parameters"] = added.get(row["contender"])
        row["quality"] = scores.get((row["contender"], row["temperature"], row["batch"]), {})
    return {
        "format": FORMAT, **about, "missing": about.get("missing", {}) | unjudged,
        "limits": limits(about["weight_bytes"], list(bandwidths.values())),
        "sittings": len({record["sitting"] for record in records}), "table": rows, "by_category": by_category(records),
        "requests": [{name: value for name, value in record.items() if name != "arrivals"} for record in records],
    }  # fmt: skip


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, one answer per line."""
    head = json.dumps({name: value for name, value in results.items() if name != "requests"}, indent=1)
    answers = ",\n".join(f"  {json.dumps(record)}" for record in results["requests"])
    with atomic_write(folder / RESULTS) as partial:
        partial.write_text(f'{head[:-2]},\n "requests": [\n{answers}\n ]\n}}\n', encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """Reads `results.json` of a folder, or the file itself.

    Raises:
        ForetellError: there is none, or another version wrote it.
    """
    if exists(path / ABOUT) and not exists(path / RESULTS):
        raise ForetellError(f"{path} holds an unfinished benchmark; give its command again to finish it.")
    path = path / RESULTS if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ForetellError(f"{path} is not a result of foretell bench ({one_line(error)}); check the path.") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or "table" not in results:
        raise ForetellError(f"{path} is not a result of this version of foretell bench; measure again.")
    for row in results["table"]:
        row.setdefault("suspended_steps", _suspended(results, row))  # results before it was a figure of its own
    return results


def _suspended(results: dict[str, Any], row: dict[str, Any]) -> int:
    """Counts the steps of a row in which speculation was held back, from its answers."""
    return sum(
        answer.get("suspended_steps", 0)
        for answer in results.get("requests", ())
        if answer["contender"] == row["contender"] and answer["round"][:2] == [row["temperature"], row["batch"]]
    )


def _scores(
    records: Sequence[Record], questions: Sequence[Question], decode: Callable[[list[int]], str], run_code: bool
) -> dict[tuple[Any, ...], dict[str, float]]:
    """Returns (system, temperature, batch) -> scores of the first repeat, where the suite has references."""
    by_id = {question.id: question for question in questions}
    tasks = {question.task for question in questions if question.task} - (set() if run_code else {"code"})
    lossy = {r["contender"] for r in records if r.get("same") is False}
    if not tasks and not lossy:
        return {}
    texts_of: dict[tuple[Any, ...], dict[tuple[str, int], str]] = defaultdict(dict)
    plain: dict[tuple[Any, ...], list[int]] = {}
    for record in records:
        if record["contender"] == PLAIN:
            plain[(*record["round"][:3], record["question"], record["turn"])] = record["ids"]
    for record in records:
        temperature, batch, repeat, *_ = record["round"]
        if repeat == 0:
            ids = record.get("ids") or plain[temperature, batch, repeat, record["question"], record["turn"]]
            texts_of[record["contender"], temperature, batch][record["question"], record["turn"]] = decode(ids)
    out: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for key, answers in texts_of.items():
        for task in tasks:
            last = {q: len(by_id[q].turns) - 1 for q, _ in answers if by_id[q].task == task}
            texts = [answers[q, turn] for q, turn in last.items()]
            out[key] |= quality.judge(task, texts, [by_id[q].reference for q in last])
        if key[0] in lossy:
            base = texts_of[PLAIN, key[1], key[2]]
            out[key] |= quality.agreement(list(answers.values()), [base[turn] for turn in answers])
    return out
