"""The decoder of a drafter: speculative, or fused where the method writes several tokens a step itself."""

from __future__ import annotations

from foretell.backbone import Backbone
from foretell.contracts import Drafter
from foretell.engine.batch import BatchDecoder
from foretell.engine.fused import FusedDecoder
from foretell.engine.loop import SpeculativeDecoder
from foretell.engine.text_stream import Decodes
from foretell.verify import Typical


def decoder_for(
    backbone: Backbone, drafter: Drafter, tokenizer: Decodes | None = None, *, max_rows: int = 1,
    rule: Typical | None = None, adapt: bool = True,
) -> BatchDecoder:  # fmt: skip
    """Returns a decoder; see `SpeculativeDecoder` and `FusedDecoder` for the arguments."""
    if drafter.fused:
        return FusedDecoder(backbone, drafter.fused, tokenizer, max_rows=max_rows, rule=rule)
    return SpeculativeDecoder(backbone, drafter, tokenizer, max_rows=max_rows, rule=rule, adapt=adapt)
