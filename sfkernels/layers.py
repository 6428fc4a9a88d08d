"""Layers for the Kernel Hub: `kernels.kernelize` gives a model's own layers one of these forwards.

As the Hub demands, none has state, a constructor or another method: `self` is the layer whose
forward is replaced, and has the attributes that are declared. Everything is computed in float32 and
rounded once, to the dtype of x; each raises ValueError for shapes that do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sfkernels.norm import adaln, gated_adaln, layer_norm, rms_norm


class RMSNorm(nn.Module):
    """`torch.nn.RMSNorm`, with or without weight."""

    has_backward = True
    can_torch_compile = True
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        rows = _rows(x, self.normalized_shape)
        # As PyTorch's, the epsilon of the dtype that is computed in.
        default = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        eps = default if self.eps is None else self.eps
        return rms_norm(rows, _affine(rows, self.weight, 1), eps=eps).view(x.shape)


class LlamaRMSNorm(nn.Module):
    """The RMSNorm of Llama, T5 and UMT5 in transformers."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = _rows(hidden_states, self.weight.shape)
        out = rms_norm(rows, self.weight, eps=self.variance_epsilon)
        return out.view(hidden_states.shape)


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` and the FP32LayerNorm of diffusers, with or without weight and bias."""

    has_backward = True
    can_torch_compile = True
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        rows = _rows(x, self.normalized_shape)
        weight, bias = _affine(rows, self.weight, 1), _affine(rows, self.bias, 0)
        return layer_norm(rows, weight, bias, eps=self.eps).view(x.shape)


class AdaLN(nn.Module):
    """A function `adaln(x, shift, scale, eps=1e-6)` of a model: see `sfkernels.adaln`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
        return adaln(x, shift, scale, eps=eps)


class GatedAdaLN(nn.Module):
    """A function `gated_adaln(x, y, gate, shift, scale, eps=1e-6)` of a model, which returns two
    tensors: see `sfkernels.gated_adaln`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]:
        return gated_adaln(x, y, gate, shift, scale, eps=eps)


def _rows(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x as [1, rows, elements of a row], where a row has the last dimensions, `shape`."""
    if x.shape[-len(shape) :] != torch.Size(shape):
        raise ValueError(f"x has shape {[*x.shape]}: must end in {[*shape]}")
    return x.reshape(1, -1, math.prod(shape))


def _affine(rows: Tensor, given: Tensor | None, value: int) -> Tensor:
    """Weight or bias [C] of rows [1, rows, C]; without one, all are `value`."""
    return rows.new_full(rows.shape[-1:], value) if given is None else given.flatten()
