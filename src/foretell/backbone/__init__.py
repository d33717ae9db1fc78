"""The frozen model, opened at its layers: kernels, key/value cache, probe."""

from foretell.backbone.base import SKIP_ATTENTION, SKIP_MLP, Adapters, Backbone, Beside
from foretell.backbone.kv_cache import KVCache
from foretell.backbone.load import assemble
from foretell.backbone.nodes import Nodes

__all__ = ["SKIP_ATTENTION", "SKIP_MLP", "Adapters", "Backbone", "Beside", "KVCache", "Nodes", "assemble"]
