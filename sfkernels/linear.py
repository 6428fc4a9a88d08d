"""Linear layers with GELU in their epilogue. Shapes are named as in reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sfkernels import reference
from sfkernels.arguments import check_same, check_shape, is_plain
from sfkernels.dispatch import HALF, choose, kernel, registered


def linear(
    x_BLC: Tensor,
    weight_OC: Tensor,
    bias_O: Tensor | None = None,
    *,
    gelu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """x Wᵀ + bias, and with `gelu` the tanh approximation of GELU of that; returns [B, L, O].

    x [B, L, C], weight [O, C] and bias [O] of one dtype; under autocast of any, which is cast as
    for `torch.nn.functional.linear`. impl="torch" has cuBLASLt add the bias and apply GELU to
    bfloat16 and float16 on a GPU where no gradient is recorded and no autocast is on, and is two
    calls of PyTorch's elsewhere. "triton" takes bfloat16 and float16 of one dtype and has no
    gradient. Raises ValueError for shapes and dtypes that do not fit."""
    if impl == "auto" and is_plain(x_BLC) and x_BLC.is_cpu and x_BLC.dim() == 3:
        try:  # the checks below take as long as a small layer
            fits = x_BLC.is_floating_point() and weight_OC.is_cpu and weight_OC.dim() == 2
            if fits and (bias_O is None or bias_O.shape == weight_OC.shape[:1]):
                return reference.linear(x_BLC, weight_OC, bias_O, gelu)
        except (RuntimeError, TypeError, AttributeError):
            pass  # they say in a sentence what is wrong
    impl = _choose(impl, x_BLC, weight_OC, bias_O)
    if impl == "triton":
        return _linear(x_BLC, weight_OC, bias_O, gelu, impl)
    if impl == "torch" and gelu and bias_O is not None and _in_one_call(x_BLC, weight_OC, bias_O):
        # On a GPU this is the tanh approximation; on a CPU it would be GELU itself.
        y_MO = torch._addmm_activation(bias_O, x_BLC.flatten(0, 1), weight_OC.t(), use_gelu=True)
        return y_MO.unflatten(0, x_BLC.shape[:2])
    return reference.linear(x_BLC, weight_OC, bias_O, gelu)


def _in_one_call(x_BLC: Tensor, *parameters: Tensor) -> bool:
    """Tells whether cuBLASLt applies GELU, in an operator without a derivative that autocast does
    not know."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x_BLC, *parameters))
    return (
        x_BLC.device.type == "cuda"
        and x_BLC.dtype in HALF
        and not (recorded or torch.is_autocast_enabled("cuda"))
        and forward_ad._current_level < 0
    )


def _choose(impl: str, x_BLC: Tensor, weight_OC: Tensor, bias_O: Tensor | None) -> str:
    """The implementation to take."""
    check_shape("x", x_BLC, ("B", "L", "C"))
    check_shape("weight", weight_OC, ("O", x_BLC.shape[2]))
    tensors = {"weight": weight_OC}
    if bias_O is not None:
        check_shape("bias", bias_O, (weight_OC.shape[0],))
        tensors["bias"] = bias_O
    refused = "" if x_BLC.shape[2] else "x has no channels: impl='triton' takes one or more"
    if x_BLC.dtype not in HALF:
        refused = f"x is {x_BLC.dtype}: impl='triton' takes bfloat16 and float16; use 'torch'"
    impl = choose("linear", impl, x_BLC.device, refused, x=x_BLC, **tensors)
    for name, t in tensors.items():
        if t.dtype != x_BLC.dtype and (impl == "triton" or not _autocast(x_BLC.device.type)):
            check_same(name, t, "x", x_BLC)
    return impl


def _autocast(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)


@registered("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, impl: str) -> Tensor:
    _choose(impl, x, weight, bias)
    y: Tensor = kernel(impl, "linear")(x, weight, bias, gelu)
    return y


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _no_gradient(ctx: Any, dy: Tensor) -> Any:
    raise RuntimeError("linear has no gradient under impl='triton': to train, use 'torch'")


_linear.register_autograd(_no_gradient)
