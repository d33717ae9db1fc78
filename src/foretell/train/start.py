"""Initialises a training from another drafter's weights instead of fresh ones.

A method names in `STARTS` the methods whose weights its own can be initialised with, by default itself alone. Options
that are not given are taken from the other drafter, so that its weights fit.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell import drafters
from foretell.api import LLM
from foretell.backbone import Backbone
from foretell.drafting.checkpoint import Checkpoint, fingerprint, load, shipped
from foretell.drafting.learning.method import TrainableMethod
from foretell.drafting.learning.trainable import Trainable
from foretell.drafting.options import renamed
from foretell.errors import ForetellError, UsageError
from foretell.files import one_line
from foretell.loading.resolve import resolve
from foretell.loading.weights import keeps_blocks

Start = tuple[Checkpoint, dict[str, Tensor]]
"""A drafter to begin with: its checkpoint and tensors."""


def read_start(start: str, backbone: Backbone, cls: type[TrainableMethod], other_model: bool = False) -> Start:
    """Reads the drafter to begin with.

    Args:
        other_model: accepts one of another model of the same sizes, such as this one was before an adapter changed it.

    Raises:
        UsageError: it is not there, of a method that `cls` cannot begin with, or of another model.
        ForetellError: it is damaged.
    """
    folder = shipped(backbone).get(start, Path(start).expanduser())
    if not folder.is_dir():
        lacks = f"No {start} drafter comes with foretell for this model" if start in drafters.table() else ""
        raise UsageError(f"{lacks or f'There is no folder {start}'}; begin with the folder of a drafter.")
    checkpoint, tensors = load(folder / "drafter" if (folder / "drafter/config.json").is_file() else folder)
    able = getattr(cls, "STARTS", (cls.method,))
    if checkpoint.method not in able:
        raise UsageError(
            f"{start} is a {checkpoint.method} drafter, with which {cls.method} cannot begin; begin with one of "
            f"{', '.join(able)}, or without `start=`."
        )
    sizes = (checkpoint.hidden, checkpoint.vocab)
    alike = sizes == (backbone.config.hidden, backbone.config.vocab)
    if checkpoint.fingerprint != backbone.fingerprint and not (other_model and alike):
        others = "without `start=`, or allow it with `other_model=True`" if alike else "or without `start=`"
        raise UsageError(
            f"{start} was trained for {checkpoint.backbone} (fingerprint {checkpoint.fingerprint}), not for this model "
            f"({backbone.fingerprint}){'' if alike else ', which has other sizes'}; begin with a drafter of this one, "
            f"{others}."
        )
    if "vocabulary" not in tensors:
        raise ForetellError(f"{start} is damaged, or of another method: it lacks a draft vocabulary.")
    return checkpoint, tensors


def inherited(cls: type[TrainableMethod], checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The options that a drafter was made with, as far as `cls` has them too."""
    names = {each.name for each in fields(cls.Training)}
    values = {name: value for name, value in renamed(cls.Training, checkpoint.arch).items() if name in names}
    taps = checkpoint.arch.get("taps", [])
    if "exit" in names and len(taps) == 1:  # of an adapter that reads one layer's stream
        values["exit"] = taps[0]
    if "draft_vocab" in names:
        chosen_from = len(tensors["vocabulary"])
        values["draft_vocab"] = 0 if chosen_from == checkpoint.vocab else chosen_from
    return values | ({"taps": len(taps)} if "taps" in values else {})


def new_module(
    cls: type[TrainableMethod], llm: LLM, counts_V: Tensor, options: Any, seed: int, origin: Start | None
) -> Trainable:
    """A module with fresh weights, which follow from the seed.

    Args:
        counts_V: how often the model wrote each token of the data.
    """
    counts_V = counts_V.clone()
    if origin:  # logits of tokens outside its draft vocabulary are untrained: keep its own
        counts_V[origin[1]["vocabulary"].long()] += counts_V.sum()
    torch.manual_seed(seed)
    return cls.trainable(llm.backbone, options, counts_V, _folder(cls, llm))


def _folder(cls: type[TrainableMethod], llm: LLM) -> Path | None:
    """Returns the model's folder; for a method that adapts the model, one with weights that can be trained."""
    if llm.folder is None:
        return None
    if "adapt" in {each.name for each in fields(cls.Training)} and keeps_blocks(llm.folder.path):
        where = {name: llm.loading.get(name) for name in ("cache_dir", "offline")}
        return resolve(llm.folder.name, weights="bf16", **where).path
    return llm.folder.path


def initialise(module: Trainable, start: str, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Loads another drafter's weights into the module; returns which they were and the commands that trained them.

    Raises:
        UsageError: they do not fit, or its draft vocabulary is larger than the module's.
        ForetellError: they are damaged.
    """
    vocabulary_V: Tensor | None = getattr(module, "vocabulary_V", None)
    if vocabulary_V is not None and len(tensors["vocabulary"]) > len(vocabulary_V):
        raise UsageError(
            f"{start} chooses from {len(tensors['vocabulary'])} tokens, more than {len(vocabulary_V)}; train with "
            f"`draft_vocab={len(tensors['vocabulary'])}` or more."
        )
    try:
        module.start(checkpoint.arch, tensors)
    except UsageError as error:
        raise UsageError(str(error).replace("It", start, 1)) from error
    except (KeyError, RuntimeError) as error:
        raise ForetellError(f"{start} is damaged, or of another method: {one_line(error)}.") from error
    about = checkpoint.provenance
    commands = [*about.get("started_by", []), about.get("command") or checkpoint.method]
    return {"start": fingerprint(tensors), "started_by": commands}
