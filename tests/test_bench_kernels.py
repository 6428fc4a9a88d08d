"""Timing, the rows of norms, RoPE and sampler, and the tuner, as far as a CPU shows them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import timing, tune
from bench.__main__ import main
from bench.harness import Job
from bench.ops import cpu, kernels, measure, memory_bound
from bench.ops.measure import run_case
from bench.tables import show
from bench.tune import Search, searches
from sfkernels import cases, cpp, launch, roofline
from sfkernels.cases import Case
from sfkernels.launch import Box, Flat, Product, RowTile, Tile
from sfkernels.testing import interpreted
from sfmodel import graphs, machine
from sfmodel.terminal import plain_console

CPU = torch.device("cpu")


CEILINGS = {"matmul_tflops": 1.0, "copy_gbps": 100.0}


def find(label: str) -> Case:
    rows = memory_bound.rows(memory_bound.TINY)
    return next(case for case, _ in rows if case.label.startswith(label))


def test_bytes_are_those_of_the_tensors() -> None:
    """Each activation once; what is left out is a thousandth at real sizes."""
    assert roofline.norm_bytes(4680, 1536, 4, 2) == 57_507_840  # 13.4 us at 4.3 TB/s
    full = {case.label: case for case, _ in memory_bound.rows(memory_bound.FULL)}
    assert full["gated_adaln 4680 x 1536"].nbytes == 57_507_840
    assert full["gated_adaln backward 4680 x 1536"].nbytes == 86_261_760
    # The same from tensors: qkv in; q, k, v out; the table.
    qkv, _, _, table, *_ = find("qk_norm_rope_append").make(CPU)
    assert find("qk_norm_rope_append").nbytes == 2 * qkv.nbytes + table.nbytes
    x, _, before, y, _ = find("rms_norm_silu").make(CPU)
    read, written = x.nbytes + y.nbytes + before.nbytes, x.nbytes + before.nbytes + x.nbytes
    assert find("rms_norm_silu").nbytes == read + written
    assert find("rms_norm_silu backward").nbytes == 4 * x.nbytes  # dx', dout, x'; dx
    assert full["rms_norm_silu 4792320 x 96"].nbytes == 4 * 920_125_440 + 2 * 153_354_240
    x, flow, noise, *_ = find("sampler_step, given").make(CPU)
    assert (
        find("sampler_step, given").nbytes == x.nbytes + flow.nbytes + noise.nbytes + 2 * x.nbytes
    )
    (x,) = find("quantize_rows, int8").make(CPU)
    assert find("quantize_rows, int8").nbytes == x.nbytes + x.numel() + 4 * x.shape[1]
    assert len(full) == len(list(memory_bound.rows(memory_bound.FULL)))  # labels are unique
    frames, widths = (1, 3, 9, 21), (1536, 5120)
    assert {f"gated_adaln {n * 1560} x {d}" for n in frames for d in widths} <= {*full}


def test_flops_of_rows_by_hand() -> None:
    """Of one row of a norm: counted in a loop as the reference writes it."""
    x, weight = [1.0, 2.0, 4.0], [2.0, 3.0, 5.0]
    flops = 0
    total = 0.0
    for value in x:
        total += value * value
        flops += 2
    scale = (total / len(x)) ** -0.5
    out = []
    for value, w in zip(x, weight, strict=True):
        out.append(value * scale * w)
        flops += 2
    want = torch.nn.functional.rms_norm(torch.tensor(x), (3,), torch.tensor(weight), 0.0)
    torch.testing.assert_close(torch.tensor(out), want)
    assert flops == roofline.row_flops("rms_norm", 3)
    # Of q and of k: the norm's four, and two products and a sum to rotate.
    assert roofline.row_flops("qk_norm_rope", 1) == 2 * (4 + 3)
    # A residual and a bias before it, SiLU after it: v · 1 / (1 + exp(-v)).
    assert roofline.row_flops("rms_norm_silu", 1) == 2 + 4 + 3
    assert (
        roofline.row_flops("adaln", 10, backward=True) == 2 * roofline.row_flops("adaln", 10) == 140
    )


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
    contestants = [timing.Implementation(f.__name__, f) for f in (slow, quick, broken)]
    times = timing.measure(contestants, sets, rounds=4)
    slow_time, quick_time = times["slow"], times["quick"]
    assert isinstance(slow_time, timing.Timing) and isinstance(quick_time, timing.Timing)
    assert 2.0 <= slow_time.p50 <= slow_time.p99
    assert quick_time.p50 < slow_time.p50
    assert times["broken"] == "RuntimeError: cannot"
    assert slow_time.rounds == quick_time.rounds == 4
    # After one preparation each, three calls of one, three of the other, and so on.
    assert order[6:] == (["slow"] * 3 + ["quick"] * 3) * 5


def test_no_round_is_begun_after_the_time_given() -> None:
    once = timing.Implementation("once", lambda x: time.sleep(1e-3))
    for seconds, rounds in ((0.0, timing.FEWEST), (60.0, 7)):
        timed = timing.measure([once], [[torch.zeros(2)]], 7, seconds)["once"]
        assert isinstance(timed, timing.Timing) and timed.rounds == rounds


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
    contestant = timing.Implementation("op", lambda x: (Counted.apply(x),), upstream)
    assert isinstance(timing.measure([contestant], sets, rounds=5)["op"], timing.Timing)
    assert passes == {"forward": 2, "backward": 2 * (1 + 1 + 5)}


def test_one_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6) * 1.01

    for label in ("rms_norm", "rms_norm backward"):
        right = run_case(find(label), CPU, CEILINGS, rounds=2)["contestants"]
        assert right["native"]["ms"] > 0 and right["eager"]["gbps"] > 0
        with monkeypatch.context() as patch:
            patch.setitem(memory_bound.NATIVE, "rms_norm", off)
            wrong = run_case(find(label), CPU, CEILINGS, rounds=2)["contestants"]
        assert wrong["native"]["failed"].startswith("wrong, not timed: AssertionError: result 0")
        assert "ms" in wrong["eager"]


def test_libraries_take_part_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called as they ask to be, and one that fails says so."""
    called: list[tuple[float, dict[str, Any]]] = []

    def quack_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        called.append((eps, {}))
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    def liger_rms_norm(X: Tensor, W: Tensor, eps: float, **more: Any) -> Tensor:
        called.append((eps, more))
        raise RuntimeError("no driver")

    fakes = {
        "quack": types.SimpleNamespace(rmsnorm=quack_rmsnorm),
        memory_bound.LIGER: types.SimpleNamespace(liger_rms_norm=liger_rms_norm),
    }
    monkeypatch.setattr(importlib, "import_module", lambda name: fakes[name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(memory_bound, "interpreted", lambda: False)
    case = find("rms_norm")
    every = memory_bound.implementations(case, torch.device("cuda"), False)
    assert [one.name for one in every] == ["triton", "eager", "native", "liger", "quack"]
    monkeypatch.setattr(measure, "implementations", lambda *_: every[1:])
    entries = run_case(case, CPU, CEILINGS, rounds=1)["contestants"]
    assert entries["quack"]["ms"] > 0
    assert entries["liger"] == {"failed": "RuntimeError: no driver"}
    assert (1e-6, {"in_place": False}) in called and (1e-6, {}) in called


def test_a_linear_layer_by_ours_and_by_both_ways_of_pytorch() -> None:
    entries = run_case(find("linear + GELU"), CPU, CEILINGS, rounds=1)["contestants"]
    assert [*entries] == [*["triton"] * interpreted(), "eager", "cublaslt"]
    assert all(entry["ms"] > 0 for entry in entries.values())


def test_all_rows_run_on_a_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory_bound, kernels):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    seen: list[int] = []
    job = Job(CPU, tiny=True, rounds=2, only="^(?!attention)")
    job.save = lambda r: seen.append(len(r["rows"]))
    result = kernels.run(job)
    assert seen == [*range(1, len(result["rows"]) + 1), len(result["rows"])]
    assert not [row for row in result["rows"] if "failed" in row]
    assert not [c for row in result["rows"] for c in row["contestants"].values() if "failed" in c]
    json.dumps(result)
    for table in kernels.tables(result):
        show(table, plain_console())
    assert "qk_norm_rope_append" in capsys.readouterr().out
    assert "kernels" in [name for name, _ in kernels.figures(result)]


def test_the_state_of_the_machine() -> None:
    here = machine.machine("cpu")
    assert here["kind"] == "cpu" and here["torch"] == torch.__version__ and here["date"]
    state = machine.state(CPU)
    assert state["load"] >= 0
    said = machine.describe_state({"celsius": 30.0, "load": 1.0}, {"celsius": 55.0})
    assert said == "30 → 55 °C"


def test_one_that_fails_while_timed_is_reported() -> None:
    calls = []

    def later(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return x

    both = [timing.Implementation("later", later), timing.Implementation("fine", lambda x: x)]
    times = timing.measure(both, [[torch.zeros(2)]], rounds=5)
    assert times["later"] == "RuntimeError: out of memory"
    fine = times["fine"]
    assert isinstance(fine, timing.Timing) and fine.spread >= 0 and fine.launched is None


def test_spread_and_floor() -> None:
    timed = timing.summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timed.p50, timed.p99) == (3.0, 5.0) and timed.spread == pytest.approx(2 / 3)
    assert timing.floor_ms(10**12, 10**9, {"matmul_tflops": 100.0, "copy_gbps": 50.0}) == 20.0
    assert timing.floor_ms(10**13, 10**9, {"matmul_tflops": 100.0, "copy_gbps": 50.0}) == 100.0


def test_candidates_are_all_different_programs() -> None:
    default = launch.untuned("norm_bwd", CPU, 1536)
    assert isinstance(default, RowTile)
    found = launch.candidates(default, 1536, sums=True)
    assert found[0] is default
    rows = [s for s in found if isinstance(s, RowTile)]
    keys = [(s.rows, s.warps(2048), s.per_sm, s.stages) for s in rows]
    assert len(keys) == len(set(keys)) > 20
    assert all(s.rows * 2048 <= launch.LARGEST_TILE and s.per_sm for s in rows)
    assert any(s.per_sm == 0 for s in launch.candidates(default, 1536, sums=False))  # type: ignore[union-attr]
    assert all(isinstance(s, Flat) for s in launch.candidates(Flat(1024, 4), 1, sums=False))
    for channels, counts in ((96, {4, 8, 16, 32, 64}), (384, {1, 2, 4, 8, 16}), (5120, {1, 2})):
        silu = launch.candidates(launch.untuned("norm_silu_fwd", CPU, channels), channels)
        assert {s.rows for s in silu[1:] if isinstance(s, RowTile)} == counts
    boxes = launch.candidates(launch.untuned("causal_conv3d", CPU, 96), 96)
    assert all(isinstance(s, Box) for s in boxes) and len(boxes) == len(set(boxes)) > 50
    tile = Tile(128, 64, 4, 2, why="measured")
    for specialised in (False, True):
        tiles = launch.candidates(tile, 256, specialised=specialised)
        assert tiles[0] == tile and len(tiles) == len(set(tiles)) > 8
        assert replace(tile, why="") not in tiles
    assert all(isinstance(s, Tile) and s.stationary == 128 and s.warps == 4 for s in tiles)


def test_candidates_of_products_fit_a_gpu() -> None:
    """Two of those that share a multiprocessor leave each other half of its shared memory."""
    default = launch.untuned("linear", torch.device("meta"), 8960)
    found = launch.candidates(default, 8960)
    assert found[0] == default and len({replace(s, why="") for s in found}) == len(found) > 8
    for setting in found:
        assert isinstance(setting, Product)
        stage_kib = (128 + max(setting.widths)) * 64 * 2 / 1024
        assert setting.per_sm * (setting.stages * stage_kib + 1) < 228


UNTUNED = {"rope_table", "causal_conv3d_float32"}


def test_the_tuner_calls_launchers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(launch, "recorder", lambda kernel, *_, **__: launched.append(kernel))
    for search in searches(torch.device("meta")):
        for case in search.cases:
            launched.clear()
            assert case.launch(search.impl, torch.device("meta")) and launched
    assert {s.kernel for s in searches(CPU)} == {*launch.DEFAULTS[90]} - UNTUNED
    silu = {s.channels for s in searches(CPU) if s.kernel.startswith("norm_silu")}
    assert silu == {*launch.DEFAULTS[90]["norm_silu_fwd"]}
    # What compiles candidates finds each kernel by its channels.
    names = [(s.kernel, s.channels) for s in searches(CPU)]
    assert len(names) == len({*names})


def test_the_tuner_writes_what_launch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times made up, so that one candidate must win; one that is wrong never does."""
    best, wrong = RowTile(2, 16), RowTile(4, 16)

    def run(x: Tensor, impl: str) -> Tensor:
        return x + (launch.overrides["norm_fwd"] == wrong)

    def measure(
        implementations: Sequence[timing.Implementation], sets: Any, rounds: int
    ) -> dict[str, timing.Timing | str]:
        out: dict[str, timing.Timing | str] = {}
        for one in implementations:
            with one.context():
                setting = launch.overrides["norm_fwd"]
            assert setting != wrong
            out[one.name] = timing.Timing(1.0 if setting == best else 2.0, 3.0)
        return out

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda *_: 100.0)
    sizes = tuple(
        Case("rms_norm", f"{n} x 1536", run, lambda d: [torch.ones(4, device=d)], 0, 10**8)
        for n in (1, 2)
    )
    monkeypatch.setattr(tune, "searches", lambda _: [Search("norm_fwd", 1536, sizes)])
    monkeypatch.setattr(tune, "CONTESTS", {"attention": ()})
    monkeypatch.setattr(tune, "rank", lambda op, device: ["sdpa", "triton"])
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
    assert written["impl"] == {"attention": ["sdpa", "triton"]}


def test_the_tuner_ranks_who_is_right_by_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """With times made up; one that is wrong and one that fails in a case are left out."""
    ms = {
        "4 queries, text of 3": {"triton": 1.0, "gluon": 2.0, "cudnn": 9.0, "sdpa_flash": 0.1},
        "2 queries, text of 3": {"triton": 3.0, "gluon": 1.0, "cudnn": 9.0, "sdpa": 0.1},
    }

    def run_case(case: Case, *_: Any, known: Sequence[timing.Implementation]) -> Any:
        entries: dict[str, Any] = {one.name: {"failed": timing.WRONG} for one in known}
        timed = {n: {"ms": t} for n, t in ms[case.size].items() if n in entries}
        return {"contestants": entries | timed}

    monkeypatch.setattr(tune, "run_case", run_case)
    contest = tuple(cases.cross_attention(cases.Heads(1, 1, 8), n, 3) for n in (4, 2))
    monkeypatch.setattr(tune, "CONTESTS", {"cross_attention": contest})
    assert tune.rank("cross_attention", CPU) == ["gluon", "triton", "cudnn"]


class FakeGraph:
    """What a CUDA graph does to the timing: `replay` runs what was captured."""

    captured: Any = None

    def replay(self) -> None:
        assert self.captured is not None
        self.captured()

    def pool(self) -> None:
        return None


def test_graphs_and_launches_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA: what is captured is replayed, what cannot be is launched."""
    calls: list[str] = []
    monkeypatch.setattr(graphs, "warm", lambda run: run())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    for name in ("current_device", "current_stream", "graph_pool_handle", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)

    class Capture:
        def __init__(self, graph: FakeGraph, pool: Any = None, stream: Any = None) -> None:
            graph.captured = lambda: calls.append("replayed")

        def __enter__(self) -> None:
            calls.clear()

        def __exit__(self, *_: Any) -> None:
            calls.clear()

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    sets = [[torch.zeros(2)]] * 3

    def op(x: Tensor) -> Tensor:
        calls.append("launched")
        return x

    ready = timing._forward_only(op, sets, cuda=True)
    ready.run()
    assert calls == ["replayed"] and not ready.note
    assert ready.launched is not None
    ready.launched()
    assert calls == ["replayed", *["launched"] * 3]

    def cannot(x: Tensor) -> Tensor:
        calls.append("launched")
        if len(calls) > 3:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x

    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    calls.clear()
    ready = timing._forward_only(cannot, sets, cuda=True)
    assert ready.launched is None
    assert ready.note == (
        "no CUDA graph, launches included: RuntimeError: operation not permitted when stream is "
        "capturing"
    )
    calls.clear()
    ready.run()
    assert calls == ["launched"] * 3


def test_nvidia_smi_is_asked_for_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for it, which knows one GPU; what it cannot say is left out."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        '[ "$3" = --id=GPU-abc ] || exit 6\n'
        'case "$1" in *driver_version) echo 580.1;; *) echo "1980, 2619, 41, [N/A]";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    properties = types.SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    cuda = torch.device("cuda")
    assert machine.state(cuda) == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 41.0}
    here = machine.machine(cuda)
    assert (here["device"], here["kind"], here["driver"]) == ("NVIDIA H200", "cuda", "580.1")
    properties.uuid = "another"
    assert machine.state(cuda) == {} and machine.machine(cuda)["driver"] is None


@pytest.mark.skipif(bool(cpp.MISSING), reason=cpp.MISSING)
def test_the_cpu_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op and the toy stream, right and timed; --only leaves out all others."""
    monkeypatch.setattr(timing, "keep_memory", lambda: None)  # for the whole process
    only = "^adaln 48 x 96, float32, 1 thread|^toy stream, 1 thread"
    assert main(["cpu", "--tiny", "--only", only, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert result["instructions"] == cpp.LOADED
    op, whole = result["rows"]
    for row in (op, whole):
        assert {"cpp", "eager"} <= row["contestants"].keys()
        assert all(entry["ms"] > 0 for entry in row["contestants"].values())
    assert op["copy_gbps"] > 0 and "copy_gbps" not in whole
    ops, ends = cpu.tables(result)
    assert [row[0] for row in (*ops.rows, *ends.rows)] == [op["case"], whole["case"]]
    assert [name for name, _ in cpu.figures(result)] == ["cpu"]
