"""Code that a model wrote, run in a process with little time, memory and disk, without network, children or input.

This file is both sides: `finishes` starts it as a program of its own (`python -I`), and that program limits itself
before it runs anything. The kernel limits its resources and, where unprivileged processes may have one, gives it a
network of its own that leads nowhere; an audit hook of Python refuses other processes, sockets, and files outside its
empty folder. That stops accidents. It does not stop an attacker, who can undo in Python what Python refuses.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS, MEMORY_BYTES, FILE_BYTES = 10, 1 << 30, 1 << 20
"""Limits: processor time (and twice as much of the clock's), memory, size of a file."""


@cache
def finishes(parts: tuple[str, ...]) -> bool:
    """Returns whether all parts run to their end, one after another in one module; equal ones run once.

    The process answers with a word drawn for this run, so that leaving early with exit code 0 is not an end.
    """
    word = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", __file__, str(SECONDS)], cwd=folder, env={},
                input=json.dumps([word, parts]).encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.stdout == word.encode()


def without_network() -> bool:
    """Returns whether the kernel cuts programs off from the network; otherwise Python alone refuses sockets."""
    ours = Path("/proc/self/ns/net")
    return ours.exists() and finishes((f"import os\nassert os.readlink('{ours}') != '{ours.readlink()}'",))


# -- inside the process ------------------------------------------------------------------------------------------------

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # flags of unshare(2); Python 3.12 names them
_REFUSED = (
    "ctypes.", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.posix_spawn", "os.remove",
    "os.rename", "os.rmdir", "os.symlink", "os.system", "os.truncate", "pty.", "shutil.", "signal.", "socket.",
    "sqlite3.", "subprocess.",
)  # fmt: skip
"""Beginnings of audit events that no answer to a question needs."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _limit(seconds: int) -> None:
    """Limits this process for good."""
    import _posixsubprocess
    import resource

    for what, most in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))
    unshare = getattr(ctypes.CDLL(None), "unshare", None)  # Linux alone has it, and may refuse it
    if unshare:
        unshare(_NEW_USER | _NEW_NETWORK)
    _posixsubprocess.fork_exec = None  # type: ignore[assignment]  # the one way to a child that raises no audit event
    home = Path.cwd().resolve()

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(event)
        if (event == "open" and arguments[2] & _WRITES) or event == "os.mkdir":
            path = arguments[0]
            if not isinstance(path, int) and not Path(os.fsdecode(path)).resolve().is_relative_to(home):
                raise PermissionError(event)

    sys.addaudithook(refuse)


def _run(parts: Sequence[str]) -> None:
    module = ModuleType("answer")
    sys.modules["answer"] = module  # where dataclasses look up their annotations
    for part in parts:
        exec(compile(part, "answer.py", "exec", dont_inherit=True), module.__dict__)


if __name__ == "__main__":
    _word, _parts = json.load(sys.stdin)
    _answer, _nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for _stream in (0, 1, 2):
        os.dup2(_nothing, _stream)
    _limit(int(sys.argv[1]))
    _run(_parts)
    os.write(_answer, _word.encode())
    os._exit(0)  # whatever threads the answer left
