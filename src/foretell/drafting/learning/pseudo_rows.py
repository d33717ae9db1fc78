"""Pseudo rows in training: the steps behind many positions of whole conversations, side by side.

Decoding gives each node of a tree its pseudo rows in the cache. In training every written position is a source: its
pseudo rows attend to the real keys and values of the conversation up to it, and to those of its own earlier steps. The
sources of a conversation are taken in blocks, so that products between those of different sources, which are masked
away, stay few.

Legend: B conversations, T tokens of the longest, P sources, X blocks of S sources, K steps, H query heads, G key/value
heads, D head width, Q pseudo rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Sources of a block."""


@dataclass
class Blocks:
    """Sources of conversations, at most `BLOCK` of one conversation in a block; their steps attend side by side.

    Attributes:
        conversation_X: of each block; position_XS: of each source, 0 where a block is not filled.
        filled_XS: where there is a source; in this order they are those that were given.
    """

    conversation_X: Tensor
    position_XS: Tensor
    filled_XS: Tensor
    _masks: dict[tuple[int, int, int, bool], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, sources_P: Tensor, tokens: int) -> Blocks:
        """Returns the blocks of positions in a flattened batch of conversations of `tokens` tokens, ascending."""
        conversation_P, count = sources_P // tokens, len(sources_P)
        begins_P = torch.searchsorted(conversation_P, conversation_P)  # where each one's conversation begins
        order_P = torch.arange(count, device=sources_P.device) - begins_P
        block_P = (order_P % BLOCK == 0).cumsum(0) - 1
        position_XS = sources_P.new_zeros(int(block_P[-1]) + 1 if count else 0, BLOCK)
        filled_XS = torch.zeros_like(position_XS, dtype=torch.bool)
        position_XS[block_P, order_P % BLOCK] = sources_P % tokens
        filled_XS[block_P, order_P % BLOCK] = True
        return cls(conversation_P[order_P % BLOCK == 0], position_XS, filled_XS)

    def places(self, steps: int) -> Tensor:
        """The position of each pseudo row, [X, S, K]."""
        return self.position_XS[..., None] + 1 + torch.arange(steps, device=self.position_XS.device)

    def attend(
        self, pseudo: tuple[Tensor, Tensor, Tensor], real: tuple[Tensor, Tensor], window: int, isolated: bool
    ) -> Tensor:
        """Each pseudo row attends to its source, what comes before it, and the steps before its own; [X, S, K, H·D].

        Args:
            pseudo: queries [X, S, K, H, D], keys and values [X, S, K, G, D]; real: keys and values [B, T, G, D].
            window: positions that a row attends to at most; 0 is all.
        """
        q_XSKHD, *own = pseudo
        steps, dtype = q_XSKHD.shape[2], q_XSKHD.dtype
        if q_XSKHD.is_cpu:
            dtype = torch.float32  # the gradient of attention takes four times as long in bfloat16
        k, v = (
            torch.cat([there[self.conversation_X], here.flatten(1, 2)], 1).transpose(1, 2).to(dtype)
            for here, there in zip(own, real, strict=True)
        )
        mixed_XHQD = F.scaled_dot_product_attention(
            q_XSKHD.flatten(1, 2).transpose(1, 2).to(dtype), k, v,
            attn_mask=self.mask(real[0].shape[1], steps, window, isolated)[:, None],
            enable_gqa=q_XSKHD.shape[3] != k.shape[1],
        )  # fmt: skip
        return mixed_XHQD.transpose(1, 2).flatten(2).unflatten(1, (-1, steps)).to(q_XSKHD.dtype)

    def mask(self, tokens: int, steps: int, window: int, isolated: bool) -> Tensor:
        """Selects what each pseudo row attends to: tokens, then pseudo rows of its block, [X, S·K, T + S·K]."""
        if (found := self._masks.get((tokens, steps, window, isolated))) is not None:
            return found  # of another layer
        places_XSK, device = self.places(steps), self.position_XS.device
        token_T, step_K = torch.arange(tokens, device=device), torch.arange(steps, device=device)
        real_XSKT = (token_T <= self.position_XS[..., None, None]).expand(-1, -1, steps, -1)
        if window:
            real_XSKT = real_XSKT & (places_XSK[..., None] - token_T < window)
        within_KK = torch.eye(steps, dtype=torch.bool, device=device) if isolated else step_K[:, None] >= step_K
        if window:
            within_KK = within_KK & (step_K[:, None] - step_K < window)
        same_SS = torch.eye(BLOCK, dtype=torch.bool, device=device)
        own_QQ = (same_SS[:, None, :, None] & within_KK[None, :, None]).flatten(2).flatten(0, 1)
        self._masks[tokens, steps, window, isolated] = mask = torch.cat(
            [real_XSKT.flatten(1, 2), own_QQ.expand(len(places_XSK), -1, -1)], 2
        )
        return mask
