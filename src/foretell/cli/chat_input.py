"""Reads the turns of a chat: lines of a pipe, or what a person types.

A terminal shows no key that is typed while an answer is written: such keys become the draft of the next turn, which
only Enter sends. Text that is pasted, and text between triple quotes, is one turn however many lines it has.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from foretell.cli.terminal import note
from foretell.errors import ForetellError, UsageError
from foretell.files import atomic_write, one_line

if TYPE_CHECKING:
    from prompt_toolkit.history import History

QUOTES = '"""'
PROMPT, CONTINUATION = "> ", "... "
END_OF_INPUT = b"\x04"  # Ctrl-D
MAX_HISTORY_TURNS, MAX_HISTORY_BYTES = 1000, 1 << 20


def open_reader() -> TurnReader:
    """Returns the reader that suits stdin."""
    if not sys.stdin.isatty():
        return TurnReader()
    draws = sys.stdout.isatty() or sys.stderr.isatty()
    if os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") or not draws:
        return KeyboardReader()
    return PromptReader()


def is_open(text: str) -> bool:
    """True if a turn begins with triple quotes and has no closing ones yet."""
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def unquoted(text: str) -> str:
    """Returns what stands between triple quotes, or the text itself where there are none."""
    if not text.startswith(QUOTES):
        return text
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip()


class TurnReader:
    """Reads turns from a pipe or a file."""

    def turns(self) -> Iterator[str]:
        """Yields turns and commands until the input ends; triple quotes are left on.

        Raises:
            ForetellError: the input is not UTF-8.
            UsageError: the input ends inside triple quotes.
        """
        while (turn := self.read()) is not None:
            yield turn.strip()

    def read(self) -> str | None:
        """Returns the next turn, None at the end of the input."""
        text = ""
        try:
            text = self.read_line("")
            while is_open(text):
                text = f"{text}\n{self.read_line('')}"
            return text
        except EOFError:
            if is_open(text):
                raise UsageError(f"The last turn opens with {QUOTES} and does not close; add {QUOTES}.") from None
            return None

    def read_line(self, prompt: str) -> str:
        try:
            return input(prompt)
        except UnicodeDecodeError as error:
            raise ForetellError("The input is not UTF-8 text; check the terminal's encoding.") from error

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Shows no key that is typed inside the block."""
        yield

    def has_left(self) -> bool:
        """True if Ctrl-D was typed inside a silent block."""
        return False


class KeyboardReader(TurnReader):
    """Reads turns from a terminal that can only append: its own line editing, and no history.

    Keys that are typed in a silent block are dropped.
    """

    def __init__(self) -> None:
        self._descriptor = sys.stdin.fileno()
        self._typed = b""

    def read(self) -> str | None:
        typed = self._take_typed()
        while END_OF_INPUT not in typed:
            try:
                text = self.read_line(PROMPT)
                while is_open(text):
                    text = f"{text}\n{self.read_line(CONTINUATION)}"
                return text
            except KeyboardInterrupt:
                note("\n(Ctrl-D or /exit leaves)")
            except EOFError:
                print()
                break
        return None

    def _take_typed(self) -> bytes:
        """Returns the keys of the last silent block, once."""
        typed, self._typed = self._typed, b""
        return typed

    @contextmanager
    def silence(self) -> Iterator[None]:
        import termios
        import tty

        before = termios.tcgetattr(self._descriptor)
        ended = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            tty.setcbreak(self._descriptor, termios.TCSADRAIN)  # no echo, keys at once; Ctrl-C stays a signal
            yield
        finally:
            try:
                self.has_left()
            finally:  # a Ctrl-C just now must not leave the terminal without echo
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, before)
                for number, handler in ended.items():
                    signal.signal(number, handler)

    def has_left(self) -> bool:
        while select.select([self._descriptor], [], [], 0)[0]:
            try:
                keys = os.read(self._descriptor, 4096)
            except OSError:  # the terminal is gone
                keys = b""
            self._typed += keys or END_OF_INPUT
            if not keys:
                break
        return END_OF_INPUT in self._typed


class PromptReader(KeyboardReader):
    """Reads turns with prompt_toolkit: line editing, history, pasted lines kept together."""

    def __init__(self) -> None:
        super().__init__()
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.output import create_output

        output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
        output.enable_cpr = False  # type: ignore[attr-defined]  # nothing is drawn below the line; some never answer
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=Condition(lambda: is_open(self._session.default_buffer.text)),  # Enter then begins a line
            prompt_continuation=lambda width, number, wrapped: CONTINUATION if not wrapped else "",
            history=open_history(),
            output=output,
            reserve_space_for_menu=0,
        )

    def read(self) -> str | None:
        typed = self._take_typed()
        draft = draft_of(typed.decode(errors="ignore"))
        while END_OF_INPUT not in typed:
            try:
                return self._session.prompt(default=draft)
            except KeyboardInterrupt:
                note("(Ctrl-D or /exit leaves)")
                draft = ""
            except EOFError:
                break
        return None


def _exit(number: int, frame: FrameType | None) -> None:
    """Leaves by an exception where a signal would end the program at once, with the terminal as it is."""
    sys.exit(128 + number)


def draft_of(typed: str) -> str:
    """Returns the text that these keys have typed; keys that move a cursor are ignored."""
    from prompt_toolkit.input.vt100_parser import Vt100Parser
    from prompt_toolkit.keys import Keys

    text = ""

    def press(key_press: Any) -> None:
        nonlocal text
        match key_press.key:
            case Keys.Backspace:
                text = text[:-1]
            case Keys.ControlU:
                text = ""
            case Keys.ControlM | Keys.ControlJ:
                text += "\n"
            case Keys.BracketedPaste:
                text += key_press.data
            case key if not isinstance(key, Keys):
                text += key

    parser = Vt100Parser(press)
    parser.feed(typed)
    parser.flush()
    return text.strip()


def history_file() -> Path:
    """Returns where turns are kept between sessions."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "foretell" / "history"


def open_history() -> History:
    """Returns the turns of earlier sessions, the oldest dropped; what is added is readable by its owner only.

    Where the file cannot be written, says so once and keeps turns for this session only.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class OwnHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a disk that fills up must not end the conversation
                super().store_string(string)

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
        history = OwnHistory(path)
        _shorten(history, path)
    except (OSError, ForetellError) as error:
        note(f"note: turns are not kept for the next session ({one_line(error)}).")
        return InMemoryHistory()
    return history


def _shorten(history: Any, path: Path) -> None:
    """Keeps the newest turns of a history file that has outgrown its bounds."""
    if path.stat().st_size <= MAX_HISTORY_BYTES and path.read_bytes().count(b"\n#") <= MAX_HISTORY_TURNS:
        return
    kept: list[str] = []
    size = 0
    for turn in history.load_history_strings():  # the newest first
        size += len(turn.encode(errors="replace"))
        if len(kept) == MAX_HISTORY_TURNS // 2 or size > MAX_HISTORY_BYTES // 2:
            break
        kept.append(turn)
    with atomic_write(path) as partial:
        partial.touch(mode=0o600)
        shortened = type(history)(partial)
        for turn in reversed(kept):
            shortened.store_string(turn)
