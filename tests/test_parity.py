"""The recorded cases of the public implementation, and the runner's refusal to pass what it cannot
run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfkernels import launch
from sfkernels.launch import RowTile
from sfmodel.config import DiTConfig, VAEConfig
from sfmodel.dit import DiT
from sfmodel.vae.codec import VideoCodec
from sfmodel.vae.taehv import TinyVAE
from sfmodel.vae.wan import WanVAE
from sfmodel.weights import checkpoint
from tests.oracle import DEVICE
from tests.parity.__main__ import drawn_weights, main

FOLDERS = Path(__file__).parent / "parity"
WAN, VAE, TINY = FOLDERS / "wan_d64", FOLDERS / "vae_d8", FOLDERS / "taehv_seed0"


def copy(
    tmp_path: Path, cases: Callable[[dict[str, Tensor]], dict[str, Tensor]], of: Path = WAN
) -> Path:
    """A recorded folder with other cases."""
    folder = tmp_path / "copy"
    shutil.copytree(of, folder)
    changed = cases(load_file(folder / "cases.safetensors"))
    save_file({k: v.contiguous() for k, v in changed.items()}, folder / "cases.safetensors")
    return folder


def without_rollouts(cases: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in cases.items() if not k.startswith("sf_")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_cases_pass(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(WAN), str(VAE), str(TINY), "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    assert "12 passed, 0 not passed" in out and ", gradients " in out


def test_recorded_cases_pass_on_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--impl", "triton", "--attention-impl", "triton", "--device", DEVICE]
    many = RowTile(64, 8)  # the interpreter pays by the program
    # What these two compute, others do as well.
    fewer = ("roll_chunk3.", "df_chunk1.")

    def cases(every: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in without_rollouts(every).items() if not k.startswith(fewer)}

    kernels = ["rope_table", "norm_fwd", "adaln_fwd", "residual_norm_fwd", "qk_norm_rope_fwd"]
    with launch.using(**dict.fromkeys(kernels, many)):
        assert main([str(copy(tmp_path, cases)), *options]) == 0
    assert "6 passed, 0 not passed" in capsys.readouterr().out


def test_what_cannot_be_run_is_said_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(cases: dict[str, Tensor]) -> dict[str, Tensor]:
        return cases | {
            f"{name}.x": torch.ones(1) for name in ("dream", "decode_chunk2", "encode_up")
        }

    folder = copy(tmp_path, odd, TINY)
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "not supported: 'dream' of a VAE" in out and "2 passed, 3 not passed" in out
    assert "with options ['chunk']" in out and "not supported: 'up' in the name" in out
    (folder / "config.json").write_text('{"kind": "super"}')
    assert main([str(folder), str(TINY)]) == 1
    out = capsys.readouterr().out
    assert "not supported: the model of config.json" in out and "2 passed, 1 not passed" in out


@pytest.fixture(params=["vae", "taehv"])
def other_sizes(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, type[VideoCodec]]:
    """A folder of batch 2, other sizes, other weights and every case of a VAE, and what runs it.
    Recordings are whole clips through the codec, which the recorded folder has proven."""
    torch.manual_seed(0)
    z, clip = torch.randn(2, 6, 16, 3, 2), 2 * torch.rand(2, 9, 3, 16, 24) - 1
    codec: WanVAE | TinyVAE
    if request.param == "vae":
        config = json.loads((VAE / "config.json").read_text()) | {"dim": 4}
        codec, folder = WanVAE(VAEConfig.from_wan(config)), tmp_path / "vae"
        folder.mkdir()
        save_file(codec.state_dict(), folder / "weights.safetensors")
    else:
        config = json.loads((TINY / "config.json").read_text()) | {"seed": 3}
        codec, folder = TinyVAE(), tmp_path / "taehv"
        codec.load_state_dict(drawn_weights(config))
        folder.mkdir()
        clip = torch.cat([clip[:, :6], clip[:, 5:6], clip[:, 5:6]], 1)
    with torch.no_grad():
        pixels, encoded = codec.decode_chunk(z)[0], codec.encode_chunk(clip)[0]
    if request.param == "vae":
        z, pixels, clip, encoded = (x.transpose(1, 2) for x in (z, pixels, clip, encoded))
    else:
        pixels, clip = (pixels + 1) / 2, (clip[:, :6] + 1) / 2
    cases = {"encode.pixels": clip, "encode.z": encoded}
    for name in ("decode", "stream", "stream_chunk2", "stream_first1_chunk3"):
        cases |= {f"{name}.z": z, f"{name}.pixels": pixels}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone().contiguous() for k, v in cases.items()}, folder / "cases.safetensors")
    return folder, type(codec)


def test_vaes_of_other_sizes_run_in_several_calls(
    other_sizes: tuple[Path, type[VideoCodec]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, codec = other_sizes
    sizes: list[list[int]] = []
    decode_chunk = codec.decode_chunk

    def counted(self: VideoCodec, z: Tensor, state: object = None) -> tuple[Tensor, object]:
        if state is None:
            sizes.append([])
        sizes[-1].append(z.shape[1])
        return decode_chunk(self, z, state)

    monkeypatch.setattr(codec, "decode_chunk", counted)
    assert main([str(folder)]) == 0
    assert "5 passed, 0 not passed" in capsys.readouterr().out
    assert sizes == [[6], [1, 3, 2], [2, 1, 3], [2, 2, 2], [1, 3, 2]]


def test_a_vae_that_forgets_between_calls_fails(
    other_sizes: tuple[Path, type[VideoCodec]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, codec = other_sizes
    decode_chunk = codec.decode_chunk

    def forgetful(self: VideoCodec, z: Tensor, state: object = None) -> tuple[Tensor, object]:
        if state is not None:
            _, state = decode_chunk(self, torch.zeros_like(z[:, :1]))
        return decode_chunk(self, z, state)

    monkeypatch.setattr(codec, "decode_chunk", forgetful)
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: over 1e-04") == 3 and "2 passed, 3 not passed" in out


def test_a_wrong_output_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def off(cases: dict[str, Tensor]) -> dict[str, Tensor]:
        cases["tf_chunk3.flow"] *= 1.001
        return without_rollouts(cases)

    assert main([str(copy(tmp_path, off))]) == 1
    out = capsys.readouterr().out
    assert re.search(r"tf_chunk3 .*FAILED: over 1e-04", out) and "7 passed, 1 not" in out


def test_a_wrong_gradient_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def off(cases: dict[str, Tensor]) -> dict[str, Tensor]:
        cases["sf_chunk3_exit1.grad.blocks.0.self_attn.k.weight"] *= 1.01
        return cases

    assert main([str(copy(tmp_path, off))]) == 1
    out = capsys.readouterr().out
    assert "FAILED: a gradient is off by 1e-02" in " ".join(out.split()) and "8 passed" in out


def test_unknown_names_and_missing_files_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(cases: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("bidir", "bidir_fancy7"): v for k, v in without_rollouts(cases).items()}

    assert main([str(copy(tmp_path, odd))]) == 1
    assert "'fancy7' in the name" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "cannot be read" in capsys.readouterr().out


def test_other_sizes_and_combinations_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Head dimension 128, windows, sinks, batch 2, first frames, images to continue: recordings are
    made with full passes here, which the recorded folder has proven."""
    config = json.loads((WAN / "config.json").read_text()) | dict(dim=256, ffn_dim=128)
    torch.manual_seed(0)
    model = DiT(DiTConfig.from_wan(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cases = {"text": torch.randn(2, 7, 24)}
    for name, frames, initial in (
        ("roll_chunk2_window5_sink2", 8, 0),
        ("roll_first1_chunk2_window4_sink1", 7, 0),
        ("roll_i2v_first1_chunk2", 4, 1),
        ("roll_first1_chunk2_extend", 4, 3),
    ):
        cases[f"{name}.noise"] = torch.randn(2, frames, 16, 8, 12)
        cases[f"{name}.renoise"] = torch.randn(2, frames, 3, 16, 8, 12)
        cases[f"{name}.video"] = torch.zeros(2, frames, 16, 8, 12)
        if initial:
            cases[f"{name}.initial"] = torch.randn(2, initial, 16, 8, 12)
    for name in ("df_chunk2_local3", "df_first1_chunk3_local4_sink1"):
        cases[f"{name}.x"] = torch.randn(2, 16, 4, 8, 12)
        cases[f"{name}.t"] = torch.rand(2, 4) * 1000
        cases[f"{name}.flow"] = torch.zeros(2, 16, 4, 8, 12)
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous() for k, v in checkpoint.to_official(model.state_dict()).items()},
        folder / "weights.safetensors",
    )
    save_file(cases, folder / "cases.safetensors")
    assert main([str(folder)]) == 1  # every case runs, and differs from the zeros recorded
    out = capsys.readouterr().out
    assert out.count("FAILED: over") == 6 and "not supported" not in out
