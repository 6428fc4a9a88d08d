"""The rolling KV cache of a streaming video: a ring that is written in place and never moved.

A frame keeps its slot for as long as it is visible. Keys are stored rotated at their absolute frame
index, so that the order of slots does not matter to attention and nothing is ever shifted, cloned
or concatenated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfkernels.layout import check_window


class RingChunk(NamedTuple):
    """Where the current chunk of F frames stands; int32 tensors on the cache's device.

    frame_F: absolute index of each frame. slot_F: its frame slot in the ring. valid: tokens of the
    ring that attention may read once the chunk is written.
    """

    frame_F: Tensor
    slot_F: Tensor
    valid: Tensor


class RingKVCache:
    """Keys and values of the newest frames of a stream, for all layers, and of its prompt.

    A stream goes chunk by chunk: `chunk(F)` says where the chunk's frames go, each layer writes its
    keys and values there (again at every denoising step, in place), and `commit(F)` makes them
    past once they are final. What changes from step to step (`start`) is an int32 tensor on the
    device, so that a captured CUDA graph goes on rolling when replayed.

    layers, batch, heads, head_dim: of the model and the stream.
    window: frames the ring holds, current chunk included; sink: the first frames, never evicted.
    frame_tokens: tokens of a latent frame. text_tokens: rows of the prompt (0: no prompt cached).

    k, v: [layers, batch, window · frame_tokens, heads, head_dim].
    text_k, text_v: [layers, batch, text_tokens, heads, head_dim].
    start: int32 [], absolute index of the first frame of the current chunk.

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
        text_tokens: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = dict(layers=layers, batch=batch, heads=heads, head_dim=head_dim)
        for name, size in (sizes | dict(window=window, frame_tokens=frame_tokens)).items():
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1")
        check_window(window, sink, chunk=1)
        self.window, self.sink, self.frame_tokens = window, sink, frame_tokens
        need = self.bytes_needed(
            window=window,
            frame_tokens=frame_tokens,
            text_tokens=text_tokens,
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
        text = (layers, batch, text_tokens, heads, head_dim)
        # Zeros, because a masked read of a slot never written must not meet a NaN.
        self.k, self.v = (torch.zeros(ring, dtype=dtype, device=device) for _ in range(2))
        self.text_k, self.text_v = (torch.zeros(text, dtype=dtype, device=device) for _ in range(2))
        self.start = torch.zeros((), dtype=torch.int32, device=device)

    @staticmethod
    def bytes_needed(
        *,
        layers: int,
        batch: int,
        window: int,
        frame_tokens: int,
        heads: int,
        head_dim: int,
        text_tokens: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of a cache of these sizes, without allocating it."""
        rows = layers * batch * (window * frame_tokens + text_tokens)
        return 2 * rows * heads * head_dim * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.text_k, self.text_v))

    def chunk(self, frames: int) -> RingChunk:
        """Places the next `frames` frames, computed on the device. Raises ValueError where there
        are none or they do not fit beside the sink."""
        if frames < 1:
            raise ValueError(f"frames={frames}: a chunk must have at least 1")
        check_window(self.window, self.sink, frames)
        frame_F = self.start + torch.arange(frames, dtype=torch.int32, device=self.start.device)
        rolling = self.sink + (frame_F - self.sink) % (self.window - self.sink)
        slot_F = torch.where(frame_F < self.sink, frame_F, rolling)
        valid = (self.start + frames).clamp(max=self.window) * self.frame_tokens
        return RingChunk(frame_F, slot_F, valid)

    def commit(self, frames: int) -> None:
        """Makes the current chunk of `frames` frames past. Its keys and values stay in place."""
        self.start += frames

    def reset(self) -> None:
        """Back to an empty ring; the prompt stays. The ring is filled with zeros, as it was made: a
        stream that went NaN must not reach the next one through a slot that is not valid yet."""
        for tensor in (self.k, self.v, self.start):
            tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The cache's tensors (not copies) and geometry, for `torch.save` or `load_state_dict`."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return tensors | {"geometry": (self.window, self.sink, self.frame_tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a saved state in. Raises ValueError, changing nothing, if it does not fit."""
        missing = {*_TENSORS, "geometry"} - state.keys()
        if missing:
            raise ValueError(f"not a saved KV cache: {', '.join(sorted(missing))} missing")
        mine = (self.window, self.sink, self.frame_tokens)
        if tuple(state["geometry"]) != mine:
            raise ValueError(
                f"saved with (window, sink, frame_tokens) {tuple(state['geometry'])}: this cache "
                f"has {mine}"
            )
        for name in _TENSORS:
            got, want = state[name].shape, getattr(self, name).shape
            if got != want:
                raise ValueError(f"saved {name} has shape {[*got]}: this cache has {[*want]}")
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])


_TENSORS = ("k", "v", "text_k", "text_v", "start")


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
