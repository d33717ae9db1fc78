"""Files read and written so that nothing is ever half there.

What is written appears under its final name only when it is complete: it is made in a hidden folder beside
and renamed. What is read and turns out broken is named in one sentence, with the remedy.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError, UsageError

ANOTHER_FOLDER = "choose another folder (--cache-dir for the cache)"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForetellError(f"{path.parent} has no {path.name}, so it is not a complete model folder.") from None
    except (OSError, ValueError, RecursionError) as error:  # a thousand open brackets recurse
        raise ForetellError(f"{path} cannot be read ({one_line(error)}); delete it and fetch it again.") from error
    if not isinstance(content, dict):
        raise ForetellError(f"{path} must hold a JSON object, but it holds a {type(content).__name__}.")
    return content


def one_line(error: BaseException, limit: int = 200) -> str:
    """What an exception of someone else's says, fit to stand inside a sentence of ours."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write_json(path: Path, content: Any, shared: bool = False) -> None:
    """Writes a JSON file whole or not at all; its folder is made. `shared`: as `written_whole` has it."""
    with written_whole(path, shared=shared) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def exists(path: Path) -> bool:
    """Whether a file is there; false, too, where the folder may not be entered."""
    try:
        return path.exists()
    except OSError:
        return False


@contextmanager
def written_whole(
    path: Path, needed_bytes: int = 0, remedy: str = ANOTHER_FOLDER, shared: bool = False
) -> Iterator[Path]:
    """Yields the name to write to; the file takes its place when the block ends, and vanishes when it fails.

    Args:
        shared: others may be writing the same file with no lock between us; the name is then like no other's.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f".{path.name}{own}.partial")
    with write_errors(path.parent, needed_bytes, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def whole_lines(path: Path, unfinished: bytes | None = None, *, cut: bool = True) -> list[bytes]:
    """Lines of a file that is only appended to, without what an interruption cut short at its end.

    Args:
        unfinished: what a last line holds that is nothing without the next.
        cut: cut it off the file too; for those that add to it.
    """
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")[:-1]
    while unfinished and lines and unfinished in lines[-1]:
        lines.pop()
    whole = sum(len(line) + 1 for line in lines)
    if cut and whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return lines


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a folder that this one adds to; it is made if need be.

    Raises:
        UsageError: another process is at it.
    """
    from filelock import FileLock, Timeout

    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"Another process is writing to {folder}; wait until it is done, or choose another folder."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends, and vanishes when it fails.

    The caller holds the lock of `target`, so any older staging folder was left by a process that was killed.
    """
    staging = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def write_errors(folder: Path, needed_bytes: int = 0, remedy: str = ANOTHER_FOLDER) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into one sentence that says what to do."""
    try:
        if needed_bytes:
            _require_room(folder, needed_bytes, remedy)
        yield
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(folder, "it ran out while writing", remedy) from error
        if isinstance(error, OSError):
            raise ForetellError(f"Cannot write to {folder} ({one_line(error)}); {remedy}.") from error
        raise


def disk_full(folder: Path, reason: str, remedy: str = ANOTHER_FOLDER) -> ForetellError:
    """The sentence for a disk without room."""
    return ForetellError(f"There is not enough disk space in {folder} ({reason}); free some, or {remedy}.")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is the system's "no space left", however the library in between dressed it up."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _require_room(folder: Path, needed_bytes: int, remedy: str) -> None:
    """Makes the folder first: a place that cannot be written, such as /proc, often reports a full disk as well."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if (free := _free_bytes(folder)) < needed_bytes:
        raise disk_full(folder, f"about {-(-needed_bytes // 10**6)} MB are needed, {free // 10**6} MB are free", remedy)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
