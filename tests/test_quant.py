"""Rows in 8 bits: every implementation gives the reference's bits, and those what the definition
says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import launch, quant, reference
from sfkernels.launch import RowTile
from sfkernels.testing import nan_filled
from tests.oracle import DEVICE, each, each_and_reference, rand

pytestmark = [
    pytest.mark.usefixtures("fresh_seed"),
    # The interpreter's, of rows of zeros and of what is not finite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
each_into = pytest.mark.parametrize("into", [INT8, E4M3], ids=["int8", "e4m3"])
# bfloat16 under the interpreter too, which only loads it.
each_from = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
each_channels = pytest.mark.parametrize("channels", [1, 5, 17, 96, 1536])


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int8) if t.itemsize == 1 else t.view(torch.int32)


def check(x: Tensor, into: torch.dtype, impl: str) -> None:
    """Bit for bit, zeros' signs and subnormal numbers included."""
    with launch.using(quantize_rows=RowTile(2, 8, per_sm=2, stages=2)), nan_filled():
        got = sf.quantize_rows(x, dtype=into, impl=impl)
    q, scale = want = sf.quantize_rows(x, dtype=into, impl="reference")
    assert (q.shape, q.dtype, scale.shape) == (x.shape, into, x.shape[:2])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        assert torch.equal(bits(a), bits(b))


@each_channels
@each_into
@each_from
@each
def test_bits(impl: str, dtype: torch.dtype, into: torch.dtype, channels: int) -> None:
    """Rows of all magnitudes, one of zeros among them, with elements down to a millionth."""
    size_L = torch.logspace(-6, 4, 7, dtype=torch.float64, device=DEVICE)
    x = rand(2, 7, channels) * rand(2, 7, channels).exp() ** 3 * size_L[:, None]
    x[1, 3] = 0
    check(x.clamp(-6e4, 6e4).to(dtype), into, impl)


@each_into
@each
def test_rows_may_be_views_of_something_larger(impl: str, into: torch.dtype) -> None:
    wide = rand(3, 12, 3 * 40, dtype=torch.float32)
    check(wide[:, 2:9, 40:80], into, impl)
    check(wide[1:2, ::3, 1:38], into, impl)
    check(wide.transpose(0, 1)[..., 5:6], into, impl)
    check(wide[:1, :, 7:30].expand(4, -1, -1), into, impl)


@each_into
@each_and_reference
def test_ties_go_to_even(impl: str, into: torch.dtype) -> None:
    """Midway between all neighbours, and on both sides of it, where a row's factor is 1 or 2⁻³."""
    every = torch.arange(-128, 128, device=DEVICE).to(torch.int8).view(into).float()
    every = every[every.abs() <= reference.LARGEST[into]].unique()
    middle = (every[1:] + every[:-1]) / 2
    low, high = (middle.nextafter(torch.full_like(middle, s * math.inf)) for s in (-1, 1))
    x = torch.cat([every, middle, low, high])
    for factor in (1.0, 0.125):
        q, scale = sf.quantize_rows(x[None, None] * factor, dtype=into, impl=impl)
        assert scale.item() == factor
        exact, of_middle, below, above = q[0, 0].float().split([len(every), *[len(middle)] * 3])
        assert torch.equal(exact, every)
        assert torch.equal(below, every[:-1]) and torch.equal(above, every[1:])
        # Of two neighbours the even one has an even code.
        even = bits(every.to(into)) % 2 == 0
        assert torch.equal(of_middle, torch.where(even[1:], every[1:], every[:-1]))
    if impl != "reference":
        check(x[None, None], into, impl)


@each_into
@each_and_reference
def test_a_row_is_its_numbers_times_its_scale(impl: str, into: torch.dtype) -> None:
    x = rand(2, 5, 96, dtype=torch.float32)
    q, scale = sf.quantize_rows(x, dtype=into, impl=impl)
    amax = x.abs().amax(-1)
    assert torch.equal(q.float().abs().amax(-1), torch.full_like(amax, reference.LARGEST[into]))
    step = scale / 2 if into == INT8 else amax / 28  # of e4m3's numbers between 256 and 448
    assert ((q.float() * scale[..., None] - x).abs() <= step[..., None] * 1.0001).all()


@each_into
@each
def test_rows_of_the_smallest_and_largest_numbers(impl: str, into: torch.dtype) -> None:
    """Where largest / amax overflows, nothing but zeros; scales below float32's normal numbers."""
    amax = torch.tensor([0, 1e-45, 1e-38, 3e-37, 4e-37, 1.3e-36, 1.4e-36, 1e30, 3.4e38])
    x = amax.to(DEVICE)[None, :, None] * torch.tensor([1, -0.3, 0, 1e-3], device=DEVICE)
    check(x, into, impl)
    q, scale = sf.quantize_rows(x, dtype=into, impl=impl)
    assert not q[0, :4].float().any() and q[0, 6:, 0].float().eq(reference.LARGEST[into]).all()
    assert (scale[0, 2:] > 0).all()


@each_into
@each_and_reference
def test_what_is_not_finite_shows_in_the_scale(impl: str, into: torch.dtype) -> None:
    for channels in (5, 96):
        x = rand(1, 5, channels, dtype=torch.float32)
        x[0, 0, 3], x[0, 1, 0], x[0, 2, -1] = math.nan, math.inf, -math.inf
        x[0, 3, 1], x[0, 3, 2] = math.inf, math.nan
        _, scale = sf.quantize_rows(x, dtype=into, impl=impl)
        assert scale[0, [0, 3]].isnan().all() and (scale[0, 1:3] == math.inf).all()
        want = sf.quantize_rows(x, dtype=into, impl="reference")[1]
        assert torch.equal(scale[0, 4], want[0, 4])


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@each_and_reference
def test_nothing_comes_of_nothing(impl: str, shape: tuple[int, int, int]) -> None:
    q, scale = sf.quantize_rows(torch.zeros(shape, device=DEVICE), impl=impl)
    assert q.shape == shape and scale.shape == shape[:2]


@each_and_reference
def test_many_rows_at_the_shipped_setting(impl: str) -> None:
    """More than one thread or program takes; float64 only as the reference takes it."""
    x = rand(1, 300, 1536 // 8)
    q, scale = sf.quantize_rows(x.float(), impl=impl)
    exact, of_exact = sf.quantize_rows(x, impl="reference")
    assert of_exact.dtype == torch.float64
    torch.testing.assert_close(scale, of_exact.float())
    assert (q.int() - exact.int()).abs().max() <= 1


@pytest.mark.parametrize("impl", ["reference", "triton", "auto"])
def test_no_graph(impl: str) -> None:
    q, scale = sf.quantize_rows(rand(1, 2, 8, dtype=torch.float32).requires_grad_(), impl=impl)
    assert not q.requires_grad and not scale.requires_grad


@each_into
@each
def test_the_op_is_known_to_pytorch(impl: str, into: torch.dtype) -> None:
    x = rand(2, 3, 40, dtype=torch.float32)
    for t in (x, x[:, 1:, 4:30]):
        torch.library.opcheck(quant._quantize_rows.registered, (t, into, impl))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return sf.quantize_rows(x * 2, dtype=into, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), run(x), strict=True):
        assert torch.equal(bits(a), bits(b))


X = torch.zeros(2, 3, 8, device=DEVICE)


@each_and_reference
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda impl: sf.quantize_rows(X[0], impl=impl), r"x has shape \[3, 8\]: must be \[B, L"),
        (lambda impl: sf.quantize_rows(X[..., :0], impl=impl), "its rows must have an element"),
        (lambda impl: sf.quantize_rows(X.int(), impl=impl), "x is torch.int32: must be floating"),
        (lambda impl: sf.quantize_rows(X.to(E4M3), impl=impl), "x is torch.float8_e4m3fn: must be"),
        (
            lambda impl: sf.quantize_rows(X, dtype=torch.uint8, impl=impl),
            "dtype is torch.uint8: must be torch.int8 or torch.float8_e4m3fn",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[str], Any], said: str, impl: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(impl)


@each
def test_what_kernels_do_not_take(impl: str) -> None:
    with pytest.raises(ValueError, match=f"x is torch.float64: impl={impl!r}"):
        sf.quantize_rows(X.double(), impl=impl)
    with pytest.raises(ValueError, match="has stride 6 in its last dimension"):
        sf.quantize_rows(torch.zeros(2, 8, 6, device=DEVICE).mT, impl=impl)
    if impl == "triton":
        with pytest.raises(ValueError, match="20000 channels: the Triton kernels hold a token in"):
            sf.quantize_rows(torch.zeros(1, 1, 20_000, device=DEVICE), impl=impl)


def test_the_instruction_that_rounds_is_used_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(launch, "recorder", lambda *_, **meta: seen.append(meta["CONVERTS"]))
    for arch in launch.ARCHITECTURES:
        monkeypatch.setattr(launch, "target", arch)
        gpu = pytest.importorskip("sfkernels.gpu")
        gpu.quantize_rows(torch.zeros(1, 2, 8, device="meta"), E4M3)
    assert seen == [False, True, True, True]
