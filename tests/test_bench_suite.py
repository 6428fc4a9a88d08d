"""`python -m bench --quick` and its like: parts that fail alone, and time that is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench import compare, report, suite, tables, verify
from bench.__main__ import main
from bench.suite import PRESETS, Preset, Step
from tests.oracle import DEVICE


def test_what_runs_on_a_gpu_needs_little_but_pytorch(tmp_path: Path) -> None:
    """No package but torch, triton, numpy, rich and pytest; the whole of a part, JSON included."""
    modules = "suite, stream, decode, train, report, compare, tune, verify"
    code = (
        "import sys; others = 'tyro av matplotlib PIL diffusers transformers'\n"
        "sys.modules.update(dict.fromkeys(others.split()))\n"
        f"from bench import {modules}; from experiments import rolling\n"
        "from bench.__main__ import main\n"
        f"options = ['--tiny', '--out', {str(tmp_path)!r}, '--only']\n"
        "code = main(['kernels', *options, 'dmd'])\n"
        "sys.exit(code + main(['decode', *options, 'decode 1 latent']))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "kernels.json").exists() and not (tmp_path / "kernels.png").exists()
    assert "is not installed" in json.loads((tmp_path / "decode.json").read_text())["note"]


@pytest.mark.skipif(DEVICE == "cuda", reason="is about a machine without a GPU")
@pytest.mark.parametrize("name", ["gpu", "full", "verify"])
def test_without_a_gpu_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m bench --{name}: needs a GPU that PyTorch can use")
    assert said.count("\n") == 1 and not [*tmp_path.iterdir()]


@pytest.mark.skipif(DEVICE == "cuda", reason="is about a machine without a GPU")
def test_the_tuner_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == "python -m bench tune: needs a GPU that PyTorch can use\n"


def test_parts_fail_alone(tmp_path: Path) -> None:
    def broken(folder: Path, seconds: float) -> dict[str, Any]:
        raise OSError("no such thing")

    def cut(folder: Path, seconds: float) -> dict[str, Any]:
        code = "import time; print('begun', flush=True); time.sleep(60)"
        return verify.command([sys.executable, "-c", code], 2.0)

    def later(folder: Path, seconds: float) -> dict[str, Any]:
        written = json.loads((tmp_path / "results.json").read_text())
        assert set(written["parts"]) == {"broken", "cut"}
        return {"ok": True}

    steps = [Step("broken", broken, 60.0), Step("cut", cut, 60.0), Step("later", later, 60.0)]
    preset = Preset(60.0, (*steps, Step("late", later, 1.0)))
    result = suite.run("quick", preset, tmp_path)
    parts = result["parts"]
    assert [*parts] == ["broken", "cut", "later", "late"]
    assert parts["broken"]["end"] == "OSError: no such thing"
    assert parts["cut"]["end"] == "cut after 2 s" and "begun" in parts["cut"]["tail"]
    assert parts["later"]["ok"] and parts["late"]["skipped"] == "no time left"
    assert report.verdict(parts["cut"]) == "FAILED (cut after 2 s)"
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert [row[0] for row in report.overview(result).rows] == [*parts, "all"]


def test_what_a_part_measured_is_kept_when_it_fails(tmp_path: Path) -> None:
    """And who was wrong is said."""
    entries = {"eager": {"ms": 1.0}, "triton": {"failed": "wrong, not timed: off by 3"}}
    rows = [{"case": "adaln", "contestants": entries}, {"case": "rope", "failed": "out of memory"}]
    out = {"ok": False, "end": "exit code 1", "result": {"rows": rows, "no_time_for": ["a", "b"]}}
    assert report.verdict(out) == (
        "FAILED (exit code 1); 2 rows; rope: out of memory; adaln: triton: wrong, not timed: off "
        "by 3; no time for 2 more"
    )


def test_a_part_runs_in_a_process(tmp_path: Path) -> None:
    one = suite.step("kernels", 60.0, "kernels", "--tiny", "--only", "^rms_norm 1560")
    out = one.run(tmp_path / "kernels", 60.0)
    assert out["ok"], out
    (row,) = out["result"]["rows"]
    assert row["contestants"]["native"]["ms"] > 0


def test_ctrl_c_ends_what_was_started(tmp_path: Path) -> None:
    """The child would write a file after two seconds."""
    file = tmp_path / "late"
    code = f"import time; time.sleep(2); open({str(file)!r}, 'w')"
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        verify.command([sys.executable, "-c", code], 30.0)
    time.sleep(2.5)
    assert not file.exists()


def test_presets_keep_their_time() -> None:
    for name, seconds in (("quick", 301), ("gpu", 480), ("verify", 540)):
        assert PRESETS[name].total < seconds
    *others, _ = PRESETS["gpu"].steps
    assert sum(step.limit for step in others) + 60 <= PRESETS["gpu"].total  # time for the last
    timed = {step.name for step in PRESETS["gpu"].steps}
    assert timed == {"attention", "kernels", "stream", "decode", "extrapolate", "train"}
    assert {"tests", "check", "sanitizer", *timed} == {step.name for step in PRESETS["full"].steps}
    assert {"attention", "gpu", "bench_stream"} <= set(verify.TESTS)


def test_junit_is_read(tmp_path: Path) -> None:
    xml = tmp_path / "t.xml"
    xml.write_text(
        '<testsuites><testsuite><testcase classname="a" name="ok"/>'
        '<testcase classname="a" name="no"><failure message="assert 1 == 2"/></testcase>'
        '<testcase classname="a" name="not here"><skipped/></testcase></testsuite></testsuites>'
    )
    out = verify.read_junit(xml)
    assert out["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert out["failures"] == [{"test": "a::no", "said": "assert 1 == 2"}]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="is about a machine without a GPU")
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, as a laptop runs it: JSON, page and figures, and nothing left out."""
    assert main(["quick", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["seconds"] < PRESETS["quick"].total
    assert [*result["parts"]] == [step.name for step in PRESETS["quick"].steps]
    for out in result["parts"].values():
        assert out["ok"] and out["result"]["rows"] and not out["result"]["no_time_for"]
        assert not tables.failures(out["result"])
    page = (tmp_path / "report.html").read_text()
    figures = "kernels kernels-roofline stream-timeline decode extrapolate train train-figure6"
    for figure in figures.split():
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
        assert f'<img alt="{figure}"' in page
    compared = compare.compare(result, result)
    assert compared.code == 0 and compared.lines == [f"no change ({compared.compared} compared)"]
    slowed = json.loads(json.dumps(result))
    rows = {row["case"]: row for row in slowed["parts"]["kernels"]["result"]["rows"]}
    entry = rows["rms_norm 1560 x 1536"]["contestants"]["native"]
    entry["ms"] *= 3
    (change,) = compare.compare(result, slowed).changes
    assert change.key == ("kernels", "rms_norm 1560 x 1536", "native") and change.times > 2.5
