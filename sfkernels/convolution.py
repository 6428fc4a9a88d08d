"""The convolutions of a video VAE. Shapes are named as in reference.py, and those of weights as in
`causal_conv3d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfkernels import reference
from sfkernels.arguments import TOO_MANY, check_floating, check_same, check_shape, is_plain
from sfkernels.dispatch import choose, kernel, registered

ALIGNED = 16  # bytes between what TMA reads


def causal_conv3d(
    x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """3-D convolution of frames that stand behind those before them: height and width are padded
    with zeros to stay what they are, time is not.

    x [B, T, H, W, C]; weight [O, C, S, Y, X], that of an nn.Conv3d, with S ≤ T taps in time and odd
    numbers of them in height and width; bias [O]; all of one dtype. Returns a contiguous
    [B, T − S + 1, H, W, O]. Raises ValueError for shapes that do not fit.

    impl="triton" takes channels whose rows fill whole 16 bytes, and weights in the format
    `torch.channels_last_3d`, which it reads as they lie; a part of the taps in time, as a slice of
    the weight, is one too. It has no gradient. "torch" is PyTorch's own convolution, and "auto" as
    long as that is not measured to be slower."""
    impl = _choose(impl, x_BTHWC, weight, bias_O)
    if impl == "reference":
        return reference.causal_conv3d(x_BTHWC, weight, bias_O)
    if impl == "torch":
        return reference.padded_in_space(x_BTHWC, weight, bias_O)
    return _causal_conv3d(x_BTHWC, weight, bias_O, impl)


def upsampled_conv2d(
    x_BTHWC: Tensor, weight_PQOCYX: Tensor, bias_O: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Four convolutions of each frame with 2×2 taps, one for each of the 2×2 pixels, P × Q, that a
    pixel becomes; which is what a 3×3 convolution of the frame upsampled to its nearest neighbours
    comes to, for sums of its taps:

    out[2h + p, 2w + q] = Σ weight[p, q, …, y, x] · x[h + y + p − 1, w + x + q − 1].

    x [B, T, H, W, C], zeros beyond a frame; weight [2, 2, O, C, 2, 2]; bias [O]; all of one dtype.
    Returns a contiguous [B, T, 2H, 2W, O]. Raises ValueError for shapes that do not fit. impl: as
    of `causal_conv3d`; "triton" takes weights that lie in memory as [2, 2, O, 2, 2, C]."""
    impl = _choose_upsampled(impl, x_BTHWC, weight_PQOCYX, bias_O)
    if impl == "reference":
        return reference.upsampled_conv2d(x_BTHWC, weight_PQOCYX, bias_O)
    if impl == "torch":
        return reference.interleaved(x_BTHWC, weight_PQOCYX, bias_O)
    return _upsampled_conv2d(x_BTHWC, weight_PQOCYX, bias_O, impl)


def _choose(impl: str, x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None) -> str:
    """Chooses the implementation; raises ValueError for what `causal_conv3d` does not take."""
    check_shape("x", x_BTHWC, ("B", "T", "H", "W", "C"))
    check_shape("weight", weight, ("O", x_BTHWC.shape[-1], "S", "Y", "X"))
    taps, frames = weight.shape[2:], x_BTHWC.shape[1]
    if not 1 <= taps[0] <= frames or not taps[1] % 2 or not taps[2] % 2:
        raise ValueError(
            f"weight has {' × '.join(map(str, taps))} taps and x {frames} frames: must be at least "
            "one tap and at most one a frame in time, and odd numbers in height and width"
        )
    return _choose_for("causal_conv3d", impl, x_BTHWC, weight, bias_O)


def _choose_upsampled(impl: str, x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None) -> str:
    """Chooses the implementation; raises ValueError for what `upsampled_conv2d` does not take."""
    check_shape("x", x_BTHWC, ("B", "T", "H", "W", "C"))
    check_shape("weight", weight, (2, 2, "O", x_BTHWC.shape[-1], 2, 2))
    return _choose_for("upsampled_conv2d", impl, x_BTHWC, weight, bias_O)


def _choose_for(op: str, impl: str, x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None) -> str:
    check_floating("x", x_BTHWC)
    check_same("weight", weight, "x", x_BTHWC)
    if not weight.numel():
        raise ValueError(f"weight has shape {[*weight.shape]}: must not be empty")
    if bias_O is not None:
        check_shape("bias", bias_O, (weight.shape[0 if op == "causal_conv3d" else 2],))
        check_same("bias", bias_O, "x", x_BTHWC)
    impl = choose(op, impl, x_BTHWC.device, bias=bias_O, x=x_BTHWC)
    if impl in ("reference", "torch"):
        return impl
    if op == "causal_conv3d":
        _check_memory(impl, x_BTHWC, weight, 1)
    else:
        for each in weight.flatten(0, 1):
            _check_memory(impl, x_BTHWC, each.unsqueeze(2), 2)
    return impl


def _check_memory(impl: str, x_BTHWC: Tensor, weight: Tensor, scale: int) -> None:
    """Raises ValueError for what kernels cannot read where it lies. scale: the height of the output
    over that of x."""
    apart = ALIGNED // x_BTHWC.itemsize
    outputs, inputs, *taps = weight.shape
    if outputs % apart or inputs % apart:
        raise ValueError(
            f"weight makes {outputs} channels of {inputs}: for impl={impl!r} both must be "
            f"multiples of {apart} in {x_BTHWC.dtype}; use 'torch'"
        )
    starts = [t.data_ptr() % ALIGNED if is_plain(t) else 0 for t in (x_BTHWC, weight)]
    if starts[0] or any(not stride or stride % apart for stride in x_BTHWC.stride()[:4]):
        raise ValueError(
            f"x has strides {x_BTHWC.stride()} and starts at byte {starts[0]} of {ALIGNED}: for "
            f"impl={impl!r} all but the last must be multiples of {apart} and it start at 0; call "
            ".contiguous()"
        )
    height, width = x_BTHWC.shape[2:4]
    reach = height * max(x_BTHWC.stride(2), scale**2 * width * outputs)
    if reach >= TOO_MANY:
        raise ValueError(
            f"a frame of x or of the output reaches over {reach} elements: impl={impl!r} takes "
            f"fewer than {TOO_MANY}"
        )
    wanted = 1, taps[1] * taps[2] * inputs, taps[2] * inputs, inputs
    sizes = zip(weight.shape[1:], weight.stride()[1:], wanted, strict=True)
    lies = all(size == 1 or stride == want for size, stride, want in sizes)
    if not lies or starts[1] or weight.stride(0) % apart:
        how = "[O, S, Y, X, C]; call .contiguous(memory_format=torch.channels_last_3d)"
        raise ValueError(
            f"weight has strides {weight.stride()}: for impl={impl!r} it must lie in memory as "
            f"{how if scale == 1 else '[2, 2, O, 2, 2, C]'}"
        )


@registered("causal_conv3d")
def _causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    _choose(impl, x, weight, bias)
    out: Tensor = kernel(impl, "causal_conv3d")(x, weight, bias)
    return out


@_causal_conv3d.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[2] + 1, *x.shape[2:4], weight.shape[0])


@registered("upsampled_conv2d")
def _upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    _choose_upsampled(impl, x, weight, bias)
    out: Tensor = kernel(impl, "upsampled_conv2d")(x, weight, bias)
    return out


@_upsampled_conv2d.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    height, width = x.shape[2:4]
    return x.new_empty(*x.shape[:2], 2 * height, 2 * width, weight.shape[2])


def _no_gradient(ctx: Any, dout: Tensor) -> Any:
    raise RuntimeError(
        "convolutions have a gradient under impl='torch' and 'reference' only: pass one of them"
    )


_causal_conv3d.register_autograd(_no_gradient)
_upsampled_conv2d.register_autograd(_no_gradient)
