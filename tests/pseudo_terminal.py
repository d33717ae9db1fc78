"""Programs that run in a terminal of their own, as a person at a keyboard would have them."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PATIENCE = 120.0
"""Seconds without a word after which a program counts as stuck."""

OWN = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
ONE = OWN + "from foretell.cli import main; main()"
SEVERAL = (
    OWN
    + """
import json, os, struct, sys, traceback
from foretell.cli import main

for number, (arguments, columns, environment, out) in enumerate(json.loads(sys.argv.pop())):
    os.environ.update(environment)
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    terminal = os.dup(1)
    if out:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.write(2, f"<begin {number}>".encode())
    try:
        main(arguments)
    except SystemExit as left:
        code = left.code
    except Exception:
        traceback.print_exc()
        code = 1
    os.dup2(terminal, 1)
    os.write(2, f"<end {number}: {code or 0}>".encode())
    for name in environment:
        del os.environ[name]
"""
)
"""Many commands in one process, so that torch is imported once."""

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")


@dataclass(frozen=True)
class Shown:
    """What a terminal was sent."""

    text: str

    @property
    def escapes(self) -> list[str]:
        return _ESCAPE.findall(self.text)

    @property
    def colours(self) -> list[str]:
        """Escape sequences that set a colour."""
        sets = [each for each in self.escapes if each.endswith("m")]
        return [each for each in sets if re.search(r"(?:^|;)(?:[349][0-7]|10[0-7]|[34]8)(?:;|m|$)", each[2:])]

    @property
    def lines(self) -> list[str]:
        """What stood in a line at some time, without escape sequences: each time it was drawn anew counts."""
        return [line for line in re.split(r"[\r\n]+", _ESCAPE.sub("", self.text)) if line.strip()]


class Terminal:
    """A Python program that has this terminal as its controlling one."""

    def __init__(self, code: str, arguments: Sequence[str], columns: int, environment: Mapping[str, str]):
        unset = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
        ours = {name: value for name, value in os.environ.items() if name not in unset}
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, env=ours | {"PYTHONUTF8": "1", "TERM": "xterm-256color"} | dict(environment),
        )  # fmt: skip
        os.close(theirs)
        self.text = ""
        self._read = 0
        self._bytes = b""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def type_until(self, keys: str, text: str) -> Shown:
        """Types again and again until this text is shown: a signal that comes just before a program waits for keys is
        seen with the next key only."""
        for _ in range(int(PATIENCE)):
            self.type(keys)
            while select.select([self._ours], [], [], 1.0)[0] and self._receive():
                if text in self.text[self._read :]:
                    return self.wait_for(text)
        raise AssertionError(f"{keys!r} was never heard:\n{self.text}")

    def wait_for(self, text: str) -> Shown:
        """What was shown up to this text since the last call."""
        while (at := self.text.find(text, self._read)) < 0:
            assert self._receive(), f"it ended without {text!r}:\n{self.text}"
        shown, self._read = self.text[self._read : at], at + len(text)
        return Shown(shown)

    def wait_for_more(self, characters: int) -> None:
        """Until so many were shown since the last call; what was shown is left for the next."""
        while len(self.text) < self._read + characters:
            assert self._receive(), f"it ended:\n{self.text}"

    def leave(self) -> tuple[int, Shown]:
        """The exit status, and what was shown at last."""
        while self._receive():
            pass
        os.close(self._ours)
        return self.process.wait(), Shown(self.text[self._read :])

    def _receive(self) -> bool:
        """Reads what is there, or waits for it; false when the program has closed its terminal."""
        if not select.select([self._ours], [], [], PATIENCE)[0]:
            self.process.kill()
            raise AssertionError(f"stuck after:\n{self.text}")
        try:
            part = os.read(self._ours, 1 << 16)
        except OSError:  # how Linux says that nobody holds the other end
            return False
        self._bytes += part
        self.text = self._bytes.decode(errors="ignore")
        return bool(part)
