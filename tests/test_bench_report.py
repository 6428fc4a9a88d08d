"""The page, the comparison and README's block, from results of every kind."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import bench
from bench import compare, report
from bench.__main__ import main
from bench.tables import Result, Table
from docs import readme

RESULTS = Path(__file__).parent.parent / "bench" / "results"
MARKUP = "[B, L] <b> & 'x'"
MACHINE = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc",
           "date": "2030-01-02T03:04:05+00:00"}  # fmt: skip


def entry(ms: float, **more: Any) -> dict[str, Any]:
    return {"ms": ms, "p99_ms": 1.02 * ms, "spread": 0.01, "gbps": 10.0, "tflops": 5.0, **more}


def one_part(**more: Any) -> Result:
    """A file of `bench kernels`: two rows timed, one with wrong contestants, one failed."""
    wrong = {"failed": "wrong, not timed: AssertionError: result 0"}
    return {
        "part": "kernels",
        "sizes": "Wan2.1 at 480×832",
        "machine": dict(MACHINE),
        "before": {"sm_mhz": 1980.0},
        "after": {"sm_mhz": 1755.0},
        "ceilings": {"dtype": "bfloat16", "matmul_tflops": 790.0, "copy_gbps": 4200.0},
        "rows": [
            {"case": "gated_adaln 4680 x 1536", "copy_gbps": 20.0, "contestants": {
                "triton": entry(0.01), "eager": entry(0.08), "compile": entry(0.02)}},
            {"case": "attention, ring", "rounds": 30, "contestants": {
                "triton": entry(1.0), "gluon": entry(0.8), "sdpa": entry(1.2)}},
            {"case": f"layer_norm {MARKUP}", "contestants": {
                "triton": wrong, "eager": entry(0.5)}},
            {"case": "rms_norm 1 x 1", "failed": f"OutOfMemoryError: {MARKUP}"},
        ],
        "no_time_for": [f"late {MARKUP}"],
        "seconds": 3.0,
        **more,
    }  # fmt: skip


def whole_run() -> dict[str, Any]:
    return {
        "preset": "quick",
        "machine": dict(MACHINE),
        "seconds": 12.0,
        "parts": {
            "tests": {"ok": False, "end": "exit code 1", "seconds": 2.0, "tail": f"boom {MARKUP}",
                      "counts": {"passed": 3, "failed": 1},
                      "failures": [{"test": "tests.x::y", "said": MARKUP}]},
            "check": {"ok": True, "end": "exit code 0", "broken": [], "seconds": 1.0},
            "sanitizer": {"skipped": f"not here {MARKUP}", "seconds": 0.0},
            "kernels": {"ok": True, "end": "exit code 0", "seconds": 3.0, "result": one_part()},
            "train": {"ok": True, "result": {
                "part": "dance", "machine": dict(MACHINE), "rows": []}},
        },
    }  # fmt: skip


def row_of(content: Any, i: int) -> dict[str, Any]:
    """Of a part's file."""
    return dict(content)["rows"][i]["contestants"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that shows any result, in the place of bench.kernels."""
    module = ModuleType("fake_part")

    def tables(result: Result) -> list[Table]:
        rows = [[row["case"], "1.5", f"failed: {MARKUP}", ""] for row in result["rows"]]
        return [Table(f"title {MARKUP}", ("case", "µs", "", ""), rows, [f"note {MARKUP}"])]

    def figures(result: Result) -> Iterator[tuple[str, Any]]:
        from matplotlib.figure import Figure

        for name in ("kernels", "roofline"):
            figure = Figure(figsize=(2, 1))
            figure.subplots().plot([1, 2])
            yield name, figure

    vars(module).update(tables=tables, figures=figures)
    monkeypatch.setitem(sys.modules, "fake_part", module)
    monkeypatch.setitem(bench.PARTS, "kernels", "fake_part")


class Checker(HTMLParser):
    """Balanced tags, no reference out of the page, and all text."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert tag != "script"
        for name, value in attrs:
            if name == "src":
                assert value and value.startswith("data:image/png;base64,")
            if name == "href":
                assert value and value.startswith("#")
                self.links.add(value[1:])
            if name == "id":
                self.ids.add(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert "url(" not in data and "@import" not in data
        self.text += data


def test_a_page_of_every_kind_of_part(shown: None) -> None:
    page = Checker(report.page(whole_run()))
    assert page.links == page.ids and len(page.ids) == 6  # summary and five parts
    assert "b" not in page.counts and page.counts["img"] == 2
    for text in (
        "quick on NVIDIA H200", "2030-01-02", "abc", "1.98e+03 → 1.76e+03 SM MHz",
        "790 matmul_tflops, 4200 copy_gbps bfloat16",
        "FAILED (exit code 1); 3 passed, 1 failed; tests.x::y", f"tests.x::y: {MARKUP}",
        f"boom {MARKUP}", f"skipped: not here {MARKUP}",
        f"title {MARKUP}", f"note {MARKUP}", f"failed: {MARKUP}", f"no time for: late {MARKUP}",
        f"rms_norm 1 x 1: OutOfMemoryError: {MARKUP}", f"layer_norm {MARKUP}: triton: wrong, not",
        "no tables: ValueError: part 'dance' is none of kernels", "no figures: ValueError: part",
    ):  # fmt: skip
        assert text in page.text, text


def test_a_page_of_one_part_beside_an_older_file(shown: None) -> None:
    slower = one_part()
    row_of(slower, 0)["triton"] = entry(0.012)
    page = Checker(report.page(slower, one_part()))
    assert "1 slower of 7 compared" in page.text and "+20.0%" in page.text
    assert "the older: abc, 2030" in page.text
    assert "1 slower" not in Checker(report.page(slower)).text


def test_a_page_without_matplotlib(shown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Checker(report.page(one_part()))
    assert "no figures, which need matplotlib" in page.text
    assert "img" not in page.counts and page.counts["table"] == 3


def test_a_page_of_what_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No module, and one that lacks something."""
    bare = {"part": "kernels", "machine": MACHINE, "rows": []}
    for module, said in (
        ("no_such_module", "No module named 'no_such_module'"),
        ("bench.timing", "module 'bench.timing' has no attribute 'tables'"),
    ):
        monkeypatch.setitem(bench.PARTS, "kernels", module)
        assert said in Checker(report.page(bare)).text


def test_half_of_the_figures_are_kept(shown: None) -> None:
    module: Any = sys.modules["fake_part"]
    all_of_them = module.figures

    def figures(result: Result) -> Iterator[tuple[str, Any]]:
        yield next(all_of_them(result))
        raise KeyError("flops")

    module.figures = figures
    page = Checker(report.page(one_part()))
    assert page.counts["img"] == 1 and "no more figures: KeyError: 'flops'" in page.text


def test_the_command_writes_the_page_and_its_figures(
    shown: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, older, out = tmp_path / "new.json", tmp_path / "old.json", tmp_path / "a" / "b"
    file.write_text(json.dumps(whole_run()))
    older.write_text(json.dumps(one_part()))
    assert main(["report", str(file), "--against", str(older), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"title {MARKUP}" in said and "part 'dance'" in said and "no change" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "kernels-roofline.png", "kernels.png", "report.html"]  # fmt: skip
    assert (out / "kernels.png").read_bytes().startswith(b"\x89PNG")
    Checker((out / "report.html").read_text(encoding="utf-8"))
    assert main(["report", str(file), "--out", str(file)]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_committed_results_can_be_read_and_shown(tmp_path: Path) -> None:
    for path in RESULTS.glob("*-h200.json"):
        content = compare.read(path)
        assert report.write(tmp_path, content, Console(quiet=True)).is_file()
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "no tables" not in page and "gated_adaln backward 4680 x 1536" in Checker(page).text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"x"', "null", "\xff", "{}", '{"machine": {}}', "[" * 100_000,
     '{"machine": {}, "parts": []}', '{"machine": {}, "parts": {"a": 1}}',
     '{"machine": {}, "part": "a", "rows": 1}', '{"machine": {}, "part": "a", "rows": [1]}',
     '{"machine": {}, "part": "a", "rows": [{"contestants": {"c": {}}}]}',
     '{"machine": {}, "part": "a", "rows": [{"case": "b", "contestants": {"c": 1}}]}',
     '{"machine": [], "part": "a", "rows": []}'],
)  # fmt: skip
def test_other_files_are_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text(text, encoding="latin-1")
    good.write_text(json.dumps(one_part()))
    out = str(tmp_path / "out")
    for arguments in (
        ("compare", bad, good), ("compare", good, bad), ("report", bad, "--out", out),
    ):  # fmt: skip
        code, said = main([*map(str, arguments)]), capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1 and "bad.json is not " in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "no"), str(tmp_path)]) == 2
    assert "no: No such file or directory" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_file_beside_itself() -> None:
    for content in (one_part(), whole_run(), *map(compare.read, RESULTS.glob("*-h200.json"))):
        found = compare.compare(content, content)
        assert not found.changes and found.code == 0 and found.compared > 0
        assert found.lines == [f"no change ({found.compared} compared)"]


@pytest.mark.parametrize("machine", [0.9, 1.0, 1.1])
def test_one_slow_kernel_is_named_whatever_the_machine_does(machine: float) -> None:
    old = compare.read(RESULTS / "kernels-h200.json")
    for times, code in ((1.2, 1), (0.8, 0)):
        new = copy.deepcopy(old)
        for row in new["rows"]:
            for one in row["contestants"].values():
                one["ms"] *= machine
                one["p99_ms"] *= machine
        row_of(new, 3)["triton"]["ms"] *= times
        row_of(new, 3)["triton"]["p99_ms"] *= times
        found = compare.compare(old, new)
        (change,) = found.changes
        assert change.key == ("kernels", "layer_norm 4680 x 1536", "triton")
        assert change.times == pytest.approx(times) and found.code == code
        assert any("the machine is 10.0%" in line for line in found.lines) == (machine != 1)
        assert found.tables[0].rows[0][5] == f"{100 * (times - 1):+.1f}%"


def test_kernels_of_ours_do_not_count_as_drift() -> None:
    old, new = one_part(), one_part()
    for i, name, times in ((0, "triton", 0.8), (1, "triton", 1.3), (1, "gluon", 1.5)):
        row_of(new, i)[name] = entry(times * row_of(new, i)[name]["ms"])
    found = compare.compare(old, new)
    assert found.lines == ["2 slower, 1 faster of 7 compared"] and found.code == 1
    assert [change.times for change in found.changes] == pytest.approx([1.5, 1.3, 0.8])
    # Models that stream run our kernels under any name but the reference's.
    for content, times in ((old, 1.0), (new, 1.3)):
        content["part"] = "stream"
        content["rows"] = [{"case": "chunk-wise", "contestants": {
            "triton, graph": entry(10 * times), "sdpa": entry(12 * times),
            "reference": entry(20.0)}}]  # fmt: skip
    changes = compare.compare(old, new).changes
    assert [change.key.contestant for change in changes] == ["triton, graph", "sdpa"]


def test_moods_of_a_shared_machine() -> None:
    """Each row of the second run met another mood; one contestant was really slowed."""
    old = compare.read(RESULTS / "quick-cpu.json")
    new = copy.deepcopy(old)
    moods = itertools.cycle((1.0, 1.3, 0.8, 1.1, 1.4, 0.7))
    for out in new["parts"].values():
        for row, mood in zip(out["result"]["rows"], moods, strict=False):
            for one in row["contestants"].values():
                one["ms"] *= mood
    row = next(row for row in new["parts"]["kernels"]["result"]["rows"]
               if row["case"].startswith("attention, 24 queries, text"))  # fmt: skip
    row["contestants"]["sdpa"]["ms"] *= 9
    found = compare.compare(old, new)
    assert any(line.startswith("the machine had moods of ±") for line in found.lines)
    (change,) = found.changes
    assert change.key == ("kernels", row["case"], "sdpa")


def test_noise_is_that_of_the_medians() -> None:
    """A spread of 20% over 30 rounds: 3 · 0.93 · 0.2 · √2 / √30 = 14%; over 6 rounds 32%."""
    for rounds, noise in ((30, 0.144), (6, 0.322)):
        for times in (1 + 0.97 * noise, 1 + 1.03 * noise):
            old, new = one_part(), one_part()
            for content, factor in ((old, 1.0), (new, times)):
                content["rows"][0]["rounds"] = rounds
                row_of(content, 0)["triton"] = entry(0.01 * factor, spread=0.2)
            assert bool(compare.compare(old, new).changes) == (times > 1 + noise)
    # Without a spread the 99th percentile stands in; a steady one is allowed 3%.
    for p99, times, changed in ((1.2, 1.1, False), (1.0, 1.1, True), (1.0, 1.029, False)):
        old, new = one_part(), one_part()
        for content, ms in ((old, 0.01), (new, 0.01 * times)):
            row_of(content, 0)["triton"] = {"ms": ms, "p99_ms": ms * p99}
        assert bool(compare.compare(old, new).changes) == changed


def test_what_fails_now_comes_first() -> None:
    old, new = whole_run(), whole_run()
    rows = new["parts"]["kernels"]["result"]["rows"]
    rows[0]["contestants"]["triton"] = {"failed": "wrong, not timed: result 1"}
    rows[0]["contestants"]["compile"] = entry(0.03)
    rows[1] = {"case": rows[1]["case"], "failed": "RuntimeError: no"}
    new["parts"]["check"] |= {"ok": False, "end": "cut after 45 s"}
    found = compare.compare(old, new)
    assert [(c.key.part, c.key.contestant, c.failed) for c in found.changes] == [
        ("check", "", "cut after 45 s"),
        ("kernels", "triton", "wrong, not timed: result 1"),
        ("kernels", "triton", "RuntimeError: no"),
        ("kernels", "gluon", "RuntimeError: no"),
        ("kernels", "sdpa", "RuntimeError: no"),
        ("kernels", "compile", ""),
    ]
    assert found.lines == ["5 failed, 1 slower of 8 compared"] and found.code == 1
    assert "FAILED: wrong, not timed: result 1" in found.tables[0].rows[1]
    # What failed before and runs now is no change for the worse.
    assert compare.compare(new, old).code == 0


def test_what_is_only_in_one_file_and_what_differs() -> None:
    old, new = one_part(), one_part(sizes="toy")
    new["machine"] |= {"torch": "2.12.0", "driver": "580"}
    del row_of(new, 0)["compile"]
    new["rows"][1]["case"] = "attention, other"
    first, *rest = compare.compare(old, new).lines
    assert first == "not the same: torch 2.11.0 → 2.12.0; sizes of kernels Wan2.1 at 480×832 → toy"
    gone = "kernels: gated_adaln 4680 x 1536: compile; kernels: attention, ring"
    assert f"only in the old file: {gone}" in rest
    assert "only in the new file: kernels: attention, other" in rest
    new["rows"] = []
    found = compare.compare(old, new)
    assert found.code == 2 and "nothing to compare: no contestant was timed in both" in found.lines


def test_the_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    slower = one_part()
    row_of(slower, 1)["gluon"] = entry(1.0)
    old.write_text(json.dumps(one_part()))
    new.write_text(json.dumps(slower))
    assert main(["compare", str(old), str(old)]) == 0
    assert capsys.readouterr().out == "no change (7 compared)\n"
    assert main(["compare", str(old), str(new)]) == 1
    assert "gluon" in (said := capsys.readouterr().out) and "+25.0%" in said
    assert main(["compare", str(new), str(old)]) == 0


def test_readme_says_what_the_committed_results_say() -> None:
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    made = readme.block(RESULTS)
    assert made in text, "run: python -m bench readme"
    assert readme.rewritten(text, made) == text
    with pytest.raises(ValueError, match="must have one block"):
        readme.rewritten("nothing here", made)


def test_the_block_shows_the_newest_results(tmp_path: Path) -> None:
    def save(name: str, date: str, ms: float, **more: Any) -> Result:
        result = one_part(machine=MACHINE | {"date": date}, **more)
        row_of(result, 0)["triton"] = entry(ms)
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        return result

    empty = readme.block(tmp_path)
    assert "**The demo is not measured yet.**" in empty
    for what in ("The kernels are", "Attention is", "Streaming is"):
        assert f"**{what} not measured on a GPU yet" in empty
    save("toy", "2031", 0.001, sizes="toy")
    assert readme.block(tmp_path) == empty
    ways = {
        "recompute window": {"times_the_ring": 5.5, "times_the_ring_in_theory": 6.0},
        "ring cache": {"times_the_ring": 1.0, "times_the_ring_in_theory": 1.0},
    }
    ways["ring cache"]["seconds_per_chunk"] = 0.02
    streamed = {"fps": 200.4, "first_frame_seconds": 0.0214, "chunk": 3}
    streamed |= {f"seconds_per_chunk_at_frame_{n}": n / 1e4 for n in (100, 1000)}
    demo = {"machine": MACHINE, "stream": streamed}
    demo["rolling"] = [{"batch": n, "window": 21, "ways": ways} for n in (1, 64)]
    (tmp_path / "demo-cpu.json").write_text(json.dumps(demo))
    shown = readme.block(tmp_path)
    said = " ".join(shown.split())
    assert "200 decoded frames a second, the first after 21 ms; a chunk of 12 takes 10.0 ms" in said
    assert "around frame 100 and 100.0 around frame 1000" in said
    assert "recompute window 5.50 × and 5.50 × (in theory 6.00 ×)" in said
    assert "with 1 and 64 streams: ring cache 20.0 and 20.0 ms a chunk" in said
    save("a", "2030-05-01", 0.01)
    save("b", "2030-04-01", 0.04)
    block = readme.block(tmp_path)
    assert "| gated_adaln 4680 × 1536 | 10 | 50 | 8.0 | 2.0 (torch.compile) |" in block
    assert "| ring | 800 | 5 | gluon | 1.5 (sdpa) |" in block
    assert "bench/results/a.json" in block and "b.json" not in block
    # A kernel that is wrong in the newest file is not shown by what it once took.
    result = save("c", "2030-06-01", 0.01)
    row_of(result, 0)["triton"] = {"failed": "wrong, not timed"}
    (tmp_path / "c.json").write_text(json.dumps(result))
    assert "| gated_adaln 4680 × 1536 | failed |" in readme.block(tmp_path)
    # Streaming, beside the paper's.
    lines = [{"name": "Self | Forcing", "paper_fps": 17.0, "paper_latency_s": 0.69, "fps": 21.04,
              "latency_s": 0.512, "said": "triton, graph"},
             {"name": "not run", "paper_fps": 1.0, "paper_latency_s": 2.0}]  # fmt: skip
    save("d", "2030-07-01", 0.01, baselines=lines)
    block = readme.block(tmp_path)
    assert r"| Self \| Forcing | 21 | 17 | 0.512 s | 0.69 s | triton, graph |" in block
    assert "not run" not in block and "Streaming is not" not in block
    # The C++, whose rows are not those of a GPU's kernels.
    kind = "4680 x 1536, float32, 1 thread"
    both = {"cpp": entry(2.0), "eager": entry(5.0), "compile": entry(3.0)}
    row: dict[str, Any] = {"case": f"gated_adaln {kind}", "contestants": both}
    both = {"cpp": entry(2.0), "eager": entry(9.0), "compile": {"failed": "no"}}
    other: dict[str, Any] = {"case": f"adaln {kind}", "contestants": both}
    ends = [
        {"case": f"toy stream, {n}", "contestants": {"cpp": entry(1.0), "eager": entry(ms)}}
        for n, ms in (("1 thread", 1.25), ("2 threads", 1.5))
    ]
    cpu = {"part": "cpu", "machine": MACHINE | {"date": "2031"}, "rows": [row, other, *ends]}
    (tmp_path / "cpu.json").write_text(json.dumps(cpu))
    block = readme.block(tmp_path)
    assert "| gated_adaln 4680 × 1536 | 10 |" in block and "(`bench/results/cpu.json`)" in block
    assert "|  | float32, 1 thread | float32, 2 threads |" in block
    assert (
        "| eager / C++ | 3.5 (2.5) |  |" in block and "| torch.compile / C++ | 1.50 |  |" in block
    )
    assert "| eager / C++, toy stream | 1.25 | 1.50 |" in block
    # README stays short when all of it is measured.
    result = save("d", "2030-07-01", 0.01, baselines=lines[:1] * 5)
    result["rows"] = [row_of(result, i) | {"case": case} for i, case in (
        (0, "gated_adaln 4680 x 1536"), (0, "qk_norm_rope_append 4680 x 1536"),
        (0, "gated_adaln backward 4680 x 1536"), *((1, f"attention, {i}") for i in range(5)),
    )]  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps(result))
    whole = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rewritten(whole, readme.block(tmp_path)).count("\n") < 150
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(ValueError, match=r"e\.json is not JSON"):
        readme.block(tmp_path)


def test_results_without_a_date_go_by_name() -> None:
    found = readme.newest(RESULTS)
    files = [name for name, result in found if "date" not in result["machine"]]
    assert files == sorted(files) and set(files) >= {"gpu-h200.json", "kernels-h200.json"}
    assert [name for name, _ in found[len(found) - len(files) :]] == files


def test_the_readme_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert main(["readme"]) == 0
    made = readme.block(tmp_path / "bench" / "results")
    assert file.read_text(encoding="utf-8") == f"before\n{made}\nafter\n"
    file.write_text("no block")
    assert main(["readme"]) == 2 and file.read_text() == "no block"
    assert "must have one block" in capsys.readouterr().err
