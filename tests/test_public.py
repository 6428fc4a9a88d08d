"""Other people's code in the bench, by a clone written anew: what is imported, compared, timed and
refused. PUBLIC_CLONE names a real one to compare as well."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, peers, public, stream, stream_report, suite, tables, verify
from bench.__main__ import main
from bench.harness import Job
from bench.inputs import StreamInputs, random_model
from bench.public import PATCHED, PUBLIC
from sfmodel.config import DiTConfig, Preset
from sfmodel.toy.vae import ToyVAE
from tests.public_wan import DIM, GRID, HEADS, TEXT

CPU = torch.device("cpu")
CONFIG = DiTConfig(DIM, 2 * DIM, HEADS, 2, 4, freq_dim=32, text_dim=16, text_len=TEXT)
SMALL = Preset(CONFIG, height=2 * GRID[0], width=2 * GRID[1], window=6, first=1)
VERSIONS = {
    "Self Forcing": ("wan/modules", "wan/modules", "CausalWanAttentionBlock"),
    "LongLive": ("wan/modules", "wan/modules", "LongLiveBlock"),
    "CausVid": ("causvid/models/wan", "causvid/models/wan/wan_base/modules", "CausVidBlock"),
}
MODEL = """
import torch
from {attention} import attention
from tests import public_wan
{more}

class CausalWanModel(public_wan.WholeModel):
    block = public_wan.{block}
    attention = staticmethod(attention)
"""
# LongLive's model imports this, of which it needs nothing.
MEMORY = "import torch\ngpu = torch.device(f'cuda:{torch.cuda.current_device()}')"


def clone(folder: Path, version: str = "Self Forcing", block: str = "", more: str = "") -> Path:
    """A clone of a version; more: lines of its model's file, before its class."""
    model, attention, own = VERSIONS[version]
    if version == "LongLive":
        more += "\nfrom utils.memory import gpu"
    text = MODEL.format(
        attention=f"{attention.replace('/', '.')}.attention", block=block or own, more=more
    )
    files = {
        f"{model}/causal_model.py": text,
        f"{attention}/attention.py": "FLASH_ATTN_2_AVAILABLE = FLASH_ATTN_3_AVAILABLE = False",
        f"{attention}/__init__.py": "raise ImportError('text encoders and VAEs')",
        "wan/__init__.py": "raise ImportError('text encoders and VAEs')",
        "utils/memory.py": MEMORY,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def inputs(preset: Preset = SMALL) -> StreamInputs:
    torch.manual_seed(0)
    model = random_model(preset.dit, CPU).eval()
    text = torch.randn(1, TEXT - 1, preset.dit.text_dim)
    return StreamInputs(preset, model, text, ToyVAE(), lambda: text)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> StreamInputs:
    """What `run` measures at toy sizes."""
    setting = inputs()
    monkeypatch.setattr(stream, "toy", lambda: setting)
    monkeypatch.setattr(stream, "CLIP", 7)
    monkeypatch.setattr(peers, "measure", lambda *_: {"said": "not run: diffusers"})
    return setting


def job(folder: Path, **more: Any) -> Job:
    return Job(CPU, tiny=True, rounds=1, public=folder, **more)


@pytest.mark.parametrize(
    ("version", "case"),
    [("Self Forcing", "frame-wise"), ("LongLive", "chunk-wise"), ("CausVid", "chunk-wise")],
)
def test_a_clone_beside_ours(version: str, case: str, tmp_path: Path, small: StreamInputs) -> None:
    result = stream.run(job(clone(tmp_path, version), only=case))
    (row,) = result["rows"]
    entries = row["contestants"]
    assert [*entries] == ["reference", PUBLIC, PATCHED, "sdpa", "sdpa, apart"]
    assert not [entry for entry in entries.values() if "failed" in entry]
    for name in (PUBLIC, PATCHED):
        assert {"step 1", "step 4", "cache update", "decode"} <= entries[name]["phases"].keys()
    assert f"{version}'s model at no known commit, attention by SDPA" in row["notes"][0]
    assert PATCHED in str(stream_report.breakdown(row))
    assert stream_report.ours(row).keys() == entries.keys() - {PUBLIC, PATCHED}
    assert not any(PUBLIC in line["said"] for line in result["baselines"])


@torch.no_grad()
def test_weights_are_shared_and_the_kernels_are_in(tmp_path: Path) -> None:
    setting, known = inputs(), public.load(clone(tmp_path), half=False)
    plain, patched = (known.streamed(setting.model, SMALL, patched) for patched in (False, True))
    ours: Any = setting.model.blocks[0]
    theirs = plain.network.blocks[0].self_attn
    assert theirs.q.weight.data_ptr() == ours.self_attn.qkv.weight.data_ptr()
    assert (theirs.local_attn_size, theirs.max_attention_size) == (6, 6 * 6)
    assert "forward" not in vars(theirs)
    assert "forward" in vars(patched.network.blocks[0].self_attn)


def test_what_is_wrong_past_the_window_gets_no_speed(tmp_path: Path, small: StreamInputs) -> None:
    """The error is in what the patch leaves to the model, so both have it."""
    text = clone(tmp_path) / "wan/modules/causal_model.py"
    late = """
    def forward(self, x, current_start, **others):
        out = super().forward(x, current_start=current_start, **others)
        return out * (1 if current_start < 6 * 6 else 1.1)
"""
    text.write_text(text.read_text() + late)
    result = stream.run(job(tmp_path, only="chunk-wise"))
    for name in (PUBLIC, PATCHED):
        assert "wrong, not timed" in result["rows"][0]["contestants"][name]["failed"]
    assert harness.wrong(result, of_peers=True) == [f"chunk-wise: {PUBLIC}"]
    assert harness.wrong(result) == [f"chunk-wise: {PATCHED}"]


def environment() -> Any:
    own = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in ("wan", "utils")}
    return own, [*sys.path], sys.dont_write_bytecode, torch.cuda.current_device, torch.compile


@pytest.mark.parametrize("more", ["", "raise OSError('no')"])
def test_all_is_as_it_was(more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also somebody else's `utils`, which is not the clone's."""
    monkeypatch.setitem(sys.modules, "utils", types.ModuleType("utils"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = environment()
    folder = clone(tmp_path, "LongLive", more=more)
    files = {*folder.rglob("*")}
    if more:
        with pytest.raises(ValueError, match="OSError: no"):
            public.load(folder, half=False)
    else:
        found: Any = public.load(folder, half=False).model
        q, k, v = torch.randn(3, 1, 5, 2, 4)
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        )
        torch.testing.assert_close(found.attention(q, k, v, k_lens=None), want.transpose(1, 2))
    assert environment() == before and {*folder.rglob("*")} == files


@pytest.mark.parametrize(
    ("more", "block", "said"),
    [
        ("import no_such_package", "", "its model needs no_such_package, which is not installed"),
        ("1 / 0", "", "its model is not known: ZeroDivisionError: division by zero"),
        ("class Block(public_wan._Block): forward = lambda self, x, y: x\npublic_wan.New = Block",
         "New", "takes (x, y): this version is not known"),
        ("class Block(public_wan._Block):\n"
         "    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens,\n"
         "                block_mask, kv_cache, crossattn_cache, current_start, cache_start,\n"
         "                updating_cache): pass\n"
         "public_wan.New = Block", "New", "Rolling Forcing denoises several chunks in one pass"),
    ],
)  # fmt: skip
def test_others_are_refused_in_one_sentence(
    more: str, block: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from tests import public_wan

    monkeypatch.setattr(public_wan, "New", None, raising=False)
    folder = clone(tmp_path / "clone", block=block, more=more)
    out = tmp_path / "out"
    assert main(["stream", "--public", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m bench stream: --public {folder}: ") and said in error
    assert error.count("\n") == 1 and not out.exists()


def test_a_folder_that_is_no_clone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no wan/modules/causal_model\.py or causvid/"):
        public.load(tmp_path, half=False)


def test_a_whole_run_takes_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []

    def begin(arguments: list[str], *_: Any) -> dict[str, Any]:
        begun.append(arguments)
        return {"ok": True}

    monkeypatch.setattr(verify, "command", begin)
    folder = clone(tmp_path)
    preset = suite.with_public(suite.PRESETS["full"], folder, tiny=False)
    assert [one.name for one in preset.steps] == [s.name for s in suite.PRESETS["full"].steps]
    (own,) = (one for one in preset.steps if one.name == "stream")
    own.run(tmp_path, 10.0)
    assert begun[0][2:6] == ["bench", "stream", "--public", str(folder)]
    with pytest.raises(ValueError, match="goes with --quick, --gpu or --full"):
        suite.with_public(suite.PRESETS["verify"], folder, tiny=False)
    with pytest.raises(ValueError, match="must be a clone of"):
        suite.with_public(suite.PRESETS["quick"], tmp_path / "none", tiny=True)


@pytest.mark.skipif("PUBLIC_CLONE" not in os.environ, reason="PUBLIC_CLONE names no real clone")
def test_a_real_clone_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, dim=256, heads=2, layers=3)
    setting = inputs(replace(SMALL, dit=config))
    monkeypatch.setattr(stream, "CLIP", 7)
    known = public.load(Path(os.environ["PUBLIC_CLONE"]), half=False)
    row = stream.run_case(job(Path()), setting, "chunk-wise", known)
    assert {PUBLIC, PATCHED} <= tables.timed(row).keys(), row["contestants"]
