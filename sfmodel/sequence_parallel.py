"""One stream on several devices: sequence parallelism over heads (DeepSpeed-Ulysses, arXiv
2309.14509), and decoding on a device of its own, beside the next chunk.

Outside attention a rank has 1/R of the tokens of each frame, inside it all tokens and 1/R of the
heads, whose part of the ring it alone holds. Between them q, k, v travel to the heads and
attention's output back to the tokens, each in one all-to-all; after the last layer all ranks get
the whole flow and take the same step of the sampler with the same noise. Not measured on a GPU yet.

Shapes: B batch, F latent frames, N tokens of a frame, n = N / R of them, L = F·N tokens, l = F·n,
H heads, h = H / R, D head dim, W frame slots of a ring, S = W·N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sfmodel.config import Preset
from sfmodel.cost import GPUS, PIXEL_FRAMES, multi_gpu, pixel_frames
from sfmodel.frames import FrameStream
from sfmodel.ranks import Ranks


class HeadRanks:
    """Ranks that share the passes of one model. group: of torch.distributed, this one among them.
    Raises ValueError where they do not divide the heads, or the tokens of a frame."""

    def __init__(self, group: dist.ProcessGroup, heads: int, frame_tokens: int) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if heads % self.size or frame_tokens % self.size:
            raise ValueError(
                f"{self.size} ranks must divide the {heads} heads of the model and the "
                f"{frame_tokens} tokens of a frame"
            )
        self.frame_tokens = frame_tokens

    def own(self, x_BLC: Tensor) -> Tensor:
        """This rank's tokens of each frame, [B, l, C]."""
        x_BFRnC = x_BLC.unflatten(1, (-1, self.size, self.frame_tokens // self.size))
        return x_BFRnC[:, :, self.rank].flatten(1, 2)

    def to_heads(self, *own_BlHD: Tensor) -> tuple[Tensor, ...]:
        """All tokens of this rank's heads, [B, L, h, D], of each tensor of own tokens."""
        sent_RTBlhD = torch.stack(
            [t.unflatten(2, (self.size, -1)).movedim(2, 0) for t in own_BlHD], 1
        )
        got_RTBlhD = self._exchange(sent_RTBlhD)
        got_TBFRnhD = got_RTBlhD.unflatten(3, (-1, self.frame_tokens // self.size)).movedim(0, 3)
        return got_TBFRnhD.flatten(2, 4).unbind()

    def to_tokens(self, x_BLhD: Tensor) -> Tensor:
        """All heads of this rank's tokens, [B, l, H, D]."""
        x_BFRnhD = x_BLhD.unflatten(1, (-1, self.size, self.frame_tokens // self.size))
        got_RBFnhD = self._exchange(x_BFRnhD.movedim(2, 0))
        return got_RBFnhD.movedim(0, 3).flatten(3, 4).flatten(1, 2)

    def whole(self, own_BlC: Tensor) -> Tensor:
        """All tokens of all ranks, [B, L, C]."""
        own_BFnC = own_BlC.unflatten(1, (-1, self.frame_tokens // self.size)).contiguous()
        all_RBFnC = own_BFnC.new_empty(self.size, *own_BFnC.shape)
        dist.all_gather([*all_RBFnC], own_BFnC, self.group)
        return all_RBFnC.movedim(0, 2).flatten(1, 3)

    def append(
        self, k_BLhD: Tensor, v_BLhD: Tensor, ring: tuple[Tensor, Tensor], slot_F: Tensor
    ) -> None:
        """Writes a chunk's keys and values into its frame slots of the ring [B, S, h, D]."""
        index_F = slot_F.long()
        for ring_BShD, new_BLhD in zip(ring, (k_BLhD, v_BLhD), strict=True):
            frames_BWNhD = ring_BShD.unflatten(1, (-1, self.frame_tokens))
            frames_BWNhD.index_copy_(1, index_F, new_BLhD.unflatten(1, (len(slot_F), -1)))

    def _exchange(self, sent_R: Tensor) -> Tensor:
        """Sends each rank its part of a tensor, and returns those that all have sent here."""
        sent_R = sent_R.contiguous()
        got_R = torch.empty_like(sent_R)
        dist.all_to_all_single(got_R, sent_R, group=self.group)
        return got_R


class Team(NamedTuple):
    """Part of this process in a stream on many ranks. heads: those it shares the passes with; None
    where it has none of them, or all. runs: it has the model. decodes: it has the decoder. decoder:
    the rank that does."""

    heads: HeadRanks | None
    runs: bool
    decodes: bool
    decoder: int

    @classmethod
    def of(cls, ranks: Ranks, preset: Preset, decoder: str = "wan") -> Team:
        """All ranks share the passes and the first one decodes, or the last one does and the others
        share the passes: what `cost.multi_gpu` predicts to be faster on H200s. decoder: as there.
        Raises ValueError for a number of ranks that does not fit."""
        world, heads = ranks.world, preset.dit.heads
        frame_tokens = preset.grid[0] * preset.grid[1]
        if world == 1:
            return cls(None, True, True, 0)
        ways = multi_gpu(preset, GPUS["h200"], heads + 1, decoder=decoder)
        fits = [way for way in ways if way["gpus"] == world]
        if not fits:
            can = ", ".join(str(n) for n in sorted({way["gpus"] for way in ways} - {1}))
            raise ValueError(
                f"{world} ranks cannot share {heads} heads and {frame_tokens} tokens of a frame "
                f"evenly, nor can one rank less: start {can}"
            )
        size = max(fits, key=lambda way: way["fps"])["transformer_gpus"]
        group = dist.new_group([*range(size)])
        runs, decodes = ranks.rank < size, size if size < world else 0
        shared = HeadRanks(group, heads, frame_tokens) if runs and size > 1 else None
        return cls(shared, runs, ranks.rank == decodes, decodes)

    def send(self, latents_BFCHW: Tensor) -> None:
        """Sends a chunk's latents to the decoder's rank, if they come from the first and that is
        another one."""
        if self.decoder and dist.get_rank() == 0:
            dist.send(latents_BFCHW, self.decoder)


class Received(FrameStream):
    """Frames of latents that the first rank makes."""

    def denoise(self) -> Tensor:
        self.finish_decoding()
        self.size, self.next = self.next, self.preset.chunk
        self.before_overwriting()
        dist.recv(self.latents_BFCHW[self.size], 0)
        return self.latents_BFCHW[self.size]


def chunks_of(preset: Preset, frames: int) -> int:
    """How many chunks give so many pixel frames."""
    first = pixel_frames(preset.first or preset.chunk)
    return 1 + max(0, -(-(frames - first) // (PIXEL_FRAMES * preset.chunk)))
