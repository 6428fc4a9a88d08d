"""The public rule of correctness, by kernels that are wrong in one way each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import reference, testing
from tests.oracle import Triples, judge


def inputs() -> list[Tensor]:
    return [torch.randn(2, 7, 12).bfloat16(), torch.randn(12).bfloat16()]


class Scaled(torch.autograd.Function):
    """An RMSNorm whose gradient is twice as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """What a kernel does: it computes in float32 and rounds once."""
    return reference.rms_norm(x.float(), weight.float(), 1e-6).to(x.dtype)


def unwritten(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:, :-1] = in_float32(x, weight)[:, :-1]
    return out


WRONG = {
    "result 0: off by": lambda x, w: 1.05 * in_float32(x, w),
    "result 1: off by": lambda x, w: in_float32(Scaled.apply(x), w),
    "result 0: off by nan": unwritten,
    "result 0 is torch.float32": lambda x, w: in_float32(x, w).float(),
}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return reference.rms_norm(x, weight, 1e-6)


def test_a_right_kernel_passes() -> None:
    testing.check(in_float32, rms_norm, inputs())


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_kernel_is_named(said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        testing.check(WRONG[said], rms_norm, inputs(), gradients="result 1" in said)


def test_an_op_that_writes_into_its_arguments() -> None:
    """The reference gets copies: what a kernel leaves unwritten is not there already."""

    def write(ring: Tensor) -> Tensor:
        ring[:2] = 1.0
        return ring

    ring = torch.zeros(4)
    oracle = testing.Oracle(write, [ring], gradients=False)
    assert not ring.any()
    with pytest.raises(AssertionError, match="result 0"):
        oracle.check([ring])
    oracle.check(testing.results(write, [ring]))


@pytest.mark.parametrize(("error", "right"), [(1.0, True), (1.5, True), (3.0, False)])
def test_luck_of_one_draw_does_not_decide(error: float, right: bool) -> None:
    """A first draw on which eager happens to be exact fails nobody; a kernel with three times
    eager's error fails on any number of draws."""
    draws = itertools.count()

    def draw(tensors: Sequence[Tensor]) -> Triples:
        (exact,) = tensors
        noise = 1e-5 * torch.rand(2, *exact.shape, dtype=torch.float64)
        eager = exact + noise[0] * (next(draws) > 0)
        return [((exact + error * noise[1]).float(), eager.float(), exact)]

    def judged() -> None:
        judge(draw, [torch.rand(100, dtype=torch.float64)])

    if right:
        judged()
    else:
        with pytest.raises(AssertionError, match="result 0: off by"):
            judged()
    assert next(draws) == 33
