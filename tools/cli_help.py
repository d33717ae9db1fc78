"""Writes docs/cli.md from the command line's own help, or with --check fails when it is stale.

    python tools/cli_help.py            write
    python tools/cli_help.py --check    compare, for CI

Help is taken as a pipe of fixed width sees it, so that no terminal, colour setting or CI service changes it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
HEADER = """\
# The command line

<!-- Written by tools/cli_help.py from `foretell --help`: edit src/foretell/cli, not this page. -->

Answers go to stdout, everything else to stderr. Exit codes: 0 done; 1 it could not be done (a missing file, no
network); 2 it could never work as typed; 130 interrupted; 141 the reader of the output has left.

## Defaults of your own

`foretell config` shows which defaults are in force, and the file that may change them, `~/.config/foretell/config.toml`
(in `$XDG_CONFIG_HOME` if that is set; `FORETELL_CONFIG` names another file):

```toml
model = "Qwen/Qwen3-0.6B"        # options of the panels Model and Sampling, for every verb that has them
lookup = true
max_new_tokens = 512

[generate]                       # options of one verb
batch_size = 8

[options.medusa]                 # options of one drafter, as given with -o
checkpoint = "/home/me/heads/drafter"
```

The command line wins over a verb's table, and that over the first lines; `FORETELL_CACHE` and `FORETELL_OFFLINE` win
over the file. An option that the file turns on is turned off by its other name, as in `--no-lookup`. `foretell bench`
takes no drafter's options from the file, so that its command line says all that it ran.

## Completion

`foretell --install-completion` completes verbs, options, models and drafters in bash, zsh, fish and PowerShell.

## foretell
"""
# what typer and rich look at; whatever forces colours has to go
_FIXED = {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUTF8": "1"}
_FIXED |= {"FORETELL_CONFIG": os.devnull, "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
_FORCING = {"FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "CLICOLOR_FORCE"}


ASK = """
import contextlib, io, json
from foretell.cli import VERBS, load_verb, main

asked = [[]]
for verb in VERBS:
    asked += [[verb], *([verb, name] for name in getattr(load_verb(verb), "commands", ()))]
texts = []
for words in asked:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main([*words, "--help"])
        except SystemExit as left:
            if left.code:
                raise
    texts.append((" ".join(words), shown.getvalue()))
print(json.dumps(texts))
"""
"""All verbs in one process, which imports what they share once."""


def help_texts() -> dict[str, str]:
    """What `foretell VERB --help` prints, for each verb and for none, without trailing spaces."""
    environment = {name: value for name, value in os.environ.items() if name not in _FORCING} | _FIXED
    environment["PYTHONPATH"] = str(ROOT / "src")
    command = [sys.executable, "-c", ASK]
    out = subprocess.run(command, env=environment, capture_output=True, check=True, encoding="utf-8").stdout
    trimmed = {verb: "\n".join(line.rstrip() for line in text.splitlines()) for verb, text in json.loads(out)}
    return {verb: text.strip("\n") for verb, text in trimmed.items()}


def page() -> str:
    """The whole page."""
    texts = help_texts()
    parts = [HEADER, f"```text\n{texts.pop('')}\n```\n"]
    parts += [f"## foretell {verb}\n\n```text\n{text}\n```\n" for verb, text in texts.items()]
    return "\n".join(parts)


def main() -> None:
    fresh = page()
    if "--check" not in sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(fresh, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != fresh:
        sys.exit("docs/cli.md is stale; run python tools/cli_help.py and commit the result.")


if __name__ == "__main__":
    main()
