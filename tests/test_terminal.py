"""Every verb in a real terminal: wide, narrow without colours, and one that can only append.

A pipe shows none of what a terminal does: bars that are drawn over, keys that interrupt. Progress is what most verbs
show for most of their time, so an error in it ends all of them.
"""

import json
import re
from pathlib import Path

import pytest
from pseudo_terminal import ONE, SEVERAL, Shown, Terminal
from tiny_gguf import write_gguf
from tiny_models import tiny_model

from foretell.loading.resolve import resolve

pytestmark = pytest.mark.slow

SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "wide": (200, {}),
    "narrow, no colour": (40, {"NO_COLOR": "1"}),
    "dumb": (100, {"TERM": "dumb"}),
}
TINY = ("--dtype", "fp32", "--threads", "1")
FEW = ("--epochs", "2", "--batch-tokens", "300", "-o", "heads=2", "-o", "draft_vocab=100")

PROGRESS: dict[str, list[str]] = {
    "convert": ["converting"],
    "answer": ["answering"],
    "distill": ["writing prompts", "answering"],
    "train": ["training medusa", "measuring, %"],
    "tune": ["measuring steps, %", "measuring drafting"],
    "bench": ["measuring"],
    "sweep": ["measuring"],
}
"""Of each command that may take long, the names of what it shows."""


def commands(model: str, gguf: str, prompts: str, folder: Path) -> dict[str, tuple[list[str], str | None]]:
    """Each verb's arguments, and the file that its answers go to."""
    ours = ["-m", model, *TINY]
    out, short, suite = str(folder), ["-n", "8"], ["--suite", prompts, "--limit", "1"]
    trained = ["-d", "medusa", "-o", f"checkpoint={out}/heads"]
    return {
        "models": (["models"], None),
        "drafters": (["drafters"], None),
        "options": (["drafters", "hydra++"], None),
        "config": (["config"], None),
        "help": (["train", "--help"], None),
        "generate": (["generate", "hello", *ours, *short, "--stats"], None),
        "convert": (["generate", "--raw", "hello", "-m", gguf, *TINY, *short, "--cache-dir", out], None),
        "pull": (["pull", gguf, "--cache-dir", out], None),
        "rm": (["rm", gguf, "--yes", "--cache-dir", out], None),
        "answer": (["generate", "--prompts", prompts, *ours, *short], f"{out}/answers"),
        "demo": (["demo", "hello", *ours, *short], None),
        "distill": (["distill", *ours, "--out", f"{out}/data", "--write", "8", "-n", "32", "--keep-repetitive"], None),
        "train": (["train", "medusa", *ours, "--data", f"{out}/data", "--out", f"{out}/heads", *FEW], None),
        "tune": (["tune", "--quick", *ours, *trained], None),
        "bench": (["bench", *ours, "--out", f"{out}/bench", *suite, *short], None),
        "sweep": (["bench", "sweep", *ours, "--out", f"{out}/sweep", *suite, *short, "--epsilon", "0.1"], None),
        "compare": (["bench", "compare", f"{out}/bench", f"{out}/bench"], None),
    }  # fmt: skip


Screens = dict[str, tuple[int, Shown]]


@pytest.fixture
def screens(tiny: str, tmp_path: Path, setting: str) -> Screens:
    """What each verb showed, and how it left; all in one process with a terminal of its own."""
    columns, environment = SETTINGS[setting]
    gguf, prompts = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")), tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two", "three")))
    asked = commands(tiny, str(gguf), str(prompts), tmp_path)
    each = [(arguments, columns, environment, out) for arguments, out in asked.values()]
    terminal = Terminal(SEVERAL, [json.dumps(each)], 80, {"FORETELL_CACHE": str(tmp_path / "cache")})
    found: Screens = {}
    for number, verb in enumerate(asked):
        terminal.wait_for(f"<begin {number}>")
        shown = terminal.wait_for(f"<end {number}: ")
        found[verb] = int(terminal.wait_for(">").text), shown
    assert terminal.leave()[0] == 0
    return found


def progress(verb: str, shown: Shown) -> list[str]:
    """The lines that say how far it is."""
    named = "|".join(map(re.escape, PROGRESS[verb]))
    return [line for line in shown.lines if re.match(rf"({named})[ :].*(\d+/(\d+|\?)|\d%)", line)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_verb_works_in_a_terminal(screens: Screens, setting: str) -> None:
    """What takes long says how far it is: to its end, and without a line that breaks or is cut where it counts."""
    for verb, (code, shown) in screens.items():
        assert "Traceback" not in shown.text, (verb, shown.text)
        assert code == 0, (verb, shown.text)
        if setting == "dumb":
            assert not shown.escapes, verb
        if "no colour" in setting:
            assert not shown.colours, verb
    for verb in PROGRESS:
        assert_says_how_far(verb, setting, screens[verb][1])


def assert_says_how_far(verb: str, setting: str, shown: Shown) -> None:
    if setting == "dumb" and verb in ("convert", "answer"):
        assert ("converting ..." in shown.lines) == (verb == "convert")
        return
    lines = progress(verb, shown)
    for name in PROGRESS[verb]:
        ends = [line for line in lines if line.startswith(name) and re.search(r"\b(\d+)/\1\b|100%", line)]
        assert ends, (verb, shown.text)
    assert max(map(len, lines)) <= SETTINGS[setting][0], verb
    assert "…" not in "".join(lines), verb
    if setting == "wide":
        assert shown.colours, verb
        assert "━" in "".join(lines), verb


def test_rm_asks_in_a_terminal(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    resolve(str(gguf), cache_dir=tmp_path)
    for answer, left in (("n", 1), ("y", 0)):
        terminal = Terminal(ONE, ["rm", str(gguf), "--cache-dir", str(tmp_path)], 400, {})
        terminal.wait_for("[y/N]")
        terminal.type(answer + "\n")
        assert terminal.leave()[0] == left  # a no leaves with 1, as every refusal
        assert len(list((tmp_path / "models").iterdir())) == left
