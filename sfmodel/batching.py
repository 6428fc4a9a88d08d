"""Many streams in one batch: each with a prompt, a seed, a length and a state of its own, at any
frame of its own; passes that have the same shape and the same noise level are run as one.

Norms and attention to the text see all streams at once, the ring's attention and, so that a stream
is what it is alone, bit for bit, linear layers one after the other. Not measured on a GPU yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sfkernels import RingKVCache
from sfmodel.config import Preset
from sfmodel.dit import DiT, Modulation
from sfmodel.graphs import on
from sfmodel.stream import Stream
from sfmodel.vae.codec import VideoDecoder

T = TypeVar("T")


class _Pass:
    """A pass that a stream waits for. key: what those that are run as one have in common.
    arguments: of the model."""

    def __init__(self, key: tuple[Any, ...], **arguments: Any) -> None:
        self.key, self.arguments = key, arguments
        self.done = False
        self.out: Tensor | None = None
        self.error: BaseException | None = None


class _StoppedError(RuntimeError):
    """The batch was stopped while a stream waited: the stream begins its chunk again."""


class _SharedError(RuntimeError):
    """A pass of several streams failed: each is tried alone, for one of them may be at fault."""


class _Joint:
    """The model as a stream of the batch sees it. Its passes wait for those of the others; all
    else is the model's own."""

    def __init__(self, model: DiT, batch: StreamBatch) -> None:
        self._model, self._batch = model, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(
        self, x_BFCHW: Tensor, t: Modulation, text: None, *, clean_BFCHW: Tensor | None = None,
        cache: RingKVCache, places: Sequence[Any], full: bool,
    ) -> Tensor:  # fmt: skip
        before = 0 if clean_BFCHW is None else clean_BFCHW.shape[1]
        key = "forward", tuple(x_BFCHW.shape[1:]), before, self._batch.level(t), full
        more = dict(clean_BFCHW=clean_BFCHW, cache=cache, places=places, full=full)
        out = self._batch.wait_for(_Pass(key, x_BFCHW=x_BFCHW, t=t, text_BTE=text, **more))
        assert out is not None
        return out

    def append(self, x_BFCHW: Tensor, t: Modulation, text: None, *, cache: RingKVCache) -> None:
        key = "append", tuple(x_BFCHW.shape[1:]), self._batch.level(t)
        self._batch.wait_for(_Pass(key, x_BFCHW=x_BFCHW, t=t, text_BTE=text, cache=cache))


class _InTurn:
    """A decoder that streams use one after the other. On a GPU nothing runs sooner beside another,
    and the largest of all activations are there once."""

    def __init__(self, codec: VideoDecoder, turn: threading.Lock) -> None:
        self._codec, self._turn = codec, turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def decode_chunk(self, latents_BFCHW: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        with self._turn:
            return self._codec.decode_chunk(latents_BFCHW, state)


class StreamBatch:
    """Streams of one model that go on together, a chunk at a time.

    `open` adds one, at any time between two chunks, and `close` takes it out; the others go on as
    they would have. A stream of the batch is a `Stream` of one sample, eager: its prompt may be
    changed, latents given, its state saved. exact: False has linear layers, too, see all streams at
    once, which is faster where these are small; a stream is then what it is alone up to rounding.
    streams: those that are open. failures: the errors of those that ended by one in the last step,
    which are closed then.

        batch = StreamBatch(model)
        cat, dog = (batch.open(codec, text, preset, seed=i) for i, text in enumerate(texts))
        for _ in range(10):
            for stream, frames in batch.step().items():
                show(stream, frames)  # bytes [1, T, H, W, 3]
    """

    def __init__(self, model: DiT, exact: bool = True) -> None:
        self.model, self.exact = model, exact
        self.joint = _Joint(model, self)
        self.streams: list[Stream] = []
        self.failures: dict[Stream, Exception] = {}
        self._levels = WeakIdKeyDictionary()
        self._frames: dict[Stream, Tensor] = {}  # that are ready, after Ctrl-C
        self._latents: dict[Stream, Tensor] = {}
        self._turn, self._decoding = threading.Condition(), threading.Lock()
        self._waiting: list[_Pass] = []
        self._running = 0
        self._serving = self._stopped = False

    def open(
        self, codec: VideoDecoder | None, text_1TE: Tensor, preset: Preset, **options: Any
    ) -> Stream:
        """A new stream; options as of `Stream`, of one sample and without graphs. Raises ValueError
        as it does."""
        for name in ("graph", "batch"):
            if (options.get(name) or 0) > (name == "batch"):
                raise ValueError(f"{name}={options[name]}: streams of a batch are eager and of one")
        joint: Any = self.joint
        if codec is not None and self.model.device.type == "cuda":
            codec = cast(VideoDecoder, _InTurn(codec, self._decoding))
        stream = Stream(joint, codec, text_1TE, preset, **options)
        self.streams.append(stream)
        return stream

    def close(self, stream: Stream) -> None:
        """Takes a stream out. Raises ValueError for one that is not in it."""
        self._check_open(stream)
        self.streams.remove(stream)
        self._frames.pop(stream, None)
        self._latents.pop(stream, None)

    def _check_open(self, stream: Stream) -> None:
        if stream not in self.streams:
            raise ValueError("the stream is not in this batch, or closed already")

    def step(self, streams: Sequence[Stream] | None = None) -> dict[Stream, Tensor]:
        """The next frames of each stream, or of those named, a chunk or a piece of one
        [1, T, H, W, 3], as `Stream.frames` gives them. Of a stream that fails there are none: its
        error is in `failures`. What Ctrl-C ends loses none: the next step returns what was
        ready. Raises ValueError for a stream that is not in the batch."""
        return self._together(lambda stream: next(stream.frames()), self._frames, streams)

    def denoise(self, streams: Sequence[Stream] | None = None) -> dict[Stream, Tensor]:
        """The next chunk's latents of each stream, or of those named, as `Stream.denoise` gives
        them. Raises ValueError as `step` does."""
        return self._together(lambda stream: stream.denoise(), self._latents, streams)

    def _together(
        self,
        work: Callable[[Stream], T],
        found: dict[Stream, T],
        named: Sequence[Stream] | None,
    ) -> dict[Stream, T]:
        """The work's result of each stream; found: of some, which is there already. named: None for
        all of them."""
        wanted = self.streams if named is None else named
        for each in wanted:
            self._check_open(each)
        failures: dict[Stream, Exception] = {}
        alone: list[Stream] = []

        def run(stream: Stream) -> None:
            try:
                with on(self.model.device):
                    found[stream] = work(stream)
            except _SharedError:
                alone.append(stream)
            except _StoppedError:
                pass
            except Exception as error:
                failures[stream] = error
            finally:
                with self._turn:
                    self._running -= 1
                    self._turn.notify_all()

        streams = [each for each in wanted if each not in found]
        self._running, self._waiting, self.failures = len(streams), [], {}
        self._serving, self._stopped = len(streams) > 1, False
        if len(streams) == 1:  # which waits for nobody
            run(streams.pop())
        threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in streams]
        try:
            for thread in threads:
                thread.start()
            self._serve()
        finally:  # also after Ctrl-C, which falls on this thread
            with self._turn:
                self._stopped = True
                self._turn.notify_all()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._serving = self._stopped = False
        for stream in alone:
            run(stream)
        self.failures = failures
        self.streams = [each for each in self.streams if each not in failures]
        return {each: found.pop(each) for each in wanted if each in found}

    def _serve(self) -> None:
        """Runs passes whenever all streams that are not done wait for one."""
        with self._turn:
            while self._running:
                self._turn.wait_for(lambda: len(self._waiting) == self._running)
                groups: dict[Any, list[_Pass]] = {}
                for each in self._waiting:
                    groups.setdefault(each.key, []).append(each)
                self._waiting = []
                for group in groups.values():
                    self._run(group)
                self._turn.notify_all()

    @torch.no_grad()
    def _run(self, group: list[_Pass]) -> None:
        run: Any = self.model.append if group[0].key[0] == "append" else self.model
        try:
            arguments = group[0].arguments if len(group) == 1 else self._joined(group)
            joint = run(**arguments)
            outs = [None] * len(group) if joint is None else joint.split(1)
            for each, out in zip(group, outs, strict=True):
                each.out = out
        except Exception as error:
            for each in group:
                each.error = _SharedError() if len(group) > 1 else error
        for each in group:
            each.done = True

    def _joined(self, group: list[_Pass]) -> dict[str, Any]:
        """Arguments of passes of the same kind, of all samples one after the other."""
        joined = group[0].arguments | {"apart": self.exact}
        for name, value in group[0].arguments.items():
            values = [each.arguments[name] for each in group]
            if name in ("x_BFCHW", "clean_BFCHW") and value is not None:
                joined[name] = torch.cat(values)
            elif name in ("cache", "places"):
                joined[name] = values
        return joined

    def wait_for(self, one: _Pass) -> Tensor | None:
        """Returns what a pass gives, once it has been run with those of others, or at once outside
        of a step of the batch; raises what it raised."""
        with self._turn:
            if self._serving:
                self._waiting.append(one)
                self._turn.notify_all()
                self._turn.wait_for(lambda: one.done or self._stopped)
            else:
                self._run([one])
        if not one.done:
            raise _StoppedError
        if one.error is not None:
            raise one.error
        return one.out

    def level(self, modulation: Modulation) -> tuple[float, ...]:
        """The noise levels of a pass, which are looked at once."""
        if modulation.t not in self._levels:
            self._levels[modulation.t] = tuple(modulation.t.flatten().tolist())
        levels: tuple[float, ...] = self._levels[modulation.t]
        return levels
