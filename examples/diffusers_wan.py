"""diffusers' Wan transformer before and after one line, in one run: time of a pass, and the largest
difference of what it returns. Then a video past its window, chunk by chunk, through a ring cache.

    python examples/diffusers_wan.py          # Wan2.1-1.3B at 480×832 on a GPU, tiny on a CPU

Weights are random: what a pass costs does not depend on them. Needs `pip install diffusers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from sfkernels.integrations import WanKVCache, patch, unpatch

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEIGHT, WIDTH, FRAMES, TEXT = (60, 104, 21, 512) if CUDA else (16, 24, 4, 16)
HEADS, HEAD_DIM, FFN, LAYERS, TEXT_DIM = (12, 128, 8960, 30, 4096) if CUDA else (4, 64, 512, 4, 64)


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
    model: Any = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=FFN, num_layers=LAYERS,
        text_dim=TEXT_DIM,
    )  # fmt: skip
    model.to(DEVICE, DTYPE)
    latents = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH, device=DEVICE, dtype=DTYPE)
    text = torch.randn(1, TEXT, TEXT_DIM, device=DEVICE, dtype=DTYPE)
    timestep = torch.full((1,), 500.0, device=DEVICE)

    def clip() -> Tensor:
        out: Tensor = model(latents, timestep, text).sample
        return out

    theirs = clip()
    patch(model)  # the one line
    ours = clip()
    times: dict[str, list[float]] = {"diffusers": [], "patched": []}
    for _ in range(5):  # in turns: what disturbs one disturbs the other
        unpatch(model)
        times["diffusers"].append(seconds(clip))
        patch(model)
        times["patched"].append(seconds(clip))
    before, after = (1e3 * min(one) for one in times.values())
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    print(
        f"a pass over {FRAMES} latent frames on {DEVICE}: diffusers {before:.1f} ms, patched "
        f"{after:.1f} ms, {before / after:.2f} ×; largest difference {apart:.1e} of the largest"
    )

    cache = WanKVCache(model, window=6, sink=1, height=HEIGHT, width=WIDTH)
    for chunk in range(4):
        with cache.append():
            model(latents[:, :, :3], timestep, text)
        with cache.overwrite():  # the other steps, and the pass on the clean latents
            model(latents[:, :, :3], timestep, text)
        held = min(cache.frames, cache.ring.window)
        print(f"chunk {chunk}: {cache.frames} latent frames so far, {held} of them in the ring")
    unpatch(model)
    assert torch.equal(clip(), theirs)


if __name__ == "__main__":
    main()
