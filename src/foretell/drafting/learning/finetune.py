"""Fine-tuning a backbone: a transformers module with low-rank adapters or fully trainable, and how it is saved.

foretell's own backbones have no gradients; transformers computes them, and peft provides the adapters.
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
from foretell.loading.weights import keeps_blocks

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTATIONS = ("lora", "full")


def trainable_model(folder: Path, adapt: str, rank: int, dropout: float) -> nn.Module:
    """Returns the model in `folder`, float32, with trainable adapters or with all but embedding and output matrix.

    Args:
        rank: of the adapters; their scale is a half, whatever the rank.
        dropout: of the adapters' input.
    """
    if adapt == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UsageError(
                "Adapters need peft (pip install 'foretell[train]'); without it use `adapt='full'`."
            ) from error
    if keeps_blocks(folder):
        raise UsageError(f'{folder} keeps quantized weights, which cannot be trained; give `weights="bf16"`.')
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapt == "full":  # heads start from the output matrix, and drafts use the embedding
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight.requires_grad_(False)
        return model
    numbers: dict[str, Any] = {"r": rank, "lora_alpha": rank / 2, "lora_dropout": dropout}
    with warnings.catch_warnings():  # peft calls transformers by a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(target_modules=ADAPTED, task_type="CAUSAL_LM", **numbers))


def causal(model: Any) -> Any:
    """The model without peft's wrapper; the adapters are inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save(model: Any, folder: Path, base: str, out: Path) -> str:
    """Writes the fine-tuned model `base` of `folder`; returns the name of the result."""
    full = causal(model) is model
    target = out / ("model" if full else "adapter")
    with write_errors(out), staged_folder(target) as staging:
        if full:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(staging)  # training may go on
            copy_beside(folder, staging)
        else:
            model.peft_config["default"].base_model_name_or_path = base
            adapters = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if ".lora_" in name}
            # the embedding did not change; else peft would ask the hub for its size
            model.save_pretrained(staging, state_dict=adapters, save_embedding_layers=False)
            (staging / "README.md").unlink(missing_ok=True)  # peft's unfilled template
        shutil.rmtree(target, ignore_errors=True)
    return str(target) if full else f"{base}+{out}"
