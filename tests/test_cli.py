"""The command line as a user meets it: what it prints, what it refuses, how it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import Foretell, ids_of, turns_of

import foretell as package
from foretell import drafters
from foretell.cli import VERBS, load_verb
from foretell.cli.generate import _note_speed
from foretell.cli.options import Loading, Sampling
from foretell.cli.terminal import program
from foretell.contracts import Draft, Drafter, Row
from foretell.drafting.options import option
from foretell.errors import UsageError
from foretell.requests import SamplingParams, Statistics, numbers
from foretell.results import Result
from foretell.trees import chain


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "one"}\n\n{"turns": ["two", "and then?", "and?"], "id": 7}\n'
        '{"prompt": "three three three"}\n'
        '{"turns": ["four"]}\n{"prompt": "five\u2028still five"}\n',
        encoding="utf-8",
    )
    return path


def in_a_process(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "foretell", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


# --- help ---------------------------------------------------------------------------------------------------


def test_help_lists_every_verb(foretell: Foretell) -> None:
    ran = foretell("--help")
    assert ran.code == 0
    for verb, (_, help) in VERBS.items():
        assert re.search(rf"{verb} +{re.escape(help[:30])}", ran.out)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_what_its_row_says(verb: str) -> None:
    assert load_verb(verb).help.startswith(VERBS[verb][1].rstrip("."))


def walked(words: tuple[str, ...], command: Any) -> list[tuple[str, ...]]:
    inner = getattr(command, "commands", {})
    return [words, *(path for name, each in inner.items() for path in walked((*words, name), each))]


@pytest.mark.parametrize("words", [path for verb in VERBS for path in walked((verb,), load_verb(verb))], ids=" ".join)
def test_help_has_no_words_of_the_parser(foretell: Foretell, words: tuple[str, ...]) -> None:
    ran = foretell(*words, "-h")
    assert ran.code == 0
    assert not re.search(r"<(int|str|bool|float|path|list|uuid)|x[<>]=|\[default: no-", ran.out), ran.out
    assert re.search(r"--help +-h ", ran.out)
    assert foretell(*words, "--help").out == ran.out


def test_the_version_has_a_short_name(foretell: Foretell) -> None:
    assert foretell("-V").out == foretell("--version").out == f"foretell {package.__version__}\n"


@pytest.mark.parametrize(
    ("words", "found"),
    [("t", {"train", "tune"}), ("generate --loo", {"--lookup"}), ("generate -d hydra", {"hydra", "hydra++"}),
     ("chat -m smollm2-135m+m", {"smollm2-135m+medusa2"})],
)  # fmt: skip
def test_a_shell_completes_verbs_options_drafters_and_models(
    foretell: Foretell, cache: Path, monkeypatch: pytest.MonkeyPatch, words: str, found: set[str]
) -> None:
    monkeypatch.setenv("FORETELL_CONFIG", "/nowhere")  # a broken config is no reason to complete nothing
    monkeypatch.setenv("_FORETELL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"foretell {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert set(foretell().out.split()) == found


def test_how_to_run_it_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".venv/bin/foretell"
    path.parent.mkdir(parents=True)
    path.touch(0o755)
    monkeypatch.chdir(tmp_path)
    for typed in (".venv/bin/foretell", str(path)):
        monkeypatch.setattr(sys, "argv", [typed])
        monkeypatch.setenv("PATH", "/nowhere")
        assert program() == ".venv/bin/foretell"
        monkeypatch.setenv("PATH", str(path.parent))
        assert program() == "foretell"
    monkeypatch.chdir("/")
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == str(path.relative_to("/"))
    monkeypatch.setattr(sys, "argv", ["/x/foretell/__main__.py"])
    assert re.fullmatch(r"python\S* -m foretell", program())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
@pytest.mark.slow
def test_help_does_not_load_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom foretell.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as left: assert not left.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_options_have_the_defaults_of_the_library() -> None:
    assert Sampling().params() == SamplingParams()


class Parrot(Drafter):
    """A toy: guesses that the newest token comes again."""

    @dataclass(frozen=True)
    class Options:
        times: int = option(1, "how often it comes", low=1, high=9)

    def draft(self, rows: Sequence[Row]) -> Draft:
        times = self.options.times
        return Draft([chain(times)] * len(rows), [[row.tokens[-1]] * (times + 1) for row in rows])


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafters, "DRAFTERS", dict(drafters.DRAFTERS))
    drafters.register("parrot", Parrot, "says it [again]")


@pytest.mark.usefixtures("parrot")
def test_a_registered_drafter_is_in_the_help_and_decodes(foretell: Foretell, tiny: str) -> None:
    assert re.search(r"parrot +says it \[again\]", foretell("generate", "--help").out)
    options = ("-m", tiny, "--json", "-n", "24", "--dtype", "fp32", "--ignore-eos")
    plain = foretell("generate", "hello", *options)
    toy = foretell("generate", "hello", *options, "-d", "parrot", "-o", "times=3", "--no-adapt")
    assert toy.lines[0]["ids"] == plain.lines[0]["ids"]
    assert toy.lines[0]["drafted"] > 0 == plain.lines[0]["drafted"]
    refused = foretell("generate", "hello", *options, "-d", "parrot", "-o", "times=often")
    assert (refused.code, refused.err) == (
        2, "error: Option 'times' of drafter 'parrot' is 'often'; it must be a whole number.\n",
    )  # fmt: skip


def test_drafters_are_listed_with_what_ships(foretell: Foretell) -> None:
    out = foretell("drafters").out
    for name, (_, help) in drafters.DRAFTERS.items():
        assert re.search(rf"^ {re.escape(name)} +{re.escape(help.split()[0])}", out, re.MULTILINE)
    assert re.search(r"hydra\+\+ .* needed +smollm2-135m", out)
    assert re.search(r"medusa2 .* needed +smollm2-135m\+medusa2", out)
    assert re.search(r"prompt_lookup .* none", out)


@pytest.mark.usefixtures("parrot")
def test_options_of_a_drafter_are_listed(foretell: Foretell, tiny: str) -> None:
    out = foretell("drafters", "parrot").out
    assert re.search(r"times +int +1 +how often it comes", out)
    assert "foretell train" not in out
    assert foretell("generate", "hi", "-m", tiny, "-d", "parrot", "-o", "help").out == out
    assert foretell("chat", "-m", tiny, "-d", "parrot", "-o", "help").out == out
    assert re.search(r"Options of --drafter plain.*: none", foretell("drafters", "plain").out)
    both = foretell("drafters", "medusa").out
    assert re.search(
        r"Options of --drafter medusa.*checkpoint .*Options of `foretell train medusa`.*heads ", both, re.S
    )


@pytest.mark.slow
def test_the_page_of_help_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    import cli_help

    monkeypatch.setattr(cli_help, "PAGE", tmp_path / "docs" / "cli.md")
    monkeypatch.setattr(sys, "argv", ["cli_help.py", "--check"])
    with pytest.raises(SystemExit, match="stale"):
        cli_help.main()
    monkeypatch.setattr(sys, "argv", ["cli_help.py"])
    cli_help.main()
    text = cli_help.PAGE.read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert all(f"## foretell {verb}\n" in text for verb in VERBS)
    monkeypatch.setattr(sys, "argv", ["cli_help.py", "--check"])
    cli_help.main()


# --- generate -----------------------------------------------------------------------------------------------

FIELDS = {
    "finish_reason", "acceptance_length", "prompt_tokens", "new_tokens", "reused_tokens",
    "steps", "plain_steps", "suspended_steps", "drafted", "accepted", "inserted", "slots",
    "prefill_seconds",
    "draft_seconds", "verify_seconds", "seconds", "tokens_per_second", "exact",
}  # fmt: skip
ANSWER = {"prompt", "text", "ids"}


def answers(foretell: Foretell, tiny: str, path: Path, *arguments: str) -> list[dict[str, Any]]:
    options = ("-m", tiny, "--dtype", "fp32", "-n", "12", "--json")
    ran = foretell("generate", "--prompts", str(path), *options, *arguments)
    assert (ran.code, ran.err) == (0, "")
    return ran.lines


def test_json_fields(foretell: Foretell, tiny: str, prompts: Path) -> None:
    lines = answers(foretell, tiny, prompts, "-d", "prompt_lookup")
    assert len(lines) == 5
    for line in lines:
        assert set(line) == FIELDS | {"line"} | ({"turns"} if "turns" in line else ANSWER)
        ids = [token for turn in turns_of(line) for token in turn["ids"]]
        assert line["new_tokens"] == len(ids) <= 12 * len(turns_of(line))
        assert line["finish_reason"] in ("stop", "length")
        assert line["seconds"] >= line["prefill_seconds"] >= 0
        assert line["acceptance_length"] == pytest.approx(line["new_tokens"] / line["steps"], abs=1e-4)


def test_turns_are_summed_and_listed(foretell: Foretell, tiny: str, prompts: Path) -> None:
    lines = answers(foretell, tiny, prompts)
    assert ["turns" in line for line in lines] == [False, True, False, True, False]
    whole, turns = lines[1], lines[1]["turns"]
    assert len(turns) == 3
    assert all(set(turn) == FIELDS | ANSWER for turn in turns)
    assert whole["finish_reason"] == turns[-1]["finish_reason"]
    for name in ("prompt_tokens", "new_tokens", "steps", "reused_tokens"):
        assert whole[name] == sum(turn[name] for turn in turns)
    said = "u:and then?a:" + turns[0]["text"]  # one token a byte, and two ends of turns
    assert turns[1]["prompt_tokens"] == turns[0]["prompt_tokens"] + len(said.encode()) + 2
    assert turns[1]["reused_tokens"] > 0  # the cache holds what was said


@pytest.mark.parametrize("arguments", [(), ("-t", "1", "--seed", "3")])
def test_neither_batch_nor_drafter_changes_a_token(
    foretell: Foretell, tiny: str, prompts: Path, arguments: tuple[str, ...]
) -> None:
    alone = answers(foretell, tiny, prompts, *arguments)
    ids = ids_of(alone)
    for more in (["-b", "2"], ["-b", "8", "-d", "prompt_lookup", "--no-adapt"]):
        assert ids_of(answers(foretell, tiny, prompts, *arguments, *more)) == ids
    some = answers(foretell, tiny, prompts, *arguments, "--every", "2", "--limit", "2")
    assert ids_of(some) == [ids[0], ids[2]]  # a line's noise is its own


def test_a_conversation_that_outgrows_the_context_ends_alone(foretell: Foretell, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    long = {"turns": ["hello", "x" * 300, "y" * 300]}
    path.write_text("\n".join(json.dumps(each) for each in (long, {"prompt": "hi"}, {"turns": ["a", "b"]})))
    ran = foretell("generate", "--prompts", str(path), "-m", tiny, "--dtype", "fp32", "-n", "12", "-b", "3", "--json")
    assert ran.code == 1
    assert "long.jsonl, line 1, turn 3: A prompt of" in ran.err
    assert "1 of 3 conversations could not be answered to their end" in ran.err
    assert ["error" in line for line in ran.lines] == [True, False, False]
    assert len(ran.lines[0]["turns"]) == 2
    assert len(ran.lines[2]["turns"]) == 2


def test_logprobs_come_when_asked_for(foretell: Foretell, tiny: str, prompts: Path) -> None:
    lines = answers(foretell, tiny, prompts, "--logprobs", "2", "--limit", "2")
    for answer in (answer for line in lines for answer in turns_of(line)):
        assert [each["id"] for each in answer["logprobs"]] == answer["ids"]
        assert all(each["logprob"] <= 0 and len(each["top"]) == 2 for each in answer["logprobs"])


def test_text_is_streamed_and_statistics_go_to_stderr(foretell: Foretell, tiny: str) -> None:
    options = ("-m", tiny, "-n", "16", "--dtype", "fp32", "--ignore-eos")
    as_json = foretell("generate", "hello", *options, "--json").lines[0]
    ran = foretell("generate", "hello", *options, "--stats")
    assert ran.out == as_json["text"] + "\n"
    assert re.search(r"16 tokens in .* tokens/s, 1.00 tokens per step", ran.err)
    assert foretell("generate", "-", *options, stdin=b"hello").out == ran.out
    assert foretell("generate", "hello", *options, "--raw", "--json").lines[0]["prompt_tokens"] == 5


def test_prompts_from_stdin_as_text(foretell: Foretell, tiny: str, prompts: Path) -> None:
    options = ("-m", tiny, "-n", "8", "--dtype", "fp32")
    lines = foretell("generate", "--prompts", str(prompts), *options, "--json").lines
    ran = foretell("generate", "--prompts", "-", *options, stdin=prompts.read_bytes())
    texts = [
        "\n".join([f"== line {line['line']} ==", *(f"> {turn['prompt']}\n{turn['text']}\n" for turn in turns_of(line))])
        for line in lines
    ]
    assert ran.out == "".join(text + "\n" for text in texts)


def test_answers_say_which_prompt_they_belong_to(foretell: Foretell, tiny: str, prompts: Path) -> None:
    lines = answers(foretell, tiny, prompts)
    assert [line["line"] for line in lines] == [1, 3, 4, 5, 6]  # as an editor counts them
    assert [[turn["prompt"] for turn in turns_of(line)] for line in lines] == [
        ["one"], ["two", "and then?", "and?"], ["three three three"], ["four"], ["five\u2028still five"],
    ]  # fmt: skip
    [typed] = foretell("generate", "hello", "-m", tiny, "-n", "4", "--json").lines
    assert typed["prompt"] == "hello"
    assert "line" not in typed
    one = foretell("generate", "--prompts", str(prompts), "-m", tiny, "-n", "4", "--limit", "1").out
    assert one == foretell("generate", "one", "-m", tiny, "-n", "4").out + "\n"  # nothing to tell it apart from


@pytest.mark.parametrize(("suspended", "stats", "terminal"), [(28, False, True), (28, True, False), (4, False, True)])
def test_speculation_that_was_held_back_is_said(
    tiny: str, suspended: int, stats: bool, terminal: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal if most steps were plain for it, and with --stats always."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    result = Result(statistics=Statistics(steps=35, plain_steps=30, suspended_steps=suspended, new_tokens=40))
    _note_speed(package.load(tiny, threads=1), [result], 1.0, stats)
    said = f"Speculation was held back in {suspended} of 35 steps" in capsys.readouterr().err
    assert said == (suspended == 28)


def test_lossy_decoding_says_so(foretell: Foretell, tiny: str) -> None:
    ran = foretell("generate", "hi", "-m", tiny, "-n", "8", "-d", "prompt_lookup", "--typical", "0.1,0.3")
    assert ran.code == 0
    assert "lossy" in ran.err


# --- leaving early ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('{"prompt": "hello"}\n' * 400)
    process = in_a_process("generate", "--prompts", str(path), "--json", "-m", tiny, "-n", "8")
    assert process.stdout is not None
    assert process.stderr is not None
    json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""


@pytest.mark.slow
def test_an_interruption_is_one_line(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('{"prompt": "hello"}\n' * 4000)
    process = in_a_process("generate", "--prompts", str(path), "--json", "-m", tiny, "-n", "100", "--ignore-eos")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "interrupted")
    assert not out or out.endswith("}\n")  # no line is cut in two


# --- demo ----------------------------------------------------------------------------------------------------


def test_demo_compares(foretell: Foretell, tiny: str) -> None:
    ran = foretell("demo", "hello", "-m", tiny, "-n", "12", "--dtype", "fp32")
    assert ran.code == 0
    assert ran.out.count("--- ") == 2
    assert re.search(r"plain .* 1\.00 ", ran.out)
    assert "the same ids both ways" in ran.out
    assert re.search(r"\d threads, \w+ kernels, float32", ran.out)


class Liar(Parrot):
    """Pretends to be lossless and spoils the cache of what it is shown."""

    def observe(self, rows: Sequence[Row], features: Any) -> None:
        for row in rows:
            row.tokens[-1] = (row.tokens[-1] + 1) % 256


def test_demo_fails_when_the_ids_differ(foretell: Foretell, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafters, "DRAFTERS", dict(drafters.DRAFTERS))
    drafters.register("liar", Liar, "breaks the promise")
    ran = foretell("demo", "hello", "-m", tiny, "-n", "12", "--dtype", "fp32", "-d", "liar")
    assert ran.code == 1
    assert "the ids DIFFER" in ran.out


# --- the demo model -----------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_demo_model_answers(foretell: Foretell, demo_folder: Path) -> None:
    ran = foretell("generate", "Name the capital of France.", "-n", "24")
    assert ran.code == 0
    assert "Paris" in ran.out


@pytest.mark.real
def test_the_demo_model_keeps_the_promise(foretell: Foretell, demo_folder: Path, prompts: Path) -> None:
    ids = [
        ids_of(foretell("generate", "--prompts", str(prompts), "--json", "-n", "12", *more).lines)
        for more in ([], ["-d", "prompt_lookup", "--no-adapt"], ["-d", "prompt_lookup", "-b", "4"])
    ]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.real
def test_the_demo_runs(foretell: Foretell, demo_folder: Path) -> None:
    ran = foretell("demo", "-n", "32")
    assert ran.code == 0
    assert "the same ids both ways" in ran.out


def test_loading_knows_every_option_of_load() -> None:
    import inspect

    import foretell

    known = set(inspect.signature(foretell.load).parameters) - {"progress", "options"}
    assert set(vars(Loading())) - {"option"} == known


def test_every_numeric_sampling_option_is_an_option_of_the_command_line() -> None:
    names = {option.name for option in numbers()}
    assert names >= {"temperature", "top_p", "top_k", "min_p", "seed"}
    assert names <= vars(Sampling()).keys()
    assert Sampling(top_k=3, seed=1).params() == SamplingParams(top_k=3, seed=1)
    with pytest.raises(UsageError, match="top_p is 2; it must lie between 1e-09 and 1"):
        Sampling(top_p=2).params()
