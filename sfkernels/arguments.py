"""Checks of arguments that every op shares. Each raises ValueError and says what would be right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)  # and no subclass, which may stand for something else
_INTEGERS = (torch.int32, torch.int64)
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
TOO_MANY = 2**31  # elements of a table or of a frame: kernels count them in 32 bits


def is_plain(tensor: Any) -> bool:
    """Tells whether it is a tensor with memory of its own, neither traced nor fake."""
    return not torch.compiler.is_compiling() and type(tensor) in _PLAIN


def numbers(tensor: Tensor) -> list[int] | None:
    """The elements of a short integer tensor; None where they are not there to be looked at without
    waiting for a GPU."""
    if is_plain(tensor) and tensor.device.type == "cpu":
        values = tensor.tolist() if tensor.dim() < 2 else tensor.flatten().tolist()
        return values if isinstance(values, list) else [values]
    return None


def check_tensor(name: str, tensor: Any) -> None:
    """Raises ValueError unless it is a tensor, dense in memory."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {_describe(tensor)}: must be a tensor")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else f"of layout {tensor.layout}"
        raise ValueError(f"{name} is {kind}: must be a dense tensor")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError unless `tensor` has `shape`, where a string stands for any size."""
    check_tensor(name, tensor)
    got = tensor.shape
    if got == shape:
        return
    fits = len(got) == len(shape)
    for size, want in zip(got, shape, strict=False):
        if not isinstance(want, str) and size != want:
            fits = False
    if not fits:
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} has shape {[*got]}: must be [{wanted}]")


def check_rotation(name: str, table: Tensor, batch: int, tokens: int, pairs: int | str) -> None:
    """Raises ValueError unless `table` is a rotation [tokens, pairs, 2], or one for each sample."""
    check_tensor(name, table)
    samples = (batch,) if table.dim() == 4 else ()
    check_shape(name, table, (*samples, tokens, pairs, 2))


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ValueError unless both tensors share a device and a dtype."""
    for what in ("device", "dtype"):
        got, want = getattr(tensor, what), getattr(like, what)
        if got != want:
            raise ValueError(f"{name} has {what} {got}: must be {want}, as {like_name}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {device}, as the others")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless `tensor` is of floating-point numbers of 16 bits or more."""
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise ValueError(
            f"{name} is {tensor.dtype}: must be floating point, of 16 bits or more, and real"
        )


def check_integers(name: str, tensor: Tensor, size: int | str, *before: int) -> None:
    """Raises ValueError unless `tensor` is an int32 or int64 [*before, size]."""
    check_shape(name, tensor, (*before, size))
    if tensor.dtype not in _INTEGERS:
        wanted = ", ".join(map(str, (*before, size)))
        raise ValueError(
            f"{name} is {tensor.dtype} {[*tensor.shape]}: must be an integer tensor [{wanted}], of "
            "int32 or int64"
        )


def check_lengths(name: str, tensor: Tensor, like_BSHD: Tensor) -> None:
    """Raises ValueError unless `tensor` is an int32 or int64 number, or one for each sample of
    `like`, on its device."""
    check_tensor(name, tensor)
    one = tensor.numel() == 1 or tensor.shape == like_BSHD.shape[:1]
    if not one or tensor.dtype not in _INTEGERS:
        raise ValueError(
            f"{name} is {tensor.dtype} {[*tensor.shape]}: must be one int32 or int64 number, or "
            f"[{like_BSHD.shape[0]}] of them"
        )
    check_device(name, tensor, like_BSHD.device)


def check_count(name: str, value: int, least: int = 1, most: float = math.inf) -> None:
    """Raises ValueError unless `value` is an integer from `least` to `most`."""
    if not is_integer(value):
        raise ValueError(f"{name}={_describe(value)}: must be an integer")
    if not least <= value <= most:
        upper = "" if most == math.inf else f" and at most {most:.0f}"
        raise ValueError(f"{name}={value}: must be at least {least}{upper}")


def is_integer(value: object) -> bool:
    """Tells whether it is an integer, or stands for one while a graph is made."""
    return isinstance(value, (int, torch.SymInt))


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless kernels can divide by `value` in float32."""
    if not (_is_number(value) and _SMALLEST <= value <= _LARGEST):
        raise ValueError(f"{name}={_describe(value)}: must be positive and finite in float32")


def check_finite(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a number that float32 can hold."""
    if not (_is_number(value) and abs(value) <= _LARGEST):
        raise ValueError(f"{name}={_describe(value)}: must be finite in float32")


def check_apart(ring_name: str, ring: Tensor, **others: Tensor) -> None:
    """Raises ValueError unless `ring` can be written, row by row, without a change to another of
    its rows or to one of `others`. Where a graph is made there is no memory to look at."""
    if not is_plain(ring):
        return
    if ring.is_neg():
        raise ValueError(f"{ring_name} is a negative view: must be memory itself")
    for stride, _, reach in _steps(ring):
        if stride < reach and ring.numel():
            raise ValueError(
                f"{ring_name} has strides {ring.stride()}: writing one of its rows changes another"
            )
    for name, other in others.items():
        if is_plain(other) and _overlap(ring, other):
            raise ValueError(f"{ring_name} and {name} share memory: must be two tensors")


def _steps(tensor: Tensor) -> list[tuple[int, int, int]]:
    """Stride and size of each dimension, the narrowest first, and how many elements those before it
    reach over."""
    steps, reach = [], 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            steps.append((stride, size, reach))
            reach += (size - 1) * stride
    return steps


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors may share memory. They do not if the elements of one lie between
    those of the other, which must have the same strides."""
    if a.device != b.device or a.is_meta or not a.numel() or not b.numel():
        return False
    steps, apart = _steps(a), b.data_ptr() - a.data_ptr()
    lengths = [
        t.itemsize * (1 + sum((size - 1) * stride for stride, size, _ in _steps(t))) for t in (a, b)
    ]
    if apart >= lengths[0] or -apart >= lengths[1]:
        return False
    if steps != _steps(b) or a.itemsize != b.itemsize or apart % a.itemsize:
        return True
    apart //= a.itemsize
    for i, (stride, _, reach) in enumerate(steps):
        regular = stride and not any(outer % stride for outer, *_ in steps[i:])
        if regular and reach <= apart % stride <= stride - reach:
            return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, (float, int, torch.SymInt, torch.SymFloat))


def _describe(value: object) -> str:
    """A value in a message: numbers and strings as they are, of others the type."""
    plain = value is None or isinstance(value, (int, float, str))
    return repr(value) if plain else f"a {type(value).__name__}"


def without_token_dim(modulation: Any) -> Any:
    """A modulation [B, F, 1, C], as the public Wan models broadcast it over tokens, as [B, F, C];
    anything else as it is."""
    if isinstance(modulation, Tensor) and modulation.dim() == 4 and modulation.shape[2] == 1:
        return modulation.squeeze(2)
    return modulation


def check_modulation(x_BLC: Tensor, **modulation: Any) -> None:
    """Raises ValueError unless x is [B, L, C] and each modulation [B or 1, frames or 1, C], where
    frames divides L; the gate alone may be None."""
    check_shape("x", x_BLC, ("B", "L", "C"))
    batch, tokens, channels = x_BLC.shape
    given = {name: m for name, m in modulation.items() if m is not None or name != "gate"}
    for name, m in given.items():
        check_tensor(name, m)
    frames = max([1, *(m.shape[1] for m in given.values() if m.dim() == 3)])
    for name, m in given.items():
        fits = (
            m.dim() == 3
            and m.shape[0] in (1, batch)
            and m.shape[1] in (1, frames)
            and tokens % frames == 0
            and m.shape[2] == channels
        )
        if not fits:
            raise ValueError(
                f"{name} has shape {[*m.shape]}: must be [1 or {batch}, frames, {channels}] with "
                f"frames 1 or the same for all, a divisor of the {tokens} tokens"
            )
