"""`python -m bench attention`, as far as a CPU shows it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import attention, attention_cases, gpu, kernels, timing
from bench.attention_cases import FULL, TINY, Case, attention_flops, cases, exact, plainly
from tests.oracle import DEVICE

CPU = torch.device("cpu")
TINY_CASES = {case.label: case for case in cases(TINY)}
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
    monkeypatch.setattr(attention, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def sdpa(case: Case) -> Callable[..., Any]:
    return lambda *tensors: kernels.sequence(plainly, case, "sdpa", *tensors)  # type: ignore[arg-type]


def test_flops_by_hand() -> None:
    # A query and a key of a head of 4: four multiply-adds for the score, four for the value.
    assert attention_flops(pairs=1, heads=1, head_dim=4) == 16
    assert attention_flops(pairs=6, heads=2, head_dim=4) == 192
    # Backward the score again, dp = do·v, and dq, dk, dv; without dk and dv two products less.
    assert attention_flops(6, 2, 4, backward=True) == 480
    assert attention_flops(6, 2, 4, backward=True, no_gradient=6) == 288
    # Two chunks of three frames: the first sees 3 frames, the second 6. Under teacher forcing the
    # noisy ones see as much: the first itself, the second the first clean one and itself.
    pair = 16 * 8 * 8 * TINY.heads  # of frames of 8 tokens, by 4 flops an element of a head of 16
    assert TINY_CASES["diffusion forcing, 6 frames"].flops == 4 * (9 + 18) * pair
    assert TINY_CASES["teacher forcing, 6 frames"].flops == 4 * 2 * (9 + 18) * pair
    # The second chunk sees frame 0 and four more, 2..5.
    windowed = TINY_CASES["diffusion forcing, 6 frames, window 5, sink 1, backward"]
    assert windowed.flops == 10 * (9 + 15) * pair
    assert TINY_CASES["24 queries, ring of 6 frames, 3 valid"].flops == 4 * 9 * pair

    full = {case.label: case for case in cases(FULL)}
    assert len(full) == len(list(cases(FULL)))  # labels are unique
    ring = full["4680 queries, ring of 21 frames"]
    assert ring.flops == 4 * 128 * 12 * 4680 * 32760  # 0.94 TFLOP
    assert ring.nbytes == 2 * 1536 * 2 * (4680 + 32760)
    forced = full["self forcing, 3 frames after 18, backward"]
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
    monkeypatch.setattr(attention_cases, "SLICE", 7)
    case = next(c for c in cases(replace(TINY, heads=2)) if c.label == label)
    torch.manual_seed(0)
    inputs = [t.double() if t.is_floating_point() else t for t in case.make(CPU)]
    upstream = [torch.randn_like(inputs[0])] * case.backward
    want = attention.results(
        case, lambda *t: kernels.sequence(plainly, case, "reference", *t), inputs, upstream  # type: ignore[arg-type]
    )  # fmt: skip
    got = exact(case, inputs, upstream, head=1)
    assert len(got) == (3 if case.backward else 1)
    for ours, whole in zip(got, want, strict=True):
        torch.testing.assert_close(ours, whole[:, :, 1:2], rtol=1e-12, atol=1e-12)


def test_an_error_in_one_row_is_seen() -> None:
    torch.manual_seed(0)
    eager = torch.randn(1, 50, 3, 16)
    want = [eager[:, :, 1:2].double()]
    attention.check([eager + 1e-7], [eager], want, head=1)
    for head, said in ((1, "o of head 1: off by"), (2, "in some head")):
        for wrong in (1e-4, float("nan")):
            got = eager.clone()
            got[0, 31, head, 5] += wrong
            with pytest.raises(AssertionError, match=said):
                attention.check([got], [eager], want, head=1)
    gradients = [eager, eager, eager]
    with pytest.raises(AssertionError, match="dv of head 1"):
        attention.check([eager, eager, eager * 1.001], gradients, want * 3, head=1)


@pytest.mark.parametrize("label", ["24 queries, ring of 6 frames", KINDS[2], KINDS[6]])
def test_contestants_that_are_wrong_or_fail(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TINY_CASES[label]
    right = sdpa(case)
    entered = []

    @contextlib.contextmanager
    def around() -> Any:
        entered.append(1)
        yield

    def cannot(*_: Tensor) -> Any:
        raise RuntimeError("no available kernel\nat all")

    found = [
        timing.Contestant("triton", right),
        timing.Contestant("sdpa cudnn", right, None, around),
        timing.Contestant("sdpa flash", lambda *t: [1.001 * o for o in right(*t)]),
        timing.Contestant("flex", cannot),
    ]
    monkeypatch.setattr(attention, "contestants", lambda *_: found)
    row = attention.run_case(case, CPU, rounds=2)
    entries = row["contestants"]
    assert entries["triton"]["us"] > 0 and entries["sdpa cudnn"]["tflops"] > 0
    assert len(entered) > 2  # in the check and in timing
    wrong = entries["sdpa flash"]["failed"]
    assert wrong.startswith(
        "wrong, not timed: AssertionError: " + "dq"[: 1 + case.backward] * case.backward
    )
    assert entries["flex"]["failed"] == "RuntimeError: no available kernel"
    assert (row["best_ours"], row["best_peer"]) == ("triton", "sdpa cudnn")


def test_contestants_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention, "flex", lambda *_: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn" or None)

    def names(label: str, capability: tuple[int, int], compiled: bool) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return [c.name for c in attention.contestants(TINY_CASES[label], cuda, compiled)]

    forced = [*attention.SDPA]
    assert names(KINDS[0], (9, 0), False) == [
        *("triton", "gluon", *forced, "sdpa varlen", "flash-attn")
    ]
    assert names(KINDS[2], (8, 0), True) == ["triton", *forced, "flash-attn", "flex"]


def test_a_failing_case_is_reported(monkeypatch: pytest.MonkeyPatch, plain_cpu: None) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "exact", broken)
    result = attention.run(CPU, TINY, rounds=1, only="text")
    assert result["rows"] == [
        {"case": "24 queries, text of 7", "failed": "RuntimeError: out of memory"}
    ]


def test_tflops_and_ratios() -> None:
    flops = 4 * 128 * 12 * 4680 * 32760
    made = attention.entry(flops, timing.Timing(1.2, 1.3))
    assert made == {"us": 1200.0, "p99_us": 1300.0, "tflops": pytest.approx(784.98, abs=0.01)}
    assert attention.entry(flops, "cannot") == {"failed": "cannot"}
    assert attention.entry(flops, timing.Timing(1.2, 1.3, "no graph"))["note"] == "no graph"
    times = {"triton": 4.0, "gluon": 2.0, "flex": 5.0, "sdpa cudnn": 3.0}
    row = attention.best({n: {"us": us} for n, us in times.items()} | {"x": {"failed": ""}})
    assert row == {"best_ours": "gluon", "best_peer": "sdpa cudnn", "peer_over_ours": 1.5}
    assert attention.best({"reference": {"us": 2.0}, "sdpa": {"us": 1.0}})["peer_over_ours"] == 0.5
    nobody = attention.best({"flex": {"us": 1.0}, "triton": {"failed": ""}})
    assert nobody == {"best_ours": None, "best_peer": "flex"}
    assert 0 < attention.matmul_tflops(CPU, 64, torch.float32, 2) < 10


@pytest.mark.parametrize("label", ["diffusion forcing", "teacher forcing"])
def test_the_mask_of_flex_attention(label: str) -> None:
    for case in TINY_CASES.values():
        if case.layout is not None and case.name.startswith(label):
            at = torch.arange(case.layout.tokens)
            zero = torch.tensor(0)
            mask = attention.visible(case.layout)(zero, zero, at[:, None], at[None, :])
            assert mask.equal(case.layout.dense_mask()), case.label


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("label", [KINDS[0], KINDS[3], KINDS[5]])
def test_flex_attention_is_right(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be compiled, eagerly."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = TINY_CASES[label]
    inputs = case.make(CPU)
    got = kernels.sequence(attention.flex(case, CPU), *inputs)
    torch.testing.assert_close(got[0], sdpa(case)(*inputs)[0])


def made_up() -> dict[str, Any]:
    """A result with every contestant, notes, failures and what had no time."""
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(cases(FULL)):
        entries: dict[str, dict[str, Any]] = {}
        for j, name in enumerate(attention.COLOURS):
            milliseconds = case.flops / (200 + 60 * j + 3 * i) / 1e9
            entries[name] = attention.entry(case.flops, timing.Timing(milliseconds, milliseconds))
        entries["flex"]["note"] = "no CUDA graph"
        entries["sdpa cudnn"] = {"failed": "RuntimeError: no available kernel"}
        row = {"case": case.label, "flops": case.flops, "contestants": entries}
        rows.append(row | attention.best(entries))
    rows[-1] = {"case": rows[-1]["case"], "failed": "out of memory"}
    here = {"device": "made up", "torch": "0", "triton": "0"}
    return {
        "machine": here, "matmul_tflops": 790.0, "rows": rows, "no_time_for": ["a with Flex"]
    }  # fmt: skip


def test_report_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = made_up()
    attention.report(result, kernels.plain_console())
    said = capsys.readouterr().out
    for text in ("790 TFLOP/s", "sdpa cudnn: Runt", "flex *", "* no CUDA graph", "failed: out of",
                 "no time for: a with Flex", "peer / ours"):  # fmt: skip
        assert text in said, text
    assert set(attention.SDPA) | {*attention.OURS, "flex", "reference"} <= set(attention.COLOURS)
    attention.plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    attention.plot(result | {"rows": []}, tmp_path / "empty.png")


@pytest.mark.usefixtures("plain_cpu")
def test_the_command_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)
    assert attention.main(["--out", str(tmp_path)]) == 0
    assert str(tmp_path / "attention.png") in capsys.readouterr().out.replace("\n", "")
    result = json.loads((tmp_path / "attention.json").read_text())
    assert [row["case"] for row in result["rows"]] == [*TINY_CASES]
    for row in result["rows"]:
        assert set(row["contestants"]) == {"reference", "sdpa"}
        assert all(e["tflops"] > 0 for e in row["contestants"].values())
        assert (row["best_ours"], row["best_peer"]) == ("reference", "sdpa")
    assert result["machine"]["torch"] == torch.__version__ and result["matmul_tflops"] > 0
    assert (tmp_path / "attention.png").exists()

    assert attention.main(["--out", str(tmp_path), "--seconds", "-1"]) == 0
    result = json.loads((tmp_path / "attention.json").read_text())
    assert not result["rows"] and result["no_time_for"] == [*TINY_CASES]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert attention.main(["--out", str(tmp_path / "bare"), "--only", "text"]) == 0
    assert "no figure, which needs matplotlib" in capsys.readouterr().out
    assert [f.name for f in (tmp_path / "bare").iterdir()] == ["attention.json"]


@pytest.mark.usefixtures("plain_cpu")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert attention.main(["--out", str(tmp_path / "file"), "--only", "text"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m bench attention: ") and said.count("\n") == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("label", [KINDS[0], KINDS[6]])
def test_kernels_take_part_in_the_interpreter(label: str) -> None:
    entries = attention.run_case(TINY_CASES[label], CPU, rounds=1)["contestants"]
    assert [*entries] == ["triton", "reference", "sdpa"], entries
    assert all("us" in e for e in entries.values()), entries


def test_flex_attention_comes_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns first, with what time is left, and its failure loses nothing."""
    order: list[tuple[str, bool]] = []

    def run_case(case: Case, *_: Any) -> dict[str, Any]:
        order.append((case.label, _[-1]))
        if _[-1] and not case.backward:
            raise RuntimeError("cannot compile")
        return {"case": case.label, "contestants": {"triton": {"us": 1.0}}}

    monkeypatch.setattr(attention, "run_case", run_case)
    monkeypatch.setattr(attention, "matmul_tflops", lambda *_: 790.0)
    monkeypatch.setattr(attention, "machine", lambda _: {})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    result = attention.run(torch.device("cuda"), TINY, seconds=600)
    count = len(TINY_CASES)
    assert order[:count] == [(label, False) for label in TINY_CASES]
    assert order[count] == ("diffusion forcing, 6 frames, backward", True)
    assert [row["case"] for row in result["rows"]] == [*TINY_CASES]
    rows = {row["case"]: row["contestants"] for row in result["rows"]}
    assert rows["diffusion forcing, 6 frames"] == {
        "triton": {"us": 1.0},
        "flex": {"failed": "RuntimeError: cannot compile"},
    }
    short = attention.run(torch.device("cuda"), TINY, seconds=attention.COMPILING / 2)
    assert len(short["no_time_for"]) == len(order) - 2 * count
    assert all(label.endswith(" with FlexAttention") for label in short["no_time_for"])


def test_the_gpu_command_keeps_its_time() -> None:
    assert sum(limit for _, _, limit in gpu.PARTS[:-1]) + 40 <= gpu.TOTAL < 540
    assert "attention" in [name for name, _, _ in gpu.PARTS]
    assert {"attention", "gpu"} <= set(gpu.TESTS)
