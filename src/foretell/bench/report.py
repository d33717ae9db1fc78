"""The report of a run: a Markdown file, and one self-contained page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretell.bench import plots
from foretell.files import atomic_write

Row = dict[str, Any]
RIGHT = {"exact_match": "exact match", "pass_at_1": "pass@1"}
"""Scores that are shares of right answers, and what they are called; they stand beside the speed."""


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes `results.md` and `report.html`; the page has plots where matplotlib is installed."""
    with atomic_write(folder / "results.md") as partial:
        partial.write_text(markdown(results), encoding="utf-8")
    with atomic_write(folder / "report.html") as partial:
        partial.write_text(html(results), encoding="utf-8")


# -- tables ------------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        f"# {settings['model']} on {settings['suite']}",
        "",
        *(f"{line}  " for line in facts(results)),
        "",
    ]
    for title, rows in sections(results):
        lines += [f"## {title}", ""]
        for head, body in tables(rows, results["limits"]):
            lines += [*markdown_table(head, body), ""]
    if len(results["by_category"]) > 1:
        lines += ["## By kind of question", "", *markdown_table(*category_table(results)), ""]
    for name, reason in results["missing"].items():
        lines.append(f"- {name}: not measured. {reason}")
    return "\n".join(lines).rstrip() + "\n"


def facts(results: dict[str, Any]) -> list[str]:
    """Returns what a reader must know before any figure: sizes, machine, command."""
    s, limits, count = results["settings"], results["limits"], results.get("sittings", 1)
    probed = f" Probing its arithmetic took {results['probe_seconds']:.1f} s." if "probe_seconds" in results else ""
    sittings = "all in one interleaved run" if count == 1 else f"interleaved, in {count} sittings"
    return [
        f"{len(s['questions'])} questions, up to {s['new_tokens']} new tokens a turn, {s['repeats']} "
        f"repeat{'s' * (s['repeats'] != 1)}, {s['dtype']}, seed {s['seed']}; {sittings}.",
        f"Machine: {results['machine']}. It reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s (median of all rounds), "
        f"and a step {limits['weight_bytes'] / 1e6:.0f} MB of weights, so plain decoding is bound to "
        f"{limits['plain_tokens_per_s']:.0f} tokens/s here at batch 1.{probed}",
        f"foretell {results['version']}, commit {results['commit']}: `{results['command']}`",
    ]


def sections(results: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """Returns (title, rows) of each setting."""
    out: dict[str, list[Row]] = {}
    for row in results["table"]:
        warmth = "greedy" if not row["temperature"] else f"temperature {row['temperature']:g}"
        out.setdefault(f"Batch {row['batch']}, {warmth}", []).append(row)
    return list(out.items())


Table = tuple[list[str], list[list[str]]]


def tables(rows: list[Row], limits: dict[str, Any]) -> list[Table]:
    return [main_table(rows, limits), detail_table(rows), *quality_table(rows)]


def main_table(rows: list[Row], limits: dict[str, Any]) -> Table:
    head = ["", "tokens/s", "decoding only", "against plain (quartiles)", "tokens per step", "same ids", "of its limit"]
    right = [name for name in RIGHT if any(name in row["quality"] for row in rows)]
    return [*head, *(RIGHT[name] for name in right)], [
        [
            row["contender"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['decode_tokens_per_s']:.1f}" if "decode_tokens_per_s" in row else "",
            f"{row['speedup']['median']:.2f}× ({row['speedup']['low']:.2f}-{row['speedup']['high']:.2f})",
            tokens_per_step(row),
            same(row),
            limit_share(row, limits),
            *(f"{row['quality'][name]:.1%}" if name in row["quality"] else "" for name in right),
        ]
        for row in rows
    ]


def detail_table(rows: list[Row]) -> Table:
    head = [
        "", "first token, s", "between tokens p50 / p99, ms", "draft / verify / prefill / other", "peak memory",
        "added parameters", "ratio of means",
    ]  # fmt: skip
    return head, [
        [
            row["contender"],
            f"{row['first_token_s']['p50']:.3f}" if row["first_token_s"] else "",
            "{p50:.1f} / {p99:.1f}".format(**row["between_tokens_ms"]) if row["between_tokens_ms"] else "",
            " / ".join(f"{row[f'{part}_share']:.0%}" for part in ("draft", "verify", "prefill", "other"))
            if "draft_share" in row
            else "",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['added_parameters'] / 1e6:.1f} M" if row.get("added_parameters") else "",
            f"{row['spec_bench_speedup']:.2f}×",
        ]
        for row in rows
    ]  # fmt: skip


def quality_table(rows: list[Row]) -> list[Table]:
    """Returns a table of the scores that the main table does not have, or none without any."""
    names = list(dict.fromkeys(name for row in rows for name in row["quality"] if name not in RIGHT))
    body = [
        [row["contender"], *(f"{row['quality'][n]:.3f}" if n in row["quality"] else "" for n in names)] for row in rows
    ]
    return [(["", *(name.replace("_", " ") for name in names)], body)] if names else []


def category_table(results: dict[str, Any]) -> Table:
    """Returns the speed-up by kind of question in the first setting, and tokens per step where known."""
    first = results["table"][0]
    names = [name for name in results["settings"]["contenders"] if name != "plain"]
    body = []
    for category, rows in results["by_category"].items():
        found = {
            row["contender"]: row
            for row in rows
            if (row["batch"], row["temperature"]) == (first["batch"], first["temperature"])
        }
        body.append([category.replace("_", " "), *(_in_category(found.get(name)) for name in names)])
    return ["against plain (tokens per step)", *names], body


def _in_category(row: Row | None) -> str:
    if row is None or not row["speedup"]:
        return ""
    steps = f" ({row['tokens_per_step']:.2f})" if "tokens_per_step" in row else ""
    return f"{row['speedup']['median']:.2f}×{steps}"


def tokens_per_step(row: Row) -> str:
    """Formats tokens per step, with the share of steps in which the governor held speculation back, if any."""
    if "tokens_per_step" not in row:
        return ""
    held_back = row.get("suspended_steps", 0) / row["steps"]
    return f"{row['tokens_per_step']:.2f}" + (f" ({held_back:.0%} held back)" if held_back else "")


def same(row: Row) -> str:
    """Formats how many answers equal plain decoding's, and the largest margin where some differ."""
    if "same" not in row:
        return ""
    counts = f"{row['same']} of {row['compared']}"
    if row["same"] == row["compared"] or not row["margins"]:
        return counts
    return f"{counts} (largest margin {row['margins'][-1]:.3f})"


def limit_share(row: Row, limits: dict[str, Any]) -> str:
    """Formats decoding speed over its bound, tokens per step x readings of the weights per second."""
    if row["batch"] != 1 or "draft_share" not in row:  # peers read other weights
        return ""
    return f"{row['decode_tokens_per_s'] / (limits['plain_tokens_per_s'] * row['tokens_per_step']):.0%}"


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows),
    ]  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
h1 { margin-bottom: .2rem } p.fact { margin: .2rem 0; color: #4b5a69 } code { background: #f1f4f7; padding: 0 .2rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums } td, th { padding: .3rem .7rem;
border-bottom: 1px solid #dfe5ea; text-align: right } td:first-child, th:first-child { text-align: left }
tr.best td { background: #eaf6ee; font-weight: 600 } svg { max-width: 100%; height: auto }
figure { margin: 1.5rem 0 } figcaption { color: #4b5a69 }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style | safe }}</style></head><body>
<h1>{{ title }}</h1>
{% for fact in facts %}<p class="fact">{{ fact }}</p>
{% endfor %}
{% for title, tables in sections %}<h2>{{ title }}</h2>
{% for head, rows, best in tables %}<table><thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr{% if row[0] == best %} class="best"{% endif %}>{% for cell in row %}<td>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}</tbody></table>
{% endfor %}{% endfor %}
{% for caption, svg in figures %}<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if missing %}<h2>Not measured</h2><ul>{% for name, reason in missing.items() %}<li>{{ name }}: {{ reason }}</li>
{%- endfor %}</ul>{% endif %}
</body></html>
"""


def html(results: dict[str, Any]) -> str:
    from jinja2 import Environment

    parts = []
    for title, rows in sections(results):
        best = max(rows, key=lambda row: row["tokens_per_s"])["contender"]
        parts.append((title, [(head, body, best) for head, body in tables(rows, results["limits"])]))
    if len(results["by_category"]) > 1:
        parts.append(("By kind of question", [(*category_table(results), None)]))
    settings = results["settings"]
    return Environment(autoescape=True).from_string(PAGE).render(
        title=f"{settings['model']} on {settings['suite']}", style=STYLE, facts=facts(results), sections=parts,
        figures=plots.benchmark(results), missing=results["missing"],
    )  # fmt: skip
