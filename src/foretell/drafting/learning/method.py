"""What a drafter class offers so that it can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from foretell.backbone import Backbone
from foretell.drafting.checkpoint import Loaded
from foretell.drafting.learning.trainable import Trainable


class TrainableMethod(Protocol):
    """A drafter class that can be trained: what `train.recipe` uses of it.

    It may also name in `STARTS` the methods whose weights its own can be initialised with (`Trainable.start`), if they
    are others than itself alone.

    Attributes:
        method: its name in the table of drafters.
        Options: see `contracts.Drafter`.
        Training: a frozen dataclass, the only list of what a training can be given (see `drafting.options`).
    """

    method: ClassVar[str]
    Options: ClassVar[type[Any]]
    Training: ClassVar[type[Any]]

    @classmethod
    def trainable(cls, backbone: Backbone, training: Any, counts_V: Tensor, folder: Path | None = None) -> Trainable:
        """Returns a fresh module.

        Args:
            training: an instance of `Training`, whose values `drafting.options.parse` has checked.
            counts_V: how often each token was written in the data, for draft vocabularies.
            folder: of the backbone's files, for methods that change it.
        """
        ...

    @classmethod
    def build(cls, backbone: Backbone, options: Any, loaded: Loaded | None = None) -> Any:
        """Returns the trained drafter; see `contracts.Drafter.build`.

        Args:
            loaded: a `Checkpoint` and its tensors, in the place of a folder.
        """
        ...
