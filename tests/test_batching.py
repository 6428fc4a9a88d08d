"""Streams that run together are those that run alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfmodel.batching import StreamBatch
from sfmodel.dit import DiT
from sfmodel.saved_stream import load_stream, save_stream
from sfmodel.stream import Stream
from sfmodel.toy.vae import ToyVAE
from tests.test_stream import SMALL, TEXT
from tests.test_stream import model as model

CODEC = ToyVAE()
SETTINGS: list[dict[str, Any]] = [
    {},
    dict(first=1, window=8, sink=1),
    dict(chunk=2, window=7, sink=3, positions="absolute"),
    dict(chunk=1, window=4, sink=1),
]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The batch of each pass of the model."""
    seen: list[int] = []
    run = DiT._run

    def counted(self: DiT, x_BLD: Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(len(x_BLD))
        return run(self, x_BLD, *arguments, **named)

    monkeypatch.setattr(DiT, "_run", counted)
    yield seen


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_each_is_what_it_is_alone(
    model: DiT, passes: list[int], settings: Any, merge: bool, exact: bool
) -> None:
    """They begin and end at different times, have seeds, prompts and prompts over time of their
    own, and one begins with given latents; one waits for a while."""
    preset = replace(SMALL, **settings)
    texts = TEXT[:1], TEXT[1:], TEXT.mean(0, keepdim=True), TEXT[:1] * 0.5
    begins, ends, waits = (0, 2, 3, 3), (9, 6, 12, 11), (6, 7)
    clip = torch.randn(1, (preset.first or preset.chunk) + preset.chunk, 4, 8, 8)

    def prepared(stream: Stream, i: int) -> Stream:
        if i == 1:
            stream.give(clip)
        if i == 2:
            stream.set_prompt(TEXT[1:], frame=4 * preset.chunk, over=2)
        return stream

    alone = []
    for i, text in enumerate(texts):
        mine = prepared(Stream(model, None, text, preset, seed=i, merge=merge), i)
        alone.append([mine.denoise().clone() for _ in range(ends[i] - begins[i])])
    passes.clear()
    batch, opened = StreamBatch(model, exact), {}
    shown = [0] * len(texts)
    for tick in range(max(ends)):
        for i, text in enumerate(texts):
            if tick == begins[i]:
                opened[i] = prepared(batch.open(None, text, preset, seed=i, merge=merge), i)
            if tick == ends[i]:
                batch.close(opened[i])
        running = [i for i in opened if begins[i] <= tick < ends[i]]
        assert {opened[i] for i in running} == {*batch.streams}
        running = [i for i in running if i or tick not in waits]
        found = batch.denoise([opened[i] for i in running] if tick in waits else None)
        assert [*found] == [opened[i] for i in running]
        for i in running:
            got, want = found[opened[i]], alone[i][shown[i]]
            assert torch.equal(got, want) if exact else close(got, want)
            shown[i] += 1
    assert max(passes) == 4 and not batch.failures


@torch.no_grad()
def test_passes_are_run_as_one(model: DiT, passes: list[int]) -> None:
    """Streams of one age: as many passes as one of them has."""
    batch = StreamBatch(model)
    for i in range(3):
        batch.open(CODEC, TEXT[:1], SMALL, seed=i)
    batch.step()
    passes.clear()
    frames = batch.step()
    assert passes == [3] * len(SMALL.steps)
    assert [x.shape for x in frames.values()] == [(1, 12, 64, 64, 3)] * 3


@torch.no_grad()
def test_frames_and_saved_streams(model: DiT, tmp_path: Path) -> None:
    """One leaves the batch by a file and goes on alone, another comes in its place."""
    whole = [Stream(model, CODEC, TEXT[:1], SMALL, seed=i) for i in range(3)]
    want = [torch.cat([*each.frames(57)], 1) for each in whole]
    batch = StreamBatch(model)
    a, b = (batch.open(CODEC, TEXT[:1], SMALL, seed=i) for i in range(2))
    got: dict[Stream, list[Tensor]] = {a: [], b: []}
    for _ in range(2):
        for stream, frames in batch.step().items():
            got[stream].append(frames)
    save_stream(a, tmp_path / "a")
    batch.close(a)
    c = batch.open(CODEC, TEXT[:1], SMALL, seed=2)
    got[c] = []
    for _ in range(3):
        for stream, frames in batch.step().items():
            got[stream].append(frames)
    alone = Stream(model, CODEC, TEXT[:1], SMALL)
    load_stream(alone, tmp_path / "a")
    got[a].append(torch.cat([*alone.frames(36)], 1))
    for stream, expected in ((a, want[0]), (b, want[1]), (c, want[2])):
        made = torch.cat(got[stream], 1)
        assert (made.int() - expected[:, : made.shape[1]].int()).abs().max() <= 1


@torch.no_grad()
def test_one_that_fails_stops_no_other(model: DiT) -> None:
    batch = StreamBatch(model)
    good, bad = (batch.open(CODEC, TEXT[:1], SMALL, seed=i) for i in range(2))
    want = [*itertools.islice(Stream(model, CODEC, TEXT[:1], SMALL).frames(), 3)]
    got = [batch.step()[good]]
    bad.latents_BFCHW[3].fill_(torch.nan)
    bad.cache.k.fill_(torch.nan)
    for i in range(2):
        found = batch.step()
        assert [*found] == [good]
        got.append(found[good])
        assert "NaN or infinity" in str(batch.failures.get(bad)) or i
    assert not batch.failures and batch.streams == [good]
    for mine, expected in zip(got, want, strict=True):
        assert (mine.int() - expected.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="not in this batch, or closed already"):
        batch.close(bad)
    assert StreamBatch(model).step() == {}


@torch.no_grad()
def test_a_pass_that_fails_fails_those_that_wait_for_it(
    model: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = StreamBatch(model)
    for i in range(2):
        batch.open(CODEC, TEXT[:1], SMALL, seed=i)
    batch.step()
    lone = batch.streams[0]

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("full")

    monkeypatch.setattr(DiT, "_run", broken)
    assert batch.step() == {} and not batch.streams
    assert [str(error) for error in batch.failures.values()] == ["full", "full"]
    assert batch.step() == {} == batch.failures
    with pytest.raises(MemoryError, match="full"):
        lone.denoise()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_pass_of_several_that_fails_is_run_for_each(model: DiT, chunks: int) -> None:
    """Where it tears a full window, that is computed anew first."""
    batch = StreamBatch(model)
    good, bad = (batch.open(CODEC, TEXT[:1], SMALL, seed=i) for i in range(2))
    want = Stream(model, CODEC, TEXT[:1], SMALL)
    for _ in range(chunks):
        batch.denoise()
        want.denoise()
    bad.cache.text_k = bad.cache.text_k.double()
    if chunks == 4:
        want.recompute()
    for _ in range(2):
        found = batch.denoise()
        assert [*found] == [good] == batch.streams
        torch.testing.assert_close(found[good], want.denoise(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ctrl_c_ends_all_threads(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = StreamBatch(model)
    for i in range(2):
        batch.open(CODEC, TEXT[:1], SMALL, seed=i)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
    assert not batch.failures
    for _ in range(2):
        assert len(batch.step()) == 2  # as if nothing had been


@torch.no_grad()
@pytest.mark.parametrize("call", ["step", "denoise"])
def test_ctrl_c_loses_nothing(model: DiT, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one stream is through, and the other one is not."""
    batch = StreamBatch(model)
    short = replace(SMALL, steps=SMALL.steps[:1])
    both = [batch.open(CODEC, TEXT[:1], preset) for preset in (short, SMALL)]
    alone = [Stream(model, CODEC, TEXT[:1], preset) for preset in (short, SMALL)]
    run = batch._run

    def interrupted(group: list[Any]) -> None:
        if batch._running == 1:
            raise KeyboardInterrupt
        run(group)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(batch, call)()
    for _ in range(3):
        found = getattr(batch, call)()
        assert [*found] == both
        for mine, each in zip(both, alone, strict=True):
            want = next(each.frames()) if call == "step" else each.denoise()
            torch.testing.assert_close(found[mine].float(), want.float(), rtol=1e-5,
                                       atol=1 if call == "step" else 1e-5)  # fmt: skip


@torch.no_grad()
def test_passes_of_its_own(model: DiT) -> None:
    """What a stream does outside of the batch's steps, before the first one and between two."""
    batch = StreamBatch(model)
    streams = [batch.open(CODEC, TEXT[:1], SMALL, seed=i) for i in range(2)]
    want = Stream(model, CODEC, TEXT[:1], SMALL)
    past = torch.randn(1, 3, 4, 8, 8)
    for each in (*streams, want):
        each.prefill(past)
    assert len(batch.denoise()) == 2
    want.denoise()
    for each in (*streams, want):
        each.set_text()
        each.recompute()
    found = batch.denoise()[streams[0]]
    torch.testing.assert_close(found, want.denoise(), rtol=1e-5, atol=1e-5)


def test_what_a_batch_does_not_take(model: DiT) -> None:
    batch = StreamBatch(model)
    for name, value in (("graph", True), ("batch", 2)):
        with pytest.raises(ValueError, match=f"{name}={value}: streams of a batch are eager"):
            batch.open(CODEC, TEXT[:1], SMALL, **{name: value})
    lone = batch.open(CODEC, TEXT[:1], SMALL)
    batch.close(lone)
    with pytest.raises(ValueError, match="not in this batch, or closed already"):
        batch.step([lone])
    with pytest.raises(ValueError, match="apart: goes with a list of caches"):
        model(torch.zeros(1, 3, 4, 8, 8), torch.tensor(1.0), TEXT[:1], apart=True)
    with pytest.raises(ValueError, match="2 caches: must be one for each of 1 samples"):
        caches = [model.new_cache(1, 6, SMALL.grid) for _ in range(2)]
        model(torch.zeros(1, 3, 4, 8, 8), torch.tensor(1.0), None, cache=caches)
