"""The loop: draft -> verify -> commit -> observe, over rows that join and leave between steps."""

from foretell.engine.loop import SpeculativeDecoder

__all__ = ["SpeculativeDecoder"]
