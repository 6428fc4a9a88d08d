"""Cases of `python -m bench kernels` for attention, in streaming and in training, at the shapes
of Wan2.1: the cases, who takes part, and what is right.

Shapes: B batch (1 here), L queries, S keys, H heads, D head dim; tensors are [B, L or S, H, D].
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sfkernels as sf
from bench.harness import EAGER
from bench.timing import Implementation
from sfkernels import cases, dispatch, launch, reference, testing
from sfkernels.bounds import LOOPS
from sfkernels.cases import CHUNK, AttentionCase, Heads
from sfkernels.layout import transpose
from sfkernels.testing import Op, close_as_eager, interpreted

Tensors = Sequence[Tensor]
SLICE = 1024  # queries at once in float64
# Operations beyond which unfused attention is left out: the scores of more do not fit in memory.
MATH = 2e12

SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH_ATTN = ("flash_attn_interface", "flash_attn")  # version 3; 2 and 4


@dataclass(frozen=True)
class Sizes:
    """rings, clips: latent frames of each, the most telling first. window, sink: of a layout whose
    window moves. wide: heads of the larger model. text: keys of a prompt. queries, keys, some: of
    few queries to a long video and its heads, the sizes at which NVIDIA times cuDNN
    (cudnn-frontend, benchmark/attention_inference, auto_regressive_dit)."""

    of: Heads
    wide: int = 40
    text: int = 512
    rings: tuple[int, ...] = (21, 9, 3, 1)
    clips: tuple[int, ...] = (21, 9, 3)
    window: int = 9
    sink: int = 3
    queries: tuple[int, ...] = (985, 2048, 4096, 8192)
    keys: int = 62_208
    some: int = 9


FULL = Sizes(Heads())
TINY = Sizes(Heads(8, 1, 16, torch.float32), 2, 7, (6, 3, 1), (6, 3), 5, 1, (5, 20), 50, 2)


def rows(sizes: Sizes) -> Iterator[tuple[AttentionCase, bool]]:
    """The cases, the most telling first, and whether FlexAttention compiles for each."""
    of = sizes.of
    ring, *rings = sizes.rings
    clip, *clips = sizes.clips
    yield cases.ring_attention(of, CHUNK, ring), True
    yield cases.ring_attention(of, 1, ring), False
    yield from _training(of, clip)
    for backward in (False, True):
        yield cases.self_forcing(of, clip, backward), True
    for frames in (CHUNK, 1):
        case = cases.ring_attention(replace(of, heads=sizes.wide), frames, ring)
        yield replace(case, size=f"{case.size}, {sizes.wide} heads"), False
    for queries in sizes.queries:
        some = replace(of, heads=sizes.some)
        yield cases.cross_attention(some, queries, sizes.keys, "video"), False
    yield cases.cross_attention(of, CHUNK * of.frame_tokens, sizes.text), False
    yield cases.ring_attention(of, CHUNK, ring, valid=CHUNK * -(-ring // (2 * CHUNK))), False
    yield from _training(of, clip, window=sizes.window, sink=sizes.sink)
    for frames in (CHUNK, 1):
        for length in rings:
            if length >= frames:  # a chunk is in the ring it attends to
                yield cases.ring_attention(of, frames, length), False
    for length in clips:
        yield from _training(of, length, compiled=False)


def _training(
    of: Heads, frames: int, compiled: bool = True, window: int | None = None, sink: int = 0
) -> Iterator[tuple[AttentionCase, bool]]:
    for forcing in (False, True):
        for backward in (False, True):
            yield cases.training(of, frames, backward, forcing, window, sink), compiled


def implementations(
    case: AttentionCase, device: torch.device, compiled: bool
) -> list[Implementation]:
    """Ours first. compiled: FlexAttention takes part."""
    cuda = device.type == "cuda"
    found = [Implementation("triton", case.by("triton"))] if cuda or interpreted() else []
    if not cuda:
        eager = Implementation(EAGER, case.by("reference"))
        return [*found, eager, Implementation("sdpa", plainly(case, "sdpa"))]
    if launch.is_hopper(device):
        found.append(Implementation("gluon", case.by("gluon")))
        if case.backward and case.layout is not None:  # without a prefix, there are two ways
            same_bits = case.by("gluon", deterministic=True)
            found.append(Implementation("gluon deterministic", same_bits))
    backends = dict(SDPA)
    if case.flops <= MATH and case.layout is None and not case.backward:
        backends["sdpa math"] = SDPBackend.MATH
    for name, backend in backends.items():
        context = functools.partial(sdpa_kernel, backend)
        found.append(Implementation(name, plainly(case, "sdpa"), context=context))
    if "ring" in case.size:  # the length read on the device, as ours
        found.append(Implementation("sdpa varlen", case.by("sdpa")))
        if "valid" not in case.size:
            found.append(Implementation("sdpa cudnn split", case.by("cudnn")))
    if any(importlib.util.find_spec(name) for name in FLASH_ATTN):
        found.append(Implementation("flash-attn", plainly(case, "flash")))
    if compiled:
        found.append(Implementation("flex", plainly(case, "flex")))
        if not dispatch.IMPLEMENTATIONS["flex_flash"].refusal(device):
            found.append(Implementation("flex flash", plainly(case, "flex_flash")))
    return found


def ceiling(case: AttentionCase, programs: int) -> float:
    """TFLOP/s that "gluon" can reach on an H200 at most, on so many multiprocessors: what its main
    loop leaves (`sfkernels.bounds.LOOPS`), while all of them are busy, of tiles that are whole."""
    # Which not every Triton can import.
    from sfkernels.gpu.hopper.work import shared_out, steps_of

    heads, head_dim = case.make(torch.device("meta"))[0].shape[2:]
    kernel = "hopper_bwd" if case.backward else "hopper_fwd"
    tile = launch.tile(kernel, torch.device("meta"), 2 * head_dim)
    keys = max(end for _, spans in case.rows for _, end in spans)
    rows = transpose(case.rows, keys) if case.backward else case.rows
    lengths = [
        steps_of(spans, tile.streamed)
        for (start, end), spans in rows
        for _ in range(start, end, tile.stationary)
    ]
    shares = shared_out(sorted(lengths, reverse=True), heads, programs, whole=case.backward)
    steps = max(sum(piece.hi - piece.lo for piece in share) for share in shares)
    products = 10 if case.backward else 4
    done = products * head_dim * tile.stationary * tile.streamed * steps * programs
    return LOOPS[kernel, head_dim].ceiling * case.flops / done


def plainly(case: AttentionCase, impl: str) -> Op:
    """The attention on its plain q, k and v: under a layout by chunks, on slices of the keys."""

    def run(*tensors: Tensor) -> list[Tensor]:
        q, k, v = case.plain(*tensors)
        if case.layout is None:
            return [sf.cross_attention(q, k, v, impl=impl)]
        return [sf.block_causal_attention(q, k, v, case.layout, impl=impl)]

    return run


class Judge:
    """Check that raises AssertionError for an op that is not right: one head, drawn at random, must
    obey the rule of sfkernels.testing at every token, and all heads must be as close to eager
    PyTorch as two that obey it. float64 of all heads would cost more than what is timed.

    upstream: the gradients of its outputs, of a backward pass."""

    def __init__(self, case: AttentionCase, inputs: Tensors) -> None:
        self.case, self.inputs = case, inputs
        self.upstream = [torch.randn_like(inputs[0])] if case.backward else []
        self.head = int(torch.randint(inputs[0].shape[2], ()))
        self.want = exact(case, inputs, self.upstream, self.head)
        self.eager = self.results(plainly(case, "reference"))

    def __call__(self, op: Op, slack: float = 1.0) -> None:
        compare(self.results(op), self.eager, self.want, self.head, slack)

    def results(self, op: Op) -> list[Tensor]:
        """o, or the gradients of q and of the keys and values that take one."""
        with torch.set_grad_enabled(self.case.backward):
            first, *rest = testing.results(op, self.inputs, self.upstream)
        if not self.case.backward:
            return [first]
        dq, *others = rest
        return [dq, *(t[:, -self.case.own :] for t in others)]


def exact(case: AttentionCase, inputs: Tensors, upstream: Tensors, head: int) -> list[Tensor]:
    """The results of one head, in float64, by slices of the queries, which saves memory."""
    q, k, v = (t[:, :, head : head + 1].double() for t in case.plain(*inputs))
    out, dk, dv = (torch.zeros_like(t) for t in (q, k, v))  # out: o or dq
    for (start, end), spans in case.rows:
        seen = torch.cat([torch.arange(lo, hi, device=q.device) for lo, hi in spans])
        for lo in range(start, end, SLICE):
            hi = min(lo + SLICE, end)
            leaves = (q[:, lo:hi].detach(), k[:, seen], v[:, seen])
            for leaf in leaves:
                leaf.requires_grad_(case.backward)
            o = reference.attention(*leaves, scale=q.shape[-1] ** -0.5)
            if not case.backward:
                out[:, lo:hi] = o
                continue
            do = upstream[0][:, lo:hi, head : head + 1].double()
            out[:, lo:hi], dk_part, dv_part = torch.autograd.grad(o, leaves, do)
            dk.index_add_(1, seen, dk_part)
            dv.index_add_(1, seen, dv_part)
    return [out, dk[:, -case.own :], dv[:, -case.own :]] if case.backward else [out]


def compare(got: Tensors, eager: Tensors, want: Tensors, head: int, slack: float = 1.0) -> None:
    """See `Judge`. Raises AssertionError."""
    names = ("o",) if len(got) == 1 else ("dq", "dk", "dv")
    for name, ours, theirs, exactly in zip(names, got, eager, want, strict=True):
        mine, eager_s = (t[:, :, head : head + 1] for t in (ours, theirs))
        close_as_eager(f"{name} of head {head}", mine, eager_s, exactly, slack=slack)
        eager_error = float((eager_s - exactly).abs().max())
        eps = torch.finfo(theirs.dtype).eps
        allowed = 4 * slack * (eager_error + eps * float(exactly.abs().max()))
        worst = float((ours.float() - theirs.float()).abs().max())
        assert worst <= allowed, (  # NaN fails too
            f"{name} is {worst:.2e} from eager PyTorch in some head, allowed {allowed:.2e}"
        )
