"""Which guesses survive: pure functions over batches of trees."""

from foretell.verify.exact import DAMAGED, draws, walk
from foretell.verify.processors import process
from foretell.verify.sampling import distribution, sample, uniform
from foretell.verify.typical import Typical, typical

__all__ = ["DAMAGED", "Typical", "distribution", "draws", "process", "sample", "typical", "uniform", "walk"]
