"""The rolling KV cache of a streaming video: a ring that is written in place and never moved.

A frame keeps its slot for as long as it is visible. Keys are stored rotated at their absolute frame
index, so that the order of slots does not matter to attention and nothing is ever shifted, cloned
or concatenated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfkernels.arguments import check_count, check_lengths, check_shape, numbers
from sfkernels.layout import check_positions, check_window

# Queries of a head that have a semaphore: no more than a tile of attention has.
SEMAPHORE_ROWS = 16


def semaphores_needed(batch: int, queries: int, heads: int) -> int:
    """Number of semaphores that attention of so many queries over a ring needs."""
    return batch * heads * -(-queries // SEMAPHORE_ROWS)


class RingChunk(NamedTuple):
    """Place of the current chunk of F frames; int32 tensors on the cache's device.

    frame_F: absolute index of each frame (`RingKVCache` says how long). slot_F: its frame slot in
    the ring. valid: tokens of the ring that attention may read once the chunk is written. moved:
    frames by which the sink has moved along with the window then; 0 where it stays.
    """

    frame_F: Tensor
    slot_F: Tensor
    valid: Tensor
    moved: Tensor


def place(
    start: Tensor, frames: int, window: int, sink: int, frame_tokens: int, moves: bool = False
) -> RingChunk:
    """The place of the frames `start`, `start` + 1, … in a ring of `window` frames whose first
    `sink` ones stay, computed on the device. start: int32 [], or [B] for samples at different
    frames: then frame and slot are [B, F], valid and moved [B]. moves: whether the sink moves along
    with the window."""
    frame_F = start[..., None] + torch.arange(frames, dtype=torch.int32, device=start.device)
    rolling = sink + (frame_F - sink) % (window - sink)
    slot_F = torch.where(frame_F < sink, frame_F, rolling)
    end = start + frames
    valid = end.clamp(max=window) * frame_tokens
    moved = (end - window).clamp(min=0) if moves else torch.zeros_like(end)
    return RingChunk(frame_F, slot_F, valid, moved)


def frames_to_redo(end: int, frame: int, window: int, sink: int) -> int:
    """Frames that the next chunk must have at least, if a ring of `window` frames that holds those
    before `end` goes back to `frame`: slots hold the newest frames, and those that come after the
    chunk would be seen by it once the ring is full. Raises ValueError where no chunk is so long,
    and for a frame that has not come yet."""
    check_count("frame", frame, least=0, most=end)
    if end <= window or frame <= sink:  # all that the chunk sees is where it was
        return 0
    least = end - frame
    if least > window - sink:
        raise ValueError(
            f"frame={frame}: frames have left the window of {window}, sink {sink}, so that a ring "
            f"that ends before frame {end} goes back to frame {end - (window - sink)} at most, or "
            "to the start (reset)"
        )
    return least


class RingKVCache:
    """Keys and values of the newest frames of a stream, for all layers, and of its prompt.

    A stream goes chunk by chunk: `chunk(F)` says where the chunk's frames go, each layer writes its
    keys and values there (again at every denoising step, in place), and `commit(F)` makes them
    past once they are final. What changes from step to step (`start`) is an int32 tensor on the
    device, so that a captured CUDA graph goes on rolling when replayed.

    layers, batch, heads, head_dim: of the model and the stream.
    window: frames the ring holds, current chunk included; sink: the first frames, never evicted.
    positions: where the sink is for RoPE. "absolute": where it was, further and further back.
    "relative": right before the window's other frames, whatever has left between them: each chunk's
    first pass rotates the sink's keys on from `sink_k`, where `keep_sink` has left them, by `moved`
    frames (`sfkernels.rotate_keys`). As RoPE sees differences alone, all other keys stay as they
    are, and without a sink the two are the same.
    frame_tokens: tokens of a latent frame. text_tokens: rows of the prompt (0: no prompt cached).
    text_heads: of the prompt, where the ring holds fewer than all; as many as of the ring if None.

    k, v: [layers, batch, window · frame_tokens, heads, head_dim].
    sink_k: [layers, batch, sink · frame_tokens, heads, head_dim], without rows if positions stay.
    text_k, text_v: [layers, batch, text_tokens, text_heads, head_dim].
    semaphores: int32 zeros for `ring_attention`, which all layers use, one after the other.
    start: int32 [], absolute index of the first frame of the current chunk. A stream is endless:
    where the index would not fit in 32 bits, after 17 years at four latent frames a second, it goes
    back by a multiple of the ring's period, window − sink, to a number of at least `window`. Slots,
    the sink and what is visible go on as before. Frames then count, for RoPE and for noise, from
    about `window` on, while keys in the ring keep the positions they were rotated at: for one
    window of frames, distances to those outside the sink are wrong.

    Raises ValueError for sizes that do not fit together and MemoryError, before anything is
    allocated, where the device has too little free memory.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        window: int,
        frame_tokens: int,
        heads: int,
        head_dim: int,
        sink: int = 0,
        positions: str = "absolute",
        text_tokens: int = 0,
        text_heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = dict(layers=layers, batch=batch, heads=heads, head_dim=head_dim)
        for name, size in (sizes | dict(window=window, frame_tokens=frame_tokens)).items():
            check_count(name, size)
        check_count("text_tokens", text_tokens, least=0)
        text_heads = heads if text_heads is None else text_heads
        check_count("text_heads", text_heads)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}: must be floating point")
        check_window(window, sink, chunk=1)
        check_positions(positions)
        self.window, self.sink, self.frame_tokens = window, sink, frame_tokens
        self.positions = positions
        moving = sink if positions == "relative" else 0
        need = self.bytes_needed(
            window=window,
            moving=moving,
            frame_tokens=frame_tokens,
            text_tokens=text_tokens,
            text_heads=text_heads,
            dtype=dtype,
            **sizes,
        )
        free = free_memory(torch.device(device))
        if need > free:
            per_frame = self.bytes_needed(window=1, frame_tokens=frame_tokens, dtype=dtype, **sizes)
            raise MemoryError(
                f"a window of {window} frames needs {need / 2**30:.2f} GiB of keys and values: "
                f"{free / 2**30:.2f} GiB are free on {device}, room for {free // per_frame} frames"
            )
        ring = (layers, batch, window * frame_tokens, heads, head_dim)
        kept = (layers, batch, moving * frame_tokens, heads, head_dim)
        text = (layers, batch, text_tokens, text_heads, head_dim)
        # Zeros, because a masked read of a slot never written must not meet a NaN.
        self.k, self.v = (torch.zeros(ring, dtype=dtype, device=device) for _ in range(2))
        self.sink_k = torch.zeros(kept, dtype=dtype, device=device)
        self.text_k, self.text_v = (torch.zeros(text, dtype=dtype, device=device) for _ in range(2))
        self.start = torch.zeros((), dtype=torch.int32, device=device)
        needed = semaphores_needed(batch, window * frame_tokens, heads)
        self.semaphores = torch.zeros(needed, dtype=torch.int32, device=device)
        # Of a ring that was rewound: where it is, and the end of the frames that it holds.
        self._at = self._held = 0

    @staticmethod
    def bytes_needed(
        *,
        layers: int,
        batch: int,
        window: int,
        frame_tokens: int,
        heads: int,
        head_dim: int,
        moving: int = 0,
        text_tokens: int = 0,
        text_heads: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of a cache of these sizes, without allocating it. moving: frames of the sink, where
        positions are relative."""
        text = text_tokens * (heads if text_heads is None else text_heads)
        rows = (2 * window + moving) * frame_tokens * heads + 2 * text
        return layers * batch * rows * head_dim * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.sink_k, self.text_k, self.text_v))

    def chunk(self, frames: int, after: int = 0, start: Tensor | None = None) -> RingChunk:
        """Places the next `frames` frames, computed on the device; after: how many come before
        them that are not past yet. In a full window these frames may take slots of those: run the
        attention of what comes before first, layer by layer. Raises ValueError where there are none
        or they do not fit beside the sink.

        start: the first frame, in place of the cache's own `start`, of samples at different frames
        an int32 tensor [batch]; all that is returned then has a row or a number for each. Who
        counts frames himself does not commit, and goes back only as far as `rewind` would: what is
        on the device is not looked at."""
        check_window(self.window, self.sink, frames)
        check_count("after", after, least=0, most=self.window)
        if self._at + frames < self._held:
            raise ValueError(
                f"a chunk of {frames} frames would see those after it, which the ring held when it "
                f"was rewound: must have {self._held - self._at} at least"
            )
        if start is None:
            start = self._wrapped_start()
        else:
            check_lengths("start", start, self.k[0])
            last = 2**31 - 1 - 2 * self.window
            if (
                start.dim() > 1
                or start.numel() not in (1, self.k.shape[1])
                or not all(0 <= first <= last for first in numbers(start) or ())
            ):
                raise ValueError(
                    f"start is {start.dtype} {[*start.shape]}: must be one number or "
                    f"[{self.k.shape[1]}] of them, each 0 to {last}"
                )
            start = start.expand(self.k.shape[1]) if start.dim() else start
        return place(
            start.to(torch.int32) + after, frames, self.window, self.sink, self.frame_tokens,
            moves=self.sink_k.numel() > 0,
        )  # fmt: skip

    def rewind(self, frame: int) -> None:
        """Goes back to `frame`: the next chunk starts there. Waits for the device.

        Exact as long as nothing has left the window, and back into the sink; otherwise if the next
        chunk covers all frames that came since, which `chunk` sees to. Raises ValueError for a
        frame that has not come yet and for one too far back for that."""
        end = max(int(self.start), self._held)
        redo = frames_to_redo(end, frame, self.window, self.sink)
        self.start.fill_(frame)
        self._at, self._held = frame, end if redo else 0

    def keep_sink(self) -> None:
        """Keeps the sink's keys as they are in the ring now: final, and where they were written."""
        self.sink_k.copy_(self.k[:, :, : self.sink_k.shape[2]])

    def commit(self, frames: int) -> None:
        """Makes the current chunk of `frames` frames past. Its keys and values stay in place.
        Raises ValueError as `chunk` does."""
        check_window(self.window, self.sink, frames)
        self.start.copy_(self._wrapped_start() + frames)
        self._at += frames

    def _wrapped_start(self) -> Tensor:
        """`start`, so far back that 32 bits hold two windows more."""
        last = 2**31 - 1 - 2 * self.window
        period = self.window - self.sink
        back = (last - self.window) // period * period
        return torch.where(self.start > last, self.start - back, self.start)

    def reset(self) -> None:
        """Empties the ring; the prompt stays. The ring is filled with zeros, as it was made: a
        stream that went NaN must not reach the next one through a slot that is not valid yet."""
        for tensor in (self.k, self.v, self.sink_k, self.start, self.semaphores):
            tensor.zero_()
        self._at = self._held = 0

    def state_dict(self) -> dict[str, Any]:
        """The cache's tensors (not copies) and geometry, for `torch.save` or `load_state_dict`."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        held = {"held": self._held} if self._held else {}  # of a ring that was rewound
        return tensors | {"geometry": self._geometry} | held

    @property
    def _geometry(self) -> tuple[int, int, int, str]:
        return self.window, self.sink, self.frame_tokens, self.positions

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a saved state in. Raises ValueError, changing nothing, if it does not fit."""
        keys = {*_TENSORS, "geometry"}
        missing = keys - state.keys() if isinstance(state, dict) else keys
        if missing:
            raise ValueError(f"not a saved KV cache: {', '.join(sorted(missing))} missing")
        saved = state["geometry"]
        if not isinstance(saved, (tuple, list)) or tuple(saved) != self._geometry:
            raise ValueError(
                f"saved with (window, sink, frame_tokens, positions) {saved}: this cache has "
                f"{self._geometry}"
            )
        for name in _TENSORS:
            got, want = state[name], getattr(self, name)
            check_shape(f"saved {name}", got, tuple(want.shape))
            if got.dtype != want.dtype or got.is_meta:
                raise ValueError(
                    f"saved {name} is {got.dtype} on {got.device}: must be {want.dtype}, in memory"
                )
        if int(state["start"]) < 0:
            raise ValueError(f"saved start is {int(state['start'])}: must be 0 or more frames")
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])
        self._at, self._held = int(self.start), int(state.get("held", 0))


_TENSORS = ("k", "v", "sink_k", "text_k", "text_v", "start")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")
