"""`python -m bench decode`: the video VAEs, a chunk in the midst of a clip decoded and encoded.

Wan2.1's VAE by this project and by diffusers, as it is (a latent frame at a time), with all frames
of a chunk in one call of its decoder ("whole"), with channels last, with both, and on a GPU with
both under torch.compile; all with the same random weights (bench/codecs.py). TAEHV has no peer.
At 480×832 in bfloat16 on a GPU: not measured on one yet. On a CPU in float32, at full width and
64×96, where ours takes Winograd's way: six minutes on two cores. With --tiny at a small width. On a
GPU ours takes part with its own convolutions too, "implicit GEMM".

Latents are normal, pixels to be encoded uniform. First every result is compared with that of
ours in float32, by PyTorch's own ops. It may be 1e-4 off in float32; in bfloat16 twice as far as
PyTorch's own ops in bfloat16, which may be 5e-2 off (relative errors of all pixels). What is wrong
is not timed. PSNR: by the range of the float32 result, which is 2 for pixels, clamped to [-1, 1].

All take turns, each with cuDNN's algorithms searched for its sizes. One set of inputs is enough: a
call reads and writes far more than any cache holds. FLOPs are those of the public decoder, by
`sfmodel/vae/flops.py`; "folded", the convolutions after up-samplings count four of nine taps.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import codecs, timing
from bench import tables as show
from bench.codecs import WanCodec
from bench.figures import BLUE, ORANGE, race
from bench.harness import Job
from bench.tables import Result, Table, timed
from sfkernels.testing import interpreted
from sfmodel.config import VAEConfig
from sfmodel.cost import PIXEL_FRAMES, VAE_STRIDE
from sfmodel.machine import describe
from sfmodel.vae.flops import decode_flops, encode_flops

OURS, REFERENCE, TINY, PEER = "wan", "reference", "tiny vae", "diffusers"
IMPLICIT = f"{OURS}, implicit GEMM"
WHOLE, LAST = ", whole", ", channels last"
COMPILE = f"{PEER}, compile"
CLOSE, CLOSE_HALF = 1e-4, 5e-2  # relative errors
FLOOR = "floor: predicted, from the measured rate of a matrix product; folded: four of nine taps"
FLOORS = {"floor": "floor_ms", "floor, folded": "folded_floor_ms"}
BEFORE = 3  # latent frames of the clip before the chunk
SECONDS, TINY_SECONDS = 30.0, 0.5  # that the rounds of a case may take
COLOURS = {
    REFERENCE: "#cccccc",
    PEER: "#c3d6a8",
    PEER + LAST: "#8aa86b",
    PEER + WHOLE: "#a99bc7",
    PEER + WHOLE + LAST: "#4f7a3a",
    COMPILE: ORANGE,
    OURS: BLUE,
    IMPLICIT: "#8fb4d9",
    TINY: "#1f3f66",
}


@dataclass(frozen=True)
class Case:
    """A chunk of `frames` latent frames of height × width. first: it begins a clip. encode: it is
    made of pixels. tiny: TAEHV's, else Wan2.1's. compiled: torch.compile takes part."""

    frames: int
    height: int
    width: int
    first: bool = False
    encode: bool = False
    tiny: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        first = "the first " * self.first
        what = f"decode {first}{self.frames} latent frame{'s' * (self.frames > 1)}"
        if self.encode:
            what = f"encode {first}{self.frames * PIXEL_FRAMES} frames"
        return f"{what}, {self.height} x {self.width} latents{', TAEHV' * self.tiny}"

    def flops(self, dim: int, folded: bool = False) -> int:
        size = self.frames, self.height, self.width
        if self.encode:
            return encode_flops(*size, dim)
        which = "taehv" if self.tiny else "wan"
        return decode_flops(which, *size, self.first, folded, dim)

    def step(self, codec: Any) -> Callable[..., Any]:
        return codec.encode_chunk if self.encode else codec.decode_chunk

    def make(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The chunks before, and this one."""
        size = self.height, self.width
        if not self.encode:
            made = torch.randn(1, BEFORE + self.frames, 16, *size, device=device)
            return made[:, :BEFORE], made[:, BEFORE:]
        scaled = [VAE_STRIDE * n for n in size]
        still = 1 + PIXEL_FRAMES
        count = still + PIXEL_FRAMES * self.frames
        made = 2 * torch.rand(1, count, 3, *scaled, device=device) - 1
        return made[:, :still], made[:, still:]

    def result(self, made: Tensor) -> Tensor:
        """The tensor that is compared."""
        return made.float() if self.encode else made.float().clamp(-1, 1)


class Sizes(NamedTuple):
    config: VAEConfig
    dtype: torch.dtype
    cases: tuple[Case, ...]


def _cases(height: int, width: int) -> tuple[Case, ...]:
    """The most telling first."""
    size = height, width
    return (
        Case(3, *size, compiled=True),
        Case(1, *size),
        Case(3, *size, tiny=True),
        Case(3, *size, first=True),
        Case(1, *size, encode=True),
    )


FULL = Sizes(VAEConfig(), torch.bfloat16, _cases(60, 104))
SMALL = Sizes(VAEConfig(), torch.float32, _cases(8, 12))
TOY = Sizes(VAEConfig(dim=8), torch.float32, _cases(3, 4))


class Field:
    """The codecs that take part, with one set of random weights, and in float32 who is right."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.sizes = sizes
        torch.manual_seed(0)
        wan = codecs.wan_vae(device, torch.float32, sizes.config)
        tiny = codecs.tiny_vae(device, torch.float32)
        self.exact = {False: codecs.twin(wan, torch.float32, "reference"), True: tiny}
        self.tiny = {TINY: codecs.prepared(copy.deepcopy(tiny).to(sizes.dtype))}
        ours = codecs.twin(wan, sizes.dtype)
        reference = codecs.twin(ours, sizes.dtype, "reference")
        self.wan: dict[str, Any] = {OURS: ours, REFERENCE: reference}
        if device.type == "cuda" and not interpreted():  # which would take minutes
            self.wan[IMPLICIT] = codecs.twin(ours, sizes.dtype, conv_impl="triton")
        self.last: Any = None  # diffusers' with channels last
        if importlib.util.find_spec(PEER):
            state = ours.state_dict()
            vae, self.last = (
                codecs.diffusers_vae(state, sizes.config, last) for last in (False, True)
            )
            for whole, suffix in ((False, ""), (True, WHOLE)):
                self.wan[PEER + suffix] = WanCodec(vae, whole)
                self.wan[PEER + suffix + LAST] = WanCodec(self.last, whole, last=True)

    def of(self, case: Case, compiled: bool) -> dict[str, Any]:
        if case.tiny:
            return self.tiny
        # One frame is whole anyway.
        found = {n: codec for n, codec in self.wan.items() if case.frames > 1 or WHOLE not in n}
        if compiled:
            torch._dynamo.reset()
            found[COMPILE] = WanCodec(self.last, whole=True, last=True, compiled=True)
        return found


def begun(case: Case, codec: Any, before: Tensor) -> Callable[[Tensor], Any]:
    """A function that runs a codec on the chunk after `before`."""
    step = case.step(codec)
    state = None if case.first else step(before)[1]
    return lambda chunk: step(chunk, state)


@torch.no_grad()
def run_case(case: Case, field: Field, job: Job, result: Result, compiled: bool) -> Result:
    """Checks all codecs of a case and times those that are right: a row of the result."""
    torch.manual_seed(0)
    before, chunk = case.make(job.device)
    everyone = field.of(case, compiled)
    job.tick(f"{case.label}: in float32")
    with codecs.plain(search=False):
        want = case.result(begun(case, field.exact[case.tiny], before)(chunk)[0])
    entries: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, float]] = {}
    exactly = field.sizes.dtype == torch.float32
    allowed = CLOSE if exactly else CLOSE_HALF

    def checked(name: str, want: Tensor) -> timing.Implementation:
        nonlocal allowed
        job.tick(f"{case.label}: is {name} right?")
        context = codecs.plain if name == REFERENCE else codecs.searched
        with context():
            run = begun(case, everyone[name], before)
            errors[name] = compared(case.result(run(chunk)[0]), want)
        error = errors[name]["error"]
        assert error <= allowed, f"off by {error:.1e}, allowed {allowed:.1e}"  # NaN fails too
        if name == REFERENCE and not exactly:
            allowed = 2 * error
        return timing.Implementation(name, run, context=context)

    # PyTorch's own ops first, as they say what others are allowed.
    order = sorted(everyone, key=lambda name: name != REFERENCE)
    right = timing.right({n: functools.partial(checked, n, want) for n in order}, entries)
    del want
    job.tick(case.label)
    flops, folded = (case.flops(field.sizes.config.dim, folded) for folded in (False, True))
    # All graphs lie in one pool: each takes gigabytes.
    pool = torch.cuda.graph_pool_handle() if job.cuda else None
    ready = [right[name] for name in everyone if name in right]
    seconds = TINY_SECONDS if job.tiny else min(SECONDS, job.left / 8)  # the cases after it too
    for name, times in timing.measure(ready, [[chunk]], job.rounds, seconds, pool).items():
        more: dict[str, Any] = {}
        if not isinstance(times, str):
            more = {"tflops": flops / times.p50 / 1e9, "rounds": times.rounds, **errors[name]}
        entries[name] = timing.entry(times, **more)
    row: Result = {"case": case.label, "flops": flops, "folded_flops": folded}
    if job.cuda:  # a CPU's convolutions outrun its matrix product
        for key, least in zip(FLOORS.values(), (flops, folded), strict=True):
            row[key] = timing.floor_ms(least, 0, result["ceilings"])
    row["contestants"] = {name: entries[name] for name in everyone}
    return row | best_peer(row)


def compared(got: Tensor, want: Tensor) -> dict[str, float]:
    """The relative error of a result, and where there is one its PSNR in dB."""
    difference = float((got - want).square().mean())
    out = {"error": math.sqrt(difference / float(want.square().mean()))}
    if difference > 0:
        out["psnr_db"] = 10 * math.log10(float(want.max() - want.min()) ** 2 / difference)
    return out


def best_peer(row: Result) -> dict[str, Any]:
    """The fastest of diffusers', and its time as a multiple of ours: above 1, ours is faster."""
    ms = {name: e["ms"] for name, e in timed(row).items()}
    peers = sorted((name for name in ms if name.startswith(PEER)), key=ms.__getitem__)
    if OURS not in ms or not peers:
        return {}
    return {"best_peer": peers[0], "peer_over_ours": ms[peers[0]] / ms[OURS]}


def run(job: Job) -> Result:
    """torch.compile comes last, as it takes most of the time."""
    sizes = TOY if job.tiny else FULL if job.cuda else SMALL
    result = job.begin("decode", sizes.dtype)
    if sizes is SMALL:
        result["sizes"] = "Wan2.1's VAE at few latents"
    job.tick("random weights")
    field = Field(job.device, sizes)
    if field.last is None:
        result["note"] = "diffusers is not installed: nothing to compare with"
    for case in sizes.cases:
        job.add(result, case.label, functools.partial(run_case, case, field, job, result, False))
    for case in sizes.cases:
        if case.compiled and job.cuda and field.last is not None:
            row = functools.partial(run_case, case, field, job, result, True)
            job.add(result, case.label, row, COMPILE)
    return job.end(result)


def tables(result: Result) -> list[Table]:
    ceilings = result["ceilings"]
    unit, scale = show.product_unit(ceilings)

    def over_ours(row: Result, e: Result) -> str:
        ours = timed(row).get(OURS) or timed(row).get(TINY)
        return f"{e['ms'] / ours['ms']:.2f}" if ours else ""

    def psnr(_: Result, e: Result) -> str:
        return f"{e['psnr_db']:.1f}" if "psnr_db" in e else "exact" * ("error" in e)

    columns = {
        "ms": show.value("ms"),
        "p99": show.value("p99_ms"),
        "with launch": show.value("launched_ms"),
        unit: show.value("tflops", scale=scale),
        "% of product": show.share("tflops", ceilings["matmul_tflops"]),
        "MiB": show.PEAK_MIB,
        "error": show.value("error", "{:.1e}".format),
        "PSNR dB": psnr,
        "time / ours": over_ours,
    }
    notes = ["error and PSNR: against float32", *filter(None, [result.get("note")])]
    rows = []
    for row in result["rows"]:
        floors = {name: {"ms": row[key]} for name, key in FLOORS.items() if key in row}
        rows.append(row | {"contestants": row.get("contestants", {}) | floors})
        notes += [FLOOR] * (bool(floors) and FLOOR not in notes)
    title = f"video VAEs, {result['sizes']}, {ceilings['dtype']} ({describe(result['machine'])})"
    table = show.of_entries(title, rows, columns, notes)
    return [table._replace(notes=[*table.notes, *show.left_out(result)])]


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    unit, scale = show.product_unit(result["ceilings"])
    label = f"{unit} of the public decoder (dashed: a matrix product)"
    product = scale * result["ceilings"]["matmul_tflops"]

    def bar(_: Result, e: Result) -> tuple[float, str]:
        return scale * e["tflops"], f"{show.number(e['ms'])} ms"

    yield from race("decode", result, result["rows"], bar, product, label, COLOURS)
