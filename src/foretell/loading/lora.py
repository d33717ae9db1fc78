"""A changed model by name: `BASE+ADAPTER` is BASE with a LoRA adapter merged into its weights.

    smollm2-135m+medusa2          the adapter came with foretell
    Qwen/Qwen3-0.6B+./my-lora     a folder of peft (adapter_config.json and adapter_model.safetensors, or .bin), or of
                                  mlx-lm (adapter_config.json and adapters.safetensors)

W + s·B·A is computed once and cached as a model of its own: it loads, steps and is fingerprinted like any other, and
its plain decoding is the reference for its drafters. LoRA, arXiv 2106.09685, §4.1.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError, UsageError
from foretell.files import one_line, read_json
from foretell.loading.cache_dir import MANIFEST, Progress
from foretell.loading.catalog import ADAPTERS

if TYPE_CHECKING:  # torch is imported where tensors are read: names are checked without it
    from torch import Tensor

SHIPPED = ADAPTERS
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED, _MLX = "adapter_model.bin", "adapters.safetensors"
_BEFORE = "base_model.model."
_PLAIN = {
    "peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode", "task_type", "auto_mapping",
    "peft_version", "base_model_name_or_path", "revision", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip
"""Settings of peft that the sum uses or that do not affect it; any other one, if set, is refused."""
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations (peft) that change the base weights too."""


def split(name: str) -> tuple[str, Path] | None:
    """Splits `BASE+ADAPTER` into base and adapter folder; None if the name is not such a sum.

    Raises:
        UsageError: there is no such adapter.
    """
    if "+" not in name[1:] or Path(name).expanduser().exists():
        return None
    parts = name.split("+")
    for i in range(len(parts) - 1, 0, -1):  # base and adapter may contain a + themselves
        base, adapter = "+".join(parts[:i]), "+".join(parts[i:])
        for folder in (SHIPPED / adapter, Path(adapter).expanduser(), Path(adapter).expanduser() / "adapter"):
            if base and adapter and (folder / CONFIG).is_file():
                return base, folder
    base, _, adapter = name.rpartition("+")
    if found := _checkpoints(Path(adapter).expanduser()):
        raise UsageError(
            f"{adapter} holds adapters of several training checkpoints; name one, such as {base}+{found[-1]}."
        )
    known = ", ".join(sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))) or "none"
    raise UsageError(
        f"There is no adapter {adapter!r} to add to {base}; name a folder with {CONFIG}, or one that came with "
        f"foretell ({known})."
    )


def refuse_alone(folder: Path) -> None:
    """Refuses a folder named as a model that holds adapters only.

    Raises:
        UsageError: it does.
    """
    if (folder / "config.json").exists():
        return
    found = [folder] if (folder / CONFIG).is_file() else _checkpoints(folder)
    if found:
        raise UsageError(f"{folder} holds an adapter and no model; add it to the model it is for: BASE+{found[-1]}.")


def _checkpoints(folder: Path) -> list[Path]:
    """Lists the adapters that a trainer left in its folder, the latest last."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{CONFIG}") if re.fullmatch(r".*-\d+", path.parent.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def identity(adapter: Path) -> str:
    """Returns a digest of the adapter's files."""
    try:
        files = (adapter / CONFIG, _tensors_file(adapter))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    except OSError as error:
        raise ForetellError(f"The adapter {adapter} cannot be read ({one_line(error)}); copy it again.") from error


def store_small(adapter: Path, coarseness: float) -> None:
    """Rounds the tensors of a peft adapter where they lie (`rounded`): a row of A and a column of B at a time, which
    make one component of the change."""
    from foretell.loading import rounded

    tensors = rounded.load(adapter / TENSORS)
    steps = {name: rounded.steps(each, coarseness, 1 if ".lora_A." in name else 0) for name, each in tensors.items()}
    rounded.save(adapter / TENSORS, tensors, steps)


def merge(base: Path, adapter: Path, target: Path, progress: Progress) -> None:
    """Writes the model folder `target`: `base` with the adapter merged in.

    Raises:
        ForetellError, UsageError: the adapter is damaged, of another kind, or made for another model.
    """
    from safetensors.torch import load_file, save_file

    from foretell.loading.weights import keeps_blocks, standard_name

    if keeps_blocks(base):
        raise UsageError(
            f"{base} keeps quantized weights, and adapters are merged into unpacked ones; unpack it first."
        )
    changes = _Changes(adapter)
    files = sorted(base.glob("model*.safetensors"))
    for number, path in enumerate(files):
        tensors = load_file(path)
        changed = {name: changes.applied(standard_name(name), weight) for name, weight in tensors.items()}
        save_file(changed, target / path.name)
        progress("adding the adapter", (number + 1) / len(files))
    if changes.left:
        raise UsageError(f"{adapter} changes {min(changes.left)}, which {base} lacks; add it to the model it is for.")
    if (index := base / "model.safetensors.index.json").is_file():
        shutil.copyfile(index, target / index.name)
    copy_beside(base, target)


def copy_beside(base: Path, target: Path) -> None:
    """Copies all files of a model folder but its weights, unless they exist in `target`."""
    for path in base.iterdir():
        weights = path.name.startswith("model") or path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        if path.is_file() and not weights and path.name != MANIFEST and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _is_mlx(config: Mapping[str, Any]) -> bool:
    return "fine_tune_type" in config or "lora_parameters" in config


def _tensors_file(adapter: Path) -> Path:
    if _is_mlx(read_json(adapter / CONFIG)):
        return adapter / _MLX
    return adapter / (_PICKLED if (adapter / _PICKLED).exists() and not (adapter / TENSORS).exists() else TENSORS)


def _load(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, or of a pickle that holds nothing else."""
    import torch

    from foretell.loading import rounded

    if path.suffix != ".bin":
        return rounded.load(path)
    found = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("it holds objects that are not tensors")
    return found


class _Changes:
    """Reads the changes of an adapter, by the names of the weights."""

    def __init__(self, adapter: Path):
        from safetensors import SafetensorError

        self.adapter, config = adapter, read_json(adapter / CONFIG)
        try:
            self._scale, self._pairs = self._mlx(config) if _is_mlx(config) else self._peft(config)
        except pickle.UnpicklingError as error:
            raise ForetellError(
                f"The adapter {adapter} is damaged, or would run code of its own when loaded ({one_line(error, 60)}); "
                "copy it again, or save it as safetensors with peft."
            ) from error
        except (
            SafetensorError, OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, ZeroDivisionError,
            AttributeError,
        ) as error:  # fmt: skip
            raise ForetellError(f"The adapter {adapter} is damaged ({one_line(error)}); copy it again.") from error
        self.left = set(self._pairs)

    def _peft(self, config: Mapping[str, Any]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
        """The scale, and A [rank, columns] and B [rows, rank] of every weight that changes."""
        odd = [name for name, value in config.items() if value and name not in _PLAIN]
        odd += ["bias"] if config.get("bias", "none") != "none" else []
        start = str(config.get("init_lora_weights", "")).lower()
        odd += [start] if start.startswith(_MOVES_THE_BASE) else []
        if config.get("peft_type") != "LORA" or odd:
            raise self._not_plain(odd[0] if odd else str(config.get("peft_type")))
        tensors, rank = _load(_tensors_file(self.adapter)), int(config["r"])
        found = self._paired(tensors, ".lora_A.weight", ".lora_B.weight", _BEFORE)
        for name, (a_RI, _) in found.items():
            if len(a_RI) != rank:
                raise ValueError(f"r is {rank}, but {name} has rank {len(a_RI)}")
        return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank), found

    def _mlx(self, config: Mapping[str, Any]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
        """Likewise; mlx-lm keeps both factors transposed, and an embedding's the other way round."""
        from foretell.loading.weights import EMBEDDING

        tool = "fuse it with mlx_lm.fuse"
        kind, given = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        if kind != "lora":
            raise self._not_plain(f"fine_tune_type {kind}", tool)
        rank = int(given["rank"])
        if given.get("alpha", rank) != rank:  # earlier versions multiplied by alpha/rank, later ones ignore it
            raise self._not_plain("alpha beside scale", tool)
        pairs = self._paired(_load(_tensors_file(self.adapter)), ".lora_a", ".lora_b", "", tool)
        return float(given["scale"]), {
            name: (b, a) if name == EMBEDDING else (a.T, b.T) for name, (a, b) in pairs.items()
        }

    def _paired(
        self, tensors: Mapping[str, Tensor], one: str, other: str, before: str, tool: str = "merge it with peft"
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Both factors of every weight that changes; anything else among the tensors is refused."""
        from foretell.loading.weights import standard_name

        found = [name.removesuffix(one) for name in tensors if name.endswith(one) and name.startswith(before)]
        pairs = {
            standard_name(f"{name.removeprefix(before)}.weight"): (tensors[name + one], tensors[name + other])
            for name in found
        }
        if others := sorted(set(tensors) - {name + end for name in found for end in (one, other)}):
            raise self._not_plain(others[0], tool)
        return pairs

    def _not_plain(self, what: str, tool: str = "merge it with peft") -> UsageError:
        return UsageError(f"{self.adapter} is no plain LoRA adapter ({what}); {tool} and name that folder.")

    def applied(self, name: str, weight: Tensor) -> Tensor:
        pair = self._pairs.get(name)
        if pair is None:
            return weight
        self.left.discard(name)
        a_RI, b_OR = pair
        if (b_OR.shape[0], a_RI.shape[1]) != weight.shape or b_OR.shape[1] != a_RI.shape[0]:
            raise UsageError(f"{self.adapter} was made for a model of other sizes ({name}); add it to that one.")
        # float64: however a library orders these sums, they round to the same weights and the same fingerprint
        change = self._scale * (b_OR.double() @ a_RI.double())
        return (weight.double() + change).to(weight.dtype)
