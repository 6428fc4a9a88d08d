"""The choice of implementation, made once per call and never silently, and the way ops are
registered."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from sfkernels import cpp, launch
from sfkernels.arguments import check_device, check_floating, check_shape, is_plain

T = TypeVar("T")

# Of the ops: torch.ops.sfkernels of what is installed. A packaged copy (docs/kernels-hub.md) is
# imported under a name of its own, and any number of copies register in one process.
NAMESPACE = __name__.partition(".")[0]

ATTENTION = ("attention", "ring_attention", "cross_attention")
CONVOLUTION = ("causal_conv3d", "upsampled_conv2d")
FUSED = ("norm", "gated_residual", "rope_table", "qk_norm_rope", "sampler_step", "quantize_rows")
LINEAR, ROTATE = "linear", "rotate_keys"
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)


def _runs_anywhere(device: torch.device) -> str:
    return ""


def _needs_gpu(device: torch.device) -> str:
    if device.type != "cpu":
        return ""
    return (
        "takes CUDA tensors; 'triton' takes CPU tensors under Triton's interpreter, with "
        "TRITON_INTERPRET=1 set before Python starts"
    )


def _needs_gpu_or_interpreter(device: torch.device) -> str:
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else _needs_gpu(device)


def _needs_ampere(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return (
                f"runs on GPUs of compute capability 8.0 and later; {device} has {major}.{minor}: "
                "use 'sdpa'"
            )
    return _needs_gpu(device)


def _needs_hopper(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return (
                f"runs on Hopper GPUs (compute capability 9.0); {device} has {major}.{minor}: use "
                "'triton'"
            )
    return _needs_gpu(device)


def _needs_flash_attn_4(device: torch.device) -> str:
    if device.type == "cpu":
        return "takes CUDA tensors: use 'flex'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return f"runs on Hopper and newer GPUs, not on {device}: use 'flex'"
    if not find_spec("flash_attn") or not find_spec("flash_attn.cute"):
        return "needs flash-attn 4 (flash_attn.cute), which is not installed: use 'flex'"
    return ""


def _needs_cpu(device: torch.device) -> str:
    if device.type != "cpu":
        return f"takes CPU tensors, not {device.type}"
    return f"has no kernels here: {cpp.MISSING}" if cpp.MISSING else ""


class Implementation(NamedTuple):
    """Kernels that compute some of the ops.

    ops: those it has. auto: those that "auto" takes it for, by type of device. dtypes: of tensors
    that it takes, which must have a contiguous last dimension; none if it takes all. refusal: why
    it does not run on a device, empty where it does. launchers: the module with ours, relative to
    this package. heads: their dimensions that its attention takes, None for all.
    """

    ops: tuple[str, ...]
    auto: Mapping[str, tuple[str, ...]] = {}
    dtypes: tuple[torch.dtype, ...] = ()
    refusal: Callable[[torch.device], str] = _runs_anywhere
    launchers: str = ""
    heads: range | None = None


# "auto" takes the fastest on a device: for attention on a GPU what tuned/sm_XX.json says was
# measured there. Where it says nothing, that is PyTorch's own to the few keys of text, and on a CPU
# to all. Linear layers and convolutions are PyTorch's, cuBLASLt's and cuDNN's on a GPU ("torch"),
# until ours are measured to be faster.
IMPLEMENTATIONS = {
    "triton": Implementation(
        (*ATTENTION, *FUSED, ROTATE, *CONVOLUTION, LINEAR),
        {"cuda": ("attention", "ring_attention", *FUSED, ROTATE)}, FLOATS,
        _needs_gpu_or_interpreter, ".gpu", range(1, 129),
    ),
    "gluon": Implementation(
        ATTENTION, {}, HALF, _needs_hopper, ".gpu.hopper", range(64, 129, 64)
    ),
    "cudnn": Implementation(
        ATTENTION, {}, HALF, _needs_ampere, ".gpu.cudnn", range(8, 129, 8)
    ),
    "sdpa": Implementation(ATTENTION, {"cuda": ("cross_attention",)}),
    "sdpa_flash": Implementation(
        ("attention", "cross_attention"), {}, HALF, _needs_ampere, heads=range(8, 129, 8)
    ),
    "flash": Implementation(ATTENTION, {}, HALF, _needs_gpu),
    "flex": Implementation(ATTENTION),
    "flex_flash": Implementation(ATTENTION, {}, HALF, _needs_flash_attn_4),
    "cpp": Implementation(FUSED, {"cpu": FUSED}, FLOATS, _needs_cpu, ".cpp"),
    "torch": Implementation(
        (*CONVOLUTION, LINEAR),
        {"cuda": (*CONVOLUTION, LINEAR), "cpu": CONVOLUTION, "meta": CONVOLUTION},
    ),
    "reference": Implementation((*ATTENTION, *FUSED, ROTATE, *CONVOLUTION, LINEAR)),
}  # fmt: skip
IMPLS = ("auto", *IMPLEMENTATIONS)
# Those of attention that need no other library and compile for no single size: a file of measured
# settings may rank them.
RANKED = ("triton", "gluon", "cudnn", "sdpa", "sdpa_flash")
# By op and type of device.
_AUTO = {
    (op, device): name
    for name, one in IMPLEMENTATIONS.items()
    for device, ops in one.auto.items()
    for op in ops
}
_ALWAYS_FLOAT32 = ("k_table",)
_FLOATING = frozenset({torch.float64, *FLOATS})


def choose(
    op: str,
    impl: str,
    device: torch.device,
    refused: str = "",
    without: str = "",
    /,
    **tensors: Tensor | None,
) -> str:
    """The implementation that computes `op` for these tensors: `impl` itself, or under "auto" the
    best one for the device that takes them. refused: what no kernel of this op takes of them beside
    what is said below, if there is such. without: an implementation that "auto" leaves out.

    Raises ValueError for a name that does not exist, an implementation that lacks the op, and
    tensors it cannot take: they must be dense, of floating-point numbers and on one device; kernels
    want float32 (not all), bfloat16 or float16 on a device that they run on, with a contiguous last
    dimension, and heads of at most 128. On a CPU "auto" leaves others to the reference, and all of
    them where the C++ is not built."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.device != device:
            check_device(name, t, device)
        if t.dtype not in _FLOATING:
            check_floating(name, t)
    if impl == "auto":
        impl = _AUTO.get((op, device.type), "reference")
        if impl == "cpp":
            return "reference" if _refusal(impl, device, tensors) or refused else impl
        for name in ranking(op, device) if impl != "reference" else ():
            if name != without and not _refusal(name, device, tensors):
                return name
    elif impl not in implementations(op):
        raise ValueError(f"impl={impl!r}: {op} has {', '.join(implementations(op))} (or 'auto')")
    if IMPLEMENTATIONS[impl].dtypes and (why := _refusal(impl, device, tensors) or refused):
        raise ValueError(why)
    return impl


def implementations(op: str) -> tuple[str, ...]:
    """Implementations that an op has."""
    return tuple(name for name, one in IMPLEMENTATIONS.items() if op in one.ops)


def ranking(op: str, device: torch.device) -> Sequence[str]:
    """Implementations of an op that were timed on GPUs like this one, the fastest first."""
    return _rankings(device).get(op, ())


# As `flat_rows` of layout.py.
ranking._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _rankings(device: torch.device) -> Mapping[str, Sequence[str]]:
    """The rankings that tuned/ has of such GPUs, by op; nothing of other devices. Raises ValueError
    for a file that ranks what cannot be ranked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    arch = launch.architecture(device)
    file, found = launch.TUNED / f"sm_{arch}.json", launch.ranking(arch)
    for op, names in found.items():
        can = [n for n in RANKED if op in ATTENTION and n in implementations(op)]
        if not can or not isinstance(names, list) or not all(name in can for name in names):
            must = f"a list of {', '.join(can)}" if can else f"by op, of {', '.join(ATTENTION)}"
            raise ValueError(f"{file}: impl of {op} is {names!r}: must be {must}")
    return found


def kernel(impl: str, launcher: str) -> Callable[..., Any]:
    """The launcher of an implementation of ours. Raises ValueError for another name, which a
    registered op may be called with."""
    module = IMPLEMENTATIONS[impl].launchers if impl in IMPLEMENTATIONS else ""
    home = importlib.import_module(module, __package__) if module else None
    found = getattr(home, launcher, None)
    if found is None:
        taken = ", ".join(name for name, one in IMPLEMENTATIONS.items() if one.launchers)
        raise ValueError(
            f"impl={impl!r}: a registered op takes {taken} where it has a kernel {launcher}; its "
            "function takes others"
        )
    return cast(Callable[..., Any], found)


class Op:
    """A function of tensors and, last, an implementation, registered with PyTorch as
    `torch.library.custom_op` does.

    In C++, where no gradient is recorded and nothing is traced, a call goes straight to the
    function: the way through the registration takes 10 µs, longer than a small norm."""

    def __init__(
        self, name: str, function: Callable[..., Any], mutates_args: Iterable[str] = ()
    ) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates_args)
        names = [*inspect.signature(function).parameters]
        self.mutated = [names.index(name) for name in mutates_args]
        self.register_fake = self.registered.register_fake
        self.register_autograd = self.registered.register_autograd

    def __call__(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise RuntimeError("kernels have no forward-mode derivative: impl='reference' has one")
        # Launches are recorded of meta tensors, which the registration would give to the fake.
        direct = launch.recorder is not None or (args[-1] == "cpp" and is_plain(args[0]))
        if torch.is_grad_enabled() or not direct:
            return self.registered(*args)
        out = self.function(*args)
        for i in self.mutated:
            if not args[i].is_inference():
                # As the registration does: autograd may have saved what is written over.
                torch.autograd.graph.increment_version(args[i])
        return out


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def registered(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Decorates the function of an `Op`."""
    return functools.partial(Op, f"{NAMESPACE}::{name}", mutates_args=mutates_args)


def _refusal(impl: str, device: torch.device, tensors: dict[str, Tensor | None]) -> str:
    """Reason why an implementation cannot take these tensors; empty if it takes them."""
    one = IMPLEMENTATIONS[impl]
    if why := one.refusal(device):
        return f"impl={impl!r} {why}"
    if not one.dtypes:
        return ""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in one.dtypes and name not in _ALWAYS_FLOAT32:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in one.dtypes)
            return f"{name} is {t.dtype}: impl={impl!r} takes {taken}; use impl='reference'"
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            return (
                f"{name} has stride {t.stride(-1)} in its last dimension: impl={impl!r} takes a "
                "contiguous one; call .contiguous()"
            )
    q, heads = tensors.get("q"), one.heads
    if q is not None and heads is not None and q.shape[-1] not in heads:
        taken = f"{heads[0]} to {heads[-1]}" + f" in steps of {heads.step}" * (heads.step > 1)
        return f"heads of {q.shape[-1]}: impl={impl!r} takes {taken}; use 'sdpa'"
    return ""


def cached_tensors(make: Callable[..., T]) -> Callable[..., T]:
    """Decorates a function that makes tensors out of numbers on a device, its last argument, so
    that it makes them once: under no mode, as who needs them later may be in none, and for good, as
    CUDA graphs hold their addresses. Under FakeTensorMode (torch.export) they are made anew, for
    its tensors hold no numbers. Raises ValueError where they are first needed while a CUDA graph is
    captured."""

    @functools.cache
    def cached(*args: Any) -> T:
        if args[-1].type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph is captured and the GPU lacks a table that this call needs: make the "
                "same call once before the capture"
            )
        with _disable_current_modes(), torch.inference_mode(False):
            return make(*args)

    @functools.wraps(make)
    def call(*args: Any) -> T:
        return make(*args) if detect_fake_mode() else cached(*args)

    return call


def derivatives(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], *grads: Tensor | None
) -> list[Any]:
    """The gradients of function(*inputs), a tensor or a tuple of them, that have gradients
    themselves: for a backward pass under create_graph=True, as kernels have first derivatives only.
    `grads` are those of its outputs. None where an input, or the gradient of an output, is."""
    # Views: one input may have been computed from another, and only the way to here counts.
    views = [
        t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
        for t in inputs
    ]
    outs = function(*views)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    given = [(out, grad) for out, grad in zip(outs, grads, strict=True) if grad is not None]
    ends, upstream = zip(*given, strict=True)
    wanted = [t for t in views if t is not None]
    found = iter(torch.autograd.grad(ends, wanted, upstream, create_graph=True))
    return [None if t is None else next(found) for t in views]


def contiguous_like(tensor: Tensor, *_: Any) -> Tensor:
    """An empty contiguous tensor of the same shape, dtype and device: what an op returns for it."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def dense(grad_BLC: Tensor) -> Tensor:
    """Gradient with a contiguous last dimension; autograd may give it expanded or transposed."""
    check_shape("the gradient", grad_BLC, ("B", "L", "C"))
    if grad_BLC.shape[-1] == 1 or grad_BLC.stride(-1) == 1:
        return grad_BLC
    return grad_BLC.contiguous()
