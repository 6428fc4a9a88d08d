"""What `sfmodel doctor` says of this machine, and what it would say of others."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from sfmodel.assets import PUBLIC
from sfmodel.cli import doctor as module
from sfmodel.cli.doctor import doctor, examine, memory, report
from sfmodel.config import PRESETS

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Another machine, with all libraries."""

    def pretend(gib: float = 80, capability: tuple[int, int] = (9, 0), **more: Any) -> None:
        gpu = {"name": "A GPU", "memory_gib": gib, "capability": capability, "driver": "1.2"}
        real = module._machine(Path())
        monkeypatch.setattr(module, "_machine", lambda _: {**real, "gpus": [gpu], **more})
        monkeypatch.setattr(module, "_version", lambda _: "1.0")

    return pretend


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """A folder with all that streaming needs, of few bytes."""
    folder = tmp_path / "my models"
    small, large = folder / "Wan2.1-T2V-1.3B", folder / "checkpoints"
    tokenizer = small / "google" / "umt5-xxl"
    for each in (large, tokenizer):
        each.mkdir(parents=True)
    (tokenizer / "tokenizer.json").touch()
    torch.save({"a": torch.zeros(1)}, small / "Wan2.1_VAE.pth")
    text = {"token_embedding.weight": torch.zeros(1, 1), "norm.weight": torch.zeros(1)}
    torch.save(text, small / "models_t5_umt5-xxl-enc-bf16.pth")
    generator = {"generator": {"model.patch_embedding.weight": torch.zeros(1536, 1)}}
    torch.save(generator, large / "self_forcing_dmd.pt")
    return folder


def shown(found: dict[str, Any], terminal: bool = False) -> str:
    out = io.StringIO()
    report(found, Console(file=out, width=160, force_terminal=terminal, no_color=True))
    return out.getvalue()


def test_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFMODEL_MODELS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    doctor(json_path=tmp_path / "doctor.json")
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert out.rstrip().endswith(found["next"])
    assert f"PyTorch  {torch.__version__}" in out and "Found nothing in models" in out
    for public in PUBLIC["wan-1.3b"].values():
        assert all(file in out for file in public.files) and public.where in out
    if not torch.cuda.is_available():
        assert "GPU      none: this PyTorch" in out and "not measured on a GPU" in out
        assert found["next"] == 'sfmodel generate --prompt "a small blue ball moves up fast"'
    assert not set("│┃─━") & set(out) and set("│┃─━") & set(shown(found, terminal=True))


def test_a_folder_that_does_not_exist_is_a_bad_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        doctor(tmp_path / "nothing")


def test_what_fits_a_gpu() -> None:
    """Of what is worked out, the parts that are known otherwise: 274 MiB a latent frame, 1.42 B and
    14.3 B parameters."""
    rows = {(row["preset"], row["window"], row["by"]): row for row in memory(24.0)}
    small = rows["wan-1.3b", 21, "wan"]
    assert small["cache"] == pytest.approx(21 * 274 / 1024, rel=0.02)
    assert small["weights"] == pytest.approx(1.419e9 * 2 / 2**30, rel=1e-3)
    parts = sum(small[part] for part in ("weights", "cache", "activations", "decoder"))
    assert small["total"] == pytest.approx(parts + module.CUDA_GIB)
    assert small["fits"] and rows["toy", PRESETS["toy"].window, "its own"]["fits"]
    large = rows["wan-14b", 9, "taehv"]
    assert not large["fits"] and module._fits(large) == "does not fit: 41 of 24 GiB"
    assert {row["fits"] for row in memory(None)} == {None}
    assert small["decoder"] > 4 * rows["wan-1.3b", 21, "taehv"]["decoder"] > 0


def test_everything_is_here(
    machine: Machine, everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    found = examine(everything)
    command, generator = found["next"], str(everything / "checkpoints" / "self_forcing_dmd.pt")
    words = shlex.split(command)
    assert words[0] == f"SFMODEL_MODELS={everything}"
    assert words[1:7] == ["sfmodel", "generate", "--preset", "wan-1.3b", "--checkpoint", generator]
    assert {each["field"] for each in found["missing"]} == {"dit", "tiny_vae"}
    assert "GPU 0    A GPU, 80 GiB, compute capability 9.0, driver 1.2" in shown(found)
    monkeypatch.setenv("SFMODEL_MODELS", str(everything))
    assert examine(everything)["next"].startswith("sfmodel generate")


def test_a_smaller_window_where_only_that_fits(machine: Machine, everything: Path) -> None:
    machine(15)
    assert "--window 9" in examine(everything)["next"]


@pytest.mark.parametrize(
    ("lacks", "command"),
    [
        (
            ["Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", "Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json"],
            "hf download Wan-AI/Wan2.1-T2V-1.3B Wan2.1_VAE.pth google/umt5-xxl/tokenizer.json",
        ),
        (["checkpoints/self_forcing_dmd.pt"], "hf download gdhe17/Self-Forcing checkpoints/self"),
    ],
)
def test_what_is_missing_is_downloaded_first(
    machine: Machine, everything: Path, lacks: list[str], command: str
) -> None:
    machine()
    for name in lacks:
        (everything / name).unlink()
    assert examine(everything)["next"].startswith(command)


def test_a_tiny_decoder_is_enough(machine: Machine, everything: Path) -> None:
    machine(12)
    vae = everything / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth"
    vae.unlink()
    save_file({"a": torch.zeros(1)}, vae.with_name("taew2_1.safetensors"))
    assert "sfmodel generate" in examine(everything)["next"]


def test_a_bad_file_counts_as_missing_and_says_why(machine: Machine, everything: Path) -> None:
    machine()
    (everything / "checkpoints" / "self_forcing_dmd.pt").write_bytes(b"PK\3\4 half a download")
    found = examine(everything)
    assert found["next"].startswith("hf download gdhe17/Self-Forcing")
    assert "not usable: not a whole PyTorch checkpoint" in shown(found)


@pytest.mark.parametrize(
    ("gib", "capability", "why"),
    [(80, (7, 5), "older than the kernels"), (8, (9, 0), "does not fit GPU 0")],
)
def test_the_toy_model_where_the_other_does_not_run(
    machine: Machine, everything: Path, gib: float, capability: tuple[int, int], why: str
) -> None:
    machine(gib, capability)
    found = examine(everything)
    assert why in found["why"] and found["next"].startswith("sfmodel generate --prompt")


def test_what_is_not_installed(
    machine: Machine, everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(compiler=None, python_headers=False, triton=None)
    monkeypatch.setattr(module, "_version", lambda name: None if name == "ftfy" else "1.0")
    found = examine(everything)
    assert found["next"] == "pip install 'sfkernels[text]'"
    out = shown(found)
    assert "not installed: pip install 'sfkernels[text]'" in out, "brackets are no markup"
    assert "no C compiler" in out and "no Python.h" in out
