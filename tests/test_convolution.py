"""Convolutions in fewer operations, against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfmodel.vae import winograd
from sfmodel.vae.convolution import conv2d, conv3d, upsampled_conv2d

pytestmark = pytest.mark.usefixtures("fresh_seed")


def plain(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    bias = None if bias is None else bias.double()
    out = F.conv3d(x_BTHWC.double().movedim(-1, 1), weight.double(), bias, padding=padding)
    return out.movedim(1, -1)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.is_contiguous()
    return float((got - want).norm() / want.norm())


# Batch, frames, height, width, channels in and out, taps in time: sides that are no multiple of a
# tile, one that is, one frame, several of a batch.
@pytest.mark.parametrize(
    "sizes", [(2, 5, 17, 22, 32, 40, 3), (1, 3, 32, 8, 33, 32, 1), (1, 4, 16, 16, 32, 32, 2)]
)
@pytest.mark.parametrize("together", [0, 4096])  # frames one by one, and all at once
@torch.no_grad()
def test_winograd_is_a_convolution(
    sizes: tuple[int, ...], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, T, H, W, C, outputs, taps = sizes
    monkeypatch.setattr(winograd, "TOGETHER", together)
    x, weight = torch.randn(B, T, H, W, C), torch.randn(outputs, C, taps, 3, 3)
    for bias in (None, torch.randn(outputs)):
        assert winograd.pays(x, weight)
        assert error(winograd.conv3d(x, weight, bias), plain(x, weight, bias)) < 1e-5


def test_winograd_is_for_what_it_can_do() -> None:
    x, weight = torch.randn(1, 3, 16, 16, 32), torch.randn(32, 32, 3, 3, 3)
    assert winograd.pays(x, weight)
    for learned in (x, weight):
        learned.requires_grad_()
        assert not winograd.pays(x, weight)  # it has no gradient
        learned.requires_grad_(False)
    with torch.no_grad():
        assert winograd.pays(x, weight.requires_grad_())
        assert winograd.pays(x[:, :1], weight)  # whatever the chunk: the whole is computed alike
        assert not winograd.pays(x[:, :, :15], weight)
        assert not winograd.pays(x[..., :31], weight[:, :31])
        assert not winograd.pays(x.half(), weight.half())
        assert not winograd.pays(x.to("meta"), weight.to("meta"))
        assert not winograd.pays(x, weight[..., :1])


@pytest.mark.parametrize("channels", [8, 32])  # without and with Winograd
@torch.no_grad()
def test_over_time_and_in_a_frame(channels: int) -> None:
    x, weight = torch.randn(1, 4, 16, 18, channels), torch.randn(channels, channels, 3, 3, 3)
    bias = torch.randn(channels)
    assert error(conv3d(x, weight, bias), plain(x, weight, bias)) < 1e-5
    # The first frame alone is what it is behind zeros.
    behind_zeros = F.pad(x[:, :1], (0, 0, 0, 0, 0, 0, 2, 0))
    assert error(conv3d(x[:, :1], weight, bias), plain(behind_zeros, weight, bias)) < 1e-5
    point = weight[:, :, :1, :1, :1]
    assert error(conv3d(x, point, bias), plain(x, point, bias)) < 1e-5
    in_time = weight[:, :, :, :1, :1]
    strided = conv3d(x[:, :3], in_time, bias, stride=(2, 1, 1))
    assert error(strided, plain(x[:, :3], in_time, bias)) < 1e-5
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    want = plain(x, layer.weight[:, :, None], layer.bias)
    assert error(conv2d(x, layer), want) < 1e-5


@pytest.mark.parametrize("frames", [1, 2])
def test_upsampling_is_folded_into_the_convolution(frames: int) -> None:
    x = torch.randn(2, 3, 5, 4, 8, requires_grad=True)
    weight, bias = torch.randn(6 * frames, 8, 3, 3, requires_grad=True), torch.randn(6 * frames)
    found = []
    for wide in (False, True):
        if not wide:
            out = upsampled_conv2d(x, weight, bias, frames)
        else:
            large = F.interpolate(x.double().flatten(0, 1).movedim(-1, 1), scale_factor=2)
            each = F.conv2d(large, weight.double(), bias.double(), padding=1)
            each = each.unflatten(0, (2, 3)).unflatten(2, (frames, 6))
            out = each.flatten(1, 2).movedim(2, -1)
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), (x, weight))
        found.append([out.detach(), *grads])
    assert found[0][0].shape == (2, 3 * frames, 10, 8, 6)
    for ours, exact in zip(*found, strict=True):
        assert error(ours.contiguous(), exact) < 1e-4
    half = upsampled_conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), frames)
    assert half.dtype == torch.bfloat16 and error(half.detach(), found[1][0]) < 0.02
