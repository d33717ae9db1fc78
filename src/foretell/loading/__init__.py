"""A name becomes checked tensors: found, fetched, converted and read."""

from foretell.loading.config import ModelConfig
from foretell.loading.resolve import ModelFolder, resolve
from foretell.loading.tokenizer import Tokenizer

__all__ = ["ModelConfig", "ModelFolder", "Tokenizer", "resolve"]
