"""The ranks of a command that torchrun started on several devices.

A collective that waits for a rank which has ended raises ConnectionError, never waits for good.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = 600.0  # seconds that a rank waits for another


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all of a run. mesh: what models are cut over; None alone."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over all ranks."""
        means = self._reduce([*values.values()], dist.ReduceOp.SUM, self.world)
        return dict(zip(values, means, strict=True))

    def any(self, flag: bool) -> bool:
        """Tells whether the flag is set on any rank."""
        return bool(self._reduce([float(flag)], dist.ReduceOp.MAX)[0])

    def _reduce(self, values: list[float], how: Any, divisor: int = 1) -> list[float]:
        if self.world == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, how)
        return (shared / divisor).tolist()

    def from_first(self, value: Any) -> Any:
        """Returns on all ranks what the first one gives."""
        held = [value]
        if self.world > 1:
            dist.broadcast_object_list(held, 0)
        return held[0]

    def agree(self, **given: Any) -> None:
        """Raises ValueError, on all ranks, where one was given something else than the first."""
        if self.world == 1:
            return
        all_given: list[Any] = [None] * self.world
        dist.all_gather_object(all_given, given)
        for rank, theirs in enumerate(all_given):
            for name, value in all_given[0].items():
                if theirs[name] != value:
                    raise ValueError(
                        f"rank {rank} has {name}={theirs[name]!r} and rank 0 {name}={value!r}: all "
                        "ranks must be given the same"
                    )

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def started(
    shard: int = 0, device: torch.device | str | None = None, patience: float = PATIENCE
) -> Iterator[Ranks]:
    """The ranks that torchrun started; without it, one alone. shard: how many ranks share a copy of
    the weights (0, or more than there are: all; fewer, such as those of a node: copies of it are
    kept equal). patience: seconds that a rank waits for another. Raises ConnectionError where one
    ended or hangs."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0)
    here = torch.device(device or "cpu") if not cuda else here
    if world == 1:
        yield Ranks(0, 1, here)
        return
    size = sharing(shard, world)
    if cuda:
        torch.cuda.set_device(here)
    own = not dist.is_initialized()
    # Outputs that are views are read here, never written.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    try:
        if own:
            backend, wait = "cpu:gloo,cuda:nccl" if cuda else "gloo", datetime.timedelta
            dist.init_process_group(backend, timeout=wait(seconds=patience))
        shape, names = ((world,), ("shard",)) if size == world else (
            (world // size, size), ("replicate", "shard"))  # fmt: skip
        mesh = init_device_mesh(here.type, shape, mesh_dim_names=names)
        yield Ranks(dist.get_rank(), world, here, mesh)
        dist.barrier()  # a rank that leaves while another one still works would take it down
    except RuntimeError as error:
        if not lost(error):
            raise
        raise ConnectionError(
            f"rank {os.environ['RANK']} of {world}: another rank ended, or did not answer for "
            f"{patience:g} seconds"
        ) from None
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def sharing(shard: int, world: int) -> int:
    """How many of `world` ranks share one copy of the weights; shard as of `started`. Raises
    ValueError where they do not divide."""
    size = min(shard or world, world)
    if world % size:
        raise ValueError(f"shard={shard}: must divide the {world} ranks")
    return size


def lost(error: BaseException) -> bool:
    """Tells whether an error says that another rank is not there. gloo's are plain ones."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
