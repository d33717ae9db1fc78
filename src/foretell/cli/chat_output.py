"""Shows an answer as it arrives: words wrap at the right margin of a terminal; a pipe gets the text itself."""

from __future__ import annotations

import os
import sys

# a model can write escape sequences, which a terminal would obey; a carriage return would overwrite the line
CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}") | {
    ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None
}  # fmt: skip
FENCES = ("```", "~~~")


class AnswerWriter:
    """Prints one answer to stdout, piece by piece."""

    def __init__(self) -> None:
        self._wrap = WordWrap() if sys.stdout.isatty() else None

    def write(self, text: str) -> None:
        if self._wrap is not None:
            text = self._wrap.feed(text.translate(CONTROLS), _columns())
        print(text, end="", flush=True)

    def close(self) -> None:
        """Prints what was held back, and ends the line."""
        print("" if self._wrap is None else self._wrap.end(_columns()), flush=True)


class WordWrap:
    """Breaks lines between the words of a text that arrives in pieces.

    A word is held back until it ends or outgrows its line, so nothing is ever erased, and a terminal that can only
    append will do. Only blanks become line breaks: a word longer than a line and the lines of fenced code pass as they
    are. Wide characters (Chinese, Japanese, Korean, emoji) count two columns, and lines break between any two of them.
    """

    def __init__(self) -> None:
        self._column = 0
        self._blanks = ""  # before the word that is held back
        self._word = ""
        self._after_wide = False
        self._at_line_start = True  # no word in this line yet
        self._in_code = False

    def feed(self, text: str, columns: int) -> str:
        """Returns what can be shown now, for a terminal of so many columns."""
        return "".join(self._take(character, columns) for character in text)

    def end(self, columns: int) -> str:
        """Returns the word that was held back."""
        return self._place(columns)

    def _take(self, character: str, columns: int) -> str:
        if character == "\n":
            shown = self._place(columns) + (self._blanks if self._in_code else "")
            self._column, self._blanks, self._after_wide, self._at_line_start = 0, "", False, True
            return f"{shown}\n"
        if character in " \t":
            shown = self._place(columns)
            self._blanks += character
            return shown
        if _width(character) == 2:
            shown = self._place(columns)
            self._word, self._after_wide = character, True
            return shown + self._place(columns, after_wide=True)
        self._word += character
        inside_word = self._column > 0 and not self._blanks and not self._after_wide
        if inside_word or self._column + _width(self._blanks + self._word) > columns:
            return self._place(columns)
        return ""

    def _place(self, columns: int, after_wide: bool = False) -> str:
        """Moves the held word to the next line if it does not fit in this one, and returns it."""
        if not self._word:
            return ""
        if self._at_line_start and self._word.startswith(FENCES):
            self._in_code = not self._in_code
        breaks = bool(self._column and (self._blanks or self._after_wide)) and not self._in_code
        if breaks and self._column + _width(self._blanks + self._word) > columns:
            before, self._column = "\n", 0
        else:
            before = self._blanks
        shown = before + self._word
        self._column += _width(shown.removeprefix("\n"))
        if self._column > columns:  # the terminal has broken the line itself
            self._column = (self._column - 1) % columns + 1
        self._blanks, self._word, self._after_wide, self._at_line_start = "", "", after_wide, False
        return shown


def dim(text: str) -> str:
    """Returns the text in a fainter face if stderr can show one."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def _columns() -> int:
    return os.get_terminal_size(sys.stdout.fileno()).columns or 80  # 0 where nobody has set it


def _width(text: str) -> int:
    """Columns that a text takes; a tab counts as one blank."""
    from prompt_toolkit.utils import get_cwidth

    return get_cwidth(text.replace("\t", " "))
