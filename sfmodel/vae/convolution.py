"""Convolutions of the video VAEs on [B, T, H, W, C], which is channels-last, each in as few
operations as there is a way to.

Shapes: B batch, T frames, N = B·T, C channels, H × W pixels; of weights, O outputs.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfmodel.vae import winograd

Module = TypeVar("Module", bound=nn.Module)


def channels_last(module: Module) -> Module:
    """Lays out the weights as the tensors are here, which else every call does anew."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    return module


def conv2d(x_BTHWC: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 3×3 convolution of each frame on its own."""
    weight = layer.weight[:, :, None]
    if layer.stride == (1, 1) and winograd.pays(x_BTHWC, weight):
        return winograd.conv3d(x_BTHWC, weight, layer.bias)
    out_NCHW = layer(x_BTHWC.flatten(0, 1).movedim(-1, 1))
    return out_NCHW.movedim(1, -1).contiguous().unflatten(0, x_BTHWC.shape[:2])


def conv3d(
    x_BTHWC: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """3-D convolution of frames that stand behind those before them: pads height and width alone. A
    single frame begins a clip: only the last of the kernel's taps in time sees it."""
    if weight.shape[2:] == (1, 1, 1):
        return F.linear(x_BTHWC, weight.flatten(1), bias)
    weight = weight[:, :, -x_BTHWC.shape[1] :]
    if stride == (1, 1, 1) and winograd.pays(x_BTHWC, weight):
        return winograd.conv3d(x_BTHWC, weight, bias)
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    out_BCTHW = F.conv3d(x_BTHWC.movedim(-1, 1), weight, bias, stride, padding)
    return out_BCTHW.movedim(1, -1).contiguous()


def upsampled_conv2d(
    x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None = None, frames: int = 1
) -> Tensor:
    """A 3×3 convolution of each frame after nearest-neighbour upsampling to twice its height and
    width, [B, T·frames, 2H, 2W, O / frames]: outputs are channels of so many frames.

    Each pixel becomes 2×2, P × Q, which see 2×2 pixels of x, some of them under several taps. With
    these taps summed, one 2×2 convolution of x has all four as its channels: 4/9 of the arithmetic,
    and nothing is upsampled in memory."""
    B, T, H, W, _ = x_BTHWC.shape
    weight_SOCPHQW = folded(weight).unflatten(0, (frames, -1))
    kernel = weight_SOCPHQW.permute(0, 3, 5, 1, 2, 4, 6).flatten(0, 3).to(x_BTHWC.dtype)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    if bias is not None:
        bias = bias.view(frames, 1, -1).expand(-1, 4, -1).flatten()
    sums_NCHW = F.conv2d(x_BTHWC.flatten(0, 1).movedim(-1, 1), kernel, bias, padding=1)
    sums_NHWSPQO = sums_NCHW.movedim(1, -1).unflatten(-1, (frames, 2, 2, -1))
    # There are H + 1 by W + 1 sums. Row p of the 2×2 that row i becomes is in row i + p, and so for
    # columns: diagonals of windows of two. These are views; one copy puts all pixels in place.
    rows_NHWSQOP = sums_NHWSPQO.unfold(1, 2, 1).diagonal(0, 4, 7)
    out_NHWSOPQ = rows_NHWSQOP.unfold(2, 2, 1).diagonal(0, 4, 7)
    out_NSHPWQO = out_NHWSOPQ.permute(0, 3, 1, 5, 2, 6, 4)
    return out_NSHPWQO.reshape(B, T * frames, 2 * H, 2 * W, -1)


def folded(weight: Tensor) -> Tensor:
    """The 2×2 kernels [O, C, P, 2, Q, 2] of a 3×3 one, [O, C, 3, 3]: in float32 at least, so that
    sums of 16-bit weights are rounded once."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _sums_of_taps(_sums_of_taps(wide, 2), 4)


def _sums_of_taps(weight: Tensor, dim: int) -> Tensor:
    """Sums of three taps, [2, 2]: the two pixels that one becomes, and the two that each sees."""
    a, b, c = weight.unbind(dim)
    return torch.stack([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)], dim)
