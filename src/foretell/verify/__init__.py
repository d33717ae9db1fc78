"""Which guesses survive: pure functions over batches of trees."""

from foretell.verify.exact import DAMAGED, draws, walk
from foretell.verify.logprobs import logprobs
from foretell.verify.processors import process
from foretell.verify.sampling import distribution, sample, uniform
from foretell.verify.typical import Typical, path_logits, typical

__all__ = [
    "DAMAGED", "Typical", "distribution", "draws", "logprobs", "path_logits", "process", "sample", "typical", "uniform",
    "walk",
]  # fmt: skip
