"""A trained drafter on disk: safetensors, and a config that names its method and its model.

    config.json          format and method; the backbone's fingerprint and sizes; the module's shape; trees and their
                         tokens per step on held-out text; the command and the data that made it
    model.safetensors    the tensors; matrices as they are, or stored small (`loading.rounded`)

A drafter trained for one model drafts nonsense for another: the fingerprints must match, unless `any_backbone` is set.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, uint8

from foretell.drafting.options import option
from foretell.errors import ForetellError, UsageError
from foretell.files import one_line, read_json, staged_folder, write_errors
from foretell.loading import rounded
from foretell.loading.catalog import current
from foretell.trees import from_paths
from foretell.trees.calibration import Scale

if TYPE_CHECKING:
    from foretell.backbone import Backbone

FORMAT = 1
SMALL = 1 << 16
"""Tensors of at most so many numbers are not rounded."""
SHIPPED = Path(__file__).parents[1] / "drafters" / "trained"
"""Checkpoints that ship with the package, in folders of any name."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Options of every drafter that is read from a checkpoint."""

    checkpoint: str = option("", "Folder of a trained drafter; by default the one that ships for this model.")
    nodes: int = option(0, "Tree size, root included; by default what pays most at the step costs here.", low=0)
    any_backbone: bool = option(False, "Accept a checkpoint of another model of the same sizes.")


@dataclass
class Checkpoint:
    """The config of a trained drafter.

    Attributes:
        method: the drafter's name in the table.
        arch: options and sizes that give its module its shape.
        paths: rank paths of trees, the most frequent first; any beginning of the list is a tree.
        tokens_per_step: tree size -> tokens per step on held-out text.
        calibration: Platt scale of each head, see `trees.calibration`.
        fitted: what the method has fitted to held-out guesses besides (`Trainable.fitted`).
        provenance: command, data, figures; free form.
    """

    method: str
    backbone: str
    fingerprint: str
    hidden: int
    vocab: int
    arch: dict[str, Any]
    paths: list[list[int]] = field(default_factory=list)
    tokens_per_step: dict[int, float] = field(default_factory=dict)
    calibration: list[list[float]] = field(default_factory=list)
    fitted: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, folder: Path, tensors: dict[str, Tensor], coarseness: float | None = None) -> None:
        """Writes the folder atomically; replaces a checkpoint that was there.

        Args:
            coarseness: stores matrices small, rounded that coarsely (`rounded.steps`).
        """
        steps = {} if coarseness is None else rounding(tensors, coarseness)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with write_errors(folder.parent, size + (1 << 16)):
            old = folder.with_name(f".{folder.name}.old")
            with staged_folder(folder) as staging:
                rounded.save(staging / "model.safetensors", tensors, steps)
                (staging / "config.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
                shutil.copymode(staging / "config.json", staging / "model.safetensors")  # the library makes it private
                if folder.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)


Loaded = tuple[Checkpoint, dict[str, Tensor]]
"""A checkpoint and its tensors, read from a folder or fresh from a training."""


def load(folder: Path) -> Loaded:
    """Returns the config and the tensors of a checkpoint.

    Raises:
        ForetellError: it is missing, damaged, or of a newer format.
    """
    from safetensors import SafetensorError

    if not (folder / "config.json").is_file():
        raise ForetellError(f"{folder} holds no drafter (no config.json); give the folder that `foretell train` wrote.")
    try:
        raw = read_json(folder / "config.json")
    except ForetellError as error:  # no model that could be fetched again
        reason = one_line(error.__cause__ or error)
        raise ForetellError(f"{folder} is damaged ({reason}); copy or train it again.") from error
    if raw.get("format") != FORMAT:
        raise ForetellError(
            f"{folder} has checkpoint format {raw.get('format')!r} where this version reads {FORMAT}; train it again, "
            "or install the version that wrote it."
        )
    try:
        checkpoint = Checkpoint(**{**raw, "fingerprint": current(str(raw["fingerprint"]))})  # JSON has text for keys
        checkpoint.tokens_per_step = {
            int(n): tokens for n, tokens in checkpoint.tokens_per_step.items()
        }  # JSON has text
        tensors = rounded.load(folder / "model.safetensors")
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError, SafetensorError, OSError) as error:
        raise ForetellError(f"{folder} is damaged ({one_line(error)}); copy or train it again.") from error
    with damage_named(str(folder)):
        _check(checkpoint, tensors)
    return checkpoint, tensors


@contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Reports any parsing failure inside the block as a damaged checkpoint."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ForetellError(f"{where} is damaged (at {one_line(error)}); copy or train it again.") from error


def _check(c: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Refuses values that kernels would use unchecked.

    Raises:
        ValueError: naming the field.
    """
    sound = {
        "hidden": c.hidden > 0,
        "vocab": c.vocab > 0,
        "taps": all(type(tap) is int and tap >= 0 for tap in c.arch.get("taps", [])),
        "paths": all(path and all(type(rank) is int and rank >= 0 for rank in path) for path in c.paths),
        "tokens_per_step": all(size > 0 and math.isfinite(tokens) for size, tokens in c.tokens_per_step.items()),
        "calibration": all(math.isfinite(slope) and math.isfinite(bias) for slope, bias in c.calibration),
    }
    sound |= {name: bool(each.isfinite().all()) for name, each in tensors.items() if each.is_floating_point()}
    if "vocabulary" in tensors:  # ids are ascending
        ids_V = tensors["vocabulary"].long()
        sound["vocabulary"] = ids_V.ndim == 1 and int(ids_V[0]) >= 0 and int(ids_V[-1]) < c.vocab
        sound["vocabulary"] &= not tensors["vocabulary"].is_floating_point() and bool((ids_V.diff() > 0).all())
    for name, fine in sound.items():
        if not fine:
            raise ValueError(name)


def rounding(tensors: dict[str, Tensor], coarseness: float) -> dict[str, Tensor]:
    """Returns the steps by which matrices are rounded where they are stored small, one per output row."""
    return {
        name: rounded.steps(tensor, coarseness)
        for name, tensor in tensors.items()
        if tensor.ndim > 1 and tensor.numel() > SMALL and tensor.is_floating_point()
    }


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A digest of a drafter's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().view(uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def shipped(backbone: Backbone) -> dict[str, Path]:
    """Method -> folder of the checkpoints that ship for this backbone, the most tokens per step first."""
    found = [(read_json(config), config.parent) for config in sorted(SHIPPED.glob("*/config.json"))]
    fitting = [(raw, folder) for raw, folder in found if current(str(raw.get("fingerprint"))) == backbone.fingerprint]
    fitting.sort(key=lambda pair: -max(pair[0]["tokens_per_step"].values(), default=0.0))
    best: dict[str, Path] = {}
    for raw, folder in fitting:
        best.setdefault(raw["method"], folder)
    return best


def tokens_per_step(folder: Path) -> dict[int, float]:
    """Tree size -> tokens per step on held-out text, of the checkpoint in a folder."""
    return {int(size): tokens for size, tokens in read_json(folder / "config.json")["tokens_per_step"].items()}


def find(method: str, backbone: Backbone, folder: str = "", any_backbone: bool = False) -> Loaded:
    """Returns the checkpoint in `folder`, by default the one that ships for this backbone, and its tensors.

    Raises:
        UsageError: none is shipped, or it belongs to another method or backbone.
    """
    if not folder:
        ready = shipped(backbone)
        if method in ready:
            return load(ready[method])
        made = (read_json(config) for config in sorted(SHIPPED.glob("*/config.json")))
        others = ", ".join(raw["backbone"] for raw in made if raw["method"] == method)
        raise UsageError(
            f"No {method} drafter comes with foretell for this model{f' (one does for {others})' if others else ''}; "
            f"train one (foretell distill, foretell train "
            f"{method}) and name its folder with `checkpoint='FOLDER'`."
        )
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ForetellError(f"There is no folder {path}; give the one that `foretell train` wrote.")
    checkpoint, tensors = load(path / "drafter" if (path / "drafter/config.json").is_file() else path)
    if checkpoint.method != method:
        raise UsageError(
            f"{folder} holds a {checkpoint.method} drafter, not {method}; use `drafter={checkpoint.method!r}`."
        )
    c = backbone.config
    if (checkpoint.hidden, checkpoint.vocab) != (c.hidden, c.vocab):
        raise UsageError(
            f"{folder} was trained for a model of width {checkpoint.hidden} and {checkpoint.vocab} tokens, but this "
            f"one has {c.hidden} and {c.vocab}; train a drafter for this model."
        )
    if checkpoint.fingerprint != backbone.fingerprint and not any_backbone:
        model = checkpoint.backbone  # a backbone trained jointly is an adapter, or lies beside the heads
        beside = Path(model).resolve() in {(each / "model").resolve() for each in (path, path.parent)}
        use = f"use `model={model!r}`, " if "+" in model or beside else ""
        raise UsageError(
            f"{folder} was trained for {model} (fingerprint {checkpoint.fingerprint}), not for this model "
            f"({backbone.fingerprint}); {use}train one for this model, or allow it with `any_backbone=True`."
        )
    if (deepest := max(checkpoint.arch.get("taps", []), default=0)) > c.layers:
        raise UsageError(f"{folder} reads layer {deepest}, but this model has {c.layers}; train a drafter for it.")
    return checkpoint, tensors


# -- checks of a drafter's inputs ------------------------------------------------------------------------------


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses tensors of other shapes than the config says: kernels would read past their ends.

    Raises:
        KeyError: naming one.
    """
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise KeyError(name)


def output_shape(arch: dict[str, Any], d: int, choices: int) -> dict[str, tuple[int, ...]]:
    """Expected shape of the output matrices in a checkpoint; empty if they are the backbone's."""
    copies = {"own": arch["heads"], "tied": 1}
    return {} if arch["output"] == "shared" else {"head": (copies[arch["output"]], choices, d)}


def check_tree(paths: Sequence[Sequence[int]], heads: int, choices: int) -> None:
    """Refuses rank paths that do not fit the heads.

    Args:
        choices: tokens that the heads choose from.

    Raises:
        UsageError: they are too deep or too wide.
    """
    tree, ordered = from_paths(paths)
    if tree.height > heads or any(path[-1] >= choices for path in ordered[1:]):
        raise UsageError(
            f"The tree is deeper than the {heads} heads, or names a rank beyond the {choices} tokens they choose from; "
            "take another tree."
        )


def read_scales(calibration: Sequence[Sequence[float]], heads: int) -> list[Scale]:
    """Returns a checkpoint's calibration (see `trees.calibration`); refuses one of another number of heads."""
    scales = [(float(slope), float(bias)) for slope, bias in calibration]
    if len(scales) not in (0, heads):
        raise UsageError(f"The drafter is calibrated for {len(scales)} heads, but has {heads}; train it again.")
    return scales
