"""Work of test_sequence_parallel on three ranks, by torchrun: `python -m tests.stream_ranks FILE`.
The first rank writes what two and three of them have streamed, a tensor for each case."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfmodel.config import DiTConfig, Preset
from sfmodel.dit import DiT
from sfmodel.ranks import started
from sfmodel.sequence_parallel import HeadRanks
from sfmodel.stream import Stream

CONFIG = DiTConfig(48, 96, 6, 2, channels=4, text_dim=8, text_len=6)
SMALL = Preset(CONFIG, 4, 6, chunk=3, window=6)
# Chunks and frames; with a sink, a wrap inside a chunk, a still first, as passes of their own.
CASES: dict[str, dict[str, Any]] = {
    "chunk": {},
    "frame": dict(chunk=1, window=4, sink=1),
    "still": dict(first=1, window=7, sink=2),
    "apart": dict(chunk=2, window=5),
}


def model() -> DiT:
    torch.manual_seed(0)
    made = DiT(CONFIG)
    torch.nn.init.normal_(made.head.head.weight, std=0.1)
    return made.eval()


def streamed(made: DiT, case: str) -> Tensor:
    """Latents of two streams with prompts of their own, far past the window."""
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    preset = replace(SMALL, **CASES[case])
    stream = Stream(made, None, text, preset, seed=3, batch=2, merge=case != "apart")
    return torch.cat([*itertools.islice(stream.latents(), 14 // preset.chunk)], 1)


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    with started(device="cpu") as ranks:
        for size in (2, 3):
            group = dist.new_group([*range(size)])
            if ranks.rank < size:
                made = model()
                made.ranks = HeadRanks(group, CONFIG.heads, 6)
                found |= {f"{size} {case}": streamed(made, case) for case in CASES}
        if ranks.first:
            torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
