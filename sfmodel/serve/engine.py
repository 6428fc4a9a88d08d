"""The thread of a device: its model, and the streams that are watched, of which those that are due
make their next chunk in one batch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
ENDED = "the server ends, or this part of it has"
SHARE = 0.2  # of the last step in the mean of its seconds
SPARE = 0.05  # seconds by which a chunk is begun earlier than it takes
TOGETHER = 0.25  # of a chunk's time: whoever is due within it goes along with those that are


class Ended(RuntimeError):
    """The server ends, or its engine has."""


class Engine:
    """A device with a model, which makes the chunks of all its sessions.

    What changes a stream happens in the engine's thread, between two chunks: `call` has it do so.
    places: sessions that it may have at once. taken: those that have a place, which the event loop
    takes and either gives free. running: those that have a stream. seconds: that a step takes.
    options: of every `Stream`."""

    def __init__(
        self,
        model: DiT,
        codec: VideoCodec,
        preset: Preset,
        metrics: Metrics,
        places: int,
        seconds: float,
        **options: Any,
    ) -> None:
        self.model, self.codec, self.preset, self.metrics = model, codec, preset, metrics
        self.places, self.seconds, self.options = places, seconds, options
        self.taken: set[Session] = set()
        self.batch = StreamBatch(model)
        self.running: dict[Stream, Session] = {}
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
        return self._thread.is_alive() and not self._ended

    def wake(self) -> None:
        """Has the engine look again at who is due: a client took what waited for it."""
        with self._turn:
            self._turn.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Result or error of the work, done in the engine's thread before the next chunk. Raises
        `Ended` where there is none any more."""
        future: Future[T] = Future()
        with self._turn:
            if self._ended:
                raise Ended(ENDED)
            self._commands.append((work, future))
            self._turn.notify()
        return future

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            with on(self.model.device):
                self._serve()
        except BaseException:  # of this thread's own work: nobody must wait for it
            log.exception("the engine has ended")
            with self._turn:
                self._ended = True
                commands, self._commands = self._commands, []
            for _, future in commands:
                if future.set_running_or_notify_cancel():
                    future.set_exception(Ended(ENDED))
            sessions = [*self.taken]
            self.taken.clear()
            for session in sessions:
                session.ended = ENDED
                session.outbox.put({"type": "stopped", "reason": ENDED})

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
        waits = {each: each.due_in(now, self.lead) for each in self.running.values()}
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
        begun = sum(stream.begun for stream in of)
        found: dict[Stream, Tensor] = {}
        try:
            found = self.batch.step([*of])
            failures = self.batch.failures
        except Exception as broken:  # the batch itself, which none of them survives
            log.exception("a step failed")
            failures = dict.fromkeys(of, broken)
        now = time.monotonic()
        if sum(stream.begun for stream in of) > begun:  # and not the rest of a chunk alone
            self.seconds += SHARE * (now - began - self.seconds)
        self.metrics.step_seconds.observe(now - began)
        self.metrics.step_sessions.observe(len(due))
        for stream, error in failures.items():
            self.fail(of[stream], error)
        for stream, frames_BTHWC in found.items():
            if not of[stream].ended:
                self._deliver(of[stream], frames_BTHWC[0].numpy(), now)

    def _deliver(self, session: Session, images_THWC: Images, now: float) -> None:
        assert session.stream is not None
        first = session.made
        # A new prompt is seen from the next chunk on, and this may be the rest of one.
        new = session.coming
        if new is not None and new.after < session.stream.begun:
            session.coming, session.prompt = None, new.number
            session.prompt_seconds = now - new.at
            self.metrics.prompt_seconds.observe(session.prompt_seconds)
            session.outbox.put({"type": "prompt", "number": new.number, "frame": first})
        session.add(len(images_THWC), now)
        self.metrics.frames.inc(len(images_THWC))
        if error := self._encoding_error(session):
            self.fail(session, error)
            return
        session.encoding = self._encoders.submit(session.encode, images_THWC, first, session.prompt)

    def _encoding_error(self, session: Session) -> BaseException | None:
        """Waits until the last chunk is encoded, so that they stay in order and one waits at most,
        and returns the error of that."""
        return session.encoding.exception() if session.encoding is not None else None

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
        seed = session.settings.seed
        stream = self.batch.open(self.codec, self._text(text_TE), preset, seed=seed, **self.options)
        session.stream, session.given_BFCHW = stream, given
        self.running[stream] = session
        if given is not None:
            stream.give(given)
        session.plays_until = time.monotonic()
        session.outbox.put({"type": "started", **session.facts(), "seed": seed})

    def close(self, session: Session) -> None:
        """Ends a session's stream, if it has one still."""
        stream, session.stream = session.stream, None
        if stream is not None:
            del self.running[stream]
            if stream in self.batch.streams:  # one that failed is closed already
                self.batch.close(stream)

    def fail(self, session: Session, error: BaseException) -> None:
        """Ends a session by an error, which its client is told unless it has ended it already."""
        if session.ended:
            self.close(session)
            return
        self._encoding_error(session)  # what was made is sent first
        session.ended = f"the stream failed: {error}"
        log.warning("session %s: %s", session.id, session.ended)
        self.metrics.failed.inc()
        self.close(session)
        self.taken.discard(session)
        session.outbox.put({"type": "stopped", "reason": session.ended})

    def prompt(self, session: Session, message: Prompt, text_TE: Tensor, asked: float) -> int:
        """Goes on under another prompt, that was asked for at a time of `time.monotonic`. Returns
        its number. One that no chunk has begun with is replaced by it."""
        stream, text_1TE = session.stream, self._text(text_TE)
        session.last_prompt += 1
        if stream is not None:
            stream.prompts = [each for each in stream.prompts if each.begun]
            options: Any = {"over": message.over, "recompute": not message.keep_cache}
            stream.set_prompt(text_1TE, **options)
            session.coming = Coming(session.last_prompt, text_1TE, asked, stream.begun)
        return session.last_prompt

    def _text(self, text_TE: Tensor) -> Tensor:
        return text_TE[None].float().to(self.model.device)

    def pause(self, session: Session, paused: bool) -> int:
        """Stops making chunks, or goes on. Returns the number of the next frame."""
        session.paused = paused
        return session.made

    def reseed(self, session: Session, seed: int) -> int:
        """Begins the video anew, under the last prompt that was asked for. Returns the number of
        its first frame."""
        if session.stream is not None:
            new = session.coming
            session.stream.restart(new and new.text_1TE, seed)
            session.coming = new and new._replace(after=0)
            if session.given_BFCHW is not None:
                session.stream.give(session.given_BFCHW)
            self._encoding_error(session)
            session.forget()
        return session.made


def _settle(work: Callable[[], T], future: Future[T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except BaseException as error:  # its caller's to tell
            future.set_exception(error)
