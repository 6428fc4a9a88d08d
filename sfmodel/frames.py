"""Frames of a video whose latents come chunk by chunk: decoded, copied to host memory, handed out.

Shapes: B samples, F latent frames of a chunk, T pixel frames, C channels, h×w latents, H×W pixels.
"""

from __future__ import annotations

import abc
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sfkernels.arguments import check_count
from sfmodel import graphs
from sfmodel.config import Preset
from sfmodel.ranges import phase
from sfmodel.vae.codec import NotFinite, VideoDecoder, finite_frames, to_bytes

DECODE, COPY = "decode", "copy to host"

Run = Callable[[], None]


def copy_all(kept: Any, new: Any) -> None:
    """Copies the tensors of a tree into those of another that is like it."""
    for old, other in zip(pytree.tree_leaves(kept), pytree.tree_leaves(new), strict=True):
        old.copy_(other)


class Decoding:
    """A clip's decoding, chunk by chunk. pixels [B, T, 3, H, W]: of the last chunk.

    A clip's first chunk is never part of a graph, since it does what others do not: no convolution
    sees anything before it. The others find the state where they left it."""

    def __init__(self, codec: VideoDecoder) -> None:
        self.codec = codec
        self.state: Any = None
        self.kept: Any = None  # where a graph finds the state
        self.pixels_BTCHW = torch.empty(0)

    def of(self, x_BFCHW: Tensor, launch: Callable[[Run], Run] | None = None) -> Run:
        """Function that decodes the chunk that lies in x, each time that it is called. launch:
        makes a CUDA graph of a function; None to run eagerly."""

        def decode() -> None:
            self.pixels_BTCHW, self.state = self.codec.decode_chunk(x_BFCHW, self.state)

        if launch is None:
            return decode
        self.kept = self.codec.decode_chunk(x_BFCHW)[1] if self.kept is None else self.kept
        made_BTCHW = self.pixels_BTCHW

        def in_place() -> None:
            nonlocal made_BTCHW
            made_BTCHW, state = self.codec.decode_chunk(x_BFCHW, self.kept)
            copy_all(self.kept, state)

        replay = launch(in_place)

        def decode_or_replay() -> None:
            if self.state is None:
                decode()
                copy_all(self.kept, self.state)
                self.state = self.kept
            else:
                replay()
                self.pixels_BTCHW = made_BTCHW

        return decode_or_replay


class OnHost(NamedTuple):
    """Frames as bytes [B, T, H, W, 3], and which of them hold finite numbers alone [B, T]."""

    bytes_BTHWC: Tensor
    finite_BT: Tensor


def _to_host(x: Tensor) -> Tensor:
    """A copy in host memory that the device does not wait for."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _arrived(frames: OnHost, event: Any, first: int) -> Tensor:
    """The bytes, once they are there; first: the number of the first frame. Raises `NotFinite`."""
    while event is not None and not event.query():
        time.sleep(0.0002)  # and not in a wait that Ctrl-C does not reach
    if not frames.finite_BT.all():
        frame, video = (~frames.finite_BT).T.nonzero()[0].tolist()
        raise NotFinite(first + frame, video)
    return frames.bytes_BTHWC


def _wanted(frames: int | None) -> float:
    """Number of pixel frames that are asked for. Raises ValueError for one below 1."""
    if frames is not None:
        check_count("frames", frames)
    return math.inf if frames is None else frames


class FrameStream(abc.ABC):
    """Frames of whoever puts the next chunk's latents into `latents_BFCHW` in `denoise`.

    codec: None for latents alone. preset: sizes and chunks. graph: decoding becomes CUDA graphs
    now, but for a clip's first chunk; not measured on a GPU yet. low_latency: the latent frames of
    a chunk are decoded one by one.

    latents [B, F, C, h, w]: by a chunk's size F. size, next: latent frames of the chunk that is
    there and of the next one. decoded: pieces of it that are; to_leave: those that `frames` has yet
    to decode. leaving: what is on its way to the host, with the events of its arrival; handed_out:
    pixel frames that `frames` gave. notes: why a phase is no graph, where that was asked for."""

    @torch.no_grad()
    def __init__(
        self,
        codec: VideoDecoder | None,
        preset: Preset,
        batch: int,
        device: torch.device,
        graph: bool = False,
        low_latency: bool = False,
    ) -> None:
        if graph and not graphs.possible(device):
            raise ValueError(f"graph=True: CUDA graphs need a CUDA device, not {device}")
        self.preset, self.batch, self.device = preset, batch, device
        self.graph, self.low_latency = graph, low_latency
        self.notes: dict[str, None] = {}
        self.size = self.next = self.first = preset.first or preset.chunk
        self.decoded = self.to_leave = self.handed_out = 0
        self.leaving: deque[tuple[OnHost, Any]] = deque()
        latent = preset.dit.channels, preset.height, preset.width
        self.latents_BFCHW = {frames: torch.zeros(batch, frames, *latent, device=device)
                              for frames in {self.first, preset.chunk}}  # fmt: skip
        self.lanes: tuple[Any, Any] | None = None  # for decoding and copying
        if graph and self.device.type == "cuda":
            self.lanes = graphs.lane(DECODE, self.device), graphs.lane(COPY, self.device)
        self.decoding: Decoding | None = None
        self.decoders: dict[int, list[Run]] = {}
        if codec is not None:
            # Its graphs run beside the others.
            launch = functools.partial(self.launch, pool=DECODE) if graph else None
            self.decoding = Decoding(codec)
            for frames, latents in self.latents_BFCHW.items():
                pieces = latents.split(1 if low_latency else frames, 1)
                self.decoders[frames] = [self.decoding.of(piece, launch) for piece in pieces]

    @abc.abstractmethod
    def denoise(self) -> Tensor:
        """The next chunk's clean latents x0 [B, F, C, h, w] in float32, in memory that the next one
        overwrites."""

    def finish_decoding(self) -> None:
        """Decodes what nobody has asked for of a chunk that was decoded in part: the next one goes
        on from there. What `frames` has begun to hand out leaves."""
        while self.to_leave:
            self._leave_next()
        if self.decoded:
            for piece in range(self.decoded, self.pieces):
                self._decode_beside(piece)
        self.decoded = 0

    def before_overwriting(self) -> None:
        """Has the device wait until the last chunk's latents are decoded."""
        if self.lanes:
            torch.cuda.current_stream(self.device).wait_stream(self.lanes[0])

    def launch(self, run: Run, pool: str = "") -> Run:
        """`run`, or its CUDA graph, in a pool of memory for those that do not run at once. Before a
        capture it really runs."""
        if not self.graph:
            return run
        stream = self.lanes[0] if self.lanes and pool == DECODE else None
        replay, note = graphs.captured(run, graphs.shared_pool(pool), stream)
        if note:
            self.notes[note] = None
        return replay or run

    def restart(self, text_BTE: Tensor | None = None, seed: int | None = None) -> None:
        """Goes back to before the first chunk. Prompt and seed are for whoever makes latents."""
        self.size = self.next = self.first
        self.decoded = self.to_leave = self.handed_out = 0
        self.leaving.clear()
        if self.decoding is not None:
            self.decoding.state = None

    @property
    def pieces(self) -> int:
        """Pieces in which the chunk is decoded."""
        return self.size if self.low_latency else 1

    @torch.no_grad()
    def decode(self, piece: int = 0) -> Tensor:
        """The pixels [B, T, 3, H, W] of a piece of the chunk, one after the other, about in
        [-1, 1], in memory that the next one may overwrite."""
        assert self.decoding is not None, "this stream has no codec"
        with phase(DECODE):
            self.decoders[self.size][piece]()
        self.decoded = piece + 1
        return self.decoding.pixels_BTCHW

    @torch.no_grad()
    def copy_to_host(self) -> OnHost:
        """The decoded pixels in host memory: on a GPU, once the device has come so far."""
        assert self.decoding is not None, "this stream has no codec"
        pixels_BTCHW = self.decoding.pixels_BTCHW
        with phase(COPY):
            both = to_bytes(pixels_BTCHW), finite_frames(pixels_BTCHW)
            return OnHost(*map(_to_host, both))

    def frames(self, frames: int | None = None) -> Iterator[Tensor]:
        """Decoded video as bytes [B, T, H, W, 3] in host memory, a chunk or a piece of one at a
        time; `frames` pixel frames in all, endless if None. Memory does not grow. A later call goes
        on with the next frame.

        In CUDA graphs, decoding and copies run on streams of the device of their own, and a chunk
        is handed out when the next one has been launched: the device does not wait for whoever
        takes them, and a new prompt is seen a chunk later. Raises `NotFinite` for a frame with NaN
        or infinity, ValueError for frames below 1."""
        left = _wanted(frames)
        while left > 0:
            ready = len(self.leaving)
            if sum(on_host.finite_BT.shape[1] for on_host, _ in self.leaving) < left:
                self._leave_next()
                while self.lanes and self.to_leave:
                    self._leave_next()
                ready = ready if self.lanes else len(self.leaving)
            for _ in range(ready):
                if left > 0 and self.leaving:  # and no other generator took it
                    bytes_BTHWC = self._hand_out(left)
                    left -= bytes_BTHWC.shape[1]
                    yield bytes_BTHWC

    def _leave_next(self) -> None:
        """Sends the next piece on its way, of the next chunk where this one has no more."""
        if not self.to_leave:
            self.denoise()
            self.to_leave = self.pieces
        self.leaving.append(self._leave(self.pieces - self.to_leave))
        self.to_leave -= 1

    def _hand_out(self, most: float) -> Tensor:
        """The frames that left first, once they are there, at most so many."""
        on_host, event = self.leaving[0]
        bytes_BTHWC = _arrived(on_host, event, self.handed_out)
        count = int(min(most, bytes_BTHWC.shape[1]))
        rest = OnHost(*(t[:, count:] for t in on_host))
        self.leaving.popleft()
        if rest.finite_BT.shape[1]:
            self.leaving.appendleft((rest, None))
        self.handed_out += count
        return bytes_BTHWC[:, :count]

    def _leave(self, piece: int) -> tuple[OnHost, Any]:
        """A piece of the chunk on its way to the host, and the event of its arrival: none where it
        is there."""
        self._decode_beside(piece)
        if not self.lanes:
            return self.copy_to_host(), self._now()
        decoding, copying = self.lanes
        copying.wait_stream(decoding)
        with torch.cuda.stream(copying):
            return self.copy_to_host(), self._now()

    def _now(self) -> Any:
        """An event that the device reaches after all that was launched; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def _decode_beside(self, piece: int) -> None:
        """Decodes a piece in the lane for it, if there is one."""
        if not self.lanes:
            self.decode(piece)
            return
        decoding, copying = self.lanes
        decoding.wait_stream(torch.cuda.current_stream(self.device))
        decoding.wait_stream(copying)  # which reads what is overwritten now
        with torch.cuda.stream(decoding):
            self.decode(piece)

    def video(self, frames: int | None = None) -> Iterator[Tensor]:
        """Decoded video, a chunk or a piece of one [B, T, 3, H, W] at a time as soon as it is
        ready; `frames` pixel frames in all, endless if None. Memory does not grow. A later call
        goes on with the next chunk. Raises ValueError for frames below 1."""
        left = _wanted(frames)
        while left > 0:
            self.denoise()
            for piece in range(self.pieces):
                pixels = self.decode(piece)
                pixels = pixels[:, : int(min(left, pixels.shape[1]))]
                yield pixels.clone() if self.graph else pixels
                left -= pixels.shape[1]
                if left <= 0:
                    return
