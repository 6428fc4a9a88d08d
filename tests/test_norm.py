"""The norm kernels against the reference: outputs and gradients, odd sizes, views, bad input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import launch
from sfkernels.launch import RowTile
from tests.oracle import DEVICE, check, each, each_and_reference, each_size, rand

pytestmark = pytest.mark.usefixtures("fresh_seed")

# (rows of a program, batch, frames, tokens of a frame, channels): odd counts, one token, more
# channels than a power of 2, tiles that end inside a frame.
SIZES = [
    (8, 2, 2, 63, 96),
    (32, 1, 1, 123, 64),
    (1, 2, 2, 5, 200),
    (2, 1, 7, 1, 32),
    (1, 2, 1, 1, 64),
]
# Of C++: rows that end inside a vector, and of many; strips of rows that end inside a frame. Fewer
# channels would leave a gate so few gradients that PyTorch may happen to be exact in all of them.
OF_CPP = [(1, 1, 2, 70, 113), (1, 1, 1, 40, 130), (1, 1, 1, 3, 20_000)]


def modulation(batch: int, frames: int, channels: int, count: int) -> list[Tensor]:
    """Strided views of one tensor, as a DiT block makes them."""
    return [*rand(batch, frames, count, channels).unbind(2)]


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Iterator[tuple[int, ...]]:
    """batch, frames, tokens, channels, under a setting with so many rows a program."""
    rows, *sizes = request.param
    kernels = [f"{form}_{way}" for form in ("norm", "adaln", "residual_norm", "norm_silu")
               for way in ("fwd", "bwd")]  # fmt: skip
    with launch.using(**{kernel: RowTile(rows, 8, per_sm=2, stages=2) for kernel in kernels}):
        yield tuple(sizes)


@each_size(SIZES, OF_CPP)
def test_layer_norm_and_rms_norm(size: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
    batch, frames, tokens, channels = size
    x = rand(batch, frames * tokens, channels)
    check(sf.layer_norm, (x, rand(channels), rand(channels)), dtype, impl=impl)
    check(sf.rms_norm, (x, rand(channels)), dtype, wide=[1], impl=impl)


@each_size(SIZES, OF_CPP)
def test_adaln(size: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
    batch, frames, tokens, channels = size
    x = rand(batch, frames * tokens, channels)
    check(sf.adaln, (x, *modulation(batch, frames, channels, 2)), dtype, wide=[1, 2], impl=impl)
    shift, scale = rand(batch, 1, channels), rand(1, frames, channels)
    check(functools.partial(sf.adaln, eps=1e-2), (x, shift, scale), dtype, wide=[1], impl=impl)
    broadcast = shift[:, :, None], scale[:, :, None]  # over tokens, as the public models do
    torch.testing.assert_close(
        sf.adaln(x, *broadcast, impl="reference"), sf.adaln(x, shift, scale, impl="reference")
    )


@each_size(SIZES, OF_CPP)
def test_gated_norms(size: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
    batch, frames, tokens, channels = size
    x, y = rand(2, batch, frames * tokens, channels).clamp(-2, 2)
    gate, shift, scale = modulation(batch, frames, channels, 3)
    weight, bias = rand(2, channels)
    # The gradient of a gate of one token has nothing to even out how x' is rounded.
    wide = [2] if tokens > 1 else []
    modulations = gate, shift[:1], scale[:, :1]
    check(sf.gated_adaln, (x, y, *modulations), dtype, wide=[*wide, 3, 4], impl=impl)
    check(sf.gated_layer_norm, (x, y, gate[:1, :1], weight, bias), dtype, wide=wide, impl=impl)

    def ungated(x: Tensor, y: Tensor, *rest: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        return sf.gated_adaln(x, y, None, *rest, impl=impl)

    check(ungated, (x, y, shift, scale), dtype, wide=[2, 3], impl=impl)


@each_size(SIZES, OF_CPP)
def test_rms_norm_silu(size: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
    batch, frames, tokens, channels = size
    x, y = rand(2, batch, frames * tokens, channels)
    weight, before = rand(channels), rand(batch, 2 * tokens, channels)

    bias = rand(channels)

    def alone(x: Tensor, weight: Tensor, *, impl: str) -> Tensor:
        nothing, out = sf.rms_norm_silu(x, weight, impl=impl)
        assert nothing is None
        return out

    def biased(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str) -> Tensor:
        return sf.rms_norm_silu(x, weight, bias_C=bias, impl=impl)[1]

    def behind(x: Tensor, weight: Tensor, y: Tensor, b: Tensor, old: Tensor, *, impl: str) -> Any:
        return sf.rms_norm_silu(x, weight, y, bias_C=b, before_BPC=old, impl=impl)

    def unused(*tensors: Tensor, impl: str) -> Tensor:
        out: Tensor = behind(*tensors, impl=impl)[1]
        return out

    check(alone, (x, weight), dtype, wide=[1], impl=impl)
    check(biased, (x, weight, bias), dtype, wide=[1], impl=impl)
    check(behind, (x, weight, y, bias, before), dtype, wide=[1], impl=impl)
    check(unused, (x, weight, y, bias, before), dtype, impl=impl)


@each_and_reference
def test_zeros_stay_zeros(impl: str) -> None:
    """Where nothing is added to the mean of squares that a float32 would notice."""
    x = torch.zeros(1, 3, 32, device=DEVICE)
    _, out = sf.rms_norm_silu(x, torch.ones(32, device=DEVICE), eps=1e-24, impl=impl)
    assert torch.equal(out, x)


@each
def test_rows_may_be_views_of_something_larger(impl: str) -> None:
    """As keys are of a fused projection, and a chunk of a clip."""
    wide = rand(2, 11, 3 * 64)

    def of_views(wide: Tensor, *rest: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        x, y, _ = wide[:, 2:9].chunk(3, -1)
        return sf.gated_adaln(x, y, *rest, impl=impl)

    check(of_views, (wide, *modulation(2, 7, 64, 3)), torch.float32, impl=impl)


@each
def test_a_gradient_may_be_expanded(impl: str) -> None:
    """The gradient of a sum has stride 0 everywhere."""
    # Positive, since rounding is measured against the sum, which is not to cancel.
    x, weight = rand(1, 5, 32).abs(), rand(32).abs()

    def summed(x: Tensor, weight: Tensor, *, impl: str) -> Tensor:
        return sf.rms_norm(x, weight, impl=impl).sum()

    check(summed, (x, weight), torch.float32, impl=impl)


@each
def test_sums_over_rows_are_deterministic(impl: str) -> None:
    x = rand(2, 120, 64, dtype=torch.float32)
    shift, scale = (t.float().requires_grad_() for t in modulation(2, 3, 64, 2))
    out = sf.adaln(x, shift, scale, impl=impl)
    upstream = torch.randn_like(out)
    first, again = (torch.autograd.grad(out, (shift, scale), upstream, retain_graph=True)
                    for _ in range(2))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


X = torch.zeros(2, 6, 8, device=DEVICE)
M = torch.zeros(2, 3, 8, device=DEVICE)


@each
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda impl: sf.adaln(X.double(), M, M, impl=impl), "x is torch.float64: impl="),
        (lambda impl: sf.adaln(X, M, M.int(), impl=impl), "scale is torch.int32"),
        (
            lambda impl: sf.adaln(X.mT.contiguous().mT, M, M, impl=impl),
            "stride 6 in its last dimension",
        ),
        (lambda impl: sf.adaln(X, M[:, :2], M, impl=impl), "frames 1 or the same for all"),
        (lambda impl: sf.gated_adaln(X, X.half(), M, M, M, impl=impl), "y has dtype torch.float16"),
        (
            lambda impl: sf.gated_layer_norm(X, X, M, M[0, 0], M[0], impl=impl),
            r"bias has shape \[3, 8\]",
        ),
        (
            lambda impl: sf.rms_norm_silu(X, M[0, 0], M, impl=impl),
            r"y has shape \[2, 3, 8\]: must be \[2, 6, 8\]",
        ),
        (
            lambda impl: sf.rms_norm_silu(X, M[0, 0], before_BPC=M[:1], impl=impl),
            r"before has shape \[1, 3, 8\]: must be \[2, P, 8\]",
        ),
        (
            lambda impl: sf.rms_norm_silu(X, M[0, 0], before_BPC=M.half(), impl=impl),
            "before has dtype torch.float16: must be torch.float32, as x",
        ),
        (
            lambda impl: sf.layer_norm(X, M[0, 0].to("meta"), M[0, 0], impl=impl),
            "weight is on meta",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[str], Any], said: str, impl: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(impl)


def test_triton_holds_a_token_in_registers() -> None:
    x, weight = torch.zeros(1, 1, 20_000, device=DEVICE), torch.zeros(20_000, device=DEVICE)
    with pytest.raises(ValueError, match="20000 channels: the Triton kernels hold a token in"):
        sf.rms_norm(x, weight, impl="triton")
