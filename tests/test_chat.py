"""The conversation in the terminal: from a pipe, at a keyboard, and its parts alone."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Foretell, Ran
from pseudo_terminal import ONE, OWN, Shown, Terminal

from foretell.cli import chat_input
from foretell.cli.chat_input import draft_of, is_open, open_history, unquoted
from foretell.cli.chat_output import CONTROLS, WordWrap
from foretell.errors import UsageError

SAMPLED = ("-t", "1", "--seed", "3")
"""The tiny model's most probable answers are all alike."""
TINY = ("--dtype", "fp32", "--threads", "1")
PROMPT = "\x1b[?2004h"
"""What prompt_toolkit sends when it waits for a turn."""
DUMB = {"TERM": "dumb"}


@pytest.fixture
def talk(foretell: Foretell, tiny: str) -> Callable[..., Ran]:
    """Runs a chat whose turns are lines of a pipe; the answers are 8 tokens long."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> Ran:
        arguments = ("chat", "-m", tiny, "-n", "8", "--dtype", "fp32", "--ignore-eos", *options)
        return foretell(*arguments, stdin="".join(f"{line}\n" for line in lines).encode())

    return run


# --- from a pipe --------------------------------------------------------------------------------------------


def test_chat_from_a_pipe(talk: Callable[..., Ran]) -> None:
    system = ("--system", "be brief", *SAMPLED)
    ran = talk("hello", "", "and?", "/stats", "/clear", "hello", "/help", "/exit", "never read", options=system)
    assert ran.code == 0
    assert re.search(r"answers: 2, tokens: 16 .*cache already: [1-9]\d* of", ran.err)
    assert re.search("/clear +start a new conversation", ran.err)
    assert "loading" not in ran.err
    once = talk("hello", options=system)
    assert ran.out.startswith(once.out)
    assert ran.out.endswith(once.out)  # after /clear everything is as it was


def test_a_conversation_that_outgrows_the_context(talk: Callable[..., Ran]) -> None:
    ran = talk("hello", "long " * 200, "/clear", "hello")
    assert ran.code == 0
    assert re.search("error: The conversation is now .* context of 512; /clear starts a new one", ran.err)
    assert ran.out == talk("hello").out * 2


def test_without_a_limit_an_answer_ends_where_the_context_does(foretell: Foretell, tiny: str) -> None:
    ran = foretell("chat", "-m", tiny, "--dtype", "fp32", "--ignore-eos", stdin=b"x" * 400 + b"\nmore\n")
    cut = re.search(r"cut at (\d+) tokens: the context is full; /clear", ran.err)
    assert cut is not None
    assert 64 < int(cut[1]) < 112
    assert re.search("no room for an answer of 64 .* context of 512; /clear", ran.err)


def test_lines_between_triple_quotes_are_one_turn(talk: Callable[..., Ran]) -> None:
    ran = talk('"""one', "/two", 'three"""', "/stats")
    assert "answers: 1," in ran.err
    unclosed = talk("hello", '"""one', "two")
    assert unclosed.code == 2
    assert 'opens with """ and does not close' in unclosed.err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("/nonsense x", "There is no command /nonsense; /help lists them."),
        ("/save", "'/save' does not fit the command; write /save FILE."),
        ("/clear all", "'/clear all' does not fit the command; write /clear."),
        ("/stats perhaps", "write /stats [on|off]."),
        ("/regen", "There is no answer yet"),
        ("/save x.json", "There is nothing to save yet"),
        ("/load no/where.json", "Cannot read no/where.json (.*No such file"),
        ("/system", "There is no system prompt"),
    ],
)
def test_a_command_that_cannot_be_done_is_a_sentence(talk: Callable[..., Ran], command: str, sentence: str) -> None:
    ran = talk(command, "hello")
    assert re.search(re.escape(sentence).replace(r"\.\*", ".*"), ran.err)
    assert ran.code == 0
    assert ran.out == talk("hello").out


def test_system_is_shown_set_and_removed(talk: Callable[..., Ran]) -> None:
    ran = talk("/system be brief", "/system", "hello", "/clear", '/system ""', "hello", options=SAMPLED)
    assert "be brief" in ran.err
    brief = talk("hello", options=("--system", "be brief", *SAMPLED)).out
    plain = talk("hello", options=SAMPLED).out
    assert brief != plain
    assert ran.out == brief + plain


def test_regen_answers_the_last_turn_anew(talk: Callable[..., Ran]) -> None:
    greedy = talk("hello", "/regen", "and?", "/stats")
    first = talk("hello", "and?").out.splitlines()
    assert greedy.out.splitlines() == [first[0], *first]
    assert "the same answer" in greedy.err
    assert "answers: 3" in greedy.err
    sampled = talk("hello", "/regen", options=SAMPLED)
    one, two = sampled.out.splitlines()
    assert one != two
    assert talk("hello", "/regen", options=SAMPLED).out == sampled.out


def test_a_saved_conversation_is_continued(talk: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk("hello", "and?", f"/save {file}", options=("--system", "be brief", *SAMPLED))
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    loaded = talk(f"/load {file}", "last", f"/save {file}", "/system")  # a saved conversation may be written over
    assert "turns: 2" in loaded.err
    assert loaded.err.endswith("be brief\n")
    saved = json.loads(file.read_text())
    assert saved["messages"][:5] == messages
    assert saved["messages"][5:] == [
        {"role": "user", "content": "last"}, {"role": "assistant", "content": loaded.out.removesuffix("\n")},
    ]  # fmt: skip
    assert saved["turns"] == ["hello", "and?", "last"]


def test_generate_answers_a_saved_conversation(talk: Callable[..., Ran], foretell: Foretell, tiny: str, tmp_path: Path):
    file = tmp_path / "talk.json"
    answers = talk("hello", "and?", f"/save {file}", options=SAMPLED).out.splitlines()
    options = (*SAMPLED, "-m", tiny, "-n", "8", "--dtype", "fp32", "--ignore-eos", "--json")
    (line,) = foretell("generate", "--prompts", str(file), *options).lines
    assert [turn["text"] for turn in line["turns"]] == answers


def test_only_a_saved_conversation_is_written_over(talk: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("precious")
    assert "exists and is not a saved conversation" in talk("hello", f"/save {file}").err
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nonsense", "is not valid JSON"),
        ({"turns": ["hello"]}, '"messages" must be a list'),
        ({"messages": [{"role": "user"}]}, '"messages" must be a list'),
        ({"messages": [{"role": "user", "content": "hello"}]}, "in turn"),
        ({"messages": []}, "in turn"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(
    talk: Callable[..., Ran], tmp_path: Path, content: Any, sentence: str
) -> None:
    file = tmp_path / "x.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert sentence in talk(f"/load {file}").err


def test_stats_on_adds_a_line_to_each_answer(talk: Callable[..., Ran]) -> None:
    ran = talk("hello", "/stats on", "and?", "/stats off", "and?")
    assert re.findall(r"\((\d+) tokens, [\d.]+ tokens/s, 1\.00 tokens per step\)\n", ran.err) == ["8"]


def test_help_hides_what_chat_refuses(foretell: Foretell) -> None:
    assert "--logprobs" not in foretell("chat", "--help").out
    assert "--logprobs" in foretell("generate", "--help").out


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_chat(tiny: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "foretell", "chat", "-m", tiny, "-n", "400", "--ignore-eos"], text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src")},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdout.read(1)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    out, err = process.communicate("/stats\n", timeout=60)
    assert process.returncode == 0
    assert "(stopped)" in err
    assert re.search(r"answers: 1 \(1 stopped\), tokens: [1-9]\d* at [1-9].* 1\.00 tokens per step", err)
    assert len(out.encode()) < 400


# --- at a keyboard ------------------------------------------------------------------------------------------


@pytest.fixture
def lasting(tiny: str, tmp_path: Path) -> str:
    """The tiny model with room for an answer that takes a minute."""
    for path in Path(tiny).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 16}))
    return str(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, DUMB], ids=["xterm", "dumb"])
def test_chat_in_a_terminal(lasting: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """A turn is read and answered; Ctrl-C ends an answer and nothing else, Ctrl-D leaves, even from within one."""
    ready = "> " if environment else PROMPT
    options = ["-m", lasting, *TINY, "-n", "60000", "--ignore-eos", "-d", "prompt_lookup"]
    chat = Terminal(ONE, ["chat", *options], 80, environment | {"XDG_STATE_HOME": str(tmp_path)})
    chat.wait_for(f"loading {lasting} ...")
    banner = "".join(chat.wait_for(ready).lines)
    assert f"{lasting}, drafter prompt_lookup, context of 65536 tokens. /help lists the commands" in banner
    for words in ("hello", "and now?"):  # the second time, too
        chat.type(f"{words}\r")
        chat.wait_for(words)
        chat.wait_for_more(400)  # in the midst of the answer
        chat.type("draft\r")
        chat.wait_for_more(1000)
        chat.type("\x03")
        shown = chat.wait_for("(stopped)")
        assert len(shown.text) > 1000
        assert "draft" not in shown.text
        assert "^C" not in shown.text
        chat.wait_for(ready)
        if not environment:
            chat.wait_for("draft")
            chat.type("\x15")  # what was typed before is one's own to delete
    chat.type_until("\x03", "(Ctrl-D or /exit leaves)")
    chat.wait_for(ready)
    chat.type("/stats\r")
    chat.wait_for("answers: 2 (2 stopped)")
    chat.wait_for(ready)
    chat.type("again\r")
    chat.wait_for("again")
    chat.wait_for_more(400)
    chat.type("\x04")
    code, last = chat.leave()
    assert code == 0
    assert last.lines[-1] == "(stopped)"
    assert "Traceback" not in chat.text
    if environment:
        assert not Shown(chat.text).escapes


READER = (
    OWN
    + """
import sys
import foretell.cli.chat
from foretell.cli.chat_input import open_reader
reader = open_reader()
with reader.silence():
    print("busy", flush=True)
    while not reader.has_left() and b"." not in reader._typed: pass
for turn in reader.turns():
    print(f"turn {turn!r}", flush=True)
assert "torch" not in sys.modules
"""
)
"""Reads turns as the chat does, without a model."""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 200])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=["colour", "no colour"])
def test_turns_are_typed_and_pasted(tmp_path: Path, columns: int, environment: dict[str, str]) -> None:
    at = environment | {"XDG_STATE_HOME": str(tmp_path / "state")}
    reader = Terminal(READER, [], columns, at)

    def answered(keys: str) -> str:
        reader.wait_for(PROMPT)
        reader.type(keys)
        reader.wait_for("turn ")
        return reader.wait_for("\r\n").text

    reader.wait_for("busy")
    reader.type("helx\x7flo\x1b[A\r\r.")  # typed too early: a draft, which no Enter has sent
    assert answered("\x7f\x7f\x7f there\r") == "'hello there'"
    assert answered("\x1b[200~one\ntwo\x1b[201~\r") == "'one\\ntwo'"
    assert answered('"""a\rb"""\r') == '\'"""a\\nb"""\''
    assert answered("\x1b[A\x1b[A\x1b[A\r") == "'one\\ntwo'"  # two lines of the last turn are passed first
    reader.wait_for(PROMPT)
    reader.type("unfinished\x03")
    reader.wait_for("(Ctrl-D or /exit leaves)")
    reader.wait_for(PROMPT)
    reader.type("\x04")
    assert reader.leave()[0] == 0
    assert "hello" not in reader.text.partition(PROMPT)[0]  # not echoed while busy
    assert not environment or not Shown(reader.text).colours

    reader = Terminal(READER, [], columns, at)  # another session
    reader.wait_for("busy")
    reader.type(".")
    assert answered("\x7f\x1b[A\x1b[A\x1b[A\r") == '\'"""a\\nb"""\''
    reader.wait_for(PROMPT)
    reader.type("\x04")
    assert reader.leave()[0] == 0


@pytest.mark.slow
def test_ctrl_d_while_busy_leaves(tmp_path: Path) -> None:
    for environment in ({}, DUMB):
        reader = Terminal(READER, [], 80, environment | {"XDG_STATE_HOME": str(tmp_path)})
        reader.wait_for("busy")
        reader.type("words\x04")
        assert reader.leave()[0] == 0
        assert "> " not in reader.text


@pytest.mark.parametrize("at", ["setcbreak", "yield", "has_left"])
def test_ctrl_c_leaves_the_terminal_as_it_was(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: just after the echo was turned off, during an answer, or as the keys typed are read."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def setcbreak_then_interrupt(*given: Any) -> None:
        setcbreak(*given)
        interrupt()

    keyboard, terminal = os.openpty()
    setcbreak = tty.setcbreak
    with os.fdopen(keyboard), os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        reader = chat_input.KeyboardReader()
        if at == "setcbreak":
            monkeypatch.setattr(tty, "setcbreak", setcbreak_then_interrupt)
        if at == "has_left":
            monkeypatch.setattr(reader, "has_left", interrupt)
        before = termios.tcgetattr(terminal)
        assert before[3] & termios.ECHO

        def be_silent() -> None:
            with reader.silence():
                assert not termios.tcgetattr(terminal)[3] & termios.ECHO
                if at == "yield":
                    interrupt()

        with pytest.raises(KeyboardInterrupt):
            be_silent()
        assert termios.tcgetattr(terminal) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_chat_leaves_the_terminal_as_it_was(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(number)
    keyboard, terminal = os.openpty()
    with os.fdopen(keyboard), os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        reader, before = chat_input.KeyboardReader(), termios.tcgetattr(terminal)

        def be_silent() -> None:
            with reader.silence():
                signal.raise_signal(number)

        with pytest.raises(SystemExit) as caught:
            be_silent()
        assert caught.value.code == 128 + number
        assert termios.tcgetattr(terminal) == before
        assert signal.getsignal(number) == handler


# --- history ------------------------------------------------------------------------------------------------


def test_history_is_kept_for_its_owner_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / "foretell" / "history"
    history = open_history()
    for number in range(30):
        history.store_string(f"turn {number}\nof two lines")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setattr(chat_input, "MAX_HISTORY_TURNS", 20)
    kept = [*open_history().load_history_strings()]  # the newest first
    assert kept == [f"turn {number}\nof two lines" for number in range(29, 19, -1)]
    monkeypatch.setattr(chat_input, "MAX_HISTORY_BYTES", 100)
    assert [*open_history().load_history_strings()] == kept[:2]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["history"]


def test_history_that_cannot_be_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    open_history().append_string("kept for this session")
    assert "note: turns are not kept for the next session" in capsys.readouterr().err


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opens", "inner"),
    [
        ("hello", False, "hello"),
        ('"""hello', True, None),
        ('"""', True, None),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\n/a\n"""', False, "/a"),
        ('say """this"""', False, 'say """this"""'),
    ],
)
def test_triple_quotes(text: str, opens: bool, inner: str | None) -> None:
    assert is_open(text) == opens
    if inner is not None:
        assert unquoted(text) == inner


@pytest.mark.parametrize(
    ("typed", "draft"),
    [
        ("", ""),
        ("hello\r", "hello"),
        ("a\rb\r\r", "a\nb"),
        ("wrong\x15right", "right"),
        ("héx\x7fé", "héé"),
        ("a\x1b[A\x1b[D\tb", "ab"),
        ("\x1b[200~one\ntwo\x1b[201~", "one\ntwo"),
    ],
)
def test_what_was_typed_too_early_becomes_a_draft(typed: str, draft: str) -> None:
    assert draft_of(typed) == draft


PROSE = (
    "Words of several lengths, wrapped at the right margin: none is broken, nothing is lost, and incomprehensibilities "
    "fit as well; this paragraph is longer than a line even of a wide terminal.\n\n"
    "* a list\n  - goes on, indented, for more than a line of a narrow terminal\n"
)
CODE = "```python\nif code:    # is not wrapped, however long its lines are, and keeps its    blanks \n    pass\n```\n"
URL = "https://example.org/" + "long" * 60


def wrapped(text: str, columns: int, step: int) -> str:
    wrap = WordWrap()
    pieces = [wrap.feed(text[at : at + step], columns) for at in range(0, len(text), step)]
    return "".join([*pieces, wrap.end(columns)])


@pytest.mark.parametrize("columns", [40, 200])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_words_wrap(columns: int, step: int) -> None:
    text = f"{PROSE}{CODE}{PROSE}See {URL} or {PROSE}"
    shown = wrapped(text, columns, step)
    assert shown.split() == text.split()
    assert CODE in shown
    assert URL in shown
    lines = shown.replace(CODE, "").replace(URL, "").split("\n")
    assert max(map(len, lines)) <= columns
    assert max(map(len, lines)) > columns * 0.7
    assert shown.count("\n\n") == text.count("\n\n")


def test_what_fits_is_not_changed() -> None:
    text = "A line.  Two blanks.\n\n    Indented\n\ttext"
    assert wrapped(text, 40, 1) == text
    assert wrapped("four four four", 14, 1) == "four four four"
    assert wrapped("four four four", 13, 1) == "four four\nfour"


def test_a_word_is_shown_as_soon_as_its_place_is_known() -> None:
    wrap = WordWrap()
    assert wrap.feed("one tw", 10) == "one"
    assert wrap.feed("o th", 10) == " two"
    assert wrap.feed("r", 10) == "\nthr"  # too long for its line, whatever follows
    assert wrap.feed("ee", 10) == "ee"
    assert wrap.end(10) == ""


def test_wide_characters_take_two_columns() -> None:
    assert wrapped("春眠不覚暁", 6, 1) == "春眠不\n覚暁"
    assert wrapped("ab 春眠", 5, 1) == "ab 春\n眠"


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert "\x1b[2Ja\r\n\tb\x9b".translate(CONTROLS) == "�[2Ja\n\tb�"


WRITER = (
    OWN
    + """
import sys
from foretell.cli.chat_output import AnswerWriter, dim
writer, text = AnswerWriter(), sys.argv[1]
for at in range(0, len(text), 3):
    writer.write(text[at : at + 3])
writer.close()
print(dim("fast"), file=sys.stderr)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 200])
@pytest.mark.parametrize(
    ("environment", "escapes"), [({}, 2), ({"NO_COLOR": "1"}, 0), (DUMB, 0)], ids=["xterm", "no colour", "dumb"]
)
def test_answers_in_a_terminal(columns: int, environment: dict[str, str], escapes: int) -> None:
    code, shown = Terminal(WRITER, [PROSE], columns, environment).leave()
    assert code == 0
    assert len(shown.escapes) == escapes
    assert [line.strip() for line in shown.lines] == [
        line.strip() for line in [*wrapped(PROSE, columns, 3).splitlines(), "fast"] if line.strip()
    ]
    assert max(map(len, shown.lines)) <= columns


def test_a_pipe_gets_the_text_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITER.removeprefix(OWN), PROSE], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{PROSE}\n", "fast\n")


def test_a_pipe_that_ends_inside_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO('"""one\n'))
    with pytest.raises(UsageError, match="does not close"):
        [*chat_input.open_reader().turns()]
