"""`sfmodel serve`: live streams in the browser, each steered while it runs."""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import quote

import torch
from tyro.conf import OmitArgPrefixes

from sfmodel.cli.chosen import choose
from sfmodel.cli.options import Content, Sampling, Streaming, Weights
from sfmodel.extras import require
from sfmodel.files import check_writable
from sfmodel.pretrained import checked_codec, default_device, load_text, progress
from sfmodel.process import handling

TOY = (
    "a large red ball moves up slowly",
    "a small cyan ball moves right fast",
    "a large bright yellow ball moves down and left",
    "a small dim green ball",
)
WAN = (
    "A cat in a red scarf walks along a snowy street at night, cinematic",
    "Waves break on black rocks below a lighthouse at dawn, drone shot",
    "A steam train crosses a stone bridge in autumn, golden light",
)


@dataclass(frozen=True)
class Serving:
    """Who is served.

    Args:
        host: Address to listen on, 0.0.0.0 for all. Any but this machine's own (127.0.0.1) needs a
            token, which is shown at the start, and is plain HTTP: put TLS in front of it.
        port: Port to listen on; 0 takes one that is free.
        token: Token that clients bring, of 16 letters or more, instead of one made up.
        origins: Pages of other servers that may ask this one, as https://example.org.
        sessions: Streams at once of each device, as far as its memory holds them; 64 if not given.
        idle: Seconds that a client may be there without a stream that runs.
        seconds: Longest stream.
        clips: Folder that saved clips are written to.
        devices: Devices to serve on; all GPUs if not given, else the CPU.
        demo: The toy world, and its page in this machine's browser, where it has a screen.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    origins: tuple[str, ...] = ()
    sessions: int | None = None
    idle: float = 300.0
    seconds: float = 3600.0
    clips: Path = Path("out/clips")
    devices: tuple[str, ...] = ()
    demo: bool = False


def serve(
    serving: OmitArgPrefixes[Serving],
    stream: OmitArgPrefixes[Streaming],
    weights: OmitArgPrefixes[Weights],
    steps: tuple[int, ...] | None = None,
    shift: float | None = None,
    warped: bool = False,
) -> None:
    """Serve live streams, which a page shows and steers: http://127.0.0.1:8080.

    Each client has a stream of its own; they are made in one batch. The protocol, which programs
    may speak as well, is in docs/serve.md. Ctrl-C ends it.

    Args:
        steps: The few-step list, falling, of 1000 to 1, the checkpoint's or the preset's if not
            given.
        shift: Of the noise levels; the checkpoint's or the preset's if not given.
        warped: The steps are meant as they are, not to be shifted (CausVid).
    """
    require("sfmodel serve", "serve")
    from sfmodel.serve.app import listening, uvicorn_server
    from sfmodel.serve.guard import is_loopback
    from sfmodel.serve.server import Limits, Server

    limits = Limits(serving.sessions, serving.idle, serving.seconds)
    token = serving.token
    if token is None and not is_loopback(serving.host):
        token = secrets.token_urlsafe(24)
    elif token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable()):
        raise ValueError("token: must have 16 letters or more, of ASCII")
    if serving.demo and (weights.checkpoint or weights.preset not in (None, "toy")):
        raise ValueError("demo: is the toy world: leave out preset and checkpoint")
    if not 0 <= serving.port <= 65535:
        raise ValueError(f"port={serving.port}: must be 0 to 65535")
    for origin in serving.origins:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ValueError(f"origins={origin!r}: must be as https://example.org")
    check_writable(serving.clips / "clip.mp4")
    sampling = Sampling(steps=steps, shift=shift, warped=warped)
    chosen = choose(Content(), stream, sampling, weights, {})
    devices = [*map(_device, serving.devices)] or _all_devices()
    text = load_text(chosen.preset, weights.models)
    loaders, line = [], ""
    for device in devices:
        load_model, line = chosen.checked(device)
        codec = checked_codec(chosen.preset, device, weights.vae, weights.models, weights.tile)
        loaders.append((load_model, codec))
    if line:
        print(line, file=sys.stderr)
    socket = listening(serving.host, serving.port)
    with socket:
        models, codecs = zip(*((load(), codec()) for load, codec in loaders), strict=True)
        examples = TOY if chosen.preset == "toy" else WAN
        options: dict[str, Any] = {"low_latency": stream.low_latency}
        with progress("warming up"):
            server = Server(
                models, codecs, text, chosen.preset, chosen.settings, serving.clips, limits,
                examples, **options,
            )  # fmt: skip
        address = _address(socket.getsockname(), token)
        on = ", ".join(str(device) for device in devices)
        streams = f"{server.places} stream{'s' if server.places > 1 else ''} at once"
        streams += f", about {min(server.real_time, server.places)} in real time"
        print(f"{address}\n{chosen.preset} on {on}: {streams}; Ctrl-C ends it", flush=True)
        if serving.demo and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            threading.Timer(0.5, webbrowser.open, [address]).start()
        running = uvicorn_server(server, token, serving.origins)
        with handling(running.handle_exit):
            running.run([socket])
    raise KeyboardInterrupt  # which it ends by


def _address(bound: tuple[Any, ...], token: str | None) -> str:
    """The address to open: of a server that listens on all of this machine's, by its name."""
    host, port = bound[:2]
    if host in ("0.0.0.0", "::"):
        host = gethostname()
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")


def _device(said: str) -> torch.device:
    try:
        device = torch.device(said)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"devices={said!r}: is no device of this machine") from None
    return device


def _all_devices() -> list[torch.device]:
    if torch.cuda.is_available():
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [default_device()]
