"""Timing, the table of kernels, the tuner and the GPU command, as far as a CPU shows them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, kernels, timing, tune
from bench.works import Search, Work, searches
from sfkernels import launch
from sfkernels.launch import Flat, Rows, Tile
from tests.oracle import DEVICE

CPU = torch.device("cpu")


def find(label: str) -> kernels.Case:
    return next(case for case in kernels.cases(kernels.TINY) if case.label.startswith(label))


def test_bytes_are_those_of_the_tensors() -> None:
    """Each activation once; what is left out is a thousandth at real sizes."""
    assert kernels.norm_bytes(4680, 1536, 4, 2) == 57_507_840  # 13.4 us at 4.3 TB/s
    full = {case.label: case for case in kernels.cases(kernels.FULL)}
    assert full["gated_adaln 4680 x 1536"].nbytes == 57_507_840
    assert full["gated_adaln backward 4680 x 1536"].nbytes == 86_261_760
    # The same from tensors: qkv in; q, k, v out; the table.
    qkv, _, _, table, *_ = find("qk_norm_rope_append").make(CPU)
    assert find("qk_norm_rope_append").nbytes == 2 * qkv.nbytes + table.nbytes
    x, flow, noise, *_ = find("sampler_step, given").make(CPU)
    assert (
        find("sampler_step, given").nbytes == x.nbytes + flow.nbytes + noise.nbytes + 2 * x.nbytes
    )
    assert len(full) == len(list(kernels.cases(kernels.FULL)))  # labels are unique


def test_inputs_rotate_through_more_than_the_cache() -> None:
    cuda = torch.device("cuda")
    for nbytes in (1, 10**6, 2**25, 2**30):
        count = timing.count_sets(nbytes, cuda)
        assert count >= 2 and count * nbytes >= timing.COLD_BYTES
    assert timing.count_sets(100, CPU) == 2


def test_timing_is_of_one_call_and_in_turn() -> None:
    order = []

    def slow(x: Tensor) -> Tensor:
        order.append("slow")
        time.sleep(2e-3)
        return x

    def quick(x: Tensor) -> Tensor:
        order.append("quick")
        return x

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("cannot\nat all")

    sets = [[torch.zeros(2)] for _ in range(3)]
    contestants = [timing.Contestant(f.__name__, f) for f in (slow, quick, broken)]
    times = timing.measure(contestants, sets, rounds=4)
    slow_time, quick_time = times["slow"], times["quick"]
    assert isinstance(slow_time, timing.Timing) and isinstance(quick_time, timing.Timing)
    assert 2.0 <= slow_time.p50 <= slow_time.p99
    assert quick_time.p50 < slow_time.p50
    assert times["broken"] == "RuntimeError: cannot"
    # After one preparation each, three calls of one, three of the other, and so on.
    assert order[6:] == (["slow"] * 3 + ["quick"] * 3) * 5


def test_only_the_backward_pass_is_timed() -> None:
    passes = {"forward": 0, "backward": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            passes["forward"] += 1
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            passes["backward"] += 1
            return grads[0] * 2

    sets = [[torch.ones(3)], [torch.ones(3)]]
    upstream = [[torch.ones(3)]] * 2
    contestant = timing.Contestant("op", lambda x: (Counted.apply(x),), upstream)
    assert isinstance(timing.measure([contestant], sets, rounds=5)["op"], timing.Timing)
    assert passes == {"forward": 2, "backward": 2 * (1 + 1 + 5)}


def test_a_contestant_that_is_wrong_is_not_timed() -> None:
    def off(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6) * 1.01

    for label in ("rms_norm", "rms_norm backward"):
        right = kernels.run_case(find(label), CPU, rounds=2)["contestants"]
        assert right["native"]["us"] > 0 and right["eager"]["gbps"] > 0
        wrong = kernels.run_case(replace(find(label), native=off), CPU, rounds=2)["contestants"]
        assert wrong["native"]["failed"].startswith("wrong, not timed: AssertionError: result 0")
        assert "us" in wrong["eager"]


def test_the_whole_table_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    result = kernels.run(
        CPU, kernels.TINY, rounds=2, progress=lambda r: seen.append(len(r["rows"]))
    )
    assert seen == list(range(1, len(result["rows"]) + 1))
    assert not [row for row in result["rows"] if "failed" in row]
    assert not [c for row in result["rows"] for c in row["contestants"].values() if "failed" in c]
    json.dumps(result)
    kernels.report(result, kernels.plain_console())
    assert "qk_norm_rope_append" in capsys.readouterr().out
    none = kernels.run(CPU, kernels.TINY, seconds=-1, rounds=2)
    assert not none["rows"] and len(none["no_time_for"]) == len(result["rows"])


def test_candidates_are_all_different_programs() -> None:
    default = tune.untuned("norm_bwd", CPU, 1536)
    assert isinstance(default, Rows)
    found = tune.candidates(default, 1536, sums=True)
    assert found[0] is default
    rows = [s for s in found if isinstance(s, Rows)]
    keys = [(s.rows, s.warps(2048), s.per_sm, s.stages) for s in rows]
    assert len(keys) == len(set(keys)) > 20
    assert all(s.rows * 2048 <= tune.LARGEST_TILE and s.per_sm for s in rows)
    assert any(s.per_sm == 0 for s in tune.candidates(default, 1536, sums=False))  # type: ignore[union-attr]
    assert all(isinstance(s, Flat) for s in tune.candidates(Flat(1024, 4), 1, sums=False))
    tile = Tile(128, 64, 4, 2, why="measured")
    for specialised in (False, True):
        tiles = tune.candidates(tile, 256, specialised=specialised)
        assert tiles[0] == tile and len(tiles) == len(set(tiles)) > 10
        assert replace(tile, why="") not in tiles
    assert all(isinstance(s, Tile) and s.keep == 128 and s.warps == 4 for s in tiles)


def test_the_tuner_calls_launchers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(launch, "recorder", lambda kernel, *_, **__: launched.append(kernel))
    for search in searches(torch.device("meta")):
        for work in search.works:
            launched.clear()
            out = work.run(*work.make(torch.device("meta")))
            assert launched and tune._tensors(out)
    assert {s.kernel for s in searches(CPU)} == {*launch.DEFAULTS[90]} - {"rope_table"}


def test_the_tuner_writes_what_launch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times made up, so that one candidate must win; one that is wrong never does."""
    best, wrong = Rows(2, 16), Rows(4, 16)

    def run(x: Tensor) -> Tensor:
        return x + (launch.overrides["norm_fwd"] == wrong)

    def measure(
        contestants: Sequence[timing.Contestant], sets: Any, rounds: int
    ) -> dict[str, timing.Timing | str]:
        out: dict[str, timing.Timing | str] = {}
        for contestant in contestants:
            with contestant.around():
                setting = launch.overrides["norm_fwd"]
            assert setting != wrong
            out[contestant.name] = timing.Timing(1.0 if setting == best else 2.0, 3.0)
        return out

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda *_: 100.0)
    works = tuple(
        Work(f"{n} x 1536", 10**8, lambda d: [torch.ones(4, device=d)], run) for n in (1, 2)
    )
    monkeypatch.setattr(tune, "searches", lambda _: [Search("norm_fwd", 1536, works)])
    arch = launch.architecture(CPU)
    tune.write(tmp_path, arch, {}, {"norm_fwd": [{"channels": 5120, "rows": 1, "per_thread": 32}]})
    found = tune.run(CPU, tmp_path, seconds=60)
    assert found["norm_fwd"][0]["rows"] == best.rows
    assert "default 2.000 x" in found["norm_fwd"][0]["why"]

    monkeypatch.setattr(launch, "TUNED", tmp_path)
    launch.tuned.cache_clear()
    launch._setting.cache_clear()
    try:
        setting = launch.rows("norm_fwd", CPU, 1536)
        assert (setting.rows, setting.per_thread) == (best.rows, best.per_thread)
        assert launch.rows("norm_fwd", CPU, 5120).per_thread == 32  # kept from before
        assert not launch.overrides
    finally:
        launch.tuned.cache_clear()
        launch._setting.cache_clear()
    written = json.loads((tmp_path / f"sm_{arch}.json").read_text())
    assert written["machine"]["torch"] == torch.__version__


def test_the_plain_commands_need_neither_tyro_nor_av() -> None:
    code = "import sys; sys.modules.update(tyro=None, av=None); import bench.gpu, bench.tune"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="is about a machine without a GPU")
@pytest.mark.parametrize(("main", "name"), [(gpu.main, "gpu"), (tune.main, "tune")])
def test_without_a_gpu_one_sentence(
    main: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == f"python -m bench {name}: needs a GPU that PyTorch can use\n"
    assert not [*tmp_path.iterdir()]


def test_parts_of_the_gpu_command_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, seconds: float) -> dict[str, Any]:
        raise OSError("no such thing")

    def cut(folder: Path, seconds: float) -> dict[str, Any]:
        code = "import time; print('begun', flush=True); time.sleep(60)"
        return gpu.command([sys.executable, "-c", code], 2.0)

    def later(folder: Path, seconds: float) -> dict[str, Any]:
        assert set(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == {"broken", "cut"}
        return {"ok": True}

    monkeypatch.setattr(gpu, "machine", lambda _: {"device": "none", "torch": "", "triton": ""})
    parts = [("broken", broken, 60.0), ("cut", cut, 60.0), ("later", later, 60.0)]
    result = gpu.run(tmp_path, [*parts, ("late", later, 1.0)])["parts"]
    assert result["broken"]["end"] == "OSError: no such thing"
    assert result["cut"]["end"] == "cut after 2 s" and "begun" in result["cut"]["tail"]
    assert result["later"]["ok"] and result["late"]["skipped"] == "no time left"
    assert gpu.verdict(result["cut"]) == "FAILED (cut after 2 s)"


def test_junit_is_read(tmp_path: Path) -> None:
    xml = tmp_path / "t.xml"
    xml.write_text(
        '<testsuites><testsuite><testcase classname="a" name="ok"/>'
        '<testcase classname="a" name="no"><failure message="assert 1 == 2"/></testcase>'
        '<testcase classname="a" name="not here"><skipped/></testcase></testsuite></testsuites>'
    )
    out = gpu.read_junit(xml)
    assert out["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert out["failures"] == [{"test": "a::no", "said": "assert 1 == 2"}]
