"""Attention in `python -m bench kernels`, as far as a CPU shows it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import figures, harness, timing
from bench.__main__ import main
from bench.harness import Job
from bench.ops import attention, kernels, measure, memory_bound
from bench.ops.attention import FULL, TINY, Judge, plainly, rows
from bench.ops.measure import run_case
from bench.tables import Result, show
from sfkernels import cases, testing
from sfkernels.cases import AttentionCase, Case, Heads
from sfkernels.roofline import attention_flops
from sfmodel.terminal import plain_console
from tests.oracle import DEVICE

CPU = torch.device("cpu")
LABELS = [case.label for case, _ in rows(TINY)]
TINY_CASES = {case.label.removeprefix("attention, "): case for case, _ in rows(TINY)}
CEILINGS = {"matmul_tflops": 1000.0, "copy_gbps": 100.0}  # so low that bytes always decide
# One of each kind: sliced ring, every pattern, prefix, text.
KINDS = (
    "24 queries, ring of 6 frames, 3 valid",
    "24 queries, text of 7",
    "diffusion forcing, 6 frames, window 5, sink 1, backward",
    "teacher forcing, 6 frames, window 5, sink 1",
    "teacher forcing, 6 frames, backward",
    "self forcing, 3 frames after 3",
    "self forcing, 3 frames after 3, backward",
)


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and no kernel in the interpreter, which takes seconds for all cases."""
    for module in (attention, memory_bound, kernels):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "keep_memory", lambda: None)  # for the whole process


def test_flops_by_hand() -> None:
    # A query and a key of a head of 4: four multiply-adds for the score, four for the value.
    assert attention_flops(pairs=1, heads=1, head_dim=4) == 16
    assert attention_flops(pairs=6, heads=2, head_dim=4) == 192
    # Backward the score again, dp = do·v, and dq, dk, dv; without dk and dv two products less.
    assert attention_flops(6, 2, 4, backward=True) == 480
    assert attention_flops(6, 2, 4, backward=True, no_gradient=6) == 288
    # Two chunks of three frames: the first sees 3 frames, the second 6. Under teacher forcing the
    # noisy ones see as much: the first itself, the second the first clean one and itself.
    pair = (
        16 * 8 * 8 * TINY.of.heads
    )  # of frames of 8 tokens, by 4 flops an element of a head of 16
    assert TINY_CASES["diffusion forcing, 6 frames"].flops == 4 * (9 + 18) * pair
    assert TINY_CASES["teacher forcing, 6 frames"].flops == 4 * 2 * (9 + 18) * pair
    # The second chunk sees frame 0 and four more, 2..5.
    windowed = TINY_CASES["diffusion forcing, 6 frames, window 5, sink 1, backward"]
    assert windowed.flops == 10 * (9 + 15) * pair
    assert TINY_CASES["24 queries, ring of 6 frames, 3 valid"].flops == 4 * 9 * pair

    full = {case.label: case for case, _ in rows(FULL)}
    assert len(full) == len(list(rows(FULL)))  # labels are unique
    ring = full["attention, 4680 queries, ring of 21 frames"]
    assert ring.flops == 4 * 128 * 12 * 4680 * 32760  # 0.94 TFLOP
    assert ring.nbytes == 2 * 1536 * 2 * (4680 + 32760)
    forced = full["attention, self forcing, 3 frames after 18, backward"]
    assert forced.flops == 2 * 128 * 12 * 4680 * (3 * 28080 + 5 * 4680)


def test_cases_count_what_their_rows_see() -> None:
    for case in TINY_CASES.values():
        q, k, _ = case.plain(*case.make(CPU))
        seen = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
        for (start, end), spans in case.rows:
            for lo, hi in spans:
                seen[start:end, lo:hi] = True
        if case.layout is not None:
            assert seen.equal(case.layout.dense_mask())
        else:
            assert seen.all()
        if not case.backward:
            assert case.flops == attention_flops(int(seen.sum()), q.shape[2], q.shape[3])


@pytest.mark.parametrize("label", KINDS)
def test_the_exact_result_of_a_head(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By slices, of one head: the reference's, in float64."""
    monkeypatch.setattr(attention, "SLICE", 7)
    sizes = replace(TINY, of=replace(TINY.of, heads=2))
    case = next(case for case, _ in rows(sizes) if case.label == f"attention, {label}")
    torch.manual_seed(0)
    judge = Judge(case, [testing.cast(t, torch.float64) for t in case.make(CPU)])
    want = judge.results(plainly(case, "reference"))
    got = attention.exact(case, judge.inputs, judge.upstream, head=1)
    assert len(got) == (3 if case.backward else 1)
    for ours, whole in zip(got, want, strict=True):
        torch.testing.assert_close(ours, whole[:, :, 1:2], rtol=1e-12, atol=1e-12)


def test_an_error_in_one_row_is_seen() -> None:
    torch.manual_seed(0)
    eager = torch.randn(1, 50, 3, 16)
    want = [eager[:, :, 1:2].double()]
    attention.compare([eager + 1e-7], [eager], want, head=1)
    for head, said in ((1, "o of head 1: off by"), (2, "in some head")):
        for wrong in (1e-4, float("nan")):
            got = eager.clone()
            got[0, 31, head, 5] += wrong
            with pytest.raises(AssertionError, match=said):
                attention.compare([got], [eager], want, head=1)
    gradients = [eager, eager, eager]
    with pytest.raises(AssertionError, match="dv of head 1"):
        attention.compare([eager, eager, eager * 1.001], gradients, want * 3, head=1)


@pytest.mark.parametrize("label", ["24 queries, ring of 6 frames", KINDS[2], KINDS[6]])
def test_those_that_are_wrong_or_fail(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TINY_CASES[label]
    right = plainly(case, "sdpa")
    entered = []

    @contextlib.contextmanager
    def around() -> Any:
        entered.append(1)
        yield

    def cannot(*_: Tensor) -> Any:
        raise RuntimeError("no available kernel\nat all")

    found = [
        timing.Implementation("triton", right),
        timing.Implementation("sdpa cudnn", right, None, around),
        timing.Implementation("sdpa flash", lambda *t: [1.001 * o for o in right(*t)]),
        timing.Implementation("flex", cannot),
    ]
    monkeypatch.setattr(measure, "implementations", lambda *_: found)
    row = run_case(case, CPU, CEILINGS, rounds=2)
    entries = row["contestants"]
    assert entries["triton"]["ms"] > 0 and entries["sdpa cudnn"]["tflops"] > 0
    assert len(entered) > 2  # in the check and in timing
    wrong = entries["sdpa flash"]["failed"]
    assert wrong.startswith(
        "wrong, not timed: AssertionError: " + "dq"[: 1 + case.backward] * case.backward
    )
    assert entries["flex"]["failed"] == "RuntimeError: no available kernel"
    assert (row["best_ours"], row["best_peer"]) == ("triton", "sdpa cudnn")
    assert row["floor_ms"] == pytest.approx(case.nbytes / 1e8)


def test_who_takes_part_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn" or None)

    def names(label: str, capability: tuple[int, int], compiled: bool) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        every = attention.implementations(TINY_CASES[label], cuda, compiled)
        return [one.name for one in every]

    forced = [*attention.SDPA]
    assert names(KINDS[0], (9, 0), False) == [
        *("triton", "gluon", *forced, "sdpa math", "sdpa varlen", "flash-attn")
    ]
    assert "sdpa cudnn split" in names("24 queries, ring of 6 frames", (9, 0), False)
    assert names(KINDS[2], (8, 0), True) == ["triton", *forced, "flash-attn", "flex"]


@pytest.mark.usefixtures("plain_cpu")
def test_a_failing_case_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "exact", broken)
    result = kernels.run(Job(CPU, tiny=True, rounds=1, only="text"))
    assert result["rows"] == [
        {"case": "attention, 24 queries, text of 7", "failed": "RuntimeError: out of memory"}
    ]


def test_rates_and_ratios() -> None:
    case, _ = next(rows(FULL))
    made = measure.rates(case, timing.Timing(1.2, 1.3))
    assert made["tflops"] == pytest.approx(784.98, abs=0.01)
    assert made["gbps"] == pytest.approx(case.nbytes / 1.2e6)
    assert measure.rates(case, "cannot") == {}
    entry = timing.entry(timing.Timing(1.2, 1.3, 0.1, 1.5, 7.0, "no graph"), tflops=2.0)
    assert entry == {
        **{"ms": 1.2, "p99_ms": 1.3, "spread": 0.1, "tflops": 2.0},
        **{"launched_ms": 1.5, "peak_mib": 7.0, "note": "no graph"},
    }
    assert timing.entry("cannot", tflops=2.0) == {"failed": "cannot"}
    times = {"triton": 4.0, "gluon": 2.0, "flex": 5.0, "sdpa cudnn": 3.0}
    row = measure.best({n: {"ms": ms} for n, ms in times.items()} | {"x": {"failed": ""}})
    assert row == {"best_ours": "gluon", "best_peer": "sdpa cudnn", "peer_over_ours": 1.5}
    assert measure.best({"eager": {"ms": 2.0}, "sdpa": {"ms": 1.0}})["peer_over_ours"] == 0.5
    nobody = measure.best({"flex": {"ms": 1.0}, "triton": {"failed": ""}})
    assert nobody == {"best_ours": None, "best_peer": "flex"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("label", [KINDS[0], KINDS[3], KINDS[5]])
def test_flex_attention_is_right(label: str) -> None:
    """Uncompiled, as it is on a CPU."""
    case = TINY_CASES[label]
    inputs = case.make(CPU)
    got = plainly(case, "flex")(*inputs)
    torch.testing.assert_close(got[0], plainly(case, "sdpa")(*inputs)[0])


def made_up() -> Result:
    """A result with every contestant, notes, failures and what had no time."""
    found: list[dict[str, Any]] = []
    for i, (case, _) in enumerate(rows(FULL)):
        entries: dict[str, dict[str, Any]] = {}
        for j, name in enumerate(figures.COLOURS):
            timed = timing.summary([case.flops / (200 + 60 * j + 3 * i) / 1e9])
            entries[name] = timing.entry(timed, **measure.rates(case, timed))
        entries["flex"]["note"] = "no CUDA graph"
        entries["sdpa cudnn"] = {"failed": "RuntimeError: no available kernel"}
        row = {"case": case.label, "flops": case.flops, "bytes": case.nbytes}
        row["ceiling_tflops"] = 777.0
        found.append({**row, "contestants": entries} | measure.best(entries))
    found[-1] = {"case": found[-1]["case"], "failed": "out of memory"}
    here = {"device": "made up", "torch": "0", "triton": "0"}
    ceilings = {"matmul_tflops": 790.0, "copy_gbps": 4300.0}
    return {"machine": here, "ceilings": ceilings, "rows": found, "no_time_for": ["a with flex"]}


def test_tables_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    result = made_up()
    for table in kernels.tables(result):
        show(table, plain_console())
    said = capsys.readouterr().out
    for text in ("790 TFLOP/s", "sdpa cudnn: Runt", "flex *", "* no CUDA graph", "failed: out of",
                 "no time for: a with flex", "time / ours", "ceiling of gluon", "777"):  # fmt: skip
        assert text in said, text
    assert set(attention.SDPA) | {*harness.OURS, "flex", "eager"} <= set(figures.COLOURS)
    assert [name for name, _ in kernels.figures(result)] == ["products", "roofline"]
    assert not [*kernels.figures(result | {"rows": []})]
    assert not kernels.tables(result | {"rows": []})


@pytest.mark.usefixtures("plain_cpu")
def test_the_command_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", "^attention", "--out", str(tmp_path)]
    assert main(["kernels", *only]) == 0
    assert "products.png, roofline.png" in capsys.readouterr().out.replace("\n", "")
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["case"] for row in result["rows"]] == LABELS
    for row in result["rows"]:
        assert set(row["contestants"]) == {"eager", "sdpa"}
        assert all(e["tflops"] > 0 for e in row["contestants"].values())
        assert (row["best_ours"], row["best_peer"]) == ("eager", "sdpa")
    assert result["machine"]["torch"] == torch.__version__
    assert result["ceilings"]["matmul_tflops"] > 0 and result["ceilings"]["copy_gbps"] > 0
    assert (tmp_path / "products.png").read_bytes().startswith(b"\x89PNG")

    assert main(["kernels", *only, "--seconds", "-1"]) == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert not result["rows"] and result["no_time_for"] == LABELS

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["kernels", "--out", str(tmp_path / "bare"), "--only", "text"]) == 0
    assert "no figures, which need matplotlib" in capsys.readouterr().out
    assert [f.name for f in (tmp_path / "bare").iterdir()] == ["kernels.json"]


@pytest.mark.usefixtures("plain_cpu")
def test_bad_arguments_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["kernels", "--out", str(tmp_path / "file"), "--only", "text"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m bench kernels: ") and said.count("\n") == 1
    assert main(["kernels", "--out", str(tmp_path), "--only", "(text"]) == 2
    assert "--only '(text'" in capsys.readouterr().err


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize(("peers", "code"), [(harness.PEERS, 0), (("flash",), 1)])
def test_a_broken_op_gets_no_speed(
    peers: tuple[str, ...],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command says which one, in the table and at the end, and fails if it is no peer."""

    def wrong(case: AttentionCase, impl: str) -> testing.Op:
        right, by = plainly(case, impl), 1.01 if impl == "sdpa" else 1.0
        return lambda *tensors: [out * by for out in right(*tensors)]

    monkeypatch.setattr(attention, "plainly", wrong)
    monkeypatch.setattr(harness, "PEERS", peers)
    assert main(["kernels", "--out", str(tmp_path), "--only", "text"]) == code
    said = capsys.readouterr()
    assert "sdpa: wrong, not timed" in said.out
    assert said.err.endswith("text of 7: sdpa is wrong and was not timed\n")
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert "ms" in row["contestants"]["eager"] and "ms" not in row["contestants"]["sdpa"]


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("label", [KINDS[0], KINDS[6]])
def test_kernels_take_part_in_the_interpreter(label: str) -> None:
    entries = run_case(TINY_CASES[label], CPU, CEILINGS, rounds=1)["contestants"]
    assert [*entries] == ["triton", "eager", "sdpa"], entries
    assert all("ms" in e for e in entries.values()), entries


def test_what_compiles_comes_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns first, with what time is left, and its failure loses nothing."""
    order: list[tuple[str, bool]] = []

    def fake(case: Case, *_: Any) -> dict[str, Any]:
        order.append((case.label, _[-1]))
        if _[-1] and not case.backward:
            raise RuntimeError("cannot compile")
        return {"case": case.label, "contestants": {"triton": {"ms": 1.0}}}

    monkeypatch.setattr(kernels, "run_case", fake)
    monkeypatch.setattr(Job, "begin", lambda *_: {"rows": [], "ceilings": {}, "no_time_for": []})
    monkeypatch.setattr(Job, "end", lambda _, result: result)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("sfkernels.launch.is_hopper", lambda _: True)
    monkeypatch.setattr("sfkernels.launch.multiprocessors", lambda _: 132)
    monkeypatch.setattr(attention, "ceiling", lambda case, programs: float(programs))
    job = Job(torch.device("cuda"), tiny=True, seconds=600)
    result = kernels.run(job)
    labels = [case.label for case, _ in kernels.rows(tiny=True)]
    assert order[: len(labels)] == [(label, False) for label in labels]
    assert order[len(labels)] == ("attention, diffusion forcing, 6 frames, backward", True)
    assert [row["case"] for row in result["rows"]] == labels
    for row in result["rows"]:
        assert row.get("ceiling_tflops") == (132 if row["case"].startswith("attention") else None)
    found = {row["case"]: row["contestants"] for row in result["rows"]}
    cut = {"attention, diffusion forcing, 6 frames": "flex", labels[0]: "compile"}
    for label, name in cut.items():
        assert found[label] == {
            "triton": {"ms": 1.0},
            name: {"failed": "RuntimeError: cannot compile"},
        }
    short = kernels.run(Job(torch.device("cuda"), tiny=True, seconds=0))
    flexes = [label for label in short["no_time_for"] if label.endswith(" with flex")]
    assert len(flexes) == sum(compiled for _, compiled in rows(TINY))


def test_the_ceiling_of_a_chunk_is_that_of_its_main_loop() -> None:
    """Nearly: 4680 queries are no whole number of tiles. A few queries leave nobody idle either,
    one tile of them does."""
    of = Heads()
    ring = attention.ceiling(cases.ring_attention(of, 3, 21), 132)
    assert 0.98 * 790 < ring < 790
    few = attention.ceiling(cases.cross_attention(replace(of, heads=9), 985, 62_208, "video"), 132)
    assert 0.93 * 790 < few < 790
    one = attention.ceiling(cases.cross_attention(replace(of, heads=1), 128, 1024), 132)
    assert one < 790 / 60
    backward = attention.ceiling(cases.training(of, 21, backward=True), 132)
    assert 0.95 * 655 < backward < 655
