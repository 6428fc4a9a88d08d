"""The causal Wan model of the public Self Forcing code before and after one line, in one run: time
of a pass over a full cache, and the largest difference of what it returns.

    PYTHONPATH=path/to/Self-Forcing python examples/causal_wan.py

Wan2.1-1.3B at 480×832 on a GPU, tiny on a CPU (where the public code's flash-attn does not run:
`python -m bench stream --public PATH` gives it PyTorch's attention). Weights are random: what a
pass costs does not depend on them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from wan.modules.causal_model import CausalWanModel

from sfkernels.integrations import patch, unpatch

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEIGHT, WIDTH, WINDOW, CHUNK, TEXT = (60, 104, 21, 3, 512) if CUDA else (4, 6, 6, 2, 6)
HEADS, DIM, FFN, LAYERS, TEXT_DIM = (12, 1536, 8960, 30, 4096) if CUDA else (2, 48, 96, 2, 16)
FRAME = HEIGHT * WIDTH // 4  # tokens


def caches() -> dict[str, Any]:
    """As the public pipeline makes them."""
    shape = 1, WINDOW * FRAME, HEADS, DIM // HEADS
    return {
        "kv_cache": [
            {name: torch.zeros(shape, dtype=DTYPE, device=DEVICE) for name in "kv"}
            | {f"{i}_end_index": torch.tensor([0], device=DEVICE) for i in ("global", "local")}
            for _ in range(LAYERS)
        ],
        "crossattn_cache": [{"is_init": False} for _ in range(LAYERS)],
    }


def seconds(call: Callable[[], Tensor]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model: Any = CausalWanModel(
        patch_size=(1, 2, 2), text_len=TEXT, in_dim=16, out_dim=16, dim=DIM, ffn_dim=FFN,
        freq_dim=256, text_dim=TEXT_DIM, cross_attn_norm=True, eps=1e-6,
        num_heads=HEADS, num_layers=LAYERS, local_attn_size=WINDOW,
    )  # fmt: skip
    for parameter in model.parameters():  # the head's are zeros in a new model
        torch.nn.init.normal_(parameter, std=0.05)
    model.to(DEVICE, DTYPE)
    latents = torch.randn(1, 16, CHUNK, HEIGHT, WIDTH, device=DEVICE, dtype=DTYPE)
    text = torch.randn(1, TEXT, TEXT_DIM, device=DEVICE, dtype=DTYPE)
    timestep = torch.full((1, CHUNK), 500.0, device=DEVICE, dtype=DTYPE)
    last = 2 * WINDOW // CHUNK  # chunk of a video that is past its window

    def video(held: dict[str, Any], first: int) -> Tensor:
        """Chunks `first` to `last`; what the last one gives."""
        for chunk in range(first, last + 1):
            out: Tensor = model(
                latents, t=timestep, context=text, seq_len=32760,
                current_start=chunk * CHUNK * FRAME, **held,
            )  # fmt: skip
        return out

    outs, times = {}, {}
    for change in (unpatch, patch):  # a video of its own each: a ring is in another order
        change(model)
        held = caches()
        outs[change] = video(held, 0)
        again = functools.partial(video, held, last)
        times[change] = min(seconds(again) for _ in range(5))
    before, after = (1e3 * found for found in times.values())
    apart = float((outs[patch] - outs[unpatch]).abs().max() / outs[unpatch].abs().max())
    print(
        f"a pass of {CHUNK} latent frames over a full window of {WINDOW} on {DEVICE}: public "
        f"{before:.1f} ms, patched {after:.1f} ms, {before / after:.2f} ×; largest difference "
        f"{apart:.1e} of the largest"
    )


if __name__ == "__main__":
    main()
