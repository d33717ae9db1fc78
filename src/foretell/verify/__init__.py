"""Which guesses survive: pure functions over batches of trees."""

from foretell.verify.logit_edits import process
from foretell.verify.logprobs import logprobs
from foretell.verify.sampling import distribution, sample, uniform
from foretell.verify.target import DAMAGED, by_row, targets
from foretell.verify.typical import Typical, path_logits, typical
from foretell.verify.walk import walk

__all__ = [
    "DAMAGED", "Typical", "by_row", "distribution", "logprobs", "path_logits", "process", "sample", "targets",
    "typical", "uniform", "walk",
]  # fmt: skip
