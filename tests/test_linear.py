"""Linear layers against the reference: outputs, odd sizes, plans of tiles, what has a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sfkernels as sf
from sfkernels import launch
from sfkernels.gpu.linear import plan
from sfkernels.launch import Product
from sfkernels.linear import _linear
from tests.oracle import DEVICE, DTYPES, check, rand

pytestmark = pytest.mark.usefixtures("fresh_seed")

HALF = [dtype for dtype in DTYPES if dtype != torch.float32]  # what tensor cores multiply
# Samples, tokens, channels, outputs, widths of tiles: odd counts, one token, fewer channels than a
# step has, ends inside every tile, two widths in a launch.
SIZES = [
    (2, 100, 96, 200, (128, 64)),
    (1, 1, 8, 5, (64,)),
    (1, 3, 130, 130, (192,)),
    (1, 400, 64, 448, (256, 192)),
]


def layer(batch: int, tokens: int, channels: int, outputs: int) -> list[Tensor]:
    """x, the weight and the bias, with outputs of about unit variance."""
    return [rand(batch, tokens, channels), rand(outputs, channels) / channels**0.5, rand(outputs)]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear(size: tuple[Any, ...], dtype: torch.dtype, gelu: bool) -> None:
    *sizes, widths = size
    with launch.using(linear=Product(widths, 4, 2)):
        op = functools.partial(sf.linear, gelu=gelu)
        check(op, layer(*sizes), dtype, gradients=False)
        check(op, layer(*sizes)[:2], dtype, gradients=False)


def test_rows_may_be_views_that_tma_cannot_read() -> None:
    """Each row begins where 16 bytes do not, and each sample inside a longer one; all are one."""
    x, weight, bias = layer(2, 9, 41, 30)

    def of_views(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str) -> Tensor:
        return sf.linear(x[:, 2:7, 1:], weight[:, 1:], bias, impl=impl)

    with launch.using(linear=Product((64,), 4, 2)):
        check(of_views, (x, weight, bias), HALF[0], gradients=False)

        def expanded(x: Tensor, *rest: Tensor, impl: str) -> Tensor:
            return sf.linear(x[:1, :1].expand(1, 70, -1), *rest, impl=impl)

        check(expanded, layer(1, 1, 16, 30), HALF[0], gradients=False)


@pytest.mark.parametrize("impl", ["auto", "reference", "torch", "triton"])
@pytest.mark.parametrize("sizes", [(0, 3, 8, 5), (2, 0, 8, 5), (2, 3, 8, 0)])
def test_nothing_is_made_of_nothing(sizes: tuple[int, ...], impl: str) -> None:
    x, weight, bias = (t.half() for t in layer(*sizes))
    out = sf.linear(x, weight, bias, gelu=True, impl=impl)
    assert out.shape == (*x.shape[:2], len(weight)) and out.dtype == x.dtype


@pytest.mark.parametrize("outputs", [1536, 4608, 8960])
@pytest.mark.parametrize("rows", [1560, 4680, 9360])
def test_a_plan_covers_every_tile_once_and_fills_the_waves(rows: int, outputs: int) -> None:
    programs, widths = 132, (256, 192)
    head_strips, head, tail = plan(rows, outputs, programs, widths)
    strips = -(-rows // 128)
    heads = head_strips * -(-outputs // head)
    tails = (strips - head_strips) * -(-outputs // tail) if tail else 0
    assert tail or head_strips == strips
    # As the kernel numbers them.
    work = [range(p, heads, programs) for p in range(programs)]
    more = [range((p - heads) % programs, tails, programs) for p in range(programs)]
    for parts, count in ((work, heads), (more, tails)):
        assert sorted(tile for part in parts for tile in part) == [*range(count)]
    longest = max(len(a) * head + len(b) * tail for a, b in zip(work, more, strict=True))
    filled = rows * outputs / (longest * 128 * programs)
    assert filled > (0.92 if rows > 1560 or outputs == 8960 else 0.73)


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_are_those_of_pytorch(gelu: bool, impl: str) -> None:
    leaves = [t.float().requires_grad_() for t in layer(2, 5, 8, 12)]
    out = sf.linear(*leaves, gelu=gelu, impl=impl)
    want = F.linear(*leaves)
    want = F.gelu(want, approximate="tanh") if gelu else want
    assert torch.equal(out, want)
    upstream = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(y, leaves, upstream) for y in (out, want)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    tangent = torch.func.jvp(lambda x: sf.linear(x, *leaves[1:], gelu=gelu, impl=impl),
                             (leaves[0],), (leaves[0],))[1]  # fmt: skip
    assert tangent.shape == out.shape


def test_triton_has_no_gradient() -> None:
    x, weight, bias = (t.half().requires_grad_() for t in layer(1, 3, 8, 8))
    out = sf.linear(x, weight, bias, impl="triton")
    with pytest.raises(RuntimeError, match="no gradient under impl='triton': to train, use 'torch"):
        out.sum().backward()


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
def test_under_autocast_dtypes_may_differ(impl: str) -> None:
    x, weight, bias = (t.float() for t in layer(1, 3, 8, 8))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = sf.linear(x, weight, bias.bfloat16(), gelu=True, impl=impl)
        want = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_it_compiles_without_graph_breaks(impl: str) -> None:
    args = [t.half() for t in layer(2, 3, 8, 8)]
    op = functools.partial(sf.linear, gelu=True, impl=impl)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), op(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_gelu_is_the_tanh_approximation(impl: str) -> None:
    """At -3 it is -0.00364, GELU itself -0.00405."""
    x, weight, bias = (
        torch.zeros(size, device=DEVICE).half() for size in ((1, 64, 64), (64, 64), (64,))
    )
    with torch.no_grad():
        out = sf.linear(x, weight, bias - 3, gelu=True, impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, -0.003637), rtol=0.02, atol=0)


X, W, V = (torch.zeros(size, device=DEVICE) for size in ((2, 6, 8), (4, 8), (4,)))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sf.linear(X[0], W), r"x has shape \[6, 8\]: must be \[B, L, C\]"),
        (lambda: sf.linear(X[..., :0].half(), W[:, :0].half(), impl="triton"), "no channels"),
        (lambda: sf.linear(X, W[:, 1:]), r"weight has shape \[4, 7\]: must be \[O, 8\]"),
        (lambda: sf.linear(X, W, V[1:]), r"bias has shape \[3\]: must be \[4\]"),
        (lambda: sf.linear(X, W.half()), "weight has dtype torch.float16: must be torch.float32"),
        (lambda: sf.linear(X, W, V.to("meta")), "bias is on meta"),
        (lambda: sf.linear(X.int(), W), "x is torch.int32"),
        (lambda: sf.linear(X, None), "weight is None: must be a tensor"),  # type: ignore[arg-type]
        (lambda: sf.linear(X, W, impl="cpp"), r"linear has triton, torch, reference \(or 'auto'\)"),
        (lambda: sf.linear(X, W, impl="triton"), "x is torch.float32: impl='triton' takes bfloat"),
        (lambda: sf.linear(X.half().mT.contiguous().mT, W.half(), impl="triton"), "stride 6 in"),
        (lambda: _linear(X.half(), W.half()[:, 1:], None, True, "triton"), "weight has shape"),
        (lambda: _linear(X, W, None, True, "torch"), "a registered op takes"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
