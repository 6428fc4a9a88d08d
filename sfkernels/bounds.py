"""Cases that are compiled ahead of time, with the bounds that their kernels must hold: every
launcher of sfkernels.gpu in every form that the public functions use, at the sizes of Wan2.1."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from sfkernels import cases, launch
from sfkernels.cases import CHUNK, FRAME, NORMS, Case, Heads

FEW = (80, 90)  # where forms are compiled that add little
# The frame slots that a thread looks up in a kernel that writes into a ring.
SLOTS = 4
# The mean and 1/σ of a row, stored by a forward pass and loaded by a backward pass, for each of up
# to four tiles in flight.
STATS = 8
# 1/σ of heads of a row, as many as a thread has, for each of two tiles in flight.
HEAD_STATS = 32
# The biases of the channels that a thread has, and few channels in.
BIAS = 32
# The scales of rows that a thread stores.
SCALES = 4
# The bounds of tiles and spans, and of each row of a tile in the tensor cores' layout the logarithm
# of its sum and what is subtracted from it.
LSE = 80
# The bias of the outputs of a tile, as the tensor cores lay them out.
BIAS = 32
# The sigmas, seed, frame index or partial sums that a thread of the sampler's kernels loads.
SCALARS = 6


@dataclass(frozen=True)
class MainLoop:
    """Bounds of the main loops of a kernel in Gluon, at the settings that ship: TFLOP/s that what
    binds leaves at least on an H200, of 790 (`sfkernels.machine_code`); and of a consumer's turn
    how many meetings of its warps, exchanges between threads and copies of registers at most."""

    ceiling: int
    barriers: int
    shuffles: int
    moves: int


# By kernel and head dim. Of short heads exponentials bind a forward pass, and of the fused backward
# pass shared memory does.
LOOPS = {
    ("hopper_fwd", 128): MainLoop(790, 1, 4, 4),
    ("hopper_fwd", 64): MainLoop(760, 1, 4, 4),
    ("hopper_bwd", 128): MainLoop(655, 2, 0, 8),
    ("hopper_dkdv", 128): MainLoop(790, 1, 0, 8),
    ("hopper_dkdv", 64): MainLoop(790, 1, 0, 8),
    ("hopper_dq", 128): MainLoop(790, 2, 0, 4),
    ("hopper_dq", 64): MainLoop(790, 2, 0, 4),
}


@dataclass(frozen=True)
class Bounded:
    """A case whose launches are compiled ahead of time. launcher: whose they are, of the GPU module
    that `impl` names. narrow: how many global loads, and how many stores, of less than 128 bits its
    kernels over activations may have in their code. archs: where it is compiled. may_spill:
    registers may spill. may_serialise: the softmax may wait for the products before it."""

    launcher: str
    case: Case
    dtype: torch.dtype
    narrow: int
    impl: str = "triton"
    archs: tuple[int, ...] = launch.ARCHITECTURES
    may_spill: bool = False
    may_serialise: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.label}, {str(self.dtype).removeprefix('torch.')}"


def ahead_of_time() -> list[Bounded]:
    """A case for every launcher of sfkernels.gpu in every form that the public functions use."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found: list[Bounded] = []
    for channels in (1536, 5120):
        found += _rows_ahead(channels, bf16)
    wide = [*_rows_ahead(1536, fp32), *_attention_ahead(Heads(dtype=fp32))]
    for of in (Heads(), Heads(head_dim=64, dtype=fp16)):
        found += [*_attention_ahead(of), *_attention_ahead(of, "gluon")]
        # So few queries that the keys are split everywhere.
        frame = cases.ring_attention(of, 1, 7 * CHUNK)
        found.append(Bounded("combine_parts", frame, of.dtype, LSE, "cudnn"))
    found += [replace(one, archs=FEW) for one in wide]
    both = False, True
    for channels, residual, backward in itertools.product((96, 192, 384), both, both):
        case = cases.rms_norm_silu(4, CHUNK * FRAME, channels, bf16, backward, residual)
        archs = launch.ARCHITECTURES if channels == 96 else FEW
        found.append(Bounded(_way("norm", backward), case, bf16, STATS, archs=archs))
    for frames, outputs, gelu in ((3, 1536, False), (3, 8960, True), (1, 8960, True)):
        case = cases.linear(frames * FRAME, 1536, outputs, gelu, bf16)
        found.append(Bounded("linear", case, bf16, BIAS))
    for size in cases.CONVOLUTIONS:
        archs = launch.ARCHITECTURES if size in cases.CONVOLUTIONS[:2] else FEW
        case = cases.causal_conv3d(*size, bf16)
        found.append(Bounded("causal_conv3d", case, bf16, BIAS, archs=archs))
    for upsampled in cases.UPSAMPLED:
        case = cases.upsampled_conv2d(*upsampled, bf16)
        found.append(Bounded("upsampled_conv2d", case, bf16, BIAS, archs=FEW))
    case = cases.causal_conv3d(*cases.CONVOLUTIONS[0], fp32)
    found.append(Bounded("causal_conv3d", case, fp32, BIAS, archs=FEW, may_spill=True))
    others = [("sampler_step", cases.sampler_step(form)) for form in cases.SAMPLERS]
    others += [("normal", cases.normal()), ("dmd_gradient", cases.dmd_gradient())]
    others.append(("rope_table", cases.rope_table()))
    found += [Bounded(launcher, case, fp32, SCALARS) for launcher, case in others]
    return found


def _way(launcher: str, backward: bool) -> str:
    return f"{launcher}_{'bwd' if backward else 'fwd'}"


def _rows_ahead(channels: int, dtype: torch.dtype) -> Iterator[Bounded]:
    size = CHUNK, FRAME, channels
    half = dtype == torch.bfloat16
    forms = [(op, True) for op in NORMS if half or op.endswith("adaln")]
    if half and channels == 1536:
        forms += [(op, False) for op in ("gated_adaln", "gated_layer_norm")]
    for (op, gate), backward in itertools.product(forms, (False, True)):
        case = cases.normalisation(op, *size, dtype, backward, gate)
        archs = launch.ARCHITECTURES if op.endswith("adaln") and gate else FEW
        launcher = op if op == "gated_residual" else "norm"
        yield Bounded(_way(launcher, backward), case, dtype, STATS, archs=archs)
    for backward in (False, True):
        case = cases.qk_norm_rope(*size, 128, dtype, backward)
        yield Bounded(_way("qk_norm_rope", backward), case, dtype, STATS)
        case = cases.qk_norm_rope(*size, 128, dtype, backward, per_head=True)
        yield Bounded(_way("qk_norm_rope", backward), case, dtype, HEAD_STATS, archs=FEW)
    case = cases.qk_norm_rope(*size, 128, dtype, append=7 * CHUNK)
    yield Bounded("qk_norm_rope_fwd", case, dtype, SLOTS)
    for into in (torch.int8, torch.float8_e4m3fn):
        case = cases.quantize_rows(CHUNK * FRAME, channels, dtype, into)
        yield Bounded("quantize_rows", case, dtype, SCALES)


def _attention_ahead(of: Heads, impl: str = "triton") -> Iterator[Bounded]:
    window, both = 7 * CHUNK, (False, True)
    forced = [cases.training(of, 2 * CHUNK, backward, teacher_forcing=True) for backward in both]
    past = [cases.self_forcing(of, 8 * CHUNK, backward) for backward in both]
    found = {"attention_fwd": [forced[0], past[0]], "attention_bwd": [forced[1], past[1]]}
    if impl == "gluon" and of.head_dim == 128:  # which has two ways
        case = cases.training(of, 2 * CHUNK, True, teacher_forcing=True, deterministic=True)
        found["attention_bwd"].append(case)
    found["ring_attention"] = [cases.ring_attention(of, CHUNK, window)]
    if impl == "triton":
        found["rotate_keys"] = [cases.ring_attention(of, CHUNK, window, table=True)]
    for launcher, forms in found.items():
        for case in forms:
            few = FEW if case in past else launch.ARCHITECTURES
            yield Bounded(
                launcher if impl == "triton" else f"hopper.{launcher}",
                case,
                of.dtype,
                LSE,
                impl,
                archs=(90,) if impl == "gluon" else few,
                may_spill=of.dtype == torch.float32,  # which only tests use
                # Of short heads under a pattern ptxas leaves products and softmax apart.
                may_serialise=of.head_dim == 64 and impl == "triton",
            )
