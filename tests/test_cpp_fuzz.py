"""Random calls of every C++ op, past the functions that check their arguments: one that fits gives
what the reference gives, any other is refused in a sentence, and no other memory changes.

FUZZ_CALLS: how many calls of each op."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import cpp, reference
from sfkernels.testing import nan_filled

pytestmark = pytest.mark.skipif(bool(cpp.MISSING), reason=cpp.MISSING)

CALLS = int(os.environ.get("FUZZ_CALLS", "150"))
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OTHERS = [
    *(torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.uint8),
    *(torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64),
]
INTEGERS = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]
NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e-30, 0.5, 1e30, 1e300]
# Called with unpacked tensors, which mypy takes for arguments without end.
exact: Any = reference
GUARD = 64  # elements around every tensor


class Placed:
    """A tensor inside a larger buffer, of which the rest must stay as it is."""

    def __init__(self, rng: random.Random, shape: Any, dtype: torch.dtype, dense: int) -> None:
        """dense: how many of the last dimensions lie side by side."""
        order = [*range(len(shape) - dense)]
        rng.shuffle(order)
        strides, reach = [0] * len(shape), 1
        for d in [*reversed(range(len(order), len(shape))), *order]:
            gap = rng.choice((1, 1, 2)) * (reach > 1) if d < len(order) else 0
            strides[d] = 0 if d < len(order) and rng.random() < 0.1 else reach + gap
            reach = max(reach, strides[d] * max(shape[d], 1))
        self.size, self.strides = (*shape,), (*strides,)
        count = 2 * GUARD + reach
        values = torch.randn(count) if dtype.is_floating_point else torch.randint(0, 4, (count,))
        self.buffer = values.to(dtype)
        self.tensor = self.view(self.buffer)

    def view(self, buffer: Tensor) -> Tensor:
        return buffer.as_strided(self.size, self.strides, GUARD)

    def keep(self) -> None:
        self.kept = self.buffer.clone()

    def changed(self, may_write: bool) -> bool:
        """Whether something changed that may not."""
        before, after = (t.view(torch.uint8).clone() for t in (self.kept, self.buffer))
        if may_write:
            for buffer in (before, after):
                self.view(buffer.view(self.buffer.dtype)).zero_()
        return not torch.equal(before, after)


Make = Callable[..., Placed]


def norm(rng: random.Random, make: Make, backward: bool = False) -> list[Any]:
    batch, frames = rng.choice((1, 2)), rng.choice((1, 2, 3))
    tokens, channels = frames * rng.randint(1, 40), rng.choice((1, 2, 7, 16, 33, 70))
    dtype = rng.choice(FLOATS)
    centred, silu = rng.choice(((True, False), (False, False), (False, True)))
    residual = rng.random() < 0.5 and (centred or silu)

    def rows(length: int = tokens) -> Placed:
        return make((batch, length, channels), dtype)

    def modulation() -> Placed:
        shape = rng.choice((1, batch)), rng.choice((1, frames)), channels
        return make(shape, rng.choice(FLOATS))

    gate = modulation() if residual and centred and rng.random() < 0.5 else None
    modulations = gate, modulation(), modulation() if centred else None
    plus_one = rng.random() < 0.5
    if backward:
        stats = make((batch, tokens, 2), torch.float32, 3)
        y = rows() if residual else None
        tensors = rows() if residual else None, rows(), rows(), y, *modulations, stats
        return [*tensors, centred, plus_one, silu]
    bias = make((channels,), rng.choice(FLOATS)) if silu and rng.random() < 0.5 else None
    before = rows(rng.randint(1, 4)) if rng.random() < 0.3 else None
    head = rows(), rows() if residual else None, *modulations
    return [*head, 1e-3, centred, plus_one, silu, bias, before]


def norm_bwd(rng: random.Random, make: Make) -> list[Any]:
    return norm(rng, make, backward=True)


def norm_reference(x: Tensor, y: Any, gate: Any, scale: Any, shift: Any, eps: float, centred: bool,
                   plus_one: bool, silu: bool = False, bias: Any = None,
                   before: Any = None) -> tuple[Any, ...]:  # fmt: skip
    def wide(modulation: Any) -> Any:
        frames = 1 if modulation is None else modulation.shape[1]
        by_token = (tokens // frames) if frames > 1 else 1
        return None if modulation is None else modulation.double().repeat_interleave(by_token, 1)

    tokens = x.shape[1]
    into = x.double() + (0 if bias is None else bias.double())
    if y is not None:
        into = (into + y.double() * (1 if gate is None else wide(gate))).to(x.dtype).double()
    mean = into.mean(-1, keepdim=True) if centred else 0
    normed = (into - mean) * ((into - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    out = normed * (wide(scale) + plus_one) + (wide(shift) if centred else 0)
    out = torch.nn.functional.silu(out) if silu else out
    out = out if before is None else torch.cat((before.double(), out), 1)
    return None if y is None else into, out, None


def rope(rng: random.Random, make: Make, ring: bool | None = None) -> list[Any]:
    batch, frames, per_frame = rng.choice((1, 2)), rng.choice((1, 2, 3)), rng.randint(1, 9)
    heads, dim, dtype = rng.choice((1, 2, 3)), rng.choice((2, 6, 16, 34)), rng.choice(FLOATS)
    tokens, channels = frames * per_frame, heads * dim
    qkv: list[Any] = [make((batch, tokens, 3 * channels), dtype), None, None]
    if rng.random() < 0.5:
        qkv = [make((batch, tokens, channels), dtype) for _ in range(3)]
    size = rng.choice((channels, dim, 0))
    weights = [make((size,), rng.choice(FLOATS)) if size else None for _ in range(2)]
    each = rng.random() < 0.3
    table = make((*(batch,) * each, tokens, dim // 2, 2), torch.float32, 3)
    if ring is None:
        norms = 0 if not size else 1 if size == channels else heads
        rstd = make((batch, tokens, 2 * norms), torch.float32, 3)
        grads = [make((batch, tokens, heads, dim), dtype, 2) for _ in range(3)]
        return [*grads, *qkv, *weights, table, rstd]
    if not ring:
        return [*qkv, *weights, table, None, None, None, 1e-3, rng.random() < 0.5]
    slots = frames + rng.randint(0, 3)
    rings = [make((batch, slots * per_frame, heads, dim), dtype, 2) for _ in range(2)]
    slot = make((*(batch,) * each, frames), rng.choice((torch.int32, torch.int64)), 0)
    if all(slot.tensor.stride()):
        orders = torch.stack([torch.randperm(slots)[:frames] for _ in range(batch)])
        slot.tensor.copy_(orders if each else orders[0])
    return [*qkv, *weights, table, *rings, slot, 1e-3, rng.random() < 0.5]


def residual(rng: random.Random, make: Make) -> list[Any]:
    batch, frames = rng.choice((1, 2)), rng.choice((1, 2, 3))
    shape = batch, frames * rng.randint(1, 40), rng.choice((1, 2, 7, 16, 33, 70))
    dtype = rng.choice(FLOATS)
    gate = make((rng.choice((1, batch)), frames, shape[2]), rng.choice(FLOATS))
    return [make(shape, dtype), make(shape, dtype), gate]


def residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor]:
    return (exact.residual(x.double(), y.double(), gate.double()),)


def rope_fwd(rng: random.Random, make: Make) -> list[Any]:
    return rope(rng, make, ring=False)


def append(rng: random.Random, make: Make) -> list[Any]:
    return rope(rng, make, ring=True)


def rope_bwd(rng: random.Random, make: Make) -> list[Any]:
    return rope(rng, make)


def rope_reference(qkv: Tensor, k: Any, v: Any, q_weight: Any, k_weight: Any, table: Tensor,
                   k_ring: Any, v_ring: Any, slot: Any, eps: float,
                   rotate_k: bool = True) -> tuple[Any, ...]:  # fmt: skip
    given = qkv, k, v, q_weight, k_weight, table
    wide = [None if t is None else t.double() for t in given]
    if slot is None:
        channels = qkv.shape[2] // (3 if k is None else 1)
        new = torch.zeros(*qkv.shape[:2], channels).unflatten(-1, (-1, 2 * table.shape[-2]))
        k_ring = v_ring = new
        slot = torch.zeros(1, dtype=torch.int64)
    rings = k_ring.double().contiguous(), v_ring.double().contiguous()
    if not qkv.numel():
        return rings[0], *rings
    return exact.qk_norm_rope_append(*wide, *rings, slot, eps, rotate_k), *rings


def rope_table(rng: random.Random, make: Make) -> list[Any]:
    frame = make((rng.randint(1, 5),), rng.choice((torch.int32, torch.int64)), 0)
    return [frame, [rng.randint(1, 5), rng.randint(1, 5)], 2 * rng.randint(1, 20), 1e4]


def table_reference(frame: Tensor, grid: Any, head_dim: int, theta: float) -> tuple[Tensor]:
    return (reference.rope_table(frame, grid, head_dim, theta),)


def quantize_rows(rng: random.Random, make: Make) -> list[Any]:
    shape = rng.randint(1, 3), rng.randint(1, 9), rng.choice((1, 5, 16, 40, 300))
    into = rng.choice((torch.int8, torch.float8_e4m3fn))
    return [make(shape, rng.choice(FLOATS)), into]


def sampler_step(rng: random.Random, make: Make) -> list[Any]:
    shape = [rng.randint(1, 3), rng.randint(1, 3), *rng.choice(((), (5,), (3, 7), (300,)))]
    euler, drawn = rng.random() < 0.3, rng.random() < 0.5
    last = not euler and rng.random() < 0.3

    def tensor() -> Placed:
        return make(shape, rng.choice(FLOATS), rng.choice((1, len(shape) - 2)))

    def sigma() -> Placed:
        return make(shape[: rng.randint(0, 2)], rng.choice(FLOATS), 0)

    noises: list[Any] = [None, None, None]
    if not (last or euler):
        seed = make(shape[:1], torch.int64, 0), make(shape[1:2], torch.int32, 0)
        noises = [None, *seed] if drawn else [tensor(), None, None]
    uncond = tensor() if rng.random() < 0.5 else None
    head = tensor(), tensor(), uncond, sigma(), None if last else sigma()
    return [*head, *noises, 1, 1.5, euler]


def step_reference(x: Tensor, flow: Tensor, uncond: Any, sigma: Tensor, following: Any, noise: Any,
                   seed: Any, frame: Any, draw: int, guidance: float,
                   euler: bool) -> tuple[Any, ...]:  # fmt: skip
    wide = [None if t is None else t.double() for t in (x, flow, sigma, following, noise, uncond)]
    if euler:
        return None, exact.euler_step(*wide[:4], wide[5], guidance)
    if seed is not None:
        wide[4] = reference.normal(seed, frame, draw, x.shape).double()
    x0, after = exact.sampler_step(*wide, guidance)
    return x0, None if following is None else after


def normal(rng: random.Random, make: Make) -> list[Any]:
    shape = [rng.randint(1, 3), rng.randint(1, 3), *rng.choice(((), (5,), (3, 7), (300,)))]
    frame = make(shape[1:2], rng.choice((torch.int32, torch.int64)), 0)
    return [make(shape[:1], torch.int64, 0), frame, rng.randint(0, 9), shape]


def normal_reference(*args: Any) -> tuple[Tensor]:
    return (reference.normal(*args),)


def dmd_gradient(rng: random.Random, make: Make) -> list[Any]:
    shape = [rng.randint(1, 3), *rng.choice(((5,), (3, 7), (2, 300)))]
    return [make(shape, rng.choice(FLOATS), rng.choice((1, len(shape) - 1))) for _ in range(3)]


def gradient_reference(*tensors: Tensor) -> tuple[Tensor]:
    return (reference.dmd_gradient(*(t.double() for t in tensors)),)


# Arguments that fit, and what comes of them in float64; None where that depends on what no caller
# would give, such as statistics of other rows.
Reference = Callable[..., tuple[Any, ...]] | None
OPS: dict[str, list[tuple[Callable[..., list[Any]], Reference]]] = {
    "norm_fwd": [(norm, norm_reference)],
    "norm_bwd": [(norm_bwd, None)],
    "gated_residual_fwd": [(residual, residual_reference)],
    "gated_residual_bwd": [(residual, None)],
    "qk_norm_rope_fwd": [(rope_fwd, rope_reference), (append, rope_reference)],
    "qk_norm_rope_bwd": [(rope_bwd, None)],
    "rope_table": [(rope_table, table_reference)],
    "quantize_rows": [(quantize_rows, reference.quantize_rows)],
    "sampler_step": [(sampler_step, step_reference)],
    "normal": [(normal, normal_reference)],
    "dmd_gradient": [(dmd_gradient, gradient_reference)],
}
RINGS = {"qk_norm_rope_fwd": (6, 7)}
# The registered ops, which come in front of them: by name the op behind and which of its arguments
# they take.
REGISTERED: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    "norm": ("norm_fwd", lambda *a: (a[0], *a[3:8])),
    "residual_norm": ("norm_fwd", lambda *a: (*a[:6], a[7])),
    "rms_norm_silu": ("norm_fwd", lambda *a: (a[0], a[9], a[1], a[9], a[10], a[5])),
    "norm_bwd": ("norm_bwd", lambda *a: (*a[1:3], *a[5:10])),
    "residual_norm_bwd": ("norm_bwd", lambda *a: (*a[:8], a[9])),
    "rms_norm_silu_bwd": ("norm_bwd", lambda *a: (*a[:3], *a[6:8])),
    "gated_residual": ("gated_residual_fwd", lambda *a: a),
    "gated_residual_bwd": ("gated_residual_bwd", lambda *a: a),
    "qk_norm_rope": ("qk_norm_rope_fwd", lambda *a: (*a[:6], a[9])),
    "qk_norm_rope_append": ("qk_norm_rope_fwd", lambda *a: a),
    "qk_norm_rope_bwd": ("qk_norm_rope_bwd", lambda *a: a),
    "rope_table": ("rope_table", lambda frame, grid, *a: (frame, *(grid * 2)[:2], *a)),
    "quantize_rows": ("quantize_rows", lambda *a: a),
    "sampler_step": ("sampler_step", lambda *a: a[:10]),
    "euler_step": ("sampler_step", lambda *a: (*a[:5], a[9])),
    "normal": ("normal", lambda *a: a),
    "dmd_gradient": ("dmd_gradient", lambda *a: a),
}


def spoilt(rng: random.Random, value: Any, others: list[Any]) -> Any:
    """Something else in place of an argument; it may still fit."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, torch.dtype):
        return rng.choice([*FLOATS, *OTHERS])
    if isinstance(value, list):
        sizes = [n for n in INTEGERS if n != 2**31 - 1]  # which is no error, but gigabytes
        return [rng.choice(sizes) if rng.random() < 0.4 else n for n in value][rng.randint(0, 1) :]
    others = [one for one in others if isinstance(one, Placed)] or [None]
    if value is None:
        return rng.choice(others)
    shape, dtype = [*value.tensor.shape], value.tensor.dtype
    kind = rng.randrange(7)
    if kind == 0:
        return None
    if kind == 1:
        return rng.choice(others)
    if kind == 2:
        return Placed(rng, shape, rng.choice([*FLOATS, *OTHERS]), 1)
    if kind == 3 and shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 5, 64))
    if kind == 4:
        shape = shape[1:] if rng.random() < 0.5 else [1, *shape]
    if kind == 5 and not dtype.is_floating_point:
        value.buffer.copy_(torch.tensor(rng.choice(INTEGERS)).to(dtype))
        return value
    return Placed(rng, shape, dtype, rng.randint(0, len(shape)))


def written_to(out: Tensor) -> bool:
    """Uninitialised memory is NaN; an infinity may be right."""
    return not out.is_floating_point() or not bool(out.float().isnan().any())


def close(got: Tensor, want: Tensor) -> bool:
    if got.dtype == torch.int8 or got.dtype == torch.float8_e4m3fn:
        return torch.equal(got.view(torch.int8), want.view(torch.int8))
    kind = torch.finfo(got.dtype)
    want = want.clamp(kind.min, kind.max)
    tolerance = 200 * kind.eps * (1 + float(want.abs().max() if want.numel() else 0))
    got = got.double().clamp(kind.min, kind.max)  # an infinity, where that is right
    return got.shape == want.shape and bool(((got - want).abs() <= tolerance).all())


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("name", OPS)
def test_no_call_of_cpp_goes_wrong(name: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    forms = itertools.cycle(OPS[name])
    op, refused = getattr(cpp, name), 0
    with torch.no_grad(), nan_filled():
        for _ in range(CALLS):
            refused += not fits(rng, op, *next(forms), RINGS.get(name, ()))
    assert 0 < refused < CALLS


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("name", REGISTERED)
def test_no_call_of_a_registered_op_goes_wrong(name: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    behind, taken = REGISTERED[name]
    forms = itertools.cycle(OPS[behind])
    registered = getattr(torch.ops.sfkernels, name).default

    def op(*args: Any) -> Any:
        return registered(*taken(*args), "cpp")

    with torch.no_grad(), nan_filled():
        for _ in range(CALLS // 2):
            fits(rng, op, next(forms)[0], None, RINGS.get(behind, ()))


def fits(
    rng: random.Random,
    op: Callable[..., Any],
    form: Callable[..., list[Any]],
    expected: Reference,
    rings: tuple[int, ...],
) -> bool:
    """Calls an op once. Returns whether it took what it was given."""

    def make(shape: Any, dtype: torch.dtype, dense: int = 1) -> Placed:
        return Placed(rng, shape, dtype, dense)

    args = form(rng, make)
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
        i = rng.randrange(len(args))
        args[i] = spoilt(rng, args[i], args)
    placed = [a for a in args if isinstance(a, Placed)]
    for one in placed:
        one.keep()
    tensors = [a.tensor if isinstance(a, Placed) else a for a in args]
    was = [t.clone() if isinstance(t, Tensor) else t for t in tensors]
    written = [args[i] for i in rings if args[i] is not None]
    try:
        outs = op(*tensors)
    except (ValueError, RuntimeError, TypeError) as error:
        by_pytorch = "Expected a value of type", "There were no tensor", "Overflow when unpacking"
        assert isinstance(error, ValueError) or any(s in str(error) for s in by_pytorch), error
        assert not any(one.changed(may_write=False) for one in placed), error
        return False
    assert not any(one.changed(may_write=one in written) for one in placed), args
    outs = (outs,) if isinstance(outs, Tensor) else outs
    if written:
        outs = outs[0], *(one.tensor for one in written)
    for out, want in zip_known(outs, expected(*was) if expected else ()):
        assert written_to(out) if want is None else close(out, want), (was, out, want)
    return True


def zip_known(outs: Any, wanted: Any) -> Iterator[tuple[Tensor, Any]]:
    for out, want in itertools.zip_longest(outs, wanted):
        if out is not None:
            yield out, want
