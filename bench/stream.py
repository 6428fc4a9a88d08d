"""`python -m bench stream`: frames a second and the time to the first frame, phase by phase, as the
paper's Table 1 (arXiv 2506.08009).

Chunks of Wan2.1-1.3B at 480×832 with random weights in bfloat16, 3 latent frames at a time
(chunk-wise) and 1 (frame-wise), four steps, decoded by Wan2.1's VAE, the text encoded by
transformers' UMT5 where it is installed: not measured on a GPU yet. At toy sizes the toy model,
with its own video decoder and text encoder. What is timed is `sfmodel.stream.Stream`, in variants
that differ in the implementation of attention, in who launches a chunk's kernels, Python or a CUDA
graph for each phase, and in what makes it fast, one thing more each: "apart" has a cache update and
a GELU of their own, "merged" the update in the next chunk's first step, the others GELU in the
matrix product before it. They share one set of weights, and the latents of each are compared with
the reference's before it is timed; then they take turns, chunk by chunk.
--public adds a clone of Self Forcing, CausVid or LongLive, its model as it is and patched by
`sfkernels.integrations`, in the place of ours; its latents are compared past the window.

Times: "whole" is wall-clock time from an idle device to an idle device. The phases of the same
chunk are CUDA events around them, without waiting, so that a launch which comes too late counts
where the device waited for it; on a CPU the wall clock. A chunk begins with the cache update of the
one before. A clip is the text and all chunks up to 21 latent frames; the steady state is a full
window; the first frame is the text and the first chunk, the reaction the same of a new prompt at a
full window. "Without decode" and the like are the whole minus that phase's median (in a clip: its
sum), "with the tiny VAE" TAEHV's decoding of the same chunks in the place of Wan2.1's, timed apart,
"denoising alone" the steps and what is merged with them. "Overlapped" is `Stream.frames` at work,
which decodes and copies beside the next chunk: a clip without its text, and chunks in a row.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import codecs, peers, public, timing
from bench.harness import Job
from bench.inputs import StreamInputs, full_size, shared, toy
from bench.stream_report import ENCODING, TINY_DECODE, ours
from bench.stream_report import figures as figures
from bench.stream_report import tables as tables
from bench.tables import Result
from bench.timing import Timed
from sfmodel import cost, stream
from sfmodel.config import Preset
from sfmodel.cost import CLIP, PIXEL_FRAMES, Way, pixel_frames
from sfmodel.dit import DiT
from sfmodel.frames import COPY, DECODE, Decoding
from sfmodel.ranges import phase
from sfmodel.stream import Stream

# Parts that a figure is also given without.
PARTS: dict[str, tuple[str, ...]] = {"text": (ENCODING, stream.PROMPT)}
PARTS |= {name: (name,) for name in (stream.UPDATE, DECODE, COPY)}

CASES = {"chunk-wise": 3, "frame-wise": 1}  # latent frames of a chunk
COMPILED = "chunk-wise, compiled"  # torch.compile takes minutes, so it comes last
NO_TIME = "no time left"
PARITY_CHUNKS = 2
FIRST_FRAMES, ROUNDS = 3, 10  # times to the first frame, and chunks with a full window


class Variant(NamedTuple):
    """impl: of all ops but attention. graph: a CUDA graph launches each phase. compiled: the model
    is compiled as a whole by torch.compile. low_latency: of `Stream`. way: what makes it fast.
    other: makes the model of somebody else that stands in the place of ours."""

    name: str
    impl: str
    attention: str
    graph: bool = False
    compiled: bool = False
    low_latency: bool = False
    way: Way = Way()
    other: Callable[[DiT, Preset], Any] | None = None


Times = Sequence[Timed]
REFERENCE = Variant("reference", "reference", "reference")
APART = Way(merged=False, epilogue=False)


def of_public(clone: public.Clone) -> list[Variant]:
    """A clone's model as it is and patched, neither of which a CUDA graph can hold."""
    makes = {name: functools.partial(clone.streamed, patched=name == public.PATCHED)
             for name in (public.PUBLIC, public.PATCHED)}  # fmt: skip
    return [Variant(name, "auto", "auto", way=APART, other=make) for name, make in makes.items()]


def variants(device: torch.device, compiled: bool = False) -> tuple[Variant, ...]:
    """The most telling first; compiled: those of the row that torch.compile is in."""
    if device.type != "cuda":
        sdpa = Variant("sdpa", "auto", "sdpa")
        return REFERENCE, sdpa, sdpa._replace(name="sdpa, apart", way=APART)
    impls = ("triton", "cudnn", "sdpa", "gluon")
    ours, cudnn, sdpa, gluon = (Variant(f"{n}, graph", "auto", n, graph=True) for n in impls)
    if compiled:
        whole = Variant("compile, graph", "reference", "sdpa", graph=True, compiled=True)
        return ours, whole, sdpa, REFERENCE
    slower = [ours._replace(name="apart, graph", way=APART)]
    slower.append(ours._replace(name="merged, graph", way=Way(epilogue=False)))
    quick = ours._replace(name="low latency, graph", low_latency=True)
    launched = [each._replace(name=each.attention, graph=False) for each in (ours, sdpa)]
    return ours, *slower, cudnn, sdpa, gluon, quick, launched[0], REFERENCE, launched[1]


def clocked(run: Callable[[], object], device: torch.device) -> Timed:
    """`timing.clocked` with cuDNN's fastest algorithms."""
    with codecs.searched():
        return timing.clocked(run, device)


class Measured:
    """A variant's stream under a clock. peak_mib: device memory beside the weights."""

    def __init__(
        self, inputs: StreamInputs, preset: Preset, variant: Variant, seed: int = 0
    ) -> None:
        linear = "auto" if variant.way.epilogue else "reference"
        model: Any = shared(inputs.model, variant.impl, variant.attention, linear)
        if variant.other is not None:
            model = variant.other(inputs.model, preset)
        if variant.compiled:
            model.forward = torch.compile(
                model.forward, mode="max-autotune-no-cudagraphs", dynamic=False
            )
        self.device, self.encode = model.device, inputs.encode
        options: Any = {"seed": seed, "graph": variant.graph, "merge": variant.way.merged}
        options["low_latency"] = variant.low_latency
        with codecs.searched():
            self.stream = Stream(model, inputs.codec, inputs.text_BTE, preset, **options)
            self.tiny: Decoding | None = None
            if inputs.tiny is not None:
                launch = self.stream.launch if variant.graph else None
                self.tiny = Decoding(inputs.tiny)
                latents = self.stream.latents_BFCHW.items()
                self.decode_tiny = {size: self.tiny.of(x, launch) for size, x in latents}
        self.peak_mib: float | None = None

    def _restart(self) -> None:
        self.stream.restart()
        if self.tiny is not None:
            self.tiny.state = None

    def _prompt(self, recompute: bool = False) -> None:
        text_BTE = self.stream.text_BTE
        if self.encode is not None:
            with phase(ENCODING):
                text_BTE = self.encode()
        self.stream.set_prompt(text_BTE, recompute=recompute)

    def _frames(self) -> None:
        self.stream.denoise()
        for piece in range(self.stream.pieces):
            self.stream.decode(piece)
            self.stream.copy_to_host()

    def _clocked(self, *steps: Callable[[], object]) -> Timed:
        """The chunk is decoded by the tiny VAE too, which is no part of the whole."""
        timed = clocked(lambda: [step() for step in steps], self.device)
        if self.tiny is not None:

            def decode() -> None:
                with phase(TINY_DECODE):
                    self.decode_tiny[self.stream.size]()

            timed.phases.update(clocked(decode, self.device).phases)
        return timed

    @torch.no_grad()
    def chunk(self) -> Timed:
        return self._clocked(self._frames)

    @torch.no_grad()
    def first_frame(self) -> Timed:
        """From the prompt to the first frames; the stream then stands before its first chunk."""
        self._restart()
        timed = self.reaction()
        self._restart()
        return timed

    @torch.no_grad()
    def reaction(self, recompute: bool = False) -> Timed:
        """From a prompt to the first frames under it, wherever the stream is. recompute: with the
        keys and values of the window computed anew under it."""
        prompt = functools.partial(self._prompt, recompute)
        timed = self._clocked(prompt, lambda: next(self.stream.frames(1)))
        self.stream.finish_decoding()
        self.stream.leaving.clear()
        return timed

    @torch.no_grad()
    def overlapped(self, frames: int) -> Timed:
        """So many frames, without waiting for the device between chunks."""
        return clocked(lambda: deque(self.stream.frames(frames), maxlen=0), self.device)

    @torch.no_grad()
    def overlapped_clip(self, frames: int) -> Timed:
        self._restart()
        return self.overlapped(frames)

    @torch.no_grad()
    def first_latents(self, chunks: int) -> Tensor:
        """x0 of the first chunks, [1, F, C, h, w] in float32, each of them decoded as well."""
        self._restart()
        latents = []
        for _ in range(chunks):
            self._frames()
            latents.append(self.stream.latents_BFCHW[self.stream.size].clone())
        self._restart()
        return torch.cat(latents, 1)


def without_each(whole: float, ms: Mapping[str, float], have: Collection[str]) -> dict[str, float]:
    """`whole`, what remains of it without each part that the stream has, and what it is by the
    other decoder; ms: of phases."""
    out = {"all": whole}
    for name, phases in PARTS.items():
        if any(each in have for each in phases):
            out[f"without {name}"] = whole - sum(ms.get(each, 0.0) for each in phases)
    if TINY_DECODE in have:
        out["with the tiny VAE"] = whole - ms.get(DECODE, 0.0) + ms.get(TINY_DECODE, 0.0)
    out["denoising alone"] = sum(ms[name] for name in ms if name.startswith(stream.STEP))
    return out


def medians(all_timed: Times) -> dict[str, float]:
    return {n: statistics.median(t.phases[n] for t in all_timed) for n in all_timed[0].phases}


def run_case(
    job: Job, inputs: StreamInputs, name: str, clone: public.Clone | None = None
) -> Result:
    """A row: who is right, then the times of all of them in turn. What does not come to a clip and
    some chunks of a full window before the job's time is over has no time. clone: somebody else's
    model, where it is a contestant."""
    preset = replace(inputs.preset, chunk=CASES.get(name, CASES["chunk-wise"]))
    first = preset.first or preset.chunk
    chunks = 1 + -(-(max(CLIP, preset.window) - first) // preset.chunk)
    frames = pixel_frames(first + (chunks - 1) * preset.chunk)
    known = variants(job.device, name == COMPILED)
    compared = dict.fromkeys(known, PARITY_CHUNKS)
    if clone is not None:  # early, while there is memory, and compared past the window if it rolls
        others = of_public(clone)
        known = known[0], *others, *known[1:]
        in_window = 1 + (preset.window - first) // preset.chunk
        compared |= dict.fromkeys((REFERENCE, *others), chunks + 1 if clone.rolls else in_window)
    streams: dict[str, Measured] = {}
    entries: dict[str, Any] = {}
    want: Tensor | None = None
    tolerance = 1e-3 if inputs.model.dtype == torch.float32 else 5e-2
    # The reference first: what it computes, the others must.
    for variant in sorted(known, key=lambda v: v is not REFERENCE):
        if job.left <= 0:
            entries[variant.name] = timing.entry(NO_TIME)
            continue
        job.tick(f"{name}: is {variant.name} right?")
        try:
            with timing.peak_memory(job.device) as peak:
                made = Measured(inputs, preset, variant)
                got = made.first_latents(compared[variant])
            want = got if want is None else want
            same = want[:, : got.shape[1]]
            off = float((got - same).norm() / same.norm())
            assert off < tolerance, f"latents differ by {off:.1e}, {tolerance:.0e} allowed"
            streams[variant.name], made.peak_mib = made, peak[0]
        except Exception as error:
            if want is None:
                raise
            entries[variant.name] = timing.failed(error)

    def turns(of: Callable[..., Timed], count: int, *args: int) -> dict[str, list[Timed]]:
        def goes_on(i: int) -> bool:
            job.tick(f"{name}: {of.__name__} {i + 1} of {count}")
            return job.left > 0

        calls = {v.name: functools.partial(of, streams[v.name], *args) for v in known
                 if v.name in streams}  # fmt: skip
        found, errors = timing.in_turn(calls, count, goes_on)
        for each, error in errors.items():
            entries[each] = timing.failed(error)
            del streams[each]
        return found

    few, many = min(FIRST_FRAMES, job.rounds), min(ROUNDS, job.rounds)
    firsts = turns(Measured.first_frame, few)
    later = turns(Measured.chunk, chunks + many)
    reactions, anew = (turns(Measured.reaction, few, recompute) for recompute in (False, True))
    clips = turns(Measured.overlapped_clip, 1, frames)
    rows = turns(Measured.overlapped, 1, many * PIXEL_FRAMES * preset.chunk)
    for each, made in streams.items():
        if len(later[each]) <= chunks:
            entries[each] = timing.entry(NO_TIME)
            continue
        clip, steady = later[each][:chunks], later[each][chunks:]
        entries[each] = entry(made, frames, firsts[each], clip, steady)
        fps = entries[each]["fps"]
        if rows[each]:
            chunk_ms = rows[each][0].whole / many
            fps["full window"] |= per_second(PIXEL_FRAMES * preset.chunk, {"overlapped": chunk_ms})
            fps["clip"] |= per_second(frames, {"overlapped": clips[each][0].whole})
            entries[each]["reaction_ms"] = {
                what: statistics.median(t.whole for t in found[each])
                for what, found in (("all", reactions), ("window computed anew", anew))
            }
    return {
        "case": name,
        "chunk": preset.chunk,
        "window": preset.window,
        "steps": len(preset.steps),
        "frames": frames,
        "notes": [*inputs.notes, *([clone.note] if clone else [])],
        "weights_mib": sum(p.nbytes for p in inputs.model.parameters()) / 2**20,
        "contestants": {variant.name: entries[variant.name] for variant in known},
    }


def entry(made: Measured, frames: int, firsts: Times, clip: Times, steady: Times) -> Result:
    """The row's entry for a variant; `phases` are the prompt's at the first frame and a chunk's at
    a full window. frames: of the clip."""
    summary = timing.summary([t.whole for t in steady])
    summary.peak_mib, summary.note = made.peak_mib, "; ".join(made.stream.notes)
    first, full = medians(firsts), medians(steady)
    prompt = [name for name in PARTS["text"] if name in first]
    have = [*prompt, *full]
    each = {
        name: timing.middle_and_tail([t.phases[name] for t in all_timed])
        for all_timed, names in ((firsts, prompt), (steady, full))
        for name in names
    }
    first_ms = statistics.median(t.whole for t in firsts)
    names = {name for t in clip for name in t.phases}  # the first chunk has other ones
    sums = {name: sum(t.phases.get(name, 0.0) for t in clip) for name in names}
    sums |= {name: first[name] for name in prompt}
    whole = sum(first[name] for name in prompt) + sum(t.whole for t in clip)
    chunk_frames = PIXEL_FRAMES * made.stream.preset.chunk
    return timing.entry(
        summary,
        phases=each,
        phases_sum_ms=sum(ms for name, ms in full.items() if name != TINY_DECODE),
        steady_ms=[t.whole for t in steady],
        first_frame_ms=first_ms,
        first_frame_phases=first,
        fps={
            "full window": per_second(chunk_frames, without_each(summary.p50, full, have)),
            "clip": per_second(frames, without_each(whole, sums, have)),
        },
        latency_ms=without_each(first_ms, first, have),
        clip_ms=[t.whole for t in clip],
        clip_frames=frames,
    )


def predicted(preset: Preset, ceilings: Mapping[str, float], device: torch.device) -> Result:
    """Predicts by arithmetic the transformer's passes, in 16 bits at this machine's ceilings."""
    rates = ceilings["matmul_tflops"], ceilings["copy_gbps"] / 1e3
    cores = 1
    if device.type == "cuda":
        cores = torch.cuda.get_device_properties(device).multi_processor_count
    here = cost.Gpu("here", cores, *rates, memory_gib=math.inf, link_gbps=0)
    return {
        "fps": {
            each.name: cost.fps(preset, here, [preset.window], "bf16", "none", each.way)
            for each in variants(device, False)
        },
        "first_frame_ms": cost.latency_ms(preset, here, "bf16", "none")["first_frame"],
    }


def per_second(frames: int, ms: Mapping[str, float]) -> dict[str, float]:
    return {name: 1e3 * frames / value for name, value in ms.items()}


def speed(entry: Mapping[str, Any], which: str = "all") -> float:
    """Frames a second over a clip; 0 of what was not timed."""
    return float(entry["fps"]["clip"].get(which, 0.0))


@torch.no_grad()
def bidirectional(inputs: StreamInputs) -> dict[str, Any]:
    """Wan2.1 as its makers run it: 50 steps with guidance are 100 passes over all latent frames at
    once, two of which are timed."""
    preset, dit = inputs.preset, inputs.model
    device = dit.device
    shape = (1, CLIP, dit.config.channels, preset.height, preset.width)
    x_BFCHW, t = torch.randn(shape, device=device), torch.tensor(500.0, device=device)
    outs, times = [], []
    for attention in ("sdpa", "auto", "auto", "auto"):
        twin = shared(dit, "auto", attention)

        def run(twin: DiT = twin) -> None:
            outs.append(twin(x_BFCHW, t, inputs.text_BTE))

        times.append(clocked(run, device).whole)
    difference = float((outs[1] - outs[0]).norm() / outs[0].norm())
    if not difference < (1e-3 if dit.dtype == torch.float32 else 5e-2):
        return {"said": f"{timing.WRONG}: attention differs from SDPA's by {difference:.1e}"}
    seconds = 100 * statistics.mean(times[2:]) / 1e3
    return {
        "fps": pixel_frames(CLIP) / seconds,
        "latency_s": seconds,
        "said": "2 of 100 passes timed, text encoder and VAE left out",
    }


def baselines(job: Job, result: Result, inputs: StreamInputs | None) -> Iterator[dict[str, Any]]:
    """The lines of the paper's table, with what was measured here beside it."""
    rows = {row["case"]: row for row in result["rows"]}
    for name, fps, latency_s, how, note in peers.BASELINES:
        line: dict[str, Any] = {"name": name, "paper_fps": fps, "paper_latency_s": latency_s}
        if found := ours(rows[how]) if how in rows else {}:
            fastest = max(found, key=lambda variant: speed(found[variant]))
            entry = found[fastest]
            line |= {"fps": speed(entry), "latency_s": entry["first_frame_ms"] / 1e3}
            tiny = speed(entry, "with the tiny VAE")
            words = [f"{fastest}, a clip, decoding included"]
            words += [f"{tiny:.3g} FPS with the tiny VAE"] * (tiny > 0)
            line["said"] = "; ".join(filter(None, (*words, note)))
        elif not how:
            line["said"] = "published, not run"
        elif how in CASES or not job.wants(f"baselines: {name}"):
            line["said"] = "not run"
        elif job.left <= 0:
            result["no_time_for"].append(f"baselines: {name}")
            line["said"] = NO_TIME
        else:
            job.tick(name)
            line |= measured(job, inputs, name, how)
        yield line


def measured(job: Job, inputs: StreamInputs | None, name: str, how: str) -> dict[str, Any]:
    if how == "diffusers":
        return peers.measure(name.removesuffix(", diffusers"), job.device, job.tiny)
    if inputs is None:
        return {"said": "not run: there is no model"}
    try:
        return bidirectional(inputs)
    except Exception as error:
        return {"said": f"not run: {timing.reason(error)}"}


def run(job: Job) -> Result:
    """torch.compile comes last, as it takes most of the time. Raises ValueError for a clone that is
    none, before anything is measured."""
    clone = public.load(job.public, job.cuda and not job.tiny) if job.public else None
    result = job.begin("stream", torch.float32 if job.tiny else torch.bfloat16)
    result["baselines"] = []
    inputs, why = None, ""
    cases = (*CASES, COMPILED) if job.cuda and not job.tiny else (*CASES,)
    if any(map(job.wants, (*cases, "baselines: Wan2.1-1.3B"))):
        job.tick("the model")
        try:
            inputs = toy() if job.tiny else full_size(job.device)
        except Exception as error:
            why = timing.reason(error)

    def measured(name: str) -> Result:
        if inputs is None:
            return {"failed": why}
        row = run_case(job, inputs, name, clone if name in CASES else None)
        preset = replace(inputs.preset, chunk=row["chunk"])
        return row | {"predicted": predicted(preset, result["ceilings"], job.device)}

    for name in CASES:
        job.add(result, name, functools.partial(measured, name))
    for line in baselines(job, result, inputs):
        result["baselines"].append(line)
        job.save(result)
    if COMPILED in cases:
        job.add(result, COMPILED, functools.partial(measured, COMPILED))
    return job.end(result)
