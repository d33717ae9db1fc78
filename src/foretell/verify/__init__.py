"""Which guesses survive: pure functions over batches of trees."""

from foretell.verify.logit_edits import process
from foretell.verify.logprobs import logprobs
from foretell.verify.sampling import distribution, sample, uniform
from foretell.verify.typical import Typical, path_logits, typical
from foretell.verify.walk import DAMAGED, draws, walk

__all__ = [
    "DAMAGED", "Typical", "distribution", "draws", "logprobs", "path_logits", "process", "sample", "typical", "uniform",
    "walk",
]  # fmt: skip
