"""`python -m bench stream`, as far as a CPU shows it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import codecs, harness, inputs, peers, stream, stream_report, tables, timing
from bench.harness import Job
from bench.inputs import StreamInputs
from bench.peers import PEERS
from bench.stream import Measured, Variant, without_each
from bench.tables import Result
from bench.timing import Timed
from sfmodel import graphs
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.ranges import phase
from sfmodel.stream import Stream
from sfmodel.terminal import plain_console
from sfmodel.toy.vae import ToyVAE

CPU = torch.device("cpu")
TOY = PRESETS["toy"]
SMALL = replace(TOY, dit=replace(TOY.dit, dim=64, heads=1, ffn_dim=64, layers=2), window=6)
# Of a chunk behind another one.
CHUNK = [n for n in stream_report.chunk_phases(4) if n not in ("cache update", "step 1")]
TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def setting() -> StreamInputs:
    torch.manual_seed(0)
    model = DiT(SMALL.dit)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return StreamInputs(SMALL, model.eval(), TEXT, ToyVAE(), lambda: TEXT)


@pytest.fixture
def small(setting: StreamInputs, monkeypatch: pytest.MonkeyPatch) -> StreamInputs:
    """What `run` measures at toy sizes."""
    monkeypatch.setattr(stream, "toy", lambda: setting)
    monkeypatch.setattr(stream, "CLIP", 7)
    monkeypatch.setattr(peers, "measure", lambda *_: {"said": "not run: diffusers"})
    return setting


def job(**more: Any) -> Job:
    return Job(CPU, tiny=True, rounds=2, **more)


def pretend_capture(run: Callable[[], Any], *more: Any) -> tuple[Callable[[], Any], str]:
    """As `graphs.captured`, which runs three times to warm up."""
    for _ in range(3):
        run()
    return run, ""


@pytest.mark.parametrize("graph", [False, True])
@torch.no_grad()
def test_what_is_timed_is_the_stream(
    setting: StreamInputs, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, three times around the ring, whatever was run before."""
    monkeypatch.setattr(graphs, "captured", pretend_capture)
    monkeypatch.setattr(graphs, "shared_pool", lambda *_: None)
    monkeypatch.setattr(graphs, "possible", lambda _: True)
    both = replace(setting, tiny=ToyVAE(width=8))
    mine = Measured(both, SMALL, Variant("x", "auto", "auto", graph), seed=5)
    first = mine.first_frame()
    assert [*first.phases][:2] == ["text encoding", "prompt keys and values"]
    chunks = Stream(setting.model, None, TEXT, SMALL, seed=5).latents()
    for want in itertools.islice(chunks, 7):
        timed = mine.chunk()
        assert torch.equal(mine.stream.latents_BFCHW[mine.stream.size], want)
    assert [*timed.phases] == [*CHUNK, "decode, tiny VAE"]
    assert all(ms > 0 for ms in timed.phases.values())
    assert sum(timed.phases[name] for name in CHUNK) <= timed.whole
    for recompute in (False, True, False):  # whatever an earlier one has left behind
        phases = [*mine.reaction(recompute).phases]
        assert phases[:2] == ["text encoding", "prompt keys and values"]
        assert {f"step {i}" for i in (2, 3, 4)} <= {*phases} and (
            "cache update" in phases
        ) == recompute
    again = mine.first_latents(2)
    chunks = Stream(setting.model, None, TEXT, SMALL, seed=5).latents()
    assert torch.equal(again, torch.cat([*itertools.islice(chunks, 2)], 1))


def test_all_share_one_set_of_weights(setting: StreamInputs) -> None:
    twin = inputs.shared(setting.model, "reference", "sdpa")
    for mine, theirs in zip(twin.parameters(), setting.model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    assert twin.blocks[0].self_attn.attention_impl == "sdpa"  # type: ignore[union-attr]


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of those of Wan2.1."""
    monkeypatch.setitem(PRESETS, "wan-1.3b", replace(SMALL, first=None))
    monkeypatch.setattr(codecs, "wan_vae", lambda *_: ToyVAE())
    monkeypatch.setattr(codecs, "tiny_vae", lambda *_: ToyVAE(width=8))


@torch.no_grad()
def test_full_size_runs_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, no text encoder: that phase is absent. A tiny VAE is timed beside the other."""

    def not_installed(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'transformers'")

    small_parts(monkeypatch)
    monkeypatch.setattr(peers, "text_encoder", not_installed)
    setting = inputs.full_size(CPU)
    assert setting.model.dtype == torch.bfloat16 and setting.text_BTE.shape == (1, 16, 32)
    row = stream.run_case(job(), setting, "chunk-wise")
    for entry in row["contestants"].values():
        assert "text encoding" not in entry["phases"] and "without text" in entry["latency_ms"]
        tiny, whole = entry["phases"]["decode, tiny VAE"]["ms"], entry["phases"]["decode"]["ms"]
        fps, latency = entry["fps"]["full window"], entry["latency_ms"]
        assert fps["with the tiny VAE"] == pytest.approx(12e3 / (entry["ms"] - whole + tiny))
        assert latency["without decode"] < latency["with the tiny VAE"]
        assert "with the tiny VAE" in entry["fps"]["clip"]
        together = sum(
            p["ms"]
            for n, p in entry["phases"].items()
            if n in CHUNK or n == "cache update" or n == "step 1"
        )
        assert entry["phases_sum_ms"] == pytest.approx(together)
    text = str(stream_report.breakdown(row))
    assert "beside it: decode, tiny VAE" in text and "decoded by Wan2.1's VAE" in text
    assert "text encoding: no text encoder here" in text
    assert "no text encoder here: ModuleNotFoundError: No module named 'transformers'" in text
    (first, *_) = stream.baselines(job(only="none"), {"rows": [row], "no_time_for": []}, setting)
    assert "FPS with the tiny VAE" in first["said"]


@torch.no_grad()
def test_full_size_with_a_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, encoding is a phase like any other."""
    small_parts(monkeypatch)
    monkeypatch.setattr(peers, "text_encoder", lambda _, rows: lambda: torch.ones(1, rows, 32))
    row = stream.run_case(job(), inputs.full_size(CPU), "chunk-wise")
    for entry in row["contestants"].values():
        assert {"decode", "text encoding"} <= entry["phases"].keys()
        assert "without decode" in entry["latency_ms"]
    assert row["notes"][1:] == ["text encoded by transformers' UMT5"]


def test_with_and_without_by_hand() -> None:
    ms = {"prompt keys and values": 1.0, "noise": 2.0, "step 1": 10.0, "step 2": 20.0,
          "decode": 5.0, "copy to host": 3.0, "cache update": 9.0}  # fmt: skip
    assert without_each(60.0, ms, ms) == {
        "all": 60.0,
        "without text": 59.0,
        "without cache update": 51.0,
        "without decode": 55.0,
        "without copy to host": 57.0,
        "denoising alone": 30.0,
    }
    beside = ms | {"decode, tiny VAE": 1.5}
    assert without_each(60.0, beside, beside)["with the tiny VAE"] == 56.5
    del ms["prompt keys and values"]
    assert "without text" not in without_each(60.0, ms, ms)
    # What the stream has and this figure has not costs it nothing.
    assert without_each(60.0, {"step 1": 1.0}, ["cache update"])["without cache update"] == 60.0


def test_figures_by_hand(setting: StreamInputs) -> None:
    """A chunk of 3 latent frames is 12 frames; a clip of 1 + 2·3 is 25."""
    mine = Measured(setting, SMALL, Variant("x", "auto", "auto"))
    chunk = dict.fromkeys(["cache update", *CHUNK], 10.0)
    prompt = {"text encoding": 4.0, "prompt keys and values": 6.0}
    first = {name: ms for name, ms in chunk.items() if name != "cache update"} | prompt
    steady = [Timed(100.0, chunk), Timed(110.0, chunk | {"decode": 40.0}), Timed(90.0, chunk)]
    entry = stream.entry(mine, 25, [Timed(85.0, first)], [Timed(100.0, chunk)] * 3, steady)
    assert entry["ms"] == 100 and entry["phases_sum_ms"] == 80
    assert entry["phases"]["decode"] == {"ms": 10.0, "p99_ms": 40.0}
    assert entry["phases"]["text encoding"] == {"ms": 4.0, "p99_ms": 4.0}
    assert entry["fps"]["full window"]["all"] == pytest.approx(120)
    assert entry["fps"]["full window"]["denoising alone"] == pytest.approx(300)
    assert entry["fps"]["clip"]["all"] == pytest.approx(25 / 0.310)
    assert entry["fps"]["clip"]["without cache update"] == pytest.approx(25 / 0.280)
    assert entry["latency_ms"]["without text"] == 75
    assert entry["latency_ms"]["without cache update"] == 85


def test_the_part(small: StreamInputs) -> None:
    saved: list[str] = []
    result = stream.run(job(save=lambda r: saved.append(json.dumps(r))))
    assert len(saved) == 2 + len(peers.BASELINES) + 1 and not result["no_time_for"]
    wide, narrow = result["rows"]
    assert (wide["case"], wide["chunk"], wide["frames"]) == ("chunk-wise", 3, 25)
    assert (narrow["case"], narrow["chunk"], narrow["frames"]) == ("frame-wise", 1, 25)
    for row, chunks in ((wide, 3), (narrow, 7)):
        assert [*row["contestants"]] == ["reference", "sdpa", "sdpa, apart"]
        for entry in row["contestants"].values():
            assert len(entry["clip_ms"]) == chunks and len(entry["steady_ms"]) == 2
            assert "note" not in entry
    lines = {line["name"]: line for line in result["baselines"]}
    assert [*lines] == [line.name for line in peers.BASELINES]
    fastest = max(e["fps"]["clip"]["all"] for e in wide["contestants"].values())
    assert lines["Self Forcing, chunk-wise"]["fps"] == lines["CausVid"]["fps"] == fastest
    assert "2 of 100 passes timed" in lines["Wan2.1-1.3B"]["said"]
    assert lines["MAGI-1"] == {"name": "MAGI-1", "paper_fps": 0.19, "paper_latency_s": 282,
                               "said": "published, not run"}  # fmt: skip

    console = plain_console()
    with console.capture() as capture:
        for table in stream.tables(result):
            tables.show(table, console)
    shown = capture.get()
    for text in ("toy sizes", "103", "step 4", "sum of a chunk's phases", "denoising alone"):
        assert text in shown


def test_the_figures(small: StreamInputs) -> None:
    pytest.importorskip("matplotlib")
    result = stream.run(job(only="chunk"))
    assert [name for name, _ in stream.figures(result)] == ["timeline", "stream"]
    result["baselines"] = []
    (only,) = stream.figures(result)
    texts = {text.get_text() for text in only[1].axes[0].texts}
    entry = result["rows"][0]["contestants"]["sdpa"]
    assert f"{sum(entry['phases'][n]['ms'] for n in CHUNK):.4g} ms" in texts


def test_only_what_is_wanted(small: StreamInputs) -> None:
    result = stream.run(job(only="frame"))
    assert [row["case"] for row in result["rows"]] == ["frame-wise"]
    said = {line["name"]: line["said"] for line in result["baselines"]}
    assert said["Wan2.1-1.3B"] == said["CausVid"] == said["LTX-Video"] == "not run"


def test_a_wrong_contestant_is_not_timed(
    small: StreamInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Variant("wrong", "auto", "auto")
    absent = Variant("absent", "auto", "triton2")
    known = (stream.REFERENCE, wrong, absent)
    monkeypatch.setattr(stream, "variants", lambda *_: known)
    right = Measured.first_latents

    def last_frame_off(self: Measured, chunks: int) -> Tensor:
        latents = right(self, chunks)
        if self.stream.model.impl == "auto":
            latents[:, -1] *= float("nan")
        return latents

    monkeypatch.setattr(Measured, "first_latents", last_frame_off)
    result = stream.run(job(only="chunk"))
    entries = result["rows"][0]["contestants"]
    assert entries["wrong"]["failed"].startswith(timing.WRONG)
    assert "triton2" in entries["absent"]["failed"]
    assert "ms" in entries["reference"] and harness.wrong(result) == ["chunk-wise: wrong"]
    assert "wrong: wrong, not timed" in str(stream.tables(result))


def test_one_that_fails_while_it_is_timed_leaves(
    small: StreamInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = Measured.chunk, itertools.count()

    def fails(self: Measured) -> Timed:
        if self.stream.model.impl == "auto" and next(calls) > 3:
            raise RuntimeError("out of memory\nand more")
        return right(self)

    monkeypatch.setattr(Measured, "chunk", fails)
    row = stream.run(job(only="chunk"))["rows"][0]
    assert row["contestants"]["sdpa"] == {"failed": "RuntimeError: out of memory"}
    assert len(row["contestants"]["reference"]["steady_ms"]) == 2


def test_without_time(setting: StreamInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything, or before the clip and a full window are over: nothing is said of it."""
    over = job(seconds=0.0)
    entries = stream.run_case(over, setting, "chunk-wise")["contestants"]
    assert entries["reference"]["failed"] == entries["sdpa"]["failed"] == "no time left"
    clock = iter(range(10**6))
    monkeypatch.setattr(Job, "left", property(lambda _: 6 - next(clock)))
    entries = stream.run_case(job(), setting, "chunk-wise")["contestants"]
    assert entries["reference"]["failed"] == entries["sdpa"]["failed"] == "no time left"
    monkeypatch.setattr(Job, "left", property(lambda _: -1))
    result: Result = {"rows": [], "no_time_for": []}
    said = {line["name"]: line["said"] for line in stream.baselines(job(), result, None)}
    assert said["Wan2.1-1.3B"] == said["LTX-Video"] == "no time left"
    assert result["no_time_for"] == [
        f"baselines: {line.name}" for line in peers.BASELINES if line.how[:1] in ("b", "d")
    ]
    assert stream.run(job())["no_time_for"][:2] == ["chunk-wise", "frame-wise"]


def test_a_model_that_cannot_be_loaded_is_said(
    small: StreamInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> StreamInputs:
        raise ValueError("the toy model needs av, of the extra 'model'")

    monkeypatch.setattr(stream, "toy", missing)
    result = stream.run(job())
    assert [row["failed"] for row in result["rows"]] == 2 * [
        "ValueError: the toy model needs av, of the extra 'model'"
    ]
    assert len(stream.tables(result)) == 4 and not [*stream.figures(result)]


def test_the_bidirectional_model_is_checked(
    setting: StreamInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CLIP", 5)
    right = stream.bidirectional(setting)
    assert right["fps"] == pytest.approx(17 / right["latency_s"])
    shared = inputs.shared

    def wrong(model: DiT, impl: str, attention: str) -> DiT:
        twin = shared(model, impl, attention)
        if attention == "sdpa":
            twin.head.head.weight = torch.nn.Parameter(1.1 * twin.head.head.weight)
        return twin

    monkeypatch.setattr(stream, "shared", wrong)
    assert stream.bidirectional(setting)["said"].startswith(timing.WRONG)


def test_phases_are_clocked_in_order() -> None:
    done: list[str] = []

    def run() -> None:
        for name in "ab":
            with phase(name):
                done.append(name)

    timed = stream.clocked(run, CPU)
    assert done == ["a", "b"] == [*timed.phases] and sum(timed.phases.values()) <= timed.whole


@pytest.mark.parametrize("name", [*PEERS])
def test_pipelines_of_diffusers(name: str) -> None:
    pytest.importorskip("diffusers")
    found = peers.measure(name, CPU, tiny=True)
    assert found["fps"] == pytest.approx(9 / found["latency_s"]), found
    assert f"2 of {PEERS[name].steps} steps timed" in found["said"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("no", name="diffusers"), "not run: diffusers is not installed"),
        (RuntimeError("CUDA out of memory\nmore"), "not run: RuntimeError: CUDA out of memory"),
        (TypeError("unexpected keyword"), "not run: TypeError: unexpected keyword"),
    ],
)
def test_why_a_pipeline_was_not_run(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(peers, "build", fails)
    assert peers.measure("LTX-Video", CPU, tiny=True) == {"said": said}


def test_a_pipeline_is_extrapolated_to_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each step moves by 2 s (the first one by 9), and decoding by 3 s."""
    now = 0.0
    asked = []

    class Pipeline:
        def __call__(
            self, num_inference_steps: int, callback_on_step_end: Any, **more: Any
        ) -> None:
            nonlocal now
            asked.append(num_inference_steps)
            for i in range(num_inference_steps):
                now += 2.0 if i else 9.0
                callback_on_step_end(self, i, None, {})
            now += 3.0

    monkeypatch.setattr(peers, "build", lambda *_: Pipeline())
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = peers.measure("Wan2.1-1.3B", CPU, tiny=True)
    assert asked == [1, peers.STEPS] and found["latency_s"] == 50 * 2 + 3
    assert found["fps"] == pytest.approx(9 / 103)


def test_the_paper_s_figures_have_their_peers() -> None:
    lines = {line.name.removesuffix(", diffusers"): line for line in peers.BASELINES}
    assert PEERS.keys() == {n for n, line in lines.items() if line.how == "diffusers"}
    assert {line.how for line in peers.BASELINES} - {"bidirectional", "diffusers", ""} == {
        *stream.CASES
    }


@torch.no_grad()
def test_a_compiled_model_streams_the_same(
    setting: StreamInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced whole, the ring's writes included, and run as traced: no code is generated here."""
    real, traced = torch.compile, []

    def trace(function: Callable[..., Any], **_: Any) -> Any:
        traced.append(function)
        return real(function, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", trace)
    plain = Variant("plain", "reference", "sdpa")
    want = Measured(setting, SMALL, plain).first_latents(4)
    got = Measured(setting, SMALL, plain._replace(compiled=True)).first_latents(4)
    assert len(traced) == 1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_compiling_comes_last(small: StreamInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes minutes: its row is begun after all others."""
    assert not any(v.compiled for v in stream.variants(torch.device("cuda")))
    assert sum(v.compiled for v in stream.variants(torch.device("cuda"), compiled=True)) == 1
    monkeypatch.setattr(stream, "full_size", lambda _: small)
    monkeypatch.setattr(Job, "cuda", property(lambda _: True))
    known = stream.REFERENCE, Variant("compile", "reference", "sdpa")
    monkeypatch.setattr(stream, "variants", lambda _, compiled: known[: 1 + compiled])
    result = stream.run(replace(job(only="chunk"), tiny=False))
    assert [row["case"] for row in result["rows"]] == ["chunk-wise", "chunk-wise, compiled"]
    assert [*result["rows"][1]["contestants"]] == ["reference", "compile"]


def test_the_text_encoder_of_transformers() -> None:
    pytest.importorskip("transformers")
    encode = peers.text_encoder(CPU, 7, vocab_size=50, d_model=16, d_kv=4, d_ff=8, num_layers=1,
                                num_heads=2)  # fmt: skip
    assert encode().shape == (1, 7, 16) and torch.get_default_dtype() == torch.float32
