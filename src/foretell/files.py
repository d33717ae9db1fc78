"""Files and folders written atomically, and read with errors of one sentence.

A file or folder appears under its final name only when it is complete: it is written under a hidden name beside it and
renamed. A broken file is reported with its path and the remedy.
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

ANOTHER_FOLDER = "choose another folder (`cache_dir=` for the cache)"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ForetellError: the file is missing, cannot be read, or holds something else.
    """
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
    """Returns the message of a library's exception on one line, shortened to `limit` characters, to quote it."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write_json(path: Path, content: Any, shared: bool = False) -> None:
    """Writes a JSON file atomically and creates its folder; `shared` as for `atomic_write`."""
    with atomic_write(path, shared=shared) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def exists(path: Path) -> bool:
    """Returns whether a file exists; False as well where its folder may not be entered."""
    try:
        return path.exists()
    except OSError:
        return False


@contextmanager
def atomic_write(
    path: Path, needed_bytes: int = 0, remedy: str = ANOTHER_FOLDER, shared: bool = False
) -> Iterator[Path]:
    """Yields the path to write to: renamed to `path` when the block ends, deleted when it fails.

    Args:
        needed_bytes: disk space to require beforehand.
        remedy: end of the sentence if the file cannot be written.
        shared: other processes may write the same file without a lock, so the temporary name is unique.

    Raises:
        ForetellError: the disk is full, or the folder cannot be written to.
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


def complete_lines(path: Path, unfinished: bytes | None = None, *, cut: bool = True) -> list[bytes]:
    """Returns the complete lines of an append-only file, without a last one that an interruption cut short.

    Args:
        unfinished: text that marks a line as incomplete without the next one.
        cut: truncate the file to these lines too, before appending to it.
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
    """Locks a folder against other writers while the block runs; creates it if needed.

    Raises:
        UsageError: another process holds the lock.
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
    """Yields an empty folder that becomes `target` when the block ends, and is deleted when it fails.

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
    """Turns a full disk or a folder without write permission into a `ForetellError` that names the remedy."""
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
    """Makes the error for a full disk."""
    return ForetellError(f"There is not enough disk space in {folder} ({reason}); free some, or {remedy}.")


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error is the system's "no space left", also if a library wrapped it."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _require_room(folder: Path, needed_bytes: int, remedy: str) -> None:
    """Creates the folder first: a path that cannot be written, such as /proc, may report a full disk as well."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if (free := _free_bytes(folder)) < needed_bytes:
        raise disk_full(folder, f"about {-(-needed_bytes // 10**6)} MB are needed, {free // 10**6} MB are free", remedy)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
