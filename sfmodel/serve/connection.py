"""A client's connection: its messages in the order in which they come, each answered or refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from sfmodel.cost import VAE_STRIDE
from sfmodel.pictures import covering_upload
from sfmodel.serve.engine import Ended, Engine
from sfmodel.serve.messages import (
    LARGEST,
    PROTOCOL,
    BadMessage,
    Pause,
    Prompt,
    Resume,
    Save,
    Seed,
    Start,
    Stop,
    parse,
)
from sfmodel.serve.server import Full, Server
from sfmodel.serve.session import Outbox, Session

T = TypeVar("T")
log = logging.getLogger(__name__)
WAITING = 32  # messages of a client that may wait to be answered
TICK = 1.0  # seconds between two messages of how it goes
MEAN = 4  # ticks that the frames a second are the mean of
GONE = 15.0  # seconds after which a live client that takes nothing is taken to be gone
ERRORS = (ValueError, OSError, MemoryError, Full, Ended)  # what a client is told in a sentence


class Connection:
    """A client and, from its start to its stop, the session that is its own.

    recorded: the session that was there last, which can be saved after it has ended. active: when
    there was last a stream that ran."""

    def __init__(self, server: Server, socket: WebSocket) -> None:
        self.server, self.socket = server, socket
        self.outbox = Outbox(server.metrics)
        self.session: Session | None = None
        self.recorded: Session | None = None
        self.engine: Engine | None = None
        # Messages that are to be answered, each with its time; None: a binary one.
        self.asked: asyncio.Queue[tuple[str | None, float]] = asyncio.Queue(WAITING)
        self.size = 0  # characters of them
        self.saving = False
        self.active = time.monotonic()

    async def run(self) -> None:
        """Returns when the client is gone, or was idle too long."""
        await self.socket.accept()
        self.say("hello", protocol=PROTOCOL, **self.server.facts())
        self.server.connected += 1
        try:
            async with anyio.create_task_group() as group:
                for task in (self._receive, self._answer, self._send, self._tick):
                    group.start_soon(self._until_the_end, task, group)
        finally:
            self.server.connected -= 1
            self._leave("the client left")

    async def _until_the_end(self, task: Callable[[], Any], group: Any) -> None:
        with contextlib.suppress(WebSocketDisconnect):
            await task()
        self._leave("the client left")  # at once, whatever is still to be ended
        group.cancel_scope.cancel()

    def say(self, kind: str, **facts: Any) -> None:
        self.outbox.put({"type": kind, **facts})

    async def _receive(self) -> None:
        """Takes messages at once, whatever the last one waits for: a client that leaves is noticed
        here."""
        while True:
            message = await self.socket.receive()
            if message["type"] != "websocket.receive":
                return
            text: str | None = message.get("text")
            self.size += len(text or "")
            if self.asked.full() or self.size > LARGEST or self.outbox.full:
                await self._end(1008, "too many messages")
                return
            self.asked.put_nowait((text, time.monotonic()))

    async def _answer(self) -> None:
        async with anyio.create_task_group() as saves:
            while True:
                text, at = await self.asked.get()
                self.size -= len(text or "")
                about = ""
                try:
                    if text is None:
                        raise ValueError("the message is binary: must be JSON text")
                    message = parse(text)
                    about = message.kind
                    if isinstance(message, Save):  # takes long, and holds up no other
                        saves.start_soon(self._save, self._to_save())
                    else:
                        await self._do(message, at)
                except Exception as error:
                    self._refuse(error.about if isinstance(error, BadMessage) else about, error)

    def _refuse(self, about: str, error: Exception) -> None:
        """Says in a sentence what is wrong with a message, or with the server."""
        if not isinstance(error, Full):
            self.server.metrics.refused.labels("message").inc()
        if not isinstance(error, ERRORS):
            log.error("%s: %s", about, error, exc_info=error)
        reason, *_ = str(error).splitlines() or ["out of memory"]
        self.say("error", about=about, message=reason)

    async def _do(self, message: Any, at: float) -> None:
        if isinstance(message, Start):
            await self._start(message)
            return
        session, engine = self._check_running(message.kind)
        if isinstance(message, Prompt):
            text_TE = await _result(self.server.text.encode(message.text))
            work = functools.partial(engine.prompt, session, message, text_TE, at)
            self.say("coming", number=await _result(engine.call(work)), text=message.text)
        elif isinstance(message, Seed):
            frame = await _result(engine.call(lambda: engine.reseed(session, message.seed)))
            self.say("seed", seed=message.seed, frame=frame)
        elif isinstance(message, (Pause, Resume)):
            paused = isinstance(message, Pause)
            frame = await _result(engine.call(lambda: engine.pause(session, paused)))
            self.say("paused" if paused else "resumed", frame=frame)
        elif isinstance(message, Stop):
            self._leave("the client stopped it")
            self.say("stopped", reason="asked")

    def _check_running(self, about: str) -> tuple[Session, Engine]:
        if self.session is None or self.session.ended or self.engine is None:
            raise ValueError(f"{about}: no stream runs: start one first")
        return self.session, self.engine

    async def _start(self, message: Start) -> None:
        if self.session is not None and not self.session.ended:
            raise ValueError("start: a stream runs already: stop it first")
        server, preset = self.server, self.server.preset
        engine = server.free_engine()
        session = self.session = self.recorded = Session(message, preset, self.outbox)
        self.engine = engine
        engine.taken.add(session)
        try:
            text_TE, picture = await _result(server.text.encode(message.prompt)), None
            if message.image is not None:
                size = VAE_STRIDE * preset.height, VAE_STRIDE * preset.width
                read = functools.partial(covering_upload, message.image, *size)
                picture = await anyio.to_thread.run_sync(
                    read, limiter=server.workers, abandon_on_cancel=True
                )
            await _result(engine.call(lambda: engine.open(session, text_TE, picture)))
        except Exception:
            self._leave("it could not start")
            raise
        server.metrics.started.inc()

    def _to_save(self) -> Session:
        if self.recorded is None:
            raise ValueError("save: no stream has run: start one first")
        if self.recorded.settings.format != "jpeg":
            raise ValueError("save: goes with format jpeg, which the server keeps")
        if self.saving:
            raise ValueError("save: a clip is being saved already")
        self.saving = True
        return self.recorded

    async def _save(self, session: Session) -> None:
        try:
            save = functools.partial(
                self.server.clips.save, session.recording(), f"session {session.id}"
            )
            clip = await anyio.to_thread.run_sync(
                save, limiter=self.server.workers, abandon_on_cancel=True
            )
            self.say("saved", **clip.facts())
        except Exception as error:
            self._refuse("save", error)
        finally:
            self.saving = False

    async def _send(self) -> None:
        while True:
            item = await self.outbox.take()
            self.outbox.sending = time.monotonic()
            try:
                await self._send_one(item)
            finally:
                stalled, self.outbox.sending = self.outbox.stalled, None
            # The engine may wait for the client to take something.
            session, engine = self.session, self.engine
            if session and engine and (stalled or not session.settings.live):
                engine.wake()

    async def _send_one(self, item: bytes | str) -> None:
        if isinstance(item, str):
            await self.socket.send_text(item)
        else:
            await self.socket.send_bytes(item)

    async def _tick(self) -> None:
        """Says how it goes, and ends what took too long."""
        made: deque[tuple[str, int]] = deque(maxlen=MEAN + 1)  # by whom
        limits = self.server.limits
        while True:
            await asyncio.sleep(TICK)
            now, session = time.monotonic(), self.session
            if session is not None and not session.ended:
                facts = session.facts()
                made.append((session.id, session.made))
                own = [count for who, count in made if who == session.id]
                fps = (own[-1] - own[0]) / (TICK * max(1, len(own) - 1))
                if facts["state"] == "running":
                    self.active = now
                self.say("stats", **facts, fps=round(fps, 1), **self.server.crowd())
                if now - session.since > limits.seconds:
                    self._leave("its time is over")
                    self.say("stopped", reason=f"its {limits.seconds:g} seconds are over")
                elif session.settings.live and self.outbox.stuck > GONE:
                    await self._end(1001, "took nothing")
                    return
            if now - self.active > limits.idle:
                self.say("stopped", reason=f"idle for {limits.idle:g} seconds")
                await self._end(1000, "idle")
                return

    async def _end(self, code: int, why: str) -> None:
        """Closes the connection, once the client has taken the messages that wait for it, or has
        not."""
        self._leave(why)
        with anyio.move_on_after(TICK):
            while self.outbox.messages:
                await asyncio.sleep(0.01)
            await self.socket.close(code, why)

    def _leave(self, why: str) -> None:
        """Gives the session's place free at once; its stream ends before the next chunk."""
        session, engine = self.session, self.engine
        if session is None or engine is None:
            return
        session.ended = session.ended or why
        engine.taken.discard(session)
        with contextlib.suppress(Ended):
            engine.call(lambda: engine.close(session))
        self.session = self.engine = None
        self.outbox.begin("", 0)


async def _result(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)
