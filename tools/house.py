"""Counts lines of Python and C++ by folder, at a commit and in the working tree, and writes docs/results/house.json.

    python tools/house.py BEFORE

BEFORE is a commit of this repository. Folders of the package are counted with everything below them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {".py": "python", ".cpp": "c++", ".h": "c++", ".inc": "c++"}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def lines(commit: str | None = None) -> Counter[tuple[str, str]]:
    """(folder, language) -> lines of the tracked files at a commit, or of the working tree."""
    counted: Counter[tuple[str, str]] = Counter()
    for line in git("grep", "--count", "-I", "", *([commit] if commit else []), "--", "src", "tests", "tools").split(
        "\n"
    ):
        path, _, count = line.removeprefix(f"{commit}:").rpartition(":")
        if language := LANGUAGES.get(Path(path).suffix):
            counted[folder(path), language] += int(count)
    return counted


def folder(path: str) -> str:
    """The folder that a file is counted under: of the package a part of it, else `tests` or `tools`."""
    parts = Path(path).parts
    return (
        "/".join(parts[:3])
        if parts[0] == "src" and len(parts) > 3
        else "/".join(parts[:2] if parts[0] == "src" else parts[:1])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    args = parser.parse_args()
    before, now = lines(args.before), lines()
    table = {
        language: {
            name: {"before": before[name, language], "after": now[name, language]}
            for name in sorted({name for name, its in {*before, *now} if its == language})
        }
        for language in ("python", "c++")
    }
    for folders in table.values():
        folders["all"] = {side: sum(found[side] for found in folders.values()) for side in ("before", "after")}
    commits = [git("rev-parse", "--short", commit).strip() for commit in (args.before, "HEAD")]
    result = {"command": "python tools/house.py BEFORE", "before": commits[0], "after": commits[1], "lines": table}
    (ROOT / "docs/results/house.json").write_text(json.dumps(result, indent=1) + "\n")
    for language, folders in table.items():
        print(f"| {language} | {commits[0]} | now |\n|---|---|---|")
        for name, found in folders.items():
            print(f"| {name} | {found['before']:,} | {found['after']:,} |")
        print()


if __name__ == "__main__":
    main()
