"""`sfmodel predict`: several GPUs, larger models, and what the command refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sfmodel import cost
from sfmodel.cli import predict
from sfmodel.cli.main import run_command
from sfmodel.cli.predict import prediction, setting
from tests.test_cost import H100, H200, WAN, D


def test_exchange() -> None:
    """Bytes by hand on 3 GPUs: 1560 of 4680 tokens each, two thirds of whose q, k, v go to the
    others, and of whose o as much comes back; each in every layer."""
    assert cost.exchange_bytes(WAN, 3) == 4 * 1560 * D * 2 * 2 / 3
    assert cost.exchange_bytes(WAN, 3, "8-bit") == (3 + 2) * 1560 * D * 2 / 3
    assert cost.exchange_bytes(WAN, 1) == 0


def test_several_gpus() -> None:
    rows = cost.multi_gpu(WAN, H200, 5)
    kinds = [(r["gpus"], r["transformer_gpus"], r["own_decoder"]) for r in rows]
    assert kinds == [
        (1, 1, False), (2, 2, False), (2, 1, True), (3, 3, False), (3, 2, True), (4, 4, False),
        (4, 3, True), (5, 4, True),
    ]  # fmt: skip
    alone = prediction(WAN, H200)
    by_kind = dict(zip(kinds, rows, strict=True))
    one, own, two = (by_kind[k] for k in ((1, 1, False), (2, 1, True), (2, 2, False)))
    assert one["fps"] == pytest.approx(alone["fps"]["full_window"]["floor"])
    assert one["reaction_ms"] == pytest.approx(alone["latency_ms"]["reaction"]["floor"])
    assert own["fps"] == pytest.approx(12_000 / max(own["dit_ms"], own["decode_ms"]))
    assert own["reaction_ms"] == pytest.approx(one["reaction_ms"])
    assert two["exchange_ms"] == pytest.approx(
        5 * 30 * cost.exchange_bytes(WAN, 2) / (450 * 0.8) / 1e6
    )
    assert two["dit_ms"] == pytest.approx(one["dit_ms"] / 2 + two["exchange_ms"])
    memory = cost.memory_gib(WAN)
    assert two["memory_gib"] == pytest.approx(memory["weights"] + memory["cache"] / 2)
    none = cost.multi_gpu(WAN, H200, 10**9, decoder="none")
    assert [r["gpus"] for r in none] == [1, 2, 3, 4, 6, 12]
    assert not any(r["own_decoder"] for r in none)


def command(*options: str) -> None:
    run_command("sfmodel", {"predict": predict.predict}, ["predict", *options])


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--gpu h100 --precision 8-bit --decoder taehv --gpus 8",
        "--model wan-14b --height 720 --width 1280 --gpus 4",
        "--gpu rtx4090 --chunk 1 --window 9 --decoder none",
        "--chunk 24 --window 30 --steps 1",
        "--gpu b200 --matmul-tflops 1500 --copy-tbps 6.5",
    ],
)
def test_command(options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "predicted.json"
    command(*options.split(), "--json", str(file))
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    tables = 6 if result["setting"]["decoder"] != "none" and "--gpus" in options else 5
    assert printed.count(predict.LABEL) == tables and result["label"] == predict.LABEL
    assert ("too much" in printed) == (not result["memory_gib"]["fits"])
    for numbers in _leaves(result):
        assert math.isfinite(numbers) and numbers >= 0
    if "--matmul-tflops" in options:
        assert result["gpu"]["source"] == "rates given"
        assert (result["gpu"]["matmul_tflops"], result["gpu"]["copy_tbps"]) == (1500, 6.5)


def _leaves(tree: Any) -> list[float]:
    if isinstance(tree, dict | list):
        branches = tree.values() if isinstance(tree, dict) else tree
        return [leaf for branch in branches for leaf in _leaves(branch)]
    return [tree] if isinstance(tree, int | float) else []


def test_a_larger_model_costs_more() -> None:
    """The cache of 14B at 720×1280 alone takes 2 · 40 layers · 21 · 3600 tokens · 5120."""
    large = setting("wan-14b", 720, 1280)
    memory = prediction(large, H200)["memory_gib"]
    assert memory["cache"] == pytest.approx(80 * (21 * 3600 + 512) * 5120 * 2 / 2**30)
    assert memory["fits"] and not prediction(large, H100)["memory_gib"]["fits"]
    scores = {row["real_score"] for row in prediction(large, H200)["training"]}
    assert scores == {"", "wan-14b"}  # where there is one


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--gpu h300", "gpu 'h300': must be one of h200, h100"),
        ("--model toy", "model 'toy': must be one of wan-1.3b, wan-14b"),
        ("--precision fp4", "precision 'fp4': must be one of bf16, 8-bit"),
        ("--decoder x", "decoder 'x': must be one of wan, taehv, none"),
        ("--height 488", "height=488: must be a multiple of 16 pixels"),
        ("--width 0", "width=0: must be a multiple of 16 pixels"),
        ("--steps 0", "steps=0: must be from 1 to 1000"),
        ("--chunk 0", "chunk=0: must be at least 1"),
        ("--chunk 4 --window 3", "window=3 is smaller than a chunk of 4"),
        ("--gpus 0", "gpus=0: must be a positive number"),
        ("--matmul-tflops nan", "matmul_tflops=nan: must be a positive number"),
        ("--copy-tbps -1", "copy_tbps=-1.0: must be a positive number"),
        ("--json /dev/null/no/file", "/dev/null"),
    ],
)
def test_bad_input(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(*options.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
