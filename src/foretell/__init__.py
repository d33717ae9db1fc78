"""foretell: a language model decodes several tokens per forward pass with no second model.

import foretell
llm = foretell.load("smollm2-135m", drafter="prompt_lookup")
print(llm.generate("Why is the sky blue?").text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foretell.api import LLM, load
    from foretell.contracts import Draft, Drafter, Features, Row
    from foretell.drafters import register
    from foretell.errors import ForetellError, ForetellWarning, UsageError
    from foretell.requests import Decoder, Event, SamplingParams
    from foretell.results import Result
    from foretell.trees import TokenTree

_HOME = {
    "LLM": "api", "load": "api", "Result": "results",
    "Draft": "contracts", "Drafter": "contracts", "Features": "contracts", "Row": "contracts",
    "Decoder": "requests", "Event": "requests", "SamplingParams": "requests",
    "register": "drafters", "ForetellError": "errors", "ForetellWarning": "errors", "UsageError": "errors",
    "TokenTree": "trees",
}  # fmt: skip
"""Public name -> module; imported when first used, so that `import foretell` costs nothing."""

__all__ = [
    "LLM", "Decoder", "Draft", "Drafter", "Event", "Features", "ForetellError", "ForetellWarning", "Result", "Row",
    "SamplingParams", "TokenTree", "UsageError", "__version__", "load", "register",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foretell' has no attribute {name!r}")
    return getattr(import_module(f"foretell.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, which tab completion would not find before they are imported."""
    return __all__
