"""Rule of correctness: a kernel may be twice as far from float64 as eager PyTorch in its dtype is,
plus rounding.

max |kernel − exact| ≤ 2 · (max |eager − exact| + ε · max |exact|), where ε is the dtype's.

It holds for outputs and every gradient. A kernel of your own is tested in a line:

    from functools import partial
    from sfkernels import reference, testing

    x, weight = torch.randn(2, 77, 96, device="cuda").bfloat16(), torch.randn(96, device="cuda")
    testing.check(my_rms_norm, partial(reference.rms_norm, eps=1e-6), [x, weight.bfloat16()])
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Any]  # of tensors, returning one or a sequence of them


def check(kernel: Op, reference: Op, tensors: Sequence[Tensor], *, gradients: bool = True) -> None:
    """Raises AssertionError unless `kernel(*tensors)` obeys the rule above.

    reference: the same in eager PyTorch, in whatever dtype it is given. gradients: those of all
    floating-point tensors are compared too, by random ones of the outputs. What the kernel leaves
    unwritten counts as wrong: while it runs, uninitialised tensors are NaN."""
    oracle = Oracle(reference, tensors, gradients=gradients)
    with nan_filled():
        got = results(kernel, tensors, oracle.upstream)
    oracle.check(got)


class Oracle:
    """The right results of an op for one set of tensors, to judge any number of kernels by: those
    of its reference in the tensors' dtype and, of the same numbers, in float64.

    upstream: the random gradients of the outputs, empty where none are wanted."""

    def __init__(self, reference: Op, tensors: Sequence[Tensor], *, gradients: bool) -> None:
        def compute(dtype: torch.dtype | None) -> list[Tensor]:
            # Copies, as an op may write into its arguments.
            inputs = [cast(t.detach().clone(), dtype) for t in tensors]
            return results(reference, inputs, [cast(u, dtype) for u in self.upstream])

        self.upstream: list[Tensor] = []
        if gradients:
            # Without tails: rounding of one large number would decide how far off a sum may be.
            self.upstream = [torch.randn_like(out).clamp(-2, 2) for out in compute(None)]
        self.exact = compute(torch.float64)
        self.eager = compute(None)

    def check(self, got: Sequence[Tensor], *, slack: float = 1.0) -> None:
        """Raises AssertionError unless what `results` gave for a kernel, the tensors and `upstream`
        obeys the rule, or is at most `slack` times as far off as that allows."""
        for i, triple in enumerate(zip(got, self.eager, self.exact, strict=True)):
            close_as_eager(f"result {i}", *triple, slack=slack)


def results(op: Op, tensors: Sequence[Tensor], upstream: Sequence[Tensor] = ()) -> list[Tensor]:
    """The outputs of an op and, where `upstream` has their gradients, behind them those of the
    floating-point tensors that have one."""
    leaves = [t.detach().requires_grad_(bool(upstream) and t.is_floating_point()) for t in tensors]
    out = op(*leaves)
    outs = [out] if isinstance(out, Tensor) else [*out]
    if not upstream:
        return outs
    wanted = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(outs, wanted, upstream, allow_unused=True)
    return [*(o.detach() for o in outs), *(g for g in grads if g is not None)]


def close_as_eager(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, *, slack: float = 1.0
) -> None:
    """Raises AssertionError unless `got` obeys the rule above, or is at most `slack` times as far
    off as that allows. eager: the same result by eager PyTorch in the same dtype; exact: in
    float64."""
    assert (got.shape, got.dtype) == (eager.shape, eager.dtype), (
        f"{name} is {got.dtype} {[*got.shape]}, eager {eager.dtype} {[*eager.shape]}"
    )
    eager_error = float((eager - exact).abs().max())
    allowed = 2 * (eager_error + torch.finfo(eager.dtype).eps * float(exact.abs().max()))
    allowed *= slack
    error = (got - exact).abs()
    worst = float(error.max())
    assert worst <= allowed, (  # NaN fails too
        f"{name}: off by {worst:.2e} at {_where(error)}, allowed {allowed:.2e} (eager is off by "
        f"{eager_error:.2e})"
    )


def _where(error: Tensor) -> list[int]:
    at = error.nan_to_num(nan=float("inf")).argmax()
    return [int(i) for i in torch.unravel_index(at, error.shape)]


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of floating-point numbers in `dtype`; others, and all for None, as they are."""
    return t if dtype is None or not t.is_floating_point() else t.to(dtype)


def interpreted() -> bool:
    """Tells whether Triton runs kernels in its interpreter, on CPU tensors: right but slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"
