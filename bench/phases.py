"""A stream as named phases that can be timed apart, for `python -m bench stream`.

A chunk is noise, the steps, decoding, the copy to pinned host memory as bytes, and the cache-update
pass, which comes last because the frames are out by then. Before the first chunk of a prompt come
its encoding and its keys and values. Each phase works on tensors that stay where they are, so that
it can be a CUDA graph: what changes from chunk to chunk, the place in the ring and with it the
noise, is read on the device. Text encoding, decoding and the copy are never part of a graph. The
graphs have not run on a GPU yet.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import peers, timing
from bench.model import PIXEL_FRAMES, VAE_STRIDE
from sfkernels import Noise, normal
from sfmodel.codec import VideoDecoder
from sfmodel.config import PRESETS, DiTConfig, Preset
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import FewStepSampler

PROMPT = "a large red ball moves up slowly"
ENCODING, PROMPT_KV = "text encoding", "prompt keys and values"
NOISE, STEP, DECODE, COPY, UPDATE = "noise", "step ", "decode", "copy to host", "cache update"
# What a figure is also given without.
PARTS = {"text": (ENCODING, PROMPT_KV), UPDATE: (UPDATE,), DECODE: (DECODE,), COPY: (COPY,)}
ABSENT = {ENCODING: "no text encoder here", DECODE: "no VAE here"}

Phases = dict[str, Callable[[], Any]]


class Contestant(NamedTuple):
    """impl: of all ops but attention. graph: a CUDA graph launches each phase. compiled: the model
    is compiled as a whole by torch.compile, which takes minutes at full size."""

    name: str
    impl: str
    attention: str
    graph: bool = False
    compiled: bool = False


REFERENCE = Contestant("reference", "reference", "reference")


def contestants(device: torch.device) -> tuple[Contestant, ...]:
    """The most telling first."""
    if device.type != "cuda":
        return REFERENCE, Contestant("sdpa", "auto", "sdpa")
    return (
        Contestant("triton, graph", "auto", "triton", graph=True),
        Contestant("sdpa, graph", "auto", "sdpa", graph=True),
        Contestant("triton", "auto", "triton"),
        REFERENCE,
        Contestant("gluon, graph", "auto", "gluon", graph=True),
        Contestant("sdpa", "auto", "sdpa"),
        Contestant("compile, graph", "reference", "sdpa", graph=True, compiled=True),
    )


@dataclass(frozen=True)
class Setting:
    """What all contestants share. model: its weights. text [1, T, text_dim]: the prompt's
    embeddings, and `encode` what computes them. Without a codec, pixels are a stand-in. notes:
    whose these are, or why there are none."""

    preset: Preset
    model: DiT
    text_BTE: Tensor
    encode: Callable[[], Tensor] | None = None
    codec: VideoDecoder | None = None
    notes: tuple[str, ...] = ()


def random_model(config: DiTConfig, device: torch.device) -> DiT:
    """In float32. Wan2.1 begins with a head of zeros, whose output hides errors and whose gradient
    stops there; this one's flow has about unit variance."""
    with device:
        model = DiT(config)
    nn.init.normal_(model.head.head.weight, std=config.dim**-0.5)
    return model


def full_size(device: torch.device) -> Setting:
    """Random weights. VAE and text encoder are not part of this version: those of diffusers and
    transformers stand in where they are installed."""
    preset = PRESETS["wan-1.3b"]
    config = preset.dit
    torch.manual_seed(0)
    model = random_model(config, device).to(torch.bfloat16).eval()
    text_BTE = torch.randn(1, config.text_len, config.text_dim, device=device)
    codec: VideoDecoder | None = None
    encode: Callable[[], Tensor] | None = None
    notes = []
    try:
        codec = peers.wan_codec(device)
        notes.append("decoded by diffusers' VAE")
    except Exception as error:  # not installed, of another version, out of memory
        notes.append(f"{ABSENT[DECODE]}: {timing.reason(error)}")
    try:
        encode = peers.text_encoder(device, config.text_len)
        notes.append("text encoded by transformers' UMT5")
    except Exception as error:
        notes.append(f"{ABSENT[ENCODING]}: {timing.reason(error)}")
    return Setting(preset, model, text_BTE, encode, codec, tuple(notes))


def toy() -> Setting:
    """The shipped toy model. Raises ValueError where what loads it is not installed."""
    try:
        from sfmodel.cli import load_toy
    except ImportError as error:
        raise ValueError(f"the toy model needs {error.name}, of the extra 'model'") from error
    model, codec, text = load_toy()

    def encode() -> Tensor:
        return text([PROMPT], model.device)

    return Setting(PRESETS["toy"], model, encode(), encode, codec)


def shared(model: DiT, impl: str, attention: str) -> DiT:
    """The same parameters, not copies, under other implementations."""
    with torch.device("meta"):
        twin = DiT(model.config, impl, attention)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


class Timed(NamedTuple):
    """Milliseconds: wall clock, and of each phase."""

    whole: float
    phases: dict[str, float]


def clocked(phases: Phases, device: torch.device) -> Timed:
    """Runs the phases in order, from an idle device to an idle device."""
    cuda = device.type == "cuda"
    marks: list[Any] = []

    def mark() -> None:
        if not cuda:
            marks.append(time.perf_counter())
            return
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    timing.wait(device)
    began = time.perf_counter()
    mark()
    for name, run in phases.items():
        with timing.phase(name, device):
            run()
        mark()
    timing.wait(device)
    whole = 1e3 * (time.perf_counter() - began)
    between = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    return Timed(whole, dict(zip(phases, between, strict=True)))


class Stream:
    """One contestant's stream of `seed`, whose chunks are named phases on tensors that stay where
    they are; in order they do what `sfmodel.stream.stream` does, bit for bit.

    prompt: the phases of a prompt. latents [1, F, C, h, w], host [1, T, H, W, 3]: x0 of the last
    chunk, and its pixels as bytes in host memory; overwritten by the next. notes: what was not as
    planned. peak_mib: device memory beside the weights, if it was measured.
    """

    def __init__(
        self, setting: Setting, preset: Preset, contestant: Contestant, seed: int = 0
    ) -> None:
        self.preset, self.graph = preset, contestant.graph
        self.model = shared(setting.model, contestant.impl, contestant.attention)
        if contestant.compiled:
            self.model.forward = torch.compile(  # type: ignore[method-assign]
                self.model.forward, mode="max-autotune-no-cudagraphs", dynamic=False
            )
        self.device = self.model.device
        self.cache = self.model.new_cache(1, preset.window, preset.grid, preset.sink)
        schedule = FlowSchedule(preset.shift)
        self.sampler = FewStepSampler(self.model, self.cache, schedule, preset.steps)
        self.seed_B = torch.tensor([seed], device=self.device)
        self.pool = torch.cuda.graph_pool_handle() if self.graph else None
        self.notes: dict[str, None] = {}
        self.peak_mib: float | None = None
        text_BTE, encode = setting.text_BTE.clone(), setting.encode
        self.prompt: Phases = {}
        if encode is not None:
            self.prompt[ENCODING] = lambda: text_BTE.copy_(encode())
        self.prompt[PROMPT_KV] = self._launch(lambda: self.model.set_text(self.cache, text_BTE))
        self.first = preset.first or preset.chunk
        self.x: dict[int, Tensor] = {}
        self.state: Any = None  # of the decoder
        sizes = {self.first, preset.chunk}
        self.phases = {frames: self._chunk(frames, setting.codec) for frames in sizes}
        self.restart()

    def _launch(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run`, or its CUDA graph. Before a capture it really runs, so what it moves, the place in
        the ring, is put back."""
        if not self.graph:
            return run
        start = self.cache.start.clone()
        replay, note = timing.captured(run, self.pool)
        self.cache.start.copy_(start)
        if note:
            self.notes[note] = None
        return replay or run

    def _chunk(self, frames: int, codec: VideoDecoder | None) -> Phases:
        config, preset = self.model.config, self.preset
        height, width = preset.height, preset.width
        x_BFCHW = torch.zeros(1, frames, config.channels, height, width, device=self.device)
        self.x[frames] = x_BFCHW
        count, size = PIXEL_FRAMES * frames, (height * VAE_STRIDE, width * VAE_STRIDE)
        host_BTHWC = torch.empty(
            1, count, *size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        pixels_BTCHW = torch.rand(1, count, 3, *size, device=self.device)  # the stand-in

        def noise(draw: int) -> Noise:
            return Noise(self.seed_B, self.cache.chunk(frames).frame_F, draw)

        def draw() -> None:
            x_BFCHW.copy_(normal(noise(0), x_BFCHW.shape, impl=self.model.impl))

        def step(i: int) -> Callable[[], Any]:  # after the last one, x is x0
            return lambda: x_BFCHW.copy_(self.sampler.step(x_BFCHW, i, noise)[1])

        def decode() -> None:
            nonlocal pixels_BTCHW
            assert codec is not None
            pixels_BTCHW, self.state = codec.decode_chunk(x_BFCHW, self.state)

        def copy() -> None:
            scaled = pixels_BTCHW.clamp(-1, 1).add(1).mul(127.5)
            bytes_BTHWC = scaled.round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
            self.host_BTHWC = host_BTHWC[:, : bytes_BTHWC.shape[1]]
            self.host_BTHWC.copy_(bytes_BTHWC, non_blocking=True)

        phases: Phases = {NOISE: self._launch(draw)}
        phases |= {f"{STEP}{i + 1}": self._launch(step(i)) for i in range(len(preset.steps))}
        if codec is not None:
            phases[DECODE] = decode
        phases[COPY] = copy
        phases[UPDATE] = self._launch(lambda: self.sampler.append(x_BFCHW))
        return phases

    def restart(self) -> None:
        self.cache.reset()
        self.state = None
        self.next = self.first

    def chunk(self) -> Timed:
        timed = clocked(self.phases[self.next], self.device)
        self.latents, self.next = self.x[self.next], self.preset.chunk
        return timed

    def first_latents(self, chunks: int) -> Tensor:
        """x0 of the first chunks, [1, F, C, h, w] in float32."""
        self.restart()
        latents = []
        for _ in range(chunks):
            self.chunk()
            latents.append(self.latents.clone())
        return torch.cat(latents, 1)

    def first_frame(self) -> Timed:
        """From the prompt to the first frames; the stream then stands before its first chunk."""
        self.restart()
        chunk = {name: run for name, run in self.phases[self.first].items() if name != UPDATE}
        timed = clocked(self.prompt | chunk, self.device)
        self.restart()
        return timed

    def fill(self) -> None:
        """A full window at once, of random keys and values."""
        for tensor in (self.cache.k, self.cache.v):
            tensor.normal_()
        self.cache.start.fill_(self.preset.window)
        self.next = self.preset.chunk


def chunk_phases(steps: int) -> list[str]:
    """In order, with those that this version lacks."""
    return [NOISE, *(f"{STEP}{i + 1}" for i in range(steps)), DECODE, COPY, UPDATE]


def without_each(whole: float, ms: Mapping[str, float], have: Collection[str]) -> dict[str, float]:
    """`whole` and what remains of it without each part that the stream has; ms: of phases."""
    out = {"all": whole}
    for name, phases in PARTS.items():
        if any(phase in have for phase in phases):
            out[f"without {name}"] = whole - sum(ms.get(phase, 0.0) for phase in phases)
    out["denoising alone"] = sum(ms[name] for name in ms if name.startswith(STEP))
    return out


def medians(timed: Sequence[Timed]) -> dict[str, float]:
    return {name: statistics.median(t.phases[name] for t in timed) for name in timed[0].phases}
