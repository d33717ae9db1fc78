"""A drafter in the user's own file: `mine.py:Class`, or `mine.py` if it defines one drafter.

Loading a file runs it, so only a path that the user typed is loaded.
"""

from __future__ import annotations

import re
import sys
import traceback
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError, UsageError
from foretell.files import one_line

if TYPE_CHECKING:
    from foretell.contracts import Drafter

PATH = re.compile(r"(?P<file>.*\.py)(?::(?P<name>[^\W\d]\w*)(?=:|$))?(?P<rest>.*)", re.DOTALL)


def split(text: str) -> tuple[str, str, str] | None:
    """Splits "mine.py:Class:rest" into file, class ("" if not given) and ":rest"; None if it names no .py file."""
    found = PATH.fullmatch(text)
    return (found["file"], found["name"] or "", found["rest"]) if found else None


def drafter_in(file: str, name: str = "") -> type[Drafter]:
    """Returns a drafter that a file defines: the class of that name, or the only one.

    Raises:
        ForetellError: the file does not exist, or running it raises an error.
        UsageError: it has no such class, or no drafter, or several and none was named.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ForetellError(f"There is no file {file}; give the path of a Python file that defines a drafter.")
    module = _module(path.resolve())
    if name:
        if not hasattr(module, name):
            has = ", ".join(_drafters(module))
            raise UsageError(f"{file} has no {name}; {f'its drafters are {has}' if has else 'it defines no drafter'}.")
        return checked(getattr(module, name), f"{name} in {file}")
    found = _drafters(module)
    if len(found) != 1:
        several = f"defines several drafters ({', '.join(found)}); name one, as in {file}:{next(iter(found), '')}"
        raise UsageError(f"{file} {several if found else 'defines no subclass of foretell.Drafter; add one'}.")
    return checked(next(iter(found.values())), f"The drafter in {file}")


def checked(found: Any, where: str) -> type[Drafter]:
    """Refuses what is no drafter class.

    Args:
        where: names it at the beginning of a sentence.

    Raises:
        UsageError: it is no subclass of Drafter, or lacks `draft`.
    """
    from foretell.contracts import Drafter

    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise UsageError(f"{where} is no subclass of foretell.Drafter; derive it from that class.")
    if isabstract(found):
        raise UsageError(f"{where} lacks a method draft(self, rows); define it.")
    return found


def _drafters(module: ModuleType) -> dict[str, Any]:
    """The drafters that a module itself defines, by name."""
    from foretell.contracts import Drafter

    own = {name: each for name, each in vars(module).items() if getattr(each, "__module__", None) == module.__name__}
    return {name: each for name, each in own.items() if isinstance(each, type) and issubclass(each, Drafter)}


_loaded: dict[Path, tuple[int, ModuleType]] = {}
"""File -> when it was changed, and the module that it became."""


def _module(path: Path) -> ModuleType:
    """Imports a file as a module; one that has not changed since is not run again."""
    name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    changed = path.stat().st_mtime_ns
    if path in _loaded and _loaded[path][0] == changed:
        return _loaded[path][1]
    spec = spec_from_file_location(name, path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their types there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may fail in any way while it is imported
        sys.modules.pop(name, None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else str(path)
        raise ForetellError(f"{where} fails: {type(error).__name__}: {one_line(error)}.") from error
    _loaded[path] = changed, module
    return module
