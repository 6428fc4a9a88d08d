"""The causal convolution against float64, by TMA and by pointers, at odd sizes and strides."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import launch
from sfkernels.gpu.convolution import boxes
from sfkernels.launch import Box
from sfkernels.testing import close_as_eager
from tests.oracle import DEVICE, DTYPES, check, rand

pytestmark = pytest.mark.usefixtures("fresh_seed")
# A GPU has the architecture it has.
ARCHS = (90, 80) if DEVICE == "cpu" else (None,)
by_each = pytest.mark.parametrize("arch", ARCHS, indirect=True)
SMALL = Box(32, 16, 32, 3, 16, 4, 2)


@pytest.fixture
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With TMA, or the way before it."""
    monkeypatch.setattr(launch, "target", request.param)
    yield


def tensors(*sizes: int, taps: tuple[int, int, int] = (3, 3, 3)) -> list[Tensor]:
    """x, a weight that lies in memory as it is read, a bias. sizes: those of x, channels out."""
    *size, outputs = sizes
    weight = rand(outputs, size[-1], *taps).contiguous(memory_format=torch.channels_last_3d)
    return [rand(*size), weight / size[-1] ** 0.5, rand(outputs)]


# Every form of the Wan decoder's over time: frames of x, channels in and out, taps.
@by_each
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize(
    ("frames", "inputs", "outputs", "taps"),
    [
        (5, 96, 96, (3, 3, 3)),
        (4, 192, 192, (3, 3, 3)),
        (3, 384, 384, (3, 3, 3)),
        (3, 16, 384, (3, 3, 3)),
        (1, 192, 384, (1, 3, 3)),  # the first frame of a clip
        (4, 384, 768, (3, 1, 1)),
    ],
)
def test_layers_of_the_decoder(
    arch: None, dtype: torch.dtype, frames: int, inputs: int, outputs: int,
    taps: tuple[int, int, int],
) -> None:  # fmt: skip
    height, width = (3, 9) if DEVICE == "cpu" else (60, 104)
    args = tensors(1, frames, height, width, inputs, outputs, taps=taps)
    check(sf.causal_conv3d, args, dtype, gradients=False)


@by_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [1, 3])
def test_odd_sizes(arch: None, dtype: torch.dtype, shared: int) -> None:
    """Sizes of all kinds, drawn anew in every run."""
    for _ in range(3):
        B, H, W, inputs, outputs = (int(torch.randint(1, n, ())) for n in (3, 14, 14, 6, 13))
        S, Y, X = (int(torch.randint(0, 2, ())) * 2 + 1 for _ in range(3))
        T = S + int(torch.randint(0, 4, ()))
        args = tensors(B, T, H, W, 8 * inputs, 8 * outputs, taps=(S, Y, X))
        setting = Box(32, 16 * (S == 3), 32, shared, 16, 4, 2)
        with launch.using(causal_conv3d=setting, causal_conv3d_float32=setting):
            check(sf.causal_conv3d, args, dtype, gradients=False)
            check(sf.causal_conv3d, args[:2], dtype, gradients=False)


@by_each
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_frames_and_slices_of_the_weight(arch: None, dtype: torch.dtype) -> None:
    """Frames of a longer clip of larger frames with more channels; the last tap in time alone."""

    def op(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str) -> Tensor:
        return sf.causal_conv3d(x[:, 1:3, 2:9, 1:-2, 8:24], weight[:, :, -2:], bias, impl=impl)

    args = tensors(2, 4, 11, 13, 32, 24)
    # Contiguous weights of 16 of the 32 channels: a slice of them would not lie as they are read.
    args[1] = tensors(1, 1, 1, 1, 16, 24)[1]
    with launch.using(causal_conv3d=SMALL, causal_conv3d_float32=SMALL):
        check(op, args, dtype, gradients=False)


@by_each
@pytest.mark.parametrize("dtype", DTYPES)
def test_upsampled(arch: None, dtype: torch.dtype) -> None:
    for B, T, H, W, inputs, outputs in ((1, 3, 5, 7, 16, 24), (2, 1, 3, 9, 24, 40)):
        weight = rand(2, 2, outputs, 2, 2, inputs).movedim(-1, 3)
        with launch.using(causal_conv3d=SMALL, causal_conv3d_float32=SMALL):
            args = [rand(B, T, H, W, inputs), weight / inputs**0.5, rand(outputs)]
            check(sf.upsampled_conv2d, args, dtype, gradients=False)


def test_what_is_upsampled() -> None:
    """By the definition, pixel by pixel, whoever computes it."""
    x, weight = rand(1, 1, 3, 4, 2), rand(2, 2, 3, 2, 2, 2)
    padded = torch.nn.functional.pad(x[0, 0], (0, 0, 1, 1, 1, 1))
    want = torch.stack(
        [
            torch.stack(
                [
                    torch.einsum("yxc,ocyx->o", padded[h + p :, w + q :][:2, :2], weight[p, q])
                    for w in range(4)
                    for q in range(2)
                ]
            )
            for h in range(3)
            for p in range(2)
        ]
    )
    for impl in ("auto", "torch", "reference"):
        torch.testing.assert_close(sf.upsampled_conv2d(x, weight, impl=impl)[0, 0], want)
    with pytest.raises(ValueError, match=r"weight has shape .* must be \[2, 2, O, 2, 2, 2\]"):
        sf.upsampled_conv2d(x, weight[:1])
    half = [t.half() for t in (rand(1, 1, 3, 4, 8), rand(2, 2, 8, 8, 2, 2))]
    with pytest.raises(ValueError, match=r"must lie in memory as \[2, 2, O, 2, 2, C\]"):
        sf.upsampled_conv2d(*half, impl="triton")


def test_the_library_is_the_choice_and_has_gradients() -> None:
    x, weight, bias = (t.requires_grad_() for t in tensors(1, 3, 4, 5, 3, 2))
    outs = [sf.causal_conv3d(x, weight, bias, impl=impl) for impl in ("auto", "torch", "reference")]
    grads = [torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in outs]
    for out, grad in zip(outs[1:], grads[1:], strict=True):
        assert out.is_contiguous()
        torch.testing.assert_close(out, outs[0])
        torch.testing.assert_close(grad, grads[0])
    half = [t.detach().bfloat16() for t in (x, weight, bias)]
    by_torch, by_reference = (sf.causal_conv3d(*half, impl=i) for i in ("torch", "reference"))
    close_as_eager("out", by_torch, by_reference, outs[0].detach())


def test_ours_has_no_gradient_and_says_so() -> None:
    x, weight, bias = (t.half() for t in tensors(1, 3, 4, 5, 8, 8))
    out = sf.causal_conv3d(x.requires_grad_(), weight, bias, impl="triton")
    with pytest.raises(RuntimeError, match="have a gradient under impl='torch' and 'reference'"):
        out.sum().backward()


def refused() -> list[tuple[dict[str, Any], str]]:
    x, weight, bias = (t.half() for t in tensors(1, 3, 4, 5, 8, 8))
    start = torch.zeros(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape)
    few = {"x_BTHWC": x[..., :6].contiguous(), "weight": weight[:, :6].contiguous()}
    return [
        ({"x_BTHWC": x[0]}, r"x has shape \[3, 4, 5, 8\]: must be \[B, T, H, W, C\]"),
        ({"weight": weight[:, :4]}, r"weight has shape \[8, 4, 3, 3, 3\]: must be \[O, 8, S"),
        ({"bias_O": bias[:4]}, r"bias has shape \[4\]: must be \[8\]"),
        ({"weight": weight.float()}, "weight has dtype torch.float32: must be torch.float16"),
        ({"x_BTHWC": x[:, :2]}, "weight has 3 × 3 × 3 taps and x 2 frames: must be at least one"),
        ({"weight": weight[..., :2]}, "3 × 3 × 2 taps and x 3 frames: must be at least one tap"),
        ({"weight": weight[:0], "bias_O": None}, "must not be empty"),
        ({"impl": "sdpa"}, "causal_conv3d has triton, torch, reference"),
        (few, "8 channels of 6: for impl='triton' both must be multiples of 8 in torch.float16"),
        ({"x_BTHWC": start}, "starts at byte 2 of 16: for impl='triton' all but the last must be"),
        ({"x_BTHWC": x.expand(2, -1, -1, -1, -1)}, "all but the last must be multiples of 8"),
        ({"weight": weight.contiguous()}, "it must lie in memory as"),
    ]


@pytest.mark.parametrize(("change", "said"), refused())
def test_what_is_refused(change: dict[str, Any], said: str) -> None:
    x, weight, bias = (t.half() for t in tensors(1, 3, 4, 5, 8, 8))
    args: dict[str, Any] = {"x_BTHWC": x, "weight": weight, "bias_O": bias, "impl": "triton"}
    with pytest.raises(ValueError, match=said):
        sf.causal_conv3d(**args | change)


def test_no_pixels_make_none() -> None:
    x, weight, bias = (t.half() for t in tensors(1, 3, 4, 0, 8, 8))
    assert sf.causal_conv3d(x, weight, bias, impl="triton").shape == (1, 1, 4, 0, 8)


def test_boxes_cover_a_frame() -> None:
    assert boxes(480, 832, 256) == (16, 16, 30 * 52)
    assert boxes(60, 104, 128) == (16, 8, 4 * 13)  # 7% more pixels than there are; 8 × 16: 15%
    for pixels in (32, 128):
        height, width, count = boxes(1, 1000, pixels)
        assert height == 1 and width == pixels and count == -(-1000 // pixels)


@torch.no_grad()
def test_the_card_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half the pixels where whole boxes leave much of the last wave idle."""
    found: list[dict[str, Any]] = []

    def record(kernel: Any, grid: Any, args: Any, **meta: Any) -> None:
        found.append({"grid": grid, **meta})

    monkeypatch.setattr(launch, "recorder", record)
    shape = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    weight = shape(192, 192, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    for frames, height, width in ((14, 240, 416), (3, 60, 104)):
        sf.causal_conv3d(shape(1, frames, height, width, 192), weight, impl="triton")
    assert [(one["grid"], one["BH"] * one["BW"]) for one in found] == [
        ((390, 12, 1), 256),
        ((52, 1, 1), 128),
    ]
