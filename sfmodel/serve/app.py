"""The server's pages, its WebSocket and what else it answers by HTTP."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from sfmodel.process import TOGETHER
from sfmodel.serve.connection import Connection
from sfmodel.serve.guard import Guard
from sfmodel.serve.messages import LARGEST
from sfmodel.serve.server import Server

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/player.js": "player.js",
}
UNSENT = 2**18  # bytes that the system keeps for a client: a few pictures, and not seconds of them
PINGS = 20.0, 60.0  # seconds between two, and until one is answered: a slow reader's may wait
# A connection on which nothing comes back any more is closed after so many seconds, and so often.
KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}


def create_app(server: Server, token: str | None = None, origins: Sequence[str] = ()) -> Starlette:
    """The ASGI application of a server, which it starts and stops."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            server.stop()

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / FILES[request.url.path])

    async def health(_: Request) -> Response:
        if not server.alive:
            return JSONResponse({"status": "an engine has ended"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(_: Request) -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def sessions(_: Request) -> Response:
        found = [session.facts() for session in server.sessions]
        return JSONResponse({**server.crowd(), "running": found})

    async def clips(_: Request) -> Response:
        return JSONResponse([clip.facts() for clip in server.clips.there()])

    async def clip(request: Request) -> Response:
        file = server.clips.find(request.path_params["name"])
        if file is None or not file.is_file():
            return PlainTextResponse("there is no such clip\n", 404)
        return FileResponse(file)

    async def stream(socket: WebSocket) -> None:
        if server.connected >= server.limits.connections:
            server.metrics.refused.labels("connections").inc()
            await socket.accept()  # or the reason would not reach it
            await socket.close(1013, "too many clients: try again later")
            return
        await Connection(server, socket).run()

    return Starlette(
        routes=[
            *(Route(path, page) for path in FILES),
            Route("/healthz", health),
            Route("/metrics", metrics),
            Route("/sessions", sessions),
            Route("/clips", clips),
            Route("/clips/{name}", clip),
            WebSocketRoute("/stream", stream),
        ],
        middleware=[Middleware(Guard, metrics=server.metrics, token=token, origins=origins)],
        lifespan=lifespan,
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free. Raises OSError with a sentence where
    it cannot."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)  # inherited by connections
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        found.bind(address)
        found.listen()  # whoever connects before the server runs waits
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
    return found


class _Server(uvicorn.Server):
    """uvicorn, which ends at once only when it is told so again a while after the first time."""

    told = float("inf")

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.should_exit or now - self.told > TOGETHER:
            super().handle_exit(number, frame)
        self.told = min(self.told, now)


def uvicorn_server(
    server: Server, token: str | None = None, origins: Sequence[str] = ()
) -> uvicorn.Server:
    """uvicorn, to be run on a socket of `listening`."""
    logging.getLogger("uvicorn.access").disabled = True
    config = uvicorn.Config(
        create_app(server, token, origins), log_level="warning", lifespan="on",
        timeout_graceful_shutdown=2,
        ws_max_size=LARGEST, ws_ping_interval=PINGS[0], ws_ping_timeout=PINGS[1],
        ws_per_message_deflate=False, server_header=False,
    )  # fmt: skip
    return _Server(config)
