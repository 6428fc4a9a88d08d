"""The other video models of the paper's Table 1, some of them as diffusers runs them: the sizes of
the published checkpoints, random weights, nothing downloaded.

What a step costs and what decoding costs does not depend on the weights. Two steps are timed after
a warm-up of the whole pipeline, and extrapolated to the model's own number of steps; the embeddings
of the prompt are given, so no text encoder runs.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import timing


class Baseline(NamedTuple):
    """FPS and seconds to the first frame on one H100 as in the paper's Table 1 (arXiv 2506.08009).
    how it is measured here: a case of `bench.stream`, "bidirectional", "diffusers" or nothing."""

    name: str
    fps: float
    latency_s: float
    how: str = ""
    note: str = ""


BASELINES = (
    Baseline("Self Forcing, chunk-wise", 17.0, 0.69, "chunk-wise"),
    Baseline("Self Forcing, frame-wise", 8.9, 0.45, "frame-wise"),
    Baseline("CausVid", 17.0, 0.69, "chunk-wise",
             "the chunk-wise stream within its first window; past it CausVid recomputes its cache"),
    Baseline("Wan2.1-1.3B", 0.78, 103, "bidirectional"),
    Baseline("Wan2.1-1.3B, diffusers", 0.78, 103, "diffusers"),
    Baseline("LTX-Video", 8.98, 13.5, "diffusers"),
    Baseline("SkyReels-V2", 0.49, 112, "diffusers"),
    Baseline("MAGI-1", 0.19, 282),
    Baseline("NOVA", 0.88, 4.1),
    Baseline("Pyramid Flow", 6.7, 2.5),
)  # fmt: skip

# Name, FPS, what that includes, and the figure of a variant here that is its like.
ANCHORS = (
    ("Self Forcing", 17.0, "dense attention, Wan2.1's VAE", "all"),
    ("Light Forcing, dense", 21.7, "fused kernels, Wan2.1's VAE", "all"),
    ("Light Forcing", 33.9, "sparse attention, 8 bits, a small VAE", "with the tiny VAE"),
    ("FlashDreams", 34.9, "the transformer's four steps alone", "denoising alone"),
)

STEPS = 3  # of the timed call; the first one is not counted

_WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16,
    out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30,
    cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
)  # fmt: skip
_TINY_WAN = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32,
                 ffn_dim=32, num_layers=1)  # fmt: skip
# By class of diffusers: what is not as published by its defaults, and toy sizes for a CPU.
SIZES = {
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN | dict(inject_sample_info=True),
}
TINY: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": _TINY_WAN,
    "SkyReelsV2Transformer3DModel": _TINY_WAN,
    "AutoencoderKLWan": dict(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "LTXVideoTransformer3DModel": dict(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=16),
    "AutoencoderKLLTXVideo": dict(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5),
}  # fmt: skip
_UNIPC = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


class Peer(NamedTuple):
    """A pipeline of diffusers and its parts by their classes' names; scheduling: what is not as
    published by the scheduler's defaults. text: rows and channels of the prompt's embeddings,
    `masked` if the pipeline wants an attention mask with them. steps, guidance: the model's own.
    frames, height, width: of the video, in pixels."""

    pipeline: str
    transformer: str
    vae: str
    scheduler: str
    scheduling: Mapping[str, Any]
    guidance: float
    frames: int
    text: tuple[int, int] = (512, 4096)
    vae_dtype: torch.dtype = torch.float32
    masked: bool = False
    steps: int = 50
    height: int = 480
    width: int = 832


PEERS = {
    "Wan2.1-1.3B": Peer(
        "WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan", "UniPCMultistepScheduler",
        _UNIPC | dict(flow_shift=5.0), guidance=5.0, frames=81,
    ),
    # The 2B model of version 0.9. Its own resolution is 512×704; 121 frames as in the paper, whose
    # FPS times its latency they are.
    "LTX-Video": Peer(
        "LTXPipeline", "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo",
        "FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True), guidance=3.0,
        frames=121, text=(128, 4096), vae_dtype=torch.bfloat16, masked=True,
    ),
    # Skywork/SkyReels-V2-DF-1.3B-540P, all frames at once (synchronous mode).
    "SkyReels-V2": Peer(
        "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Transformer3DModel", "AutoencoderKLWan",
        "UniPCMultistepScheduler", _UNIPC | dict(flow_shift=8.0), guidance=6.0, frames=97,
        steps=30, height=544, width=960,
    ),
}  # fmt: skip


def measure(name: str, device: torch.device, tiny: bool = False) -> dict[str, Any]:
    """{"fps", "latency_s", "said"} of a pipeline of PEERS: a whole video, and as nothing is seen
    before it, the time to its first frame; or {"said"}, why there is none. tiny: toy sizes."""
    try:
        return _measure(PEERS[name], device, tiny)
    except ModuleNotFoundError as error:
        return {"said": f"not run: {error.name} is not installed"}
    except Exception as error:  # a version of diffusers with another interface, out of memory, …
        return {"said": f"not run: {timing.reason(error)}"}


def build(peer: Peer, device: torch.device, tiny: bool) -> Any:
    """The pipeline with random weights: the transformer in bfloat16, the VAE as published."""
    library = importlib.import_module("diffusers")

    def part(name: str, dtype: torch.dtype) -> Any:
        """As by `from_pretrained(torch_dtype=dtype)`, which leaves some modules in float32."""
        sizes = SIZES.get(name, {}) | (TINY[name] if tiny else {})
        with device:
            module = getattr(library, name)(**sizes).to(device).eval()
        kept = {*(module._keep_in_fp32_modules or ())}
        for where, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if kept.isdisjoint(where.split(".")):
                tensor.data = tensor.data.to(dtype)
        return module

    torch.manual_seed(0)
    pipeline = getattr(library, peer.pipeline)(
        tokenizer=None,
        text_encoder=None,
        transformer=part(peer.transformer, torch.bfloat16),
        vae=part(peer.vae, peer.vae_dtype),
        scheduler=getattr(library, peer.scheduler)(**peer.scheduling),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _measure(peer: Peer, device: torch.device, tiny: bool) -> dict[str, Any]:
    pipeline = build(peer, device, tiny)
    height, width, frames = (64, 64, 9) if tiny else (peer.height, peer.width, peer.frames)
    rows, channels = (8, 16) if tiny else peer.text
    arguments: dict[str, Any] = {"prompt": None, "height": height, "width": width,
                                 "num_frames": frames, "guidance_scale": peer.guidance}  # fmt: skip
    for which in ("prompt", "negative_prompt"):
        embeds = torch.randn(1, rows, channels, device=device, dtype=torch.bfloat16)
        arguments[f"{which}_embeds"] = embeds
        if peer.masked:
            arguments[f"{which}_attention_mask"] = torch.ones(1, rows, device=device)
    ends: list[float] = []

    def step_ended(_pipeline: Any, _step: int, _t: Any, tensors: dict[str, Tensor]) -> Any:
        timing.wait(device)
        ends.append(time.perf_counter())
        return tensors

    for steps in (1, STEPS):  # the first call warms up, decoding included
        ends.clear()
        pipeline(num_inference_steps=steps, callback_on_step_end=step_ended, **arguments)
        timing.wait(device)
    step_s = (ends[-1] - ends[0]) / (len(ends) - 1)
    decode_s = time.perf_counter() - ends[-1]
    seconds = peer.steps * step_s + decode_s
    return {
        "fps": frames / seconds,
        "latency_s": seconds,
        "said": f"diffusers, random weights, {height}×{width}, {frames} frames: {STEPS - 1} of "
        f"{peer.steps} steps timed ({1e3 * step_s:.3g} ms each, guidance included), "
        f"{decode_s:.3g} s of decoding, no text encoder",
    }


def text_encoder(device: torch.device, rows: int, **config: Any) -> Callable[[], Tensor]:
    """The encoder of UMT5-XXL by transformers, 5.7 B random weights in bfloat16: what encodes a
    prompt of `rows` tokens, [1, rows, 4096]. Raises what its library raises."""
    library = importlib.import_module("transformers")
    sizes = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                 feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # float32 weights would not fit everywhere
    try:
        with device:
            model = library.UMT5EncoderModel(library.UMT5Config(**sizes | config)).eval()
    finally:
        torch.set_default_dtype(before)
    tokens = torch.randint(model.config.vocab_size, (1, rows), device=device)

    @torch.no_grad()
    def encode() -> Tensor:
        out: Tensor = model(tokens).last_hidden_state
        return out

    return encode
