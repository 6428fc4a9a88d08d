"""The thread of a device: its model, and the streams that are watched, of which those that are due
make their next chunk in one batch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfmodel.batching import StreamBatch
from sfmodel.config import Preset
from sfmodel.cost import PIXEL_FRAMES
from sfmodel.dit import DiT
from sfmodel.footage import to_pixels
from sfmodel.graphs import on
from sfmodel.pictures import Images
from sfmodel.serve.messages import Prompt
from sfmodel.serve.metrics import Metrics
from sfmodel.serve.session import Coming, Session
from sfmodel.stream import Stream
from sfmodel.vae.codec import VideoCodec

T = TypeVar("T")
log = logging.getLogger(__name__)
SHARE = 0.2  # of the last step in the mean of its seconds
COMING = 8  # prompts of a session that may wait for its next chunk
SPARE = 0.05  # seconds by which a chunk is begun earlier than it takes
TOGETHER = 0.25  # of a chunk's time: whoever is due within it goes along with those that are


class Ended(RuntimeError):
    """The server ends, or its engine has."""


class Engine:
    """A device with a model, which makes the chunks of all its sessions.

    All that touches a stream happens in the engine's thread, between two chunks: `call` has it do
    so. places: sessions that it may have at once. taken: that have theirs. seconds: that a step
    takes. options: of every `Stream`."""

    def __init__(
        self,
        model: DiT,
        codec: VideoCodec,
        preset: Preset,
        metrics: Metrics,
        places: int = 1,
        **options: Any,
    ) -> None:
        self.model, self.codec, self.preset, self.metrics = model, codec, preset, metrics
        self.places, self.options, self.seconds = places, options, 0.0
        self.taken: set[Session] = set()
        self.batch = StreamBatch(model)
        self.sessions: dict[Stream, Session] = {}
        self._commands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._turn = threading.Condition()
        self._ended = False
        self._encoders = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "encoder")
        self._thread = threading.Thread(
            target=self._run, name=f"engine {model.device}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after the step that is under way."""
        with self._turn:
            self._ended = True
            self._turn.notify()
        self._thread.join()
        self._encoders.shutdown()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        """Has the engine look again at who is due: a client took what waited for it."""
        with self._turn:
            self._turn.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """What the work returns or raises, in the engine's thread before the next chunk. Raises
        `Ended` where there is none any more."""
        future: Future[T] = Future()
        with self._turn:
            if self._ended:
                raise Ended("the server ends")
            self._commands.append((work, future))
            self._turn.notify()
        return future

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        with on(self.model.device):
            self._serve()

    def _serve(self) -> None:
        while True:
            with self._turn:
                while not (self._commands or self._ended):
                    due, seconds = self._due()
                    if due:
                        break
                    self._turn.wait(seconds)
                if self._ended and not self._commands:
                    return
                commands, self._commands = self._commands, []
            for work, future in commands:
                _settle(work, future)
            if due := self._due()[0]:
                self._step(due)

    def _due(self) -> tuple[list[Session], float | None]:
        """Sessions whose next chunk is due, and those that soon will be; without any the seconds
        until one is, None where all wait for their clients."""
        now, soon = time.monotonic(), TOGETHER * PIXEL_FRAMES * self.preset.chunk / self.preset.fps
        waits = {each: each.wait(now, self.lead) for each in self.sessions.values()}
        known = {each: seconds for each, seconds in waits.items() if seconds is not None}
        least = min(known.values(), default=None)
        if least is None or least > 0:
            return [], least
        return [each for each, seconds in known.items() if seconds <= soon], 0.0

    @property
    def lead(self) -> float:
        """Seconds before a chunk is seen at which it is begun."""
        return 1.2 * self.seconds + SPARE

    def _step(self, due: list[Session]) -> None:
        began = time.monotonic()
        of = {each.stream: each for each in due if each.stream is not None}
        found: dict[Stream, Tensor] = {}
        try:
            found = self.batch.step([*of])
            failures = self.batch.failures
        except Exception as broken:  # the batch itself, which none of them survives
            log.exception("a step failed")
            failures = dict.fromkeys(of, broken)
        now = time.monotonic()
        self.seconds += (now - began - self.seconds) * (SHARE if self.seconds else 1)
        self.metrics.step_seconds.observe(now - began)
        self.metrics.step_sessions.observe(len(due))
        for stream, error in failures.items():
            log.warning("session %s ended: %s", of[stream].id, error)
            self.metrics.failed.inc()
            self.fail(of[stream], f"the stream failed: {error}")
        for stream, frames_BTHWC in found.items():
            if not of[stream].ended:
                self._deliver(of[stream], frames_BTHWC[0].numpy(), now)

    def _deliver(self, session: Session, images_THWC: Images, now: float) -> None:
        assert session.stream is not None
        first = session.made
        # A new prompt is seen from the next chunk on, and this may be the rest of one.
        while session.coming and session.coming[0].begun < session.stream.begun:
            new = session.coming.popleft()
            session.prompt, session.prompt_seconds = new.number, now - new.asked
            self.metrics.prompt_seconds.observe(session.prompt_seconds)
            session.outbox.put({"type": "prompt", "number": new.number, "frame": first})
        session.add(len(images_THWC), now)
        self.metrics.frames.inc(len(images_THWC))
        self._encoded(session)
        session.encoding = self._encoders.submit(session.encode, images_THWC, first, session.prompt)

    def _encoded(self, session: Session) -> None:
        """Waits until the last chunk is encoded: they stay in order, and one waits at most."""
        if session.encoding is not None:
            wait([session.encoding])

    def open(self, session: Session, text_TE: Tensor, picture: Images | None) -> None:
        """Makes the stream of a session. Raises ValueError and MemoryError as `Stream` does."""
        if session.ended:  # its client is gone
            return
        preset, given = self.preset, None
        if picture is not None:
            pixels_BTCHW = to_pixels([picture])[None].to(self.model.device)
            with torch.no_grad():
                given = self.codec.encode_chunk(pixels_BTCHW)[0]
            preset = replace(preset, first=1)
        text_1TE = text_TE[None].float().to(self.model.device)
        seed = session.start.seed
        stream = self.batch.open(self.codec, text_1TE, preset, seed=seed, **self.options)
        session.stream, session.given_BFCHW = stream, given
        if given is not None:
            stream.give(given)
        self.sessions[stream] = session
        session.played = time.monotonic()
        session.outbox.put({"type": "started", **session.facts(), "seed": seed})

    def close(self, session: Session) -> None:
        """Ends a session's stream, if it has one still."""
        stream, session.stream = session.stream, None
        if stream is not None:
            del self.sessions[stream]
            if stream in self.batch.streams:  # one that failed is closed already
                self.batch.close(stream)

    def fail(self, session: Session, why: str) -> None:
        """Ends a session for a reason that its client is told."""
        session.ended = why
        self.close(session)
        self.taken.discard(session)
        session.outbox.put({"type": "stopped", "reason": why})

    def prompt(self, session: Session, message: Prompt, text_TE: Tensor, asked: float) -> int:
        """Goes on under another prompt, that was asked for at a time of `time.monotonic`. Returns
        its number. Raises ValueError where too many have not been taken yet."""
        stream = session.stream
        if len(session.coming) >= COMING:
            raise ValueError(f"prompt: {COMING} are still to be taken: wait, or resume the stream")
        session.prompts += 1
        if stream is not None:
            text_1TE = text_TE[None].float().to(self.model.device)
            options: Any = {"over": message.over, "recompute": not message.keep_cache}
            stream.set_prompt(text_1TE, **options)
            session.coming.append(Coming(session.prompts, text_1TE, stream.begun, asked))
        return session.prompts

    def pause(self, session: Session, paused: bool) -> int:
        """Stops making chunks, or goes on. Returns the number of the next frame."""
        session.paused = paused
        session.played = time.monotonic()
        return session.made

    def reseed(self, session: Session, seed: int) -> int:
        """Begins the video anew, under the last prompt that was asked for. Returns the number of
        its first frame."""
        if session.stream is not None:
            last = session.coming[-1].text_1TE if session.coming else None
            session.stream.restart(last, seed)
            session.coming = deque(each._replace(begun=0) for each in session.coming)
            if session.given_BFCHW is not None:
                session.stream.give(session.given_BFCHW)
            self._encoded(session)
            session.forget()
        session.played = time.monotonic()
        return session.made


def _settle(work: Callable[[], T], future: Future[T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except BaseException as error:  # its caller's to tell
            future.set_exception(error)
