"""Messages between a server of live streams and its clients: docs/serve.md has them all.

A client sends JSON objects with a `type`. The server answers with such objects, and with frames,
which are binary: the HEADER and a picture.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import struct
from dataclasses import dataclass
from typing import Any

from sfmodel.config import check_seed

PROTOCOL = 1
# Little-endian: the frame's number in the session and that of the prompt it was made under.
HEADER = struct.Struct("<II")
LONGEST = 4096  # characters of a prompt
PICTURE = 2**23  # bytes of a picture
LARGEST = 4 * (PICTURE // 3 + 1) + 2**16  # bytes of a message: a picture in base64, and the rest
MOST_CHUNKS = 64  # from one prompt to the next
QUALITY, SMALL_QUALITY = 85, 95  # of JPEG if none is asked for; of pictures that are enlarged


@dataclass(frozen=True)
class Start:
    """A stream begins. image: a file of a picture that the video starts with. live: frames come at
    the video's rate, and those that the client does not take in time are dropped; else as fast as
    it takes them, every one. format: of frames, "jpeg" or "rgb". quality: of JPEG, 10 to 95; None
    for the usual one."""

    prompt: str
    seed: int = 0
    image: bytes | None = None
    live: bool = True
    format: str = "jpeg"
    quality: int | None = None


@dataclass(frozen=True)
class Prompt:
    """Another prompt from the next chunk on; over, keep_cache: as of `sfmodel generate`."""

    text: str
    over: int = 1
    keep_cache: bool = False


@dataclass(frozen=True)
class Seed:
    """The video begins anew, with another seed and the present prompt."""

    seed: int


@dataclass(frozen=True)
class Pause:
    """Nothing more is made until `Resume`."""


@dataclass(frozen=True)
class Resume:
    """The stream goes on from where it was."""


@dataclass(frozen=True)
class Save:
    """The last of what was made becomes an MP4 file on the server."""


@dataclass(frozen=True)
class Stop:
    """The stream ends; the connection may start another one."""


Message = Start | Prompt | Seed | Pause | Resume | Save | Stop
TYPES: dict[str, type] = {
    each.__name__.lower(): each for each in (Start, Prompt, Seed, Pause, Resume, Save, Stop)
}


def parse(text: str) -> Message:
    """A client's message. Raises ValueError, with one sentence, for what is none."""
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ValueError("the message is no JSON: must be an object with a type") from None
    if not isinstance(found, dict):
        raise ValueError("the message must be a JSON object with a type")
    kind = found.pop("type", None)
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"type={_shown(kind)}: must be one of {', '.join(TYPES)}")
    known = {field.name: field for field in dataclasses.fields(TYPES[kind])}
    for name in found:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes nothing more"
            raise ValueError(f"{kind}: {_shown(name)} is not known: it {takes}")
    for name, field in known.items():
        if name not in found and field.default is dataclasses.MISSING:
            raise ValueError(f"{kind}: has no {name}")
    try:
        values = {name: _CHECKS[name](name, value) for name, value in found.items()}
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None
    message: Message = TYPES[kind](**values)
    return message


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _shown(value: object) -> str:
    """What a client sent, short enough for a sentence."""
    said = ascii(value)
    return said if len(said) <= 40 else f"{said[:40]}…"


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}={_shown(value)}: must be text")
    if len(value) > LONGEST:
        raise ValueError(f"{name} has {len(value):,} characters: must have at most {LONGEST:,}")
    if any("\ud800" <= each <= "\udfff" or each == "\0" for each in value):
        raise ValueError(f"{name}={_shown(value)}: must be Unicode text")
    return value.strip()


def _number(name: str, value: object, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}={_shown(value)}: must be a whole number from {least} to {most}")
    return value


def _seed(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={_shown(value)}: must be a whole number")
    check_seed(value)
    return value


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={_shown(value)}: must be true or false")
    return value


def _format(name: str, value: object) -> str:
    if value not in ("jpeg", "rgb"):
        raise ValueError(f"{name}={_shown(value)}: must be jpeg or rgb")
    return str(value)


def _picture(name: str, value: object) -> bytes | None:
    if value is None:
        return None
    try:
        data = base64.b64decode(value if isinstance(value, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}: must be a file in base64") from None
    if not 0 < len(data) <= PICTURE:
        raise ValueError(f"{name} has {len(data):,} bytes: must have 1 to {PICTURE:,}")
    return data


_CHECKS: dict[str, Any] = {
    "prompt": _text,
    "text": _text,
    "seed": _seed,
    "image": _picture,
    "live": _flag,
    "keep_cache": _flag,
    "format": _format,
    "quality": lambda name, value: None if value is None else _number(name, value, 10, 95),
    "over": lambda name, value: _number(name, value, 1, MOST_CHUNKS),
}
