"""The frozen model, opened at its layers: loading, kernels, key/value cache."""

from foretell.backbone.assemble import assemble
from foretell.backbone.base import SKIP_ATTENTION, SKIP_MLP, Backbone
from foretell.backbone.cache import KVCache
from foretell.backbone.config import ModelConfig
from foretell.backbone.loading import ModelFolder, resolve
from foretell.backbone.nodes import Nodes
from foretell.backbone.tokenizer import Tokenizer

__all__ = [
    "SKIP_ATTENTION", "SKIP_MLP", "Backbone", "KVCache", "ModelConfig", "ModelFolder", "Nodes", "Tokenizer",
    "assemble", "resolve",
]  # fmt: skip
