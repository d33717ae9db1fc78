"""What a training refuses before any work: a method that learns nothing, a folder in use, data of another model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from foretell import drafters
from foretell.api import LLM
from foretell.drafting.learning.method import TrainableMethod
from foretell.errors import ForetellError, UsageError
from foretell.files import read_json, write_errors
from foretell.train.data import ConversationStore

Data = str | Path | ConversationStore
"""A folder that `foretell distill` wrote, or an open one."""


def trainable_methods() -> list[str]:
    """The drafters of the table that can be trained."""
    return [name for name in drafters.table() if hasattr(drafters.drafter_class(name), "trainable")]


def method_class(method: str) -> type[TrainableMethod]:
    """The drafter's class, if it can be trained."""
    cls: Any = drafters.drafter_class(method)
    if not hasattr(cls, "trainable"):
        raise UsageError(
            f"Drafter {method!r} has nothing to train; those that have are {', '.join(trainable_methods())}."
        )
    return cls


def check_out(out: Path, method: str) -> None:
    """Refuses a folder in which a drafter, or anything else, would be lost."""
    with write_errors(out):
        names, inside = ([path.name for path in _visible(folder)] for folder in (out, out / "drafter"))
    found = ""
    if "config.json" in inside:
        with suppress(ForetellError):  # a damaged one is a drafter all the same
            found = str(read_json(out / "drafter/config.json").get("method", ""))
    if "run" not in names and "drafter" in names:
        kind = f"{found} drafter" if found else "drafter"
        raise UsageError(f"{out} holds a finished {kind}; choose another `out=`, or delete it.")
    if "run" not in names and names:
        some = ", ".join(names[:3]) + (", …" if names[3:] else "")
        raise UsageError(f"{out} holds other things ({some}); choose another `out=`.")
    if found not in ("", method):
        raise UsageError(f"{out} holds a run of {found}; choose another `out=`.")
    if others := sorted({*inside} - {"config.json", "model.safetensors"}):
        raise UsageError(
            f"{out / 'drafter'} holds {', '.join(others)}, which would be lost; move it elsewhere, or choose another "
            "`out=`."
        )


def check_shared_out(out: Path) -> None:
    """Refuses a folder for several drafters that is one drafter's own, or holds more than folders of drafters."""
    with write_errors(out):
        names = [path.name for path in _visible(out)]
    if {"drafter", "run"} & {*names}:
        raise UsageError(f"{out} holds a drafter, or a run that makes one; choose another `out=` for several methods.")
    if others := sorted({*names}.difference(trainable_methods())):
        raise UsageError(f"{out} holds other things ({', '.join(others[:3])}); choose another `out=`.")


def _visible(folder: Path) -> list[Path]:
    """The contents of a folder, if it is one, without locks and what an interruption left."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def open_data(data: Data | Sequence[Data]) -> list[ConversationStore]:
    """Opens the folders of data; refuses empty ones, and one that is named twice."""
    given = [data] if isinstance(data, str | Path | ConversationStore) else data
    folders = [each.folder if isinstance(each, ConversationStore) else Path(each) for each in given]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("`data=` names a folder twice; give each once, and more `epochs=` to learn it longer.")
    stores = [
        each if isinstance(each, ConversationStore) else ConversationStore.open(folder)
        for each, folder in zip(given, folders, strict=True)
    ]
    for store in stores:
        if not store.conversations:
            raise UsageError(f"{store.folder} holds no conversations; distill some first.")
    if not stores:
        raise UsageError("No data is given; name a folder that foretell distill wrote.")
    return stores


def check_data(store: ConversationStore, llm: LLM, other_model: bool) -> None:
    """Refuses data that another model wrote, unless `other_model`, and tokens that the model does not have."""
    model, writer, backbone = store.manifest["model"], store.manifest["fingerprint"], llm.backbone
    if writer != backbone.fingerprint and not other_model:
        raise UsageError(
            f"{store.folder} was written by {model} (fingerprint {writer}), not by this model "
            f"({backbone.fingerprint}); distill with this one, or allow it with `other_model=True`."
        )
    largest, vocab_size = max(max(talk.tokens) for talk in store.conversations), backbone.config.vocab
    if largest >= vocab_size:
        raise UsageError(
            f"{store.folder} holds token {largest}, but this model's ids lie between 0 and {vocab_size - 1}; distill "
            "with this model."
        )
