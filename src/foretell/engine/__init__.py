"""The loop: draft -> verify -> commit -> observe, over rows that join and leave between steps."""

from foretell.engine.driver import Driver, run
from foretell.engine.loop import SpeculativeDecoder

__all__ = ["Driver", "SpeculativeDecoder", "run"]
