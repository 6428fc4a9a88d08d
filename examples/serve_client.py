"""A client of `sfmodel serve` in twenty lines: takes every frame of a stream, whose prompt it
changes, and writes them as pictures.

    sfmodel serve &
    python examples/serve_client.py ws://127.0.0.1:8080/stream [TOKEN]
"""

import json
import struct
import sys
from pathlib import Path

from websockets.sync.client import connect

address, *token = sys.argv[1:] or ["ws://127.0.0.1:8080/stream"]
folder = Path("out/frames")
folder.mkdir(parents=True, exist_ok=True)
headers = {"Authorization": f"Bearer {token[0]}"} if token else {}

with connect(address, max_size=None, close_timeout=1, additional_headers=headers) as socket:

    def send(kind: str, **facts: object) -> None:
        socket.send(json.dumps({"type": kind, **facts}))

    send("start", prompt="a large red ball moves up", seed=1, live=False)
    for item in socket:
        if isinstance(item, bytes):
            frame, prompt = struct.unpack_from("<II", item)
            (folder / f"{frame:05d}.jpg").write_bytes(item[8:])
            if frame == 40:
                send("prompt", text="a large blue ball moves up")
            if frame == 80:
                break
        elif (message := json.loads(item))["type"] != "stats":
            print(message)
            if message["type"] == "error":
                break
