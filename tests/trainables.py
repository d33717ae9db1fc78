"""Fresh modules of methods that learn, made from options by name as the command line makes them."""

from pathlib import Path
from typing import Any

from torch import Tensor

from foretell.backbone import Backbone
from foretell.drafting.options import parse


def trainable(kind: Any, backbone: Backbone, counts_V: Tensor, folder: Path | None = None, **options: Any) -> Any:
    return kind.trainable(backbone, parse(kind.Training, options), counts_V, folder)
