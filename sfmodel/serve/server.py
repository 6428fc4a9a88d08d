"""A server of live streams: its engines, the thread for prompts, clips, counters and limits."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sfmodel.batching import StreamBatch
from sfmodel.config import Preset
from sfmodel.cost import GIB, PIXEL_FRAMES, VAE_STRIDE, activations_gib, pixel_frames
from sfmodel.dit import DiT
from sfmodel.graphs import on
from sfmodel.pretrained import TextEncoder
from sfmodel.serve.clips import Clips
from sfmodel.serve.engine import Engine
from sfmodel.serve.metrics import Metrics
from sfmodel.serve.session import RECORDED, Session
from sfmodel.serve.text import TextThread
from sfmodel.vae.codec import VideoCodec

SHARE = 0.8  # of the memory that is free that sessions may take
MOST = 64  # sessions of a device, however small they are
WORKERS = 2  # threads that read pictures and write clips
WARM_UP = 3  # chunks: the first, one behind it, and one whose cache update is merged with its step


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server. sessions: of each device; as many as its memory holds if None.
    idle: seconds that a connection may be without a stream that runs. seconds: of a stream.
    connections: at once."""

    sessions: int | None = None
    idle: float = 300.0
    seconds: float = 3600.0
    connections: int = 256

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be more than 0")


class Full(RuntimeError):
    """No place for another session."""


class Server:
    """Streams of one preset for clients that come and go. models, codecs: of each device.
    examples: prompts that the page proposes."""

    def __init__(
        self,
        models: Sequence[DiT],
        codecs: Sequence[VideoCodec],
        text: TextEncoder,
        name: str,
        preset: Preset,
        clips: Path,
        limits: Limits | None = None,
        examples: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.name, self.preset, self.limits = name, preset.check(), limits or Limits()
        self.examples, self.metrics = examples, Metrics()
        self.clips = Clips(clips, preset.fps)
        self.text = TextThread(text, models[0].device)
        self.engines = []
        for model, codec in zip(models, codecs, strict=True):
            with on(model.device):
                seconds, held = warmed_up(model, codec, preset, **options)
                places = min(room(model.device, held, len(models)), self.limits.sessions or MOST)
            engine = Engine(model, codec, preset, self.metrics, places, seconds, **options)
            self.engines.append(engine)
        self.metrics.places.set(self.places)
        self.connected = 0  # clients
        self.metrics.connections.set_function(lambda: self.connected)
        self.metrics.sessions.set_function(lambda: len(self.sessions))
        self.workers = anyio.CapacityLimiter(WORKERS)

    @property
    def places(self) -> int:
        return sum(engine.places for engine in self.engines)

    @property
    def real_time(self) -> int:
        """About how many streams keep to the video's rate, each chunk as long as one by itself took
        last: with more, all are slower."""
        chunk = PIXEL_FRAMES * self.preset.chunk / self.preset.fps
        return sum(int(chunk / engine.seconds) for engine in self.engines)

    def start(self) -> None:
        for engine in self.engines:
            engine.start()

    def stop(self) -> None:
        """Ends all threads, after the steps that are under way."""
        for engine in self.engines:
            engine.stop()
        self.text.stop()

    @property
    def sessions(self) -> list[Session]:
        """Those that hold a place."""
        return [session for engine in self.engines for session in [*engine.taken]]

    @property
    def alive(self) -> bool:
        """Tells whether all engines run."""
        return all(engine.alive for engine in self.engines)

    def crowd(self) -> dict[str, int]:
        """How many hold a place, of how many."""
        return {"sessions": len(self.sessions), "places": self.places}

    def facts(self) -> dict[str, Any]:
        """What a client is told at first."""
        preset = self.preset
        return {
            "preset": self.name,
            "width": VAE_STRIDE * preset.width,
            "height": VAE_STRIDE * preset.height,
            "fps": preset.fps,
            "first": pixel_frames(preset.first or preset.chunk),
            "chunk": PIXEL_FRAMES * preset.chunk,
            "window": preset.window,
            "examples": [*self.examples],
            "limits": {"idle": self.limits.idle, "seconds": self.limits.seconds},
            **self.crowd(),
        }

    def free_engine(self) -> Engine:
        """The engine that runs with the most places left. Raises `Full` where none has one."""
        running = [each for each in self.engines if each.alive] or self.engines
        engine = max(running, key=lambda each: each.places - len(each.taken))
        if len(engine.taken) >= engine.places:
            self.metrics.refused.labels("full").inc()
            many = "the only place is" if self.places == 1 else f"all {self.places} places are"
            raise Full(f"{many} taken: try again later")
        return engine


def warmed_up(model: DiT, codec: VideoCodec, preset: Preset, **options: Any) -> tuple[float, int]:
    """Runs a stream, for what the first one compiles and loads. Returns seconds of a chunk, and the
    bytes that each stream takes: what it holds, counted, and its part of the largest pass, which is
    worked out (`sfmodel.cost`)."""
    text_1TE = torch.zeros(1, 1, model.config.text_dim, device=model.device)
    stream = StreamBatch(model).open(codec, text_1TE, preset, **options)
    seconds = 0.0
    for _ in range(WARM_UP):
        began = time.monotonic()
        next(stream.frames())
        while stream.to_leave:
            next(stream.frames())
        seconds = time.monotonic() - began
    assert stream.decoding is not None
    kept = vars(stream.cache), stream.recent_BFCHW, stream.latents_BFCHW, stream.x
    tensors = [x for x in pytree.tree_leaves(kept) if isinstance(x, Tensor)]
    state = pytree.tree_leaves(stream.decoding.state)
    # While a chunk is decoded the decoder's state is there before and after it.
    held = sum(x.nbytes for x in tensors) + 2 * sum(x.nbytes for x in state)
    return seconds, held + int(activations_gib(preset) * GIB * model.dtype.itemsize / 2)


def room(device: torch.device, held: int, devices: int = 1) -> int:
    """Streams of so many bytes that fit into what is free of a device's memory, and of this
    machine's, which devices share, with what it keeps of each to be saved. Raises MemoryError where
    none does."""
    host = _available() // devices
    most = int(SHARE * host / (RECORDED + (held if device.type != "cuda" else 0)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        most = min(most, int(SHARE * free / held))
    else:
        free = host
    if most < 1:
        raise MemoryError(
            f"a stream takes {held / GIB:.2f} GiB and {free / GIB:.2f} are free on {device}: make "
            "the window or the picture smaller"
        )
    return most


def _available() -> int:
    """Bytes of this machine's memory that programs can still take."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
