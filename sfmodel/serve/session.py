"""What the server holds for a client: what is to be sent to it, what was made for it, and when more
is due."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from sfmodel.config import Preset
from sfmodel.cost import PIXEL_FRAMES
from sfmodel.pictures import Images
from sfmodel.serve.messages import HEADER, QUALITY, SMALL_QUALITY, Start
from sfmodel.serve.metrics import Metrics
from sfmodel.stream import Stream
from sfmodel.video import MIN_SHORT_SIDE

STALLED = 2.0  # seconds: a client that takes nothing for so long does not watch
UNREAD = 200  # messages, frames apart, that may wait for a client
RECORDED = 2**26  # bytes of the last frames that are kept, to be saved


class Outbox:
    """What waits to be sent to a client. Any thread puts, the event loop that it was made in takes.

    most: frames that may wait; of more the oldest are dropped. taken, dropped: so many so far.
    session: whose frames these are. sending: since when the client has been taking what was sent
    last, whosever it is; None between two."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.session = metrics, ""
        self.sending: float | None = None
        self.most = self.taken = self.dropped = 0
        self.frames = self.messages = 0  # that wait
        self._items: deque[bytes | str] = deque()
        self._lock = threading.Lock()
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()

    def put(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            if self.messages >= UNREAD:  # who reads none of so many gets no more
                return
            self._items.append(json.dumps(message))
            self.messages += 1
        self._tell()

    def put_frame(self, frame: bytes, session: str) -> None:
        with self._lock:
            if session != self.session:  # it has ended
                return
            self._items.append(frame)
            self.frames += 1
            if self.frames > self.most:
                del self._items[next(i for i, x in enumerate(self._items) if type(x) is bytes)]
                self.frames -= 1
                self.dropped += 1
                self.metrics.dropped.inc()
        self._tell()

    def _tell(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ready.set)

    def begin(self, session: str, most: int) -> None:
        """Forgets the frames that wait, for those of another session."""
        with self._lock:
            self._items = deque(item for item in self._items if isinstance(item, str))
            self.frames = self.taken = self.dropped = 0
            self.most, self.session = most, session

    @property
    def full(self) -> bool:
        """Tells whether the client has left unread all messages that may wait."""
        return self.messages >= UNREAD

    @property
    def stuck(self) -> float:
        """Seconds for which the client has not taken what was sent last."""
        since = self.sending
        return 0.0 if since is None else time.monotonic() - since

    @property
    def stalled(self) -> bool:
        """Tells whether the client takes nothing any more."""
        return self.stuck > STALLED

    async def take(self) -> bytes | str:
        """The next one, once there is one."""
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        with self._lock:
            item = self._items.popleft()
            self.frames -= isinstance(item, bytes)
            self.taken += isinstance(item, bytes)
            self.messages -= isinstance(item, str)
        return item


class Coming(NamedTuple):
    """A prompt to come. at: when it was asked for; after: latent frames that were begun by then."""

    number: int
    text_1TE: Tensor
    at: float
    after: int


class Session:
    """A stream and the client that watches it.

    It ends once, for a reason, by its connection (the client left, stopped it or was too long) or
    by the engine (it failed). Either sets `ended` and gives its place free at once; its stream is
    taken out of the batch by `Engine.close`, before the next chunk.

    settings: as the client asked. paused: by the client. made: frames so far. prompt: number of
    that under which the last of them was made, from 0; last_prompt: of that asked for last.
    coming: the prompt that was asked for last, until a frame is made under it.
    plays_until: when the frames that were made will have been seen.
    """

    def __init__(self, settings: Start, preset: Preset, outbox: Outbox) -> None:
        self.id = secrets.token_hex(4)
        self.settings, self.preset, self.outbox = settings, preset, outbox
        self.stream: Stream | None = None
        self.chunk = PIXEL_FRAMES * preset.chunk
        outbox.begin(self.id, 2 * self.chunk if settings.live else sys.maxsize)
        self.since = self.plays_until = time.monotonic()
        self.paused, self.ended = False, ""
        self.made = self.prompt = self.last_prompt = 0
        self.coming: Coming | None = None
        self.prompt_seconds = 0.0  # from when the last one was asked for to its first frame
        self.given_BFCHW: Tensor | None = None  # latents of the picture that it starts with
        self.encoding: Future[None] | None = None
        self.recorded: deque[bytes] = deque()  # JPEG files
        self.recorded_bytes = 0
        self._recording = threading.Lock()

    def due_in(self, now: float, lead: float) -> float | None:
        """Seconds until its next chunk is to be begun, that it be there in time; None while there
        is nothing to wait for but the client. lead: seconds that a chunk takes."""
        if self.stream is None or self.paused or self.ended or self.outbox.stalled:
            return None
        if self.settings.live:
            return max(0.0, self.plays_until - lead - now)
        return 0.0 if self.made - self.outbox.taken < self.chunk else None

    def add(self, frames: int, now: float) -> None:
        """Counts frames that were made."""
        self.made += frames
        # What comes late is seen late: the next one is not hurried for it.
        self.plays_until = max(self.plays_until, now) + frames / self.preset.fps

    def encode(self, images_THWC: Images, first: int, prompt: int) -> None:
        """Puts frames into the outbox as they are asked for, and keeps them to be saved."""
        for number, image_HWC in enumerate(images_THWC, first):
            if self.ended:
                return
            if self.settings.format == "rgb":
                data = image_HWC.tobytes()
            else:
                data = to_jpeg(image_HWC, self.settings.quality)
                self._record(data)
            self.outbox.put_frame(HEADER.pack(number % 2**32, prompt % 2**32) + data, self.id)

    def _record(self, data: bytes) -> None:
        with self._recording:
            self.recorded.append(data)
            self.recorded_bytes += len(data)
            while self.recorded_bytes > RECORDED:
                self.recorded_bytes -= len(self.recorded.popleft())

    def recording(self) -> list[bytes]:
        """The last frames, as JPEG files."""
        with self._recording:
            return [*self.recorded]

    def forget(self) -> None:
        """Begins the recording anew."""
        with self._recording:
            self.recorded.clear()
            self.recorded_bytes = 0

    def facts(self) -> dict[str, Any]:
        """What `/sessions` and the page show of it."""
        stream, settings = self.stream, self.settings
        cache = min(self.preset.window, stream.past + stream.pending) if stream else 0
        state = "paused" if self.paused else "stalled" if self.outbox.stalled else "running"
        return {
            "session": self.id,
            "state": self.ended or state,
            "seconds": round(time.monotonic() - self.since, 1),
            "made": self.made,
            "dropped": self.outbox.dropped,
            "waiting": self.outbox.frames,
            "prompt": self.prompt,
            "prompt_seconds": round(self.prompt_seconds, 3),
            "cache": cache,
            "window": self.preset.window,
            "live": settings.live,
            "format": settings.format,
        }


def to_jpeg(image_HWC: Images, quality: int | None = None) -> bytes:
    """A JPEG file; of small pictures, which are enlarged, in full colour."""
    file = io.BytesIO()
    small = min(image_HWC.shape[:2]) < MIN_SHORT_SIDE
    options = {
        "quality": quality or (SMALL_QUALITY if small else QUALITY),
        "subsampling": 0 if small else 2,  # colour at full or at half resolution
    }
    Image.fromarray(image_HWC).save(file, "JPEG", **options)
    return file.getvalue()
