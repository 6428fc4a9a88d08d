"""Attention for `python -m bench kernels`: what a case is, who takes part, and what is right.

Shapes: B batch (1 here), L queries, S keys, H heads, D head dim; tensors are [B, L or S, H, D].
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sfkernels as sf
from bench import contest
from bench.contest import Inputs, Op, interpreted, sequence
from bench.timing import Contestant
from sfkernels import reference
from sfkernels.layout import Row
from sfkernels.testing import close_as_eager

COMPILE_SECONDS = 60.0  # what compiling FlexAttention for a case may take
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
class Case:
    """new: new tensors on a device. ours: the op on them, as its user calls it. plain: the q, k
    and v of the same attention for contestants that know no ring and no prefix: each row of `rows`
    sees its spans of these keys, all of them where there is no `layout`. own: keys, the last ones,
    that take a gradient. compiled: FlexAttention takes part."""

    name: str
    flops: int
    nbytes: int
    rows: tuple[Row, ...]
    own: int
    new: Callable[[torch.device], list[Tensor]]
    ours: Callable[..., Tensor]
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]]
    layout: sf.BlockLayout | None = None
    backward: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"attention, {self.name}" + ", backward" * self.backward

    @property
    def compiler(self) -> tuple[str, float] | None:
        return ("flex", COMPILE_SECONDS) if self.compiled else None

    def make(self, device: torch.device) -> list[Tensor]:
        return self.new(device)

    def contestants(self, device: torch.device, compiled: bool) -> list[Contestant]:
        found: list[Contestant] = []

        def enter(name: str, op: Callable[..., Any], around: Any = contextlib.nullcontext) -> None:
            found.append(Contestant(name, functools.partial(sequence, op), None, around))

        cuda = device.type == "cuda"
        if cuda or interpreted():
            enter("triton", functools.partial(self.ours, impl="triton"))
        if not cuda:
            enter(contest.EAGER, functools.partial(self.ours, impl="reference"))
            enter("sdpa", functools.partial(self.plainly, "sdpa"))
            return found
        if torch.cuda.get_device_capability(device)[0] == 9:
            enter("gluon", functools.partial(self.ours, impl="gluon"))
        backends = dict(SDPA)
        if self.flops <= MATH and self.layout is None and not self.backward:
            backends["sdpa math"] = SDPBackend.MATH
        for name, backend in backends.items():
            around = functools.partial(sdpa_kernel, backend)
            enter(name, functools.partial(self.plainly, "sdpa"), around)
        if self.ours is sf.ring_attention:  # the length read on the device, as ours
            enter("sdpa varlen", functools.partial(self.ours, impl="sdpa"))
        if any(importlib.util.find_spec(name) for name in FLASH_ATTN):
            enter("flash-attn", functools.partial(self.plainly, "flash"))
        if compiled:
            enter("flex", self.flex(device))
        return found

    def plainly(self, impl: str, *tensors: Tensor) -> Tensor:
        """The attention on its plain q, k and v: under a layout one call for each chunk, on slices
        of the keys."""
        q, k, v = self.plain(*tensors)
        if self.layout is None:
            return sf.cross_attention(q, k, v, impl=impl)
        return sf.block_causal_attention(q, k, v, self.layout, impl=impl)

    def flex(self, device: torch.device) -> Callable[..., Tensor]:
        attend = flex_attention(self.layout, device)

        def run(*tensors: Tensor) -> Tensor:
            return attend(*self.plain(*tensors))

        return run

    def upstream(self, inputs: Inputs) -> list[Tensor]:
        return [torch.randn_like(inputs[0])]

    def results(self, op: Op, inputs: Inputs, upstream: Inputs) -> list[Tensor]:
        """o, or the gradients of q and of the keys and values that take one."""
        first, *rest = contest.gradients_or_outputs(op, inputs, upstream)
        return [first, *(t[:, -self.own :] for t in rest)]

    def judge(self, inputs: Inputs, upstream: Inputs) -> Callable[..., None]:
        """One head, drawn at random, obeys the rule of parity.py at every token, and all heads are
        as close to eager PyTorch as two that obey it: float64 of all heads would cost more than
        what is timed."""
        head = int(torch.randint(inputs[0].shape[2], ()))
        want = self.exact(inputs, upstream, head)
        by_reference = functools.partial(sequence, functools.partial(self.plainly, "reference"))
        eager = self.results(by_reference, inputs, upstream)
        return functools.partial(check, eager=eager, want=want, head=head)

    def exact(self, inputs: Inputs, upstream: Inputs, head: int) -> list[Tensor]:
        """The results of one head, in float64, by slices of the queries: the pattern at full size
        in a fraction of its memory."""
        q, k, v = (t[:, :, head : head + 1].double() for t in self.plain(*inputs))
        out, dk, dv = (torch.zeros_like(t) for t in (q, k, v))  # out: o or dq
        for (start, end), spans in self.rows:
            seen = torch.cat([torch.arange(lo, hi, device=q.device) for lo, hi in spans])
            for lo in range(start, end, SLICE):
                hi = min(lo + SLICE, end)
                leaves = (q[:, lo:hi].detach(), k[:, seen], v[:, seen])
                for leaf in leaves:
                    leaf.requires_grad_(self.backward)
                o = reference.attention(*leaves, scale=q.shape[-1] ** -0.5)
                if not self.backward:
                    out[:, lo:hi] = o
                    continue
                do = upstream[0][:, lo:hi, head : head + 1].double()
                out[:, lo:hi], dk_part, dv_part = torch.autograd.grad(o, leaves, do)
                dk.index_add_(1, seen, dk_part)
                dv.index_add_(1, seen, dv_part)
        return [out, dk[:, -self.own :], dv[:, -self.own :]] if self.backward else [out]


def check(got: Inputs, eager: Inputs, want: Inputs, head: int, slack: float = 1.0) -> None:
    """See `Case.judge`. Raises AssertionError."""
    one = slice(head, head + 1)
    names = ("o",) if len(got) == 1 else ("dq", "dk", "dv")
    for name, ours, theirs, exactly in zip(names, got, eager, want, strict=True):
        one_of = ours[:, :, one], theirs[:, :, one], exactly
        close_as_eager(f"{name} of head {head}", *one_of, slack=slack)
        eager_error = float((theirs[:, :, one] - exactly).abs().max())
        eps = torch.finfo(theirs.dtype).eps
        allowed = 4 * slack * (eager_error + eps * float(exactly.abs().max()))
        worst = float((ours.float() - theirs.float()).abs().max())
        assert worst <= allowed, (  # NaN fails too
            f"{name} is {worst:.2e} from eager PyTorch in some head, allowed {allowed:.2e}"
        )


def flex_attention(
    layout: sf.BlockLayout | None, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention of q, k, v [B, L or S, H, D] for this layout (None: all sees all), as fast as
    it tunes itself; on a CPU uncompiled. It masks only those blocks that are seen in part."""
    from torch.nn.attention import flex_attention as flex

    attend: Callable[..., Any] = flex.flex_attention
    make_mask: Callable[..., Any] = flex.create_block_mask
    if device.type == "cuda":
        torch._dynamo.reset()  # one entry for each pattern, not a growing list of guards
        attend = torch.compile(attend, mode="max-autotune-no-cudagraphs", dynamic=False)
        make_mask = torch.compile(make_mask)  # else the whole matrix is made first
    mask = None
    if layout is not None and layout.pairs < layout.tokens**2:
        mask = make_mask(visible(layout), None, None, layout.tokens, layout.tokens, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = attend(q, k, v, block_mask=mask).transpose(1, 2)
        return out

    return run


def visible(layout: sf.BlockLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A layout of equal chunks as FlexAttention's mask_mod."""
    (size,) = set(layout.chunks)
    assert not layout.hide_first
    tokens, frames, sink = layout.frame_tokens, layout.frames, layout.sink
    newest = frames if layout.window is None else layout.window - sink

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_frame, k_frame = q // tokens, k // tokens
        q_chunk = q_frame % frames // size
        own = q_frame // size == k_frame // size
        past = (k_frame < frames) & (k_frame // size < q_chunk)
        return own | past & ((k_frame >= (q_chunk + 1) * size - newest) | (k_frame < sink))

    return mask_mod
