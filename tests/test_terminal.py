"""Every verb in a real terminal: wide, narrow, one that can only append, and one whose owner wants no colours.

A pipe shows none of what a terminal does: bars that are drawn over, keys that interrupt. Progress is what most verbs
show for most of their time, so an error in it ends all of them.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pseudo_terminal import ONE, SEVERAL, Shown, Terminal
from tiny_gguf import write_gguf
from tiny_models import tiny_model

from foretell.loading.resolve import resolve

pytestmark = pytest.mark.slow

SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "wide": (200, {}),
    "narrow": (40, {}),
    "dumb": (100, {"TERM": "dumb"}),
    "no colour": (100, {"NO_COLOR": "1"}),
}
TINY = ("--dtype", "fp32", "--threads", "1")
FEW = ("--epochs", "2", "--batch-tokens", "300", "-o", "heads=2", "-o", "draft_vocab=100")

PROGRESS: dict[str, list[str]] = {
    "convert": ["converting"],
    "answer": ["answering"],
    "distill": ["writing prompts", "answering"],
    "train": ["training medusa", "replaying, %"],
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


VERBS = tuple(commands("", "", "", Path()))
Screens = dict[tuple[str, str], tuple[int, Shown]]


@pytest.fixture(scope="module")
def screens(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Screens:
    """What each verb showed in each setting, and how it left; all in one process with a terminal of its own."""
    folder = tmp_path_factory.mktemp("terminal")
    gguf, prompts = write_gguf(folder / "tiny.gguf", tiny_model("llama")), folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two", "three")))
    asked: dict[tuple[str, str], Any] = {}
    for setting, (columns, environment) in SETTINGS.items():
        (folder / setting).mkdir()
        for verb, (arguments, out) in commands(tiny, str(gguf), str(prompts), folder / setting).items():
            asked[setting, verb] = (arguments, columns, environment, out)
    terminal = Terminal(SEVERAL, [json.dumps([*asked.values()])], 80, {"FORETELL_CACHE": str(folder / "cache")})
    found: Screens = {}
    for number, which in enumerate(asked):
        terminal.wait_for(f"<begin {number}>")
        shown = terminal.wait_for(f"<end {number}: ")
        found[which] = int(terminal.wait_for(">").text), shown
    assert terminal.leave()[0] == 0
    return found


def progress(verb: str, shown: Shown) -> list[str]:
    """The lines that say how far it is."""
    named = "|".join(map(re.escape, PROGRESS[verb]))
    return [line for line in shown.lines if re.match(rf"({named})[ :].*(\d+/(\d+|\?)|\d%)", line)]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_verb_works_in_a_terminal(screens: Screens, setting: str, verb: str) -> None:
    code, shown = screens[setting, verb]
    assert "Traceback" not in shown.text, shown.text
    assert code == 0, shown.text
    if setting == "dumb":
        assert not shown.escapes
    if setting == "no colour":
        assert not shown.colours


@pytest.mark.parametrize("verb", PROGRESS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_takes_long_says_how_far_it_is(screens: Screens, setting: str, verb: str) -> None:
    """To its end, without a line that breaks, or one that is cut where it counts."""
    shown = screens[setting, verb][1]
    if setting == "dumb" and verb in ("convert", "answer"):
        assert ("converting ..." in shown.lines) == (verb == "convert")
        return
    lines = progress(verb, shown)
    for name in PROGRESS[verb]:
        ends = [line for line in lines if line.startswith(name) and re.search(r"\b(\d+)/\1\b|100%", line)]
        assert ends, shown.text
    assert max(map(len, lines)) <= SETTINGS[setting][0]
    assert "…" not in "".join(lines)
    if setting == "wide":
        assert shown.colours
        assert "━" in "".join(lines)


def test_rm_asks_in_a_terminal(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    resolve(str(gguf), cache_dir=tmp_path)
    for answer, left in (("n", 1), ("y", 0)):
        terminal = Terminal(ONE, ["rm", str(gguf), "--cache-dir", str(tmp_path)], 400, {})
        terminal.wait_for("[y/N]")
        terminal.type(answer + "\n")
        assert terminal.leave()[0] == left  # a no leaves with 1, as every refusal
        assert len(list((tmp_path / "models").iterdir())) == left
