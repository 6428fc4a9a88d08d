"""The discriminator of the GAN objective: a head on the hidden states of the critic's backbone
(arXiv 2506.08009, section 3.3, with the heads of arXiv 2501.08316).

Shapes: B batch, F latent frames, C channels, H×W latents, L tokens, D model dim, T text rows,
E text dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfkernels as sf
from sfkernels.arguments import check_shape
from sfmodel.blocks import Context, CrossAttention, TextKeys
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT

DEPTHS = 0.45, 0.72, 1.0  # of the blocks that are read, as shares of the backbone's layers


def taps(config: DiTConfig, registers: int = 3) -> tuple[int, ...]:
    """The blocks that are read, nearest to the deepest `registers` of DEPTHS: 13, 21 and 29 of 30.
    Fewer if the model has fewer."""
    if not 1 <= registers <= len(DEPTHS):
        raise ValueError(f"registers={registers}: must be in 1..{len(DEPTHS)}")
    nearest = {max(round(depth * config.layers), 1) - 1 for depth in DEPTHS[-registers:]}
    return tuple(sorted(nearest))


class Reader(nn.Module):
    """A register token that reads one block's hidden states: cross-attention to them and an FFN,
    each with a norm before and a residual connection."""

    def __init__(self, config: DiTConfig, impl: str, attention_impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attention = CrossAttention(config, 0, impl, attention_impl)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )

    def forward(self, token_B1D: Tensor, x_BLD: Tensor) -> Tensor:
        """Register token [B, 1, D] after reading hidden states [B, L, D]."""
        h_BLD = _layer_norm(x_BLD, self.norm1, self.impl)
        # The hidden states stand where the prompt does: cross-attention reads nothing else.
        context = Context(h_BLD)
        token_B1D = token_B1D + self.attention(token_B1D, context)
        return token_B1D + self.ffn(_layer_norm(token_B1D, self.norm2, self.impl))


class Discriminator(nn.Module):
    """The logit of a noisy video from the hidden states of the backbone's blocks `taps`. Holds the
    head alone; `logits` runs both. At first the logit of everything is 0.

    registers: how many blocks are read, each by a token of its own. impl: the implementation of the
    sfkernels ops; attention_impl: that of the attention ops.
    """

    def __init__(
        self,
        config: DiTConfig,
        registers: int = 3,
        impl: str = "auto",
        attention_impl: str = "auto",
    ) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        self.taps = taps(config, registers)
        self.readers = nn.ModuleList(Reader(config, impl, attention_impl) for _ in self.taps)
        # Their size is 1 whatever they learn, as that of the hidden states that they are added to.
        self.tokens = nn.Parameter(0.02 * torch.randn(len(self.taps), config.dim))
        self.token_norm = nn.Parameter(torch.ones(config.dim))
        self.norm = nn.LayerNorm(len(self.taps) * config.dim, config.eps)
        self.mix = nn.Linear(len(self.taps) * config.dim, config.dim)
        # No bias: the losses see differences of logits alone.
        self.logit = nn.Linear(config.dim, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.logit.weight)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B], float32, of a [B, L, D] for each tapped block. Raises ValueError for
        others."""
        if len(features) != len(self.taps):
            raise ValueError(f"{len(features)} features: must be those of blocks {self.taps}")
        for x_BLD in features:
            check_shape("features", x_BLD, (len(features[0]), "L", self.config.dim))
        batch = len(features[0])
        registers = sf.rms_norm(self.tokens[:, None], self.token_norm, eps=1e-6, impl=self.impl)
        tokens = [
            reader(register.expand(batch, -1, -1), x)
            for reader, register, x in zip(self.readers, registers, features, strict=True)
        ]
        # In float32 whatever the weights' dtype: the penalties divide small differences of logits.
        with torch.autocast(tokens[0].device.type, enabled=False):
            h_B1E = _layer_norm(torch.cat(tokens, -1).float(), self.norm, self.impl)
            h_BD = F.silu(F.linear(h_B1E[:, 0], self.mix.weight.float(), self.mix.bias.float()))
            return h_BD @ self.logit.weight.float()[0]


def logits(
    backbone: DiT,
    head: Discriminator,
    x_t_BFCHW: Tensor,
    t_B: Tensor,
    text_BTE: Tensor | TextKeys,
) -> Tensor:
    """Logits [B] of videos noised to timesteps t; with all but x_t given, what the losses take."""
    return head(backbone.features(x_t_BFCHW, t_B, text_BTE, head.taps))


def _layer_norm(x_BLD: Tensor, norm: nn.LayerNorm, impl: str) -> Tensor:
    return sf.layer_norm(x_BLD, norm.weight, norm.bias, eps=norm.eps, impl=impl)
