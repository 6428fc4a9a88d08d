"""Triton's interpreter as tests.interpreter changes it: results and refusals stay."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@triton.jit
def _larger_and_sum(a, b, c, d):  # type: ignore[no-untyped-def]
    return tl.maximum(a, c), b + d


@triton.jit
def _reduce_kernel(  # type: ignore[no-untyped-def]
    x_ptr, largest_ptr, sum_ptr, R: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr
):
    x_RC = tl.load(x_ptr + tl.arange(0, R)[:, None] * C + tl.arange(0, C))
    largest, total = tl.reduce((x_RC, x_RC), AXIS, _larger_and_sum)
    at = tl.arange(0, R if AXIS else C)
    tl.store(largest_ptr + at, largest)
    tl.store(sum_ptr + at, total)


@triton.jit
def _multiply_kernel(out_ptr, factor, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr + tl.arange(0, N), tl.arange(0, N) * factor)


@pytest.mark.parametrize("axis", [0, 1])
def test_pairs_are_reduced(axis: int) -> None:
    x = torch.randn(4, 16)
    out: list[Tensor] = [torch.empty(x.shape[1 - axis]) for _ in range(2)]
    _reduce_kernel[(1,)](x, *out, *x.shape, AXIS=axis)
    torch.testing.assert_close(out, [x.amax(axis), x.sum(axis)])


def test_integers_that_overflow_are_refused() -> None:
    out = torch.empty(8, dtype=torch.int32)
    _multiply_kernel[(1,)](out, 2**28, N=8)
    assert out[-1] == 7 * 2**28
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        _multiply_kernel[(1,)](out, 2**29, N=8)
