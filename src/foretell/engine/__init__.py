"""The loop: draft -> verify -> commit -> observe, over rows that join and leave between steps; and the fused one."""

from foretell.engine.batch import BatchDecoder
from foretell.engine.driver import Driver, run
from foretell.engine.fused import FusedDecoder
from foretell.engine.loop import SpeculativeDecoder
from foretell.engine.start import decoder_for

__all__ = ["BatchDecoder", "Driver", "FusedDecoder", "SpeculativeDecoder", "decoder_for", "run"]
