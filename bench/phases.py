"""A stream as named phases that can be timed apart, for `python -m bench stream`.

A chunk is noise, the steps, decoding, the copy to pinned host memory as bytes, and the cache-update
pass, which comes last because the frames are out by then. Before the first chunk of a prompt come
its encoding and its keys and values. Each phase works on tensors that stay where they are, so that
it can be a CUDA graph: what changes from chunk to chunk, the place in the ring and with it the
noise, is read on the device, and decoding finds its state where it left it. Text encoding, the
decoding of a clip's first chunk and the copy are never part of a graph. The graphs have not run on
a GPU yet.

Beside each chunk, as no part of it, a tiny VAE decodes it too where there is one.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bench import codecs, peers, timing
from sfkernels import Noise, normal
from sfmodel import ranges
from sfmodel.config import PRESETS, DiTConfig, Preset
from sfmodel.cost import PIXEL_FRAMES, VAE_STRIDE
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import FewStepSampler
from sfmodel.vae.codec import VideoDecoder

PROMPT = "a large red ball moves up slowly"
ENCODING, PROMPT_KV = "text encoding", "prompt keys and values"
NOISE, STEP, DECODE, COPY, UPDATE = "noise", "step ", "decode", "copy to host", "cache update"
TINY_DECODE = "decode, tiny VAE"  # beside the others
# What a figure is also given without.
PARTS = {"text": (ENCODING, PROMPT_KV), UPDATE: (UPDATE,), DECODE: (DECODE,), COPY: (COPY,)}
ABSENT = {ENCODING: "no text encoder here"}

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
    embeddings, and `encode` what computes them. tiny: a second decoder, to be timed beside `codec`.
    notes: whose these are, or why there are none."""

    preset: Preset
    model: DiT
    text_BTE: Tensor
    codec: VideoDecoder
    encode: Callable[[], Tensor] | None = None
    tiny: VideoDecoder | None = None
    notes: tuple[str, ...] = ()


def random_model(config: DiTConfig, device: torch.device) -> DiT:
    """In float32. Wan2.1 begins with a head of zeros, whose output hides errors and whose gradient
    stops there; this one's flow has about unit variance."""
    with device:
        model = DiT(config)
    nn.init.normal_(model.head.head.weight, std=config.dim**-0.5)
    return model


def full_size(device: torch.device) -> Setting:
    """Random weights. The text encoder is that of transformers, where it is installed."""
    preset = PRESETS["wan-1.3b"]
    config = preset.dit
    torch.manual_seed(0)
    model = random_model(config, device).to(torch.bfloat16).eval()
    text_BTE = torch.randn(1, config.text_len, config.text_dim, device=device)
    codec = codecs.wan_vae(device, torch.bfloat16)
    tiny = codecs.tiny_vae(device, torch.bfloat16)
    encode: Callable[[], Tensor] | None = None
    notes = ["decoded by Wan2.1's VAE, beside it by TAEHV"]
    try:
        encode = peers.text_encoder(device, config.text_len)
        notes.append("text encoded by transformers' UMT5")
    except Exception as error:  # not installed, of another version, out of memory
        notes.append(f"{ABSENT[ENCODING]}: {timing.reason(error)}")
    return Setting(preset, model, text_BTE, codec, encode, tiny, tuple(notes))


def toy() -> Setting:
    """The shipped toy model. Raises ValueError where what loads it is not installed."""
    try:
        from sfmodel.pretrained import load_toy
    except ImportError as error:
        raise ValueError(f"the toy model needs {error.name}, of the extra 'model'") from error
    model, codec, text = load_toy()

    def encode() -> Tensor:
        return text([PROMPT], model.device)

    return Setting(PRESETS["toy"], model, encode(), codec, encode)


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
        with ranges.phase(name):
            run()
        mark()
    timing.wait(device)
    whole = 1e3 * (time.perf_counter() - began)
    between = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    return Timed(whole, dict(zip(phases, between, strict=True)))


@functools.cache
def _pool() -> Any:
    """Of memory for all graphs: no two run at once, and none reads what another left there."""
    return torch.cuda.graph_pool_handle()


class Decoding:
    """A clip's decoding, chunk by chunk. pixels_BTCHW: of the last chunk.

    What a clip's first chunk does, others do not: no convolution sees anything before it. So the
    others may be a graph of their own, at whose end the state is copied to where it finds it."""

    def __init__(self, codec: VideoDecoder) -> None:
        self.codec = codec
        self.state: Any = None
        self.kept: Any = None
        self.pixels_BTCHW = torch.empty(0)

    def phase(
        self, x_BFCHW: Tensor, launch: Callable[[Callable[[], Any]], Callable[[], Any]] | None
    ) -> Callable[[], None]:
        """What decodes the chunk that lies in x. launch: what makes a graph."""

        def decode(state: Any) -> tuple[Tensor, Any]:
            with codecs.searched():
                return self.codec.decode_chunk(x_BFCHW, state)

        def run() -> None:
            self.pixels_BTCHW, self.state = decode(self.state)

        if launch is None:
            return run
        self.kept = decode(None)[1] if self.kept is None else self.kept
        made_BTCHW = self.pixels_BTCHW

        def in_place() -> None:
            nonlocal made_BTCHW
            made_BTCHW, state = decode(self.kept)
            self._keep(state)

        later = launch(in_place)

        def run_or_replay() -> None:
            if self.state is None:
                run()
                self._keep(self.state)
                self.state = self.kept
            else:
                later()
                self.pixels_BTCHW = made_BTCHW

        return run_or_replay

    def _keep(self, state: Any) -> None:
        pairs = zip(pytree.tree_leaves(self.kept), pytree.tree_leaves(state), strict=True)
        for kept, new in pairs:
            kept.copy_(new)


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
        self.notes: dict[str, None] = {}
        self.peak_mib: float | None = None
        # Kept, as the graph of the prompt reads it.
        self.text_BTE = text_BTE = setting.text_BTE.clone()
        encode = setting.encode
        self.prompt: Phases = {}
        if encode is not None:
            self.prompt[ENCODING] = lambda: text_BTE.copy_(encode())
        self.prompt[PROMPT_KV] = self._launch(lambda: self.model.set_text(self.cache, text_BTE))
        self.first = preset.first or preset.chunk
        self.x: dict[int, Tensor] = {}
        self.decoding = Decoding(setting.codec)
        self.tiny = Decoding(setting.tiny) if setting.tiny else None
        self.beside: dict[int, Phases] = {}  # of each size of a chunk
        sizes = {self.first, preset.chunk}
        self.phases = {frames: self._chunk(frames) for frames in sizes}
        self.restart()

    def _launch(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run`, or its CUDA graph. Before a capture it really runs, so what it moves, the place in
        the ring, is put back."""
        if not self.graph:
            return run
        start = self.cache.start.clone()
        replay, note = timing.captured(run, _pool())
        self.cache.start.copy_(start)
        if note:
            self.notes[note] = None
        return replay or run

    def _chunk(self, frames: int) -> Phases:
        config, preset = self.model.config, self.preset
        height, width = preset.height, preset.width
        x_BFCHW = torch.zeros(1, frames, config.channels, height, width, device=self.device)
        self.x[frames] = x_BFCHW
        count, size = PIXEL_FRAMES * frames, (height * VAE_STRIDE, width * VAE_STRIDE)
        host_BTHWC = torch.empty(
            1, count, *size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )

        def noise(draw: int) -> Noise:
            return Noise(self.seed_B, self.cache.chunk(frames).frame_F, draw)

        def draw() -> None:
            x_BFCHW.copy_(normal(noise(0), x_BFCHW.shape, impl=self.model.impl))

        def step(i: int) -> Callable[[], Any]:  # after the last one, x is x0
            return lambda: x_BFCHW.copy_(self.sampler.step(x_BFCHW, i, noise)[1])

        def copy() -> None:
            scaled = self.decoding.pixels_BTCHW.clamp(-1, 1).add(1).mul(127.5)
            bytes_BTHWC = scaled.round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
            self.host_BTHWC = host_BTHWC[:, : bytes_BTHWC.shape[1]]
            self.host_BTHWC.copy_(bytes_BTHWC, non_blocking=True)

        phases: Phases = {NOISE: self._launch(draw)}
        phases |= {f"{STEP}{i + 1}": self._launch(step(i)) for i in range(len(preset.steps))}
        launch = self._launch if self.graph else None
        phases[DECODE] = self.decoding.phase(x_BFCHW, launch)
        phases[COPY] = copy
        phases[UPDATE] = self._launch(lambda: self.sampler.append(x_BFCHW))
        tiny = {TINY_DECODE: self.tiny.phase(x_BFCHW, launch)} if self.tiny else {}
        self.beside[frames] = tiny
        return phases

    def restart(self) -> None:
        self.cache.reset()
        for decoding in filter(None, (self.decoding, self.tiny)):
            decoding.state = None
        self.next = self.first

    def chunk(self) -> Timed:
        """The phases of `beside` are no part of the whole."""
        timed = clocked(self.phases[self.next], self.device)
        timed.phases.update(clocked(self.beside[self.next], self.device).phases)
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
        timed.phases.update(clocked(self.beside[self.first], self.device).phases)
        self.restart()
        return timed

    def fill(self) -> None:
        """A full window at once, of random keys and values, and something before it to decode."""
        for decode in (self.phases[self.first][DECODE], *self.beside[self.first].values()):
            decode()
        for tensor in (self.cache.k, self.cache.v):
            tensor.normal_()
        self.cache.start.fill_(self.preset.window)
        self.next = self.preset.chunk


def chunk_phases(steps: int) -> list[str]:
    """In order."""
    return [NOISE, *(f"{STEP}{i + 1}" for i in range(steps)), DECODE, COPY, UPDATE]


def without_each(whole: float, ms: Mapping[str, float], have: Collection[str]) -> dict[str, float]:
    """`whole`, what remains of it without each part that the stream has, and what it is by the
    other decoder; ms: of phases."""
    out = {"all": whole}
    for name, phases in PARTS.items():
        if any(phase in have for phase in phases):
            out[f"without {name}"] = whole - sum(ms.get(phase, 0.0) for phase in phases)
    if TINY_DECODE in have:
        out["with the tiny VAE"] = whole - ms.get(DECODE, 0.0) + ms.get(TINY_DECODE, 0.0)
    out["denoising alone"] = sum(ms[name] for name in ms if name.startswith(STEP))
    return out


def medians(timed: Sequence[Timed]) -> dict[str, float]:
    return {name: statistics.median(t.phases[name] for t in timed) for name in timed[0].phases}
