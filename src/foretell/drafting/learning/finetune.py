"""A backbone that learns: a module with gradients, with adapters of low rank or whole, and what is written of it.

Our own backbones compute, and compute exactly; gradients are transformers' work, and adapters peft's.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foretell.errors import UsageError
from foretell.files import staged_folder, write_errors
from foretell.loading.lora import copy_beside

PLACES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS = ("lora", "full")


def learning(folder: Path, way: str, rank: int, dropout: float) -> nn.Module:
    """The model in `folder`, float32, of which adapters learn or all but embedding and output matrix.

    Args:
        rank: of the adapters; their scale is a half, whatever the rank.
        dropout: of what adapters read.
    """
    if way == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UsageError(
                "Adapters need peft (pip install 'foretell[train]'); without it use `adapt='full'`."
            ) from error
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if way == "full":  # what heads begin with, and what drafts are embedded by, stays
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight.requires_grad_(False)
        return model
    numbers: dict[str, Any] = {"r": rank, "lora_alpha": rank / 2, "lora_dropout": dropout}
    with warnings.catch_warnings():  # peft asks transformers by a name of before; nobody here can mend that
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(target_modules=PLACES, task_type="CAUSAL_LM", **numbers))


def causal(model: Any) -> Any:
    """The model without peft's wrapping: adapters are within its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save(model: Any, folder: Path, base: str, out: Path) -> str:
    """Writes what became of the model `base` in `folder`; returns the name that it has now."""
    whole = causal(model) is model
    target = out / ("model" if whole else "adapter")
    with write_errors(out), staged_folder(target) as staging:
        if whole:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(staging)  # ours may go on learning
            copy_beside(folder, staging)
        else:
            model.peft_config["default"].base_model_name_or_path = base
            learnt = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if ".lora_" in name}
            # the embedding did not change: else peft would ask the hub how large it was
            model.save_pretrained(staging, state_dict=learnt, save_embedding_layers=False)
            (staging / "README.md").unlink(missing_ok=True)  # peft's template, all of it to be filled in
        shutil.rmtree(target, ignore_errors=True)
    return str(target) if whole else f"{base}+{out}"
