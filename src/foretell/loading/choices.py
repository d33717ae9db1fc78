"""What becomes of a model's weights while it is loaded: the choices of `weights=`.

    stored      those of a quantized GGUF file stay as they are: the default
    bf16        they are unpacked and rounded to bfloat16: the default with an adapter, which is merged into floats
    fp32        they are unpacked exactly, to float32
    q8_0, q4_k  float ones, from wherever the model comes, are quantized to this type of GGUF files

What a choice does not speak of stays as it is. PyTorch is not needed to refuse one.
"""

from __future__ import annotations

from foretell.errors import UsageError

WEIGHTS = ("stored", "bf16", "fp32", "q8_0", "q4_k")
QUANTIZED = ("q8_0", "q4_k")


def chosen(weights: str | None, source: str = "") -> str:
    """Returns the choice, by default the one for models from this source (see `resolve.identify`).

    Raises:
        UsageError: there is no such choice.
    """
    if weights not in (None, *WEIGHTS):
        raise UsageError(f"weights is {weights!r}; it must be {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}.")
    return weights or ("bf16" if source == "adapter" else "stored")


def of_base(choice: str) -> str:
    """Returns the choice for the base of an adapter: it is merged into floats, and the sum is quantized."""
    return "bf16" if choice in QUANTIZED else choice


def quantized_already(name: object) -> UsageError:
    """Returns the refusal to quantize what is quantized: the second rounding would add to the first."""
    return UsageError(
        f"{name} holds quantized weights, which lose more by being quantized again; load it with `weights='stored'`."
    )
