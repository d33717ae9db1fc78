"""Writes the figures of README.md and the pages of docs/ from docs/results; --check fails when they are stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import breadth_tables
import cost_model
import hamburger_tables
import hidden_streams_tables
import layer_tables
import never_slower_table
import stored_table
import training_speed
from breadth_tables import digest
from stored_table import exactness

from foretell.bench.peers import PEERS
from foretell.bench.report import facts, main_table, markdown_table, sections
from foretell.bench.results import read_results

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- figures: written by tools/readme.py from docs/results -->"
HEADS = {"heads.json": "smollm2-135m", "medusa2.json": "smollm2-135m+medusa2"}
"""Results of tools/drafter_figures.py -> the model that they draft for."""
STORED = ("stored", "stored_coder_small", "stored_coder")
"""Results of `foretell bench` on weights as they are stored, which the README shows."""
END = "<!-- end of figures -->"


def measured(folder: Path) -> list[str]:
    """Returns the tables of a benchmark's results, with the facts to read them by."""
    results = read_results(folder)
    settings = results["settings"]
    lines = [f"{settings['model']}, suite {settings['suite']}: {' '.join(facts(results))}", ""]
    for title, rows in sections(results):
        lines += [f"{title}:", ""]
        lines += [*markdown_table(*main_table(rows, results["limits"])), ""]
        lines += drafting(rows)
    return lines + reading(results)


def reading(results: dict[str, Any]) -> list[str]:
    """Returns how fast prompts were read, where a peer says so too."""
    read: dict[str, list[float]] = {}
    for answer in results["requests"]:
        if answer["contender"] in ("plain", *PEERS) and answer.get("prefill_seconds"):
            tokens, seconds = read.setdefault(answer["contender"], [0, 0])
            read[answer["contender"]] = [tokens + answer["prompt_tokens"], seconds + answer["prefill_seconds"]]
    if len(read) < 2:
        return []
    rates = (f"{name} {tokens / seconds:,.0f}" for name, (tokens, seconds) in read.items())
    return [f"Prompts are read at so many tokens a second, at batch 1 and all together: {', '.join(rates)}.", ""]


def drafting(rows: list[dict[str, Any]]) -> list[str]:
    """Returns drafting's share of the time and acceptance by depth, for systems that report them."""
    figures = [
        f"{row['contender']} {row['draft_share']:.0%}, {' '.join(f'{p:.0%}' for p in row['acceptance_by_depth'][:6])}"
        for row in rows
        if "acceptance_by_depth" in row and "draft_share" in row
    ]
    if not figures:
        return []
    ran = [f"{row['contender']} {row['rows_per_step']:.1f}" for row in rows if "rows_per_step" in row]
    ran_sentence = [f"Rows a step, inserted ones counted: {'; '.join(ran)}.", ""] if ran else []
    return [
        *ran_sentence,
        "Drafting's share of the time, and, of the steps with a guess at depth 1, 2, ..., the share that accepted one: "
        f"{'; '.join(figures)}.",
        "",
    ]


def core(results: dict[str, Any]) -> list[str]:
    """Returns a sentence for each section of core.json that has one, machine by machine."""
    lines = []
    for machine in dict.fromkeys(results[name]["machine"] for name in SENTENCES if name in results):
        lines += [f"On {machine} (docs/results/core.json has commands and commits):", ""]
        for name, sentence in SENTENCES.items():
            if name in results and results[name]["machine"] == machine:
                lines.append(f"- {sentence(results[name]['result'])}")
        lines.append("")
    return lines


def plain_step(r: dict[str, Any]) -> str:
    return (
        f"A plain step takes {r['plain_ms_per_step_at_100_keys']} ms; reading the weights once at the measured "
        f"{r['read_gb_per_s']} GB/s takes {r['bound_ms_per_step']} ms."
    )


def step(r: dict[str, Any]) -> str:
    relative = r["bf16"]["300"]["relative"]
    cost = ", ".join(f"{size} nodes {relative[size]}" for size in ("8", "16", "32", "64"))
    return f"A step's cost relative to one node, at 300 keys: {cost}."


def batch(r: dict[str, Any]) -> str:
    return f"Batch of 32: {r['plain']['tokens_per_s']} tokens/s (transformers: {r['transformers']['tokens_per_s']})."


def startup(r: dict[str, Any]) -> str:
    first, peak = r["first_token_seconds_from_process_start"], r["peak_memory_gb"]
    return f"From process start to the first token {first} s; peak memory {peak} GB."


SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "exactness": exactness, "machine": plain_step, "step": step, "batch": batch, "startup": startup,
}  # fmt: skip
"""Section of the results -> its sentence."""


def by_size(model: str, results: dict[str, Any]) -> list[str]:
    """Returns tokens per step and speed by tree size, of heads that ship or shipped for a model."""
    if "sizes" not in results:
        return []
    sizes = results["sizes"]["result"]
    which = "that come" if are_shipped(model, sizes) else "before those that come"
    lines = [
        f"Heads {which} with foretell for {model}, by tree size; {results['sizes']['machine']}; "
        f"{sizes['prompts']} Spec-Bench questions, {sizes['new_tokens']} new tokens, bfloat16, greedy, batch 1, all in "
        f"one interleaved run (commit {results['sizes']['commit']}, `{results['sizes']['command']}`). Tokens per step, "
        "and decoding speed against plain decoding's; *possible* is the share reached of the speed-up with free "
        "drafting and steps that cost what their nodes cost alone.",
        "",
        "| nodes | grown at each step | possible | drafting | one tree | with lookup merged |",
        "|---|---|---|---|---|---|",
    ]
    runs = [name for name, run in sizes.items() if isinstance(run, dict) and "tokens_per_step" in run]
    for run in [each for each in runs if "with" not in each and "tree" not in each]:
        row, others = sizes[run], [sizes.get(f"{run}{kind}") for kind in (", one tree", " with lookup")]
        cells = [f"{row['tokens_per_step']:.2f}, {row['decode_speedup']:.2f}×"]
        cells.append(f"{row['share_of_possible']:.0%}" if "share_of_possible" in row else "")
        cells.append(f"{row['draft_ms'] / row['step_ms']:.0%}")
        cells += [f"{each['tokens_per_step']:.2f}, {each['decode_speedup']:.2f}×" if each else "" for each in others]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    lines += ["", "Of the steps with a guess at depth 1, 2, ..., the share that accepted one, 16 nodes: " + "; ".join(
        f"{run.rpartition(' ')[0]} {', '.join(f'{share:.0%}' for share in sizes[run]['accepted_by_depth'])}"
        for run in runs if run.endswith(" 16")
    ) + "."]  # fmt: skip
    if "tune" in results:
        lines += ["", f"`foretell tune` measures a step's cost in {results['tune']['result']['seconds']} seconds."]
    if "exactness" in results:
        lines += ["", exactness(results["exactness"]["result"])]
    return [*lines, ""]


def are_shipped(model: str, sizes: dict[str, Any]) -> bool:
    """Returns whether all the heads that were measured are still those that ship."""
    shipped = ROOT / "src/foretell/drafters/trained"
    base, measured_heads = model.partition("+")[0], sizes.get("heads", {})
    current = {method: digest(shipped / f"{method}-{base}") for method in measured_heads}
    return bool(measured_heads) and current == measured_heads


def fastest(model: str, results: dict[str, Any]) -> list[str]:
    """Returns a sentence about the fastest heads, if those that ship were measured."""
    sizes = results["sizes"]["result"]
    if not are_shipped(model, sizes):
        return []
    rows = {
        run: row for run, row in sizes.items() if isinstance(row, dict) and " " in run and " before " not in run
    }  # fmt: skip
    run = max(rows, key=lambda run: rows[run]["decode_speedup"])
    drafter, nodes, *lookup = run.split(maxsplit=2)
    return [
        f"- The fastest heads for {model}: {' '.join([drafter, *lookup])}, {nodes} nodes: "
        f"{rows[run]['tokens_per_step']:.2f} tokens per step, {rows[run]['decode_speedup']:.2f} times plain decoding's "
        f"speed ({sizes['prompts']} of these questions, batch 1, greedy, {results['sizes']['machine']})."
    ]


def quality(results: dict[str, Any]) -> list[str]:
    """Returns what models lost in training together with heads."""
    lines = []
    for model, section in results.items():
        r = section["result"]
        base, after = r[model.rpartition("+")[0]], r[model]
        lines += [
            f"What `{model}` lost: on {r['texts']} human texts, perplexity {base['human_perplexity']:.2f} "
            f"before and {after['human_perplexity']:.2f} after; on {r['questions']} answers of the original model, "
            f"{base['own_perplexity']:.3f} and {after['own_perplexity']:.3f}, of whose tokens it would "
            f"choose {after['own_agreement']:.1%}; on the reference solutions of {r['sums']} GSM8K problems "
            f"{base['sums_perplexity']:.2f} and {after['sums_perplexity']:.2f}, its own answers correct in "
            f"{base['exact_match']:.0%} and {after['exact_match']:.0%} (commit {section['commit']}, "
            f"`{section['command']}`).",
            "",
        ]
    return lines


def own_layers(folder: Path) -> list[str]:
    """Returns the figures of drafters without heads, and predictions for other sizes."""
    lines = ["## Measured", ""]
    for each in sorted(folder.glob("own_layers*/results.json")):
        lines += measured(each.parent)
        results = read_results(each.parent)
        rows = {row["contender"]: row for row in results["table"]}
        lines += layer_tables.step_costs(results)
        if row := rows.get("kangaroo"):
            tokens, levels = row["tokens_per_step"], row["levels_per_step"]
            lines += [
                "At other sizes (`python tools/cost_model.py`): the cost of a guess where a step costs exactly the "
                f"reading of its weights, and the gain there of Kangaroo's {tokens:.2f} tokens and {levels:.2f} "
                "levels per step.",
                "", *cost_model.table(tokens, levels), "",
            ]  # fmt: skip
    if (folder / "exits.json").exists():
        lines += layer_tables.exits(_json(folder / "exits.json")["exits"])
    if (folder / "layers.json").exists():
        found = _json(folder / "layers.json")
        for name, lines_of in (("spare", layer_tables.spare), ("control", layer_tables.control)):
            lines += lines_of(found[name]) if name in found else []
    return lines


def hidden_streams(folder: Path) -> list[str]:
    """Returns the figures of streams that draft inside the verifying pass and beside it."""
    lines = ["## Measured", ""]
    for each in sorted(folder.glob("hidden_streams*/results.json")):
        results = read_results(each.parent)
        lines += measured(each.parent)
        if len(sections(results)) == 1:  # of one batch size and temperature
            lines += layer_tables.step_costs(results) + hidden_streams_tables.at_other_sizes(results)
    return lines + hidden_streams_tables.sweeps(_json(folder / "hidden_streams.json"))


def hamburger(folder: Path) -> list[str]:
    """Returns the figures of macro steps, verified and fused."""
    lines = ["## Measured", ""]
    for each in sorted(folder.glob("hamburger*/results.json")):
        lines += measured(each.parent)
    if (folder / "hamburger.json").exists():
        lines += hamburger_tables.tables(_json(folder / "hamburger.json"))
    return lines if len(lines) > 2 else ["No grafts that were trained for long enough have been measured yet."]


def ablation(section: dict[str, Any]) -> list[str]:
    """Returns the effect of each option of Hydra++ after the same training."""
    runs = section["result"]
    common = next(iter(runs.values()))["command"].partition(" -o ")[0]
    lines = [
        f"The effect of Hydra++'s options after a short training (`{common}` and the options named), on held-out "
        "conversations: how often each head's first guess is right, and tokens per step by tree size.",
        "",
        "| options | head 1 | 2 | 3 | 4 | 8 nodes | 16 | 32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs.values():
        options = " ".join(word for word in run["command"].split() if "=" in word)
        right = [f"{share:.1%}" for share in run["accuracy"]]
        tokens_per_step = [f"{run['tokens_per_step'][size]:.2f}" for size in ("8", "16", "32")]
        lines.append(f"| {options or 'none'} | {' | '.join(right + tokens_per_step)} |")
    return [*lines, ""]


def trained() -> list[str]:
    """Returns how the heads that ship were trained."""
    lines = []
    for config in sorted((ROOT / "src/foretell/drafters/trained").glob("*/config.json")):
        made, name = json.loads(config.read_text())["provenance"], config.parent.name
        data = made["data"] if isinstance(made["data"], list) else [made["data"]]  # one, at first
        written, talks = (sum(each["counts"][what] for each in data) for what in ("written", "conversations"))
        sources = ", ".join(dict.fromkeys(map(_source, data)))
        begun = f" (started from the result of {_commands(made['started_by'])})" if "started_by" in made else ""
        heads = ", ".join(f"{head['top1']:.0%} / {head['top5']:.0%}" for head in made["accuracy"])
        minutes = [
            f"{part} {seconds / 60:.0f} minutes"
            for part, seconds in (
                ("data", sum(each.get("seconds", 0) for each in data)), ("features", made.get("feature_seconds")),
                ("training", made["seconds"]),
            )
            if seconds
        ]  # fmt: skip
        curves = [f"![training curves](images/{name}.png)", ""] if (ROOT / f"docs/images/{name}.png").exists() else []
        if "together" in made and minutes:
            minutes[-1] += f" for {', '.join(made['together'])} at once"
        took = f": {', '.join(minutes)}" if minutes else ""
        notes = "; ".join(each["note"] for each in [*data, made] if "note" in each)
        lines += [
            f"`{name}` on {made.get('machine', 'two cores')}: {written:,} tokens in {talks:,} conversations "
            f"({sources}), then `{made['command']}`{begun}{took}{f' ({notes})' if notes else ''}. "
            f"Held-out accuracy by head, top 1 / top 5: {heads}.",
            "", *curves,
        ]  # fmt: skip
    return lines


def _source(data: dict[str, Any]) -> str:
    """How one folder of data was made: by the command line, or, on an accelerator, by a loop of its own."""
    command = data.get("command", "")
    if command.startswith("foretell"):
        return f"`{command}`"
    answers = "answers to [broad prompts](../data/BROAD_SOURCES.md)"
    return f"{answers}, by {command}" if command else answers


def _commands(run: list[str]) -> str:
    """Joins commands in their order; each continued the result of the one before."""
    return ", then ".join(f"`{each}`" if each.startswith("foretell") else each for each in run)


def pages() -> dict[Path, str]:
    """Returns page -> its block of figures."""
    folder = ROOT / "docs/results"
    head = ["## Measured", ""]
    every = sorted(path.parent for path in folder.glob("*/results.json"))
    blocks = {
        ROOT / "README.md": [
            *head, *(line for name in STORED for line in measured(folder / name)),
            *stored_table.sentences(_json(folder / "stored.json")),
            never_slower_table.sentence(_json(folder / "never_slower.json")), "",
            *(line for name, model in HEADS.items() for line in fastest(model, _json(folder / name))),
            "", "How each method does by tree size, and how its heads were made: [docs/training.md](docs/training.md).",
            "",
            *core(_json(folder / "core.json")),
        ],
        ROOT / "docs/benchmarks.md": [
            *head, *(line for each in every for line in measured(each)),
            *never_slower_table.table(_json(folder / "never_slower.json")),
        ],
        ROOT / "docs/own-layers.md": own_layers(folder),
        ROOT / "docs/hidden-streams.md": hidden_streams(folder),
        ROOT / "docs/hamburger.md": hamburger(folder),
        ROOT / "docs/training.md": [
            *head, *trained(),
            *breadth_tables.tables(_json(folder / "breadth.json")),
            *breadth_tables.tables(_json(folder / "breadth_medusa2.json"), brief=True),
            *training_speed.table(_json(folder / "training.json")["learning"]),
            *(line for name, model in HEADS.items() for line in by_size(model, _json(folder / name))),
            *quality(_json(folder / "quality.json")),
            *ablation(_json(folder / "ablation.json")["ablation"]),
        ],
    }  # fmt: skip
    return {page: "\n".join(lines).rstrip() for page, lines in blocks.items()}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def main() -> int:
    stale = 0
    for page, block in pages().items():
        text = page.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        fresh = f"{before}{BEGIN}\n{block}\n{END}{after}"
        if "--check" not in sys.argv:
            page.write_text(fresh)
        elif fresh != text:
            print(f"error: the figures of {page.name} are stale; run python tools/readme.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
