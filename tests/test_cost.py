"""The analytical model: every formula against a hand count, and its figures for Wan2.1-1.3B at
480×832 on an H200."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sfkernels import BlockLayout, roofline
from sfmodel import cost
from sfmodel.cli import predict
from sfmodel.cli.predict import prediction, setting
from sfmodel.config import PRESETS, DiTConfig
from sfmodel.cost import GPUS, Gpu, Way, waves
from sfmodel.dit import DiT
from sfmodel.vae import flops

H200, H100 = GPUS["h200"], GPUS["h100"]
WAN = setting("wan-1.3b", 480, 832)
FRAME_WISE = replace(WAN, chunk=1)
N, D = 1560, 1536  # tokens of a frame, channels
SMALL = DiTConfig(dim=8, ffn_dim=20, heads=2, layers=3, channels=4, text_len=5, text_dim=6)


def agrees(value: float, said: str) -> bool:
    """Within 2%, or within half a unit of the last digit that is given if that is more."""
    digits = len(said.partition(".")[2])
    return abs(value - float(said)) <= max(0.02 * float(said), 0.5 * 10**-digits)


# --- Formulas


def test_attention() -> None:
    """10 pairs of 3 heads of 8: two products of 10 · 3 · 8 multiply-adds, five backward, three for
    the pairs without a gradient."""
    assert roofline.attention_flops(10, 3, 8) == 2 * 2 * 240
    assert roofline.attention_flops(10, 3, 8, backward=True) == 5 * 2 * 240
    assert roofline.attention_flops(10, 3, 8, True, no_gradient=4) == 5 * 2 * 144 + 3 * 2 * 96
    assert roofline.attention_bytes(2, 5, 3, 8, 2) == (2 + 5 + 5 + 2) * 24 * 2


def test_pointwise_ops() -> None:
    assert roofline.norm_bytes(7, 10, 4, 2) == 4 * 70 * 2
    # x, y read, x', out written, behind 3 rows copied; dx', dout, x' read, dx written.
    assert roofline.norm_silu_bytes(7, 3, 10, 2) == 4 * 70 * 2 + 2 * 30 * 2
    assert roofline.norm_silu_bytes(7, 3, 10, 2, backward=True) == 4 * 70 * 2
    table = 5 * 4 * 2 * 4  # 5 tokens, 4 pairs, a cosine and a sine, float32
    assert roofline.rope_table_bytes(5, 8) == table
    assert roofline.qk_norm_rope_bytes(5, 16, 8, 2) == (3 + 3) * 80 * 2 + table
    assert roofline.qk_norm_rope_bytes(5, 16, 8, 2, backward=True) == (3 + 2 + 3) * 80 * 2 + table
    assert roofline.sampler_bytes(10, 5) == 5 * 10 * 4


def test_convolution() -> None:
    """6 pixels, 2 channels to 3, 9 taps: 6 · 3 outputs of 2 · 9 multiply-adds."""
    assert roofline.convolution_flops(6, 2, 3, 9) == 6 * 3 * 2 * 9 * 2
    assert roofline.convolution_bytes(8, 6, 2, 3, 9, 2) == 2 * (8 * 2 + 6 * 3 + 2 * 3 * 9)


def test_pass() -> None:
    """Self-attention has q, k, v and o, cross-attention q and o; 16 numbers make a token."""
    linears = 2 * 7 * (3 * (4 * 64 + 2 * 64 + 2 * 8 * 20) + 2 * 16 * 8)
    attended, crossed = 3 * 4 * 8 * 70, 3 * 4 * 8 * 7 * 5
    assert cost.pass_parts(SMALL, 7, 70) == (linears, attended, crossed)
    assert cost.pass_flops(SMALL, 7, 70) == linears + attended + crossed


@pytest.mark.parametrize(("frames", "chunk", "first"), [(21, 3, None), (7, 3, 1), (5, 1, None)])
def test_causal_pairs_are_those_of_the_layout(frames: int, chunk: int, first: int | None) -> None:
    layout = BlockLayout.causal(frames, chunk, 4, first=first)
    assert cost.causal_pairs(layout.chunks, 4) == layout.pairs
    assert 2 * layout.pairs == replace(layout, teacher_forcing=True).pairs


def test_rolling() -> None:
    """A window of 3 chunks of 2 frames of 4 tokens, 2 steps."""
    found = cost.rolling_flops(SMALL, 4, 6, 2, 2)
    cached = [cost.pass_flops(SMALL, 8, 8 * 4 * seen) for seen in (2, 4, 6)]
    assert found == {
        "recompute window": 2 * cost.pass_flops(SMALL, 24, BlockLayout((4, 2), 4).pairs),
        "recompute cache": cached[0] + cached[1] + 2 * cached[2],
        "ring cache": 3 * cached[2],
    }


@pytest.mark.parametrize("config", [SMALL, *(p.dit for p in PRESETS.values())])
def test_parameters_are_those_of_the_module(config: DiTConfig) -> None:
    with torch.device("meta"):
        module = DiT(config)
    assert cost.parameters(config) == sum(p.numel() for p in module.parameters())


def test_memory() -> None:
    """The published model has 1,418,996,800 parameters; keys and values of a frame, 274 MiB."""
    assert cost.parameters(WAN.dit) == 1_418_996_800
    memory = cost.memory_gib(WAN)
    assert memory["weights"] == 2 * 1_418_996_800 / 2**30
    frame = 2 * 30 * N * D * 2
    assert round(frame / 2**20) == 274
    assert memory["cache"] == (21 * frame + 2 * 30 * 512 * D * 2) / 2**30
    assert memory["total"] == memory["weights"] + memory["cache"]
    assert cost.memory_gib(WAN, batch=3)["cache"] == pytest.approx(3 * memory["cache"])
    assert cost.memory_gib(WAN, precision="8-bit")["total"] == memory["total"] / 2


def wan_decoder(frames: int, height: int, width: int) -> int:
    """Multiply-adds of Wan2.1's decoder, layer by layer as its code builds it."""
    total = 0

    def conv(a: int, b: int, taps: int) -> None:
        nonlocal total
        total += frames * height * width * a * b * taps

    def block(a: int, b: int) -> None:
        conv(a, b, 27)
        conv(b, b, 27)
        if a != b:
            conv(a, b, 1)

    dims = [96 * m for m in (4, 4, 4, 2, 1)]
    conv(16, 16, 1)
    conv(16, dims[0], 27)
    block(384, 384)
    conv(384, 3 * 384, 1)
    total += 2 * frames * (height * width) ** 2 * 384  # scores and their sum of values
    conv(384, 384, 1)
    block(384, 384)
    for i, (a, b) in enumerate(pairwise(dims)):
        a = a // 2 if i else a
        for _ in range(3):
            block(a, b)
            a = b
        if i < 2:
            conv(b, 2 * b, 3)
            frames *= 2
        if i < 3:
            height, width = 2 * height, 2 * width
            conv(b, b // 2, 9)
    conv(96, 3, 27)
    return total


def taehv_decoder(frames: int, height: int, width: int) -> int:
    """The same of TAEHV: up-sampling, growth in time, convolution."""
    total = 0

    def conv(a: int, b: int, taps: int = 9) -> None:
        nonlocal total
        total += frames * height * width * a * b * taps

    conv(16, 256)
    for a, b, grows in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
        for _ in range(3):
            conv(2 * a, a)
            conv(a, a)
            conv(a, a)
        height, width = 2 * height, 2 * width
        conv(a, grows * a, 1)
        frames *= grows
        conv(a, b)
    conv(64, 3)
    return total


@pytest.mark.parametrize("size", [(3, 60, 104), (1, 90, 160)])
def test_decoders(size: tuple[int, int, int]) -> None:
    assert flops.decode_flops("wan", *size) == 2 * wan_decoder(*size)
    assert flops.decode_flops("taehv", *size) == 2 * taehv_decoder(*size)
    assert flops.decode_flops("none", *size) == 0


def test_parts_of_the_wan_decoder() -> None:
    """By hand: 12 frames of 240×416 with 192 channels, of 480×832 with 96: 14.3 TFLOP each. The
    3×3×3 convolutions into 384 channels take 8, those of up-sampling the rest."""

    def tflop(channels: int) -> float:
        return sum(
            n * roofline.convolution_flops(3 * t * 60 * 104 * s**2, a, b, taps) / 1e12
            for n, a, b, taps, s, t in flops.WAN_DECODER
            if b == channels and taps == 27
        )

    assert tflop(192) == pytest.approx(6 * 12 * 240 * 416 * 192**2 * 27 * 2 / 1e12)
    assert agrees(tflop(192), "14.3") and agrees(tflop(96), "14.3") and agrees(tflop(384), "8")


def test_the_first_latent_frame_makes_one_pixel_frame() -> None:
    """All convolutions but those in time take one frame, whatever the rate further on."""
    one = sum(
        n * roofline.convolution_flops(60 * 104 * s**2, a, b, taps)
        for n, a, b, taps, s, _ in flops.WAN_DECODER
        if taps != 3
    )
    first = flops.decode_flops("wan", 1, 60, 104, first=True)
    assert first == one + roofline.attention_flops((60 * 104) ** 2, 1, 384)
    later = flops.decode_flops("wan", 2, 60, 104)
    assert flops.decode_flops("wan", 3, 60, 104, first=True) == first + later
    again = flops.decode_flops("taehv", 3, 60, 104, first=True)
    assert again == flops.decode_flops("taehv", 3, 60, 104)


def test_waves() -> None:
    """By hand: 4680 rows are 36.6 tiles, 37 started; with 12 heads 444, in four waves of 132."""
    assert waves(4680, 12, 132) == 4680 / 128 * 12 / (4 * 132)
    assert waves(132 * 128, 1, 132) == 1
    assert waves(1, 1, 132) == 1 / 128 / 132
    for rows, split, said in ((4680, 1, ".83"), (1560, 1, ".55"), (4680, 2, ".95"),
                              (1560, 5, ".92")):  # fmt: skip
        assert agrees(waves(rows, 12, 132, split=split), said)
    assert agrees(waves(4680, 1536 / 128, 132), ".83")  # a linear of 1536 columns
    best = cost.best_split(4680, 12, 132)
    shares = [waves(4680, 12, 132, split=s) for s in range(1, cost.MOST_SPLITS + 1)]
    assert shares[best - 1] == max(shares) > 0.95
    assert cost.best_split(132 * 128, 1, 132) == 1  # nothing to gain


# --- Times


def test_components_by_hand() -> None:
    """FLOPs and bytes of a chunk: four passes of 30 layers and one of 29, of whose last layer q, k
    and v are computed."""
    rows, passes, tokens = cost.dit(WAN, H200, 21), 4 * 30 + 29, 3 * N
    assert rows["self-attention"]["tflop"] == passes * 4 * D * tokens * 21 * N / 1e12
    activations = passes * tokens * D * 2
    table = passes * tokens * 128 * 4
    # Twice a gated AdaLN of four, a gated norm of four, QK-norm with RoPE of six.
    assert rows["norms, RoPE"]["gb"] == pytest.approx((18 * activations + table) / 1e9)
    kept = passes * (2 * tokens + 2 * 21 * N) * D * 2
    assert rows["self-attention"]["gb"] == pytest.approx(kept / 1e9)
    eight = cost.dit(WAN, H200, 21, "8-bit")
    assert eight["norms, RoPE"]["gb"] == pytest.approx((15 * activations + table) / 1e9)
    qkv, out = (tokens + 2 * 21 * N) * D, tokens * D * 2
    assert eight["self-attention"]["gb"] == pytest.approx(passes * (qkv + out) / 1e9)
    every = sum(row["tflop"] for row in rows.values())
    last = 3 * D * D + 2 * D * 8960 + 2 * D * (21 * N + 512) + D * 64  # the head too
    five = 5 * cost.pass_flops(WAN.dit, tokens, tokens * 21 * N)
    assert every == pytest.approx((five - 2 * tokens * last) / 1e12)
    apart = cost.dit(WAN, H200, 21, way=Way(merged=False, epilogue=False, split=False))
    assert apart["GELU"]["gb"] == passes * tokens * 8960 * 2 * 2 / 1e9
    for name in ("self-attention", "linears"):
        assert apart[name]["tflop"] == rows[name]["tflop"]
        assert apart[name]["whole_waves_ms"] > rows[name]["whole_waves_ms"]


def test_a_row_takes_the_longer_of_arithmetic_and_copy() -> None:
    gpu = Gpu("one", 1, matmul_tflops=1, copy_tbps=2, memory_gib=1, link_gbps=1)
    assert cost._row(gpu, "bf16", 3e12, 2e12, share=0.5) == {
        "tflop": 3, "gb": 2000, "floor_ms": 3000, "whole_waves_ms": 6000,
    }  # fmt: skip
    assert cost._row(gpu, "8-bit", 3e12, 2e12)["floor_ms"] == 1500
    assert cost._row(gpu, "8-bit", 3e12, 4e12, share=0.9)["whole_waves_ms"] == 2000
    # One token: reading the weights takes longer than multiplying with them.
    tiny = replace(setting("wan-1.3b", 16, 16, chunk=1))
    linears = cost.dit(tiny, H200, 21)["linears"]
    assert linears["floor_ms"] == pytest.approx(linears["gb"] / H200.copy_tbps)
    assert linears["gb"] > 4 * 30 * 2 * (6 * D * D + 2 * D * 8960) / 1e9


def test_linears_in_whole_waves() -> None:
    """By hand: with 12 or 70 tiles across, 37 down; q, k, v have 36."""

    def padded(columns: int) -> float:
        return math.ceil(37 * columns / 132) * 132 / (4680 / 128 * columns)

    row = cost.dit(WAN, H200, 21, way=Way(merged=False))["linears"]
    macs = ((3, 36), (3, 12), (8960 / D, 70), (8960 / D, 12))  # in units of D²
    ratio = sum(m * padded(c) for m, c in macs) / sum(m for m, _ in macs)
    assert row["whole_waves_ms"] / row["floor_ms"] == pytest.approx(ratio, rel=0.002)  # the ends


TABLE = {  # TFLOP, floor ms in bf16 and in 8-bit
    "self-attention": ("141.3", "179", "89"),
    "linears": ("58.5", "74", "37"),
    "cross-attention": ("2.2", "3", "1.4"),
    "norms, RoPE": ("0", "9", "7.5"),
    "DiT": ("202", "265", "135"),
    "decode": ("40.7", "52", "26"),
}


@pytest.mark.parametrize("precision", predict.PRECISIONS)
def test_floors_of_the_h200(precision: str) -> None:
    rows = prediction(WAN, H200, precision)["components"]
    assert [*rows] == [*TABLE]
    for name, (tflop, bf16, eight) in TABLE.items():
        assert agrees(rows[name]["tflop"], tflop), name
        assert agrees(rows[name]["floor_ms"], bf16 if precision == "bf16" else eight), name
        assert rows[name]["whole_waves_ms"] >= rows[name]["floor_ms"]
    # These two leave the table of RoPE out, 1% of it.
    activations = rows["norms, RoPE"]["gb"] - 5 * 30 * 3 * N * 128 * 4 / 1e9
    assert agrees(activations, "39" if precision == "bf16" else "32")
    taehv = cost.decode(WAN, H200, precision, "taehv")
    assert agrees(taehv["tflop"], "1.6") and agrees(taehv["floor_ms"], "2")


@pytest.mark.parametrize(
    ("decoder", "precision", "said"),
    [
        ("wan", "bf16", ("38", "50", "56")),
        ("wan", "8-bit", ("75", "98", "109")),
        ("taehv", "bf16", ("45", "63", "73")),
        ("taehv", "8-bit", ("87", "121", "139")),
    ],
)
def test_frames_a_second_of_the_h200(
    decoder: str, precision: str, said: tuple[str, str, str]
) -> None:
    """Full window, mean over a clip, window of 9 frames."""
    rows = prediction(WAN, H200, precision, decoder)["fps"]
    for row, figure in zip(rows.values(), said, strict=True):
        assert agrees(row["floor"], figure)
        assert row["whole_waves"] < row["floor"]


def test_latency() -> None:
    """A reaction takes four of five passes at a full window and the decode; the first frame takes
    them with the chunk alone in the cache."""
    for preset, said in ((WAN, "110"), (FRAME_WISE, "37")):
        rows = cost.latency_ms(preset, H200, "8-bit", "taehv")
        assert agrees(rows["reaction"]["floor"], said)
        assert rows["first_frame"]["floor"] < rows["reaction"]["floor"] / 2
    four = cost.total(cost.dit(WAN, H200, 3, update=False).values())["floor_ms"]
    latency = cost.latency_ms(WAN, H200, "bf16", "none")
    assert latency["first_frame"]["floor"] == four
    independent = cost.latency_ms(replace(WAN, first=1), H200, "bf16", "wan")
    assert (
        independent["first_frame"]
        == cost.latency_ms(FRAME_WISE, H200, "bf16", "wan")["first_frame"]
    )
    assert independent["reaction"] == cost.latency_ms(WAN, H200, "bf16", "wan")["reaction"]


def test_a_gpu_whose_copy_alone_is_slower() -> None:
    """The H100 has the H200's multiprocessors and rate of matrix products."""
    assert H100.matmul_tflops == H200.matmul_tflops == pytest.approx(790)
    assert H200.copy_tbps == pytest.approx(4.3) and agrees(H100.copy_tbps, "3.0")
    for precision in predict.PRECISIONS:
        ours, theirs = (prediction(WAN, gpu, precision) for gpu in (H100, H200))
        for name in ("self-attention", "linears", "cross-attention", "decode"):
            assert ours["components"][name] == theirs["components"][name]
        slower = ours["components"]["norms, RoPE"]["floor_ms"]
        assert slower == pytest.approx(theirs["components"]["norms, RoPE"]["floor_ms"] * 4.8 / 3.35)
    rows = prediction(WAN, H100)
    assert agrees(rows["components"]["DiT"]["floor_ms"], "265")
    for row, said in zip(rows["fps"].values(), ("38", "50", "56"), strict=True):
        assert agrees(row["floor"], said)


def test_only_the_h200_is_measured() -> None:
    assert [key for key, gpu in GPUS.items() if gpu.source == "measured"] == ["h200"]
    assert GPUS["a100"].matmul_tflops == pytest.approx(312 * 790 / 989)
    assert GPUS["a100"].copy_tbps == pytest.approx(2.039 * 4.3 / 4.8)


def test_is_quick_to_import() -> None:
    heavy = "{'tyro', 'av', 'matplotlib', 'rich', 'safetensors'}"
    code = f"import sys, sfmodel.training_cost; sys.exit(len({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
