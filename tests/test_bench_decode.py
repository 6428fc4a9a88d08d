"""`python -m bench decode`, as far as a CPU shows it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import codecs, compare, decode, harness, tables, timing
from bench.__main__ import main
from bench.codecs import WanCodec
from bench.decode import Case, Field, Sizes
from bench.harness import Job
from sfmodel.config import VAEConfig
from sfmodel.terminal import plain_console
from tests.oracle import DEVICE

CPU = torch.device("cpu")
CONFIG = VAEConfig(dim=4)
CEILINGS = {"dtype": "float32", "matmul_tflops": 1.0, "copy_gbps": 1.0}
SMALL = Sizes(CONFIG, torch.float32, decode._cases(2, 3))
DIFFUSERS = importlib.util.find_spec("diffusers") is not None
needs_diffusers = pytest.mark.skipif(not DIFFUSERS, reason="needs diffusers")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no time for the ceilings."""
    monkeypatch.setattr(decode, "TOY", SMALL)
    monkeypatch.setattr(timing, "ceilings", lambda *_: CEILINGS)


def job(**more: Any) -> Job:
    return Job(CPU, tiny=True, rounds=2, **more)


def peer(**options: bool) -> WanCodec:
    torch.manual_seed(0)
    ours = codecs.wan_vae(CPU, torch.float32, CONFIG)
    vae = codecs.diffusers_vae(ours.state_dict(), CONFIG, options.get("last", False))
    return WanCodec(vae, **options)


def row_of(case: Case, sizes: Sizes, compiled: bool = False) -> dict[str, Any]:
    return decode.run_case(case, Field(CPU, sizes), job(), {"ceilings": CEILINGS}, compiled)


@needs_diffusers
@pytest.mark.parametrize("options", [{}, {"whole": True}, {"whole": True, "last": True}])
@torch.no_grad()
def test_the_vae_of_diffusers_streams(options: dict[str, bool]) -> None:
    """Chunk by chunk, to the pixels and the latents of its own calls for the whole clip; from one
    state twice."""
    codec = peer(**options)
    clip = torch.randn(1, 6, 16, 2, 3)
    scaled = clip.transpose(1, 2) * codec.std + codec.mean
    want = codec.vae.decode(scaled).sample.transpose(1, 2)
    first, state = codec.decode_chunk(clip[:, :1])
    second, state = codec.decode_chunk(clip[:, 1:3], state)
    third, _ = codec.decode_chunk(clip[:, 3:], state)
    again, _ = codec.decode_chunk(clip[:, 3:], state)
    got = torch.cat([first, second, third], 1)
    assert got.shape == (1, 21, 3, 16, 24) and torch.equal(third, again)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    latents = codec.vae.encode(want.transpose(1, 2)).latent_dist.mean
    first, state = codec.encode_chunk(want[:, :5])
    second, _ = codec.encode_chunk(want[:, 5:], state)
    made = torch.cat([first, second], 1).transpose(1, 2) * codec.std + codec.mean
    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-5)


@needs_diffusers
@pytest.mark.parametrize(
    "case", [Case(3, 2, 3), Case(2, 4, 2, first=True), Case(2, 2, 3, encode=True)]
)
@torch.no_grad()
def test_flops_are_those_pytorch_counts(case: Case) -> None:
    codec = peer()
    before, chunk = case.make(CPU)
    state = None if case.first else case.step(codec)(before)[1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        case.step(codec)(chunk, state)
    assert counter.get_total_flops() == case.flops(CONFIG.dim)
    assert case.encode or case.flops(CONFIG.dim, folded=True) < case.flops(CONFIG.dim)


def test_flops_at_full_size() -> None:
    """14.3 TFLOP with 96 channels, 40.7 in all; folding saves 5/9 of 2 · 9 · 10,027,008 FLOPs a
    latent and frame."""
    (case,) = (c for c in decode.FULL.cases if c.compiled)
    assert case.flops(96) == pytest.approx(40.7e12, rel=1e-2)
    saved = case.flops(96) - case.flops(96, folded=True)
    assert saved == 2 * 5 * 10_027_008 * 3 * 60 * 104
    halved = case.flops(48) / case.flops(96)
    assert 0.24 < halved < 0.26


def test_the_part(capsys: pytest.CaptureFixture[str]) -> None:
    saved: list[str] = []
    result = decode.run(job(save=lambda r: saved.append(json.dumps(r, allow_nan=False))))
    assert len(saved) == len(SMALL.cases) + 1 and not result["no_time_for"]
    rows = {row["case"]: row for row in result["rows"]}
    assert [*rows] == [case.label for case in SMALL.cases]
    peers = {"diffusers", "diffusers, channels last"} if DIFFUSERS else set()
    whole = {f"diffusers, whole{last}" for last in ("", ", channels last")} if DIFFUSERS else set()
    for case, row in zip(SMALL.cases, rows.values(), strict=True):
        entries = row["contestants"]
        wanted = {"wan", "reference", *peers} | (whole if case.frames > 1 else set())
        assert entries.keys() == ({"tiny vae"} if case.tiny else wanted)
        for entry in entries.values():
            assert entry["ms"] > 0 and entry["error"] <= decode.CLOSE and entry["rounds"] == 2
            assert entry["tflops"] == pytest.approx(row["flops"] / entry["ms"] / 1e9)
        if peers and not case.tiny:
            assert row["peer_over_ours"] == pytest.approx(
                min(e["ms"] for n, e in entries.items() if n in peers | whole)
                / entries["wan"]["ms"]
            )
    assert ("note" in result) == (not DIFFUSERS)
    for table in decode.tables(result):
        tables.show(table, plain_console())
    shown = capsys.readouterr().out
    assert "floor" not in shown and "TAEHV" in shown
    rows["decode 1 latent frame, 2 x 3 latents"] |= {"floor_ms": 0.5, "folded_floor_ms": 0.25}
    (table,) = decode.tables(result)
    assert [cells[:3] for cells in table.rows if "floor" in cells[1]] == [
        ["", "floor", "0.5"], ["", "floor, folded", "0.25"]
    ]  # fmt: skip
    assert decode.FLOOR in table.notes
    pytest.importorskip("matplotlib")
    assert [name for name, _ in decode.figures(result)] == ["decode"]


def test_pixels_are_grey_and_within_range() -> None:
    """So that a range of 2 means something: few are clamped."""
    torch.manual_seed(1)
    latents = torch.randn(1, 6, 16, 4, 6)
    for codec in (codecs.wan_vae(CPU, torch.float32, CONFIG), codecs.tiny_vae(CPU, torch.float32)):
        pixels = codec.decode_chunk(latents)[0]
        assert 0.2 < float(pixels.std()) < 0.45
        assert float((pixels.abs() >= 1).float().mean()) < 0.05


def test_errors_by_hand() -> None:
    want = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    found = decode.compared(want + torch.tensor([0.0, 0.1, 0.0, -0.1]), want)
    assert found["error"] == pytest.approx(0.05**0.5 * 0.1 * 10**0.5, rel=1e-4)
    assert found["psnr_db"] == pytest.approx(10 * torch.tensor(4 / 0.005).log10().item(), rel=1e-4)
    assert decode.compared(want, want) == {"error": 0.0}


class Off:
    """A codec whose pixels are off by a share of their size."""

    def __init__(self, codec: Any, by: float) -> None:
        self.codec, self.by = codec, by

    def decode_chunk(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        pixels, state = self.codec.decode_chunk(latents, state)
        return pixels * (1 + self.by), state


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, None)])
def test_a_wrong_one_is_not_timed(
    dtype: torch.dtype, allowed: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-4 off is allowed in float32, in bfloat16 twice as much as PyTorch's own ops are off."""
    sizes = SMALL._replace(dtype=dtype)
    case = Case(1, 2, 3)
    right = row_of(case, sizes)["contestants"]
    reference = right["reference"]["error"]
    assert all("ms" in entry for entry in right.values()), right
    limit = allowed or 2 * reference
    assert dtype == torch.float32 or 1e-3 < reference < decode.CLOSE_HALF

    of = Field.of

    def with_others(self: Field, case: Case, compiled: bool) -> dict[str, Any]:
        found = of(self, case, compiled)
        exactly = self.exact[False]
        for share in (0.5, 1.5):
            found[f"off {share}"] = Off(exactly, share * limit)
        found["nan"] = Off(exactly, float("nan"))
        found["broken"] = None
        return found

    monkeypatch.setattr(Field, "of", with_others)
    entries = row_of(case, sizes)["contestants"]
    assert "ms" in entries["off 0.5"] and "ms" in entries["wan"]
    for name in ("off 1.5", "nan"):
        assert entries[name]["failed"].startswith(timing.WRONG)
    assert entries["broken"]["failed"].startswith("AttributeError")
    result = {"rows": [{"case": case.label, "contestants": entries}]}
    assert harness.wrong(result) == [f"{case.label}: off 1.5", f"{case.label}: nan"]


def test_where_diffusers_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    result = decode.run(job(only="^encode"))
    (row,) = result["rows"]
    assert [*row["contestants"]] == ["wan", "reference"] and "best_peer" not in row
    assert result["note"].startswith("diffusers is not installed")
    assert result["note"] in decode.tables(result)[0].notes


@needs_diffusers
@torch.no_grad()
def test_a_compiled_decoder_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a clip, cache included; traced and run as traced: no code is generated here."""
    real, traced = torch.compile, []

    def trace(function: Callable[..., Any], **_: Any) -> Any:
        traced.append(function)
        return real(function, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", trace)
    row = row_of(Case(2, 2, 2, compiled=True), SMALL, compiled=True)
    assert "ms" in row["contestants"]["diffusers, compile"], row["contestants"]
    assert len(traced) == 1


def test_more_than_toy_sizes_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decode, "SMALL", SMALL._replace(config=replace(CONFIG, dim=8)))
    monkeypatch.setattr(decode, "SECONDS", 0.0)
    threads = torch.get_num_threads()
    arguments = ["--out", str(tmp_path), "--only", "^encode", "--json-only"]
    assert main(["decode", *arguments]) == 0 and torch.get_num_threads() == threads
    content = compare.read(tmp_path / "decode.json")
    assert content["sizes"] == "Wan2.1's VAE at few latents"
    assert compare.compare(content, content).code == 0
    said = capsys.readouterr().out
    assert "encode 4 frames, 2 x 3 latents" in said


def test_without_time() -> None:
    result = decode.run(job(seconds=0.0))
    assert not result["rows"] and len(result["no_time_for"]) == len(SMALL.cases)
    assert "no time for" in decode.tables(result)[0].notes[-1]


@pytest.mark.gpu
def test_in_graphs_on_a_gpu() -> None:
    result = decode.run(Job(torch.device(DEVICE), tiny=True, rounds=2))
    for row in result["rows"]:
        for name, entry in row["contestants"].items():
            assert "failed" not in entry and "note" not in entry, (row["case"], name, entry)
