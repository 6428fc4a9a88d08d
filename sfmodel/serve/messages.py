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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

PROTOCOL = 1
# Little-endian: the frame's number in the session and that of the prompt it was made under.
HEADER = struct.Struct("<II")
LONGEST = 4096  # characters of a prompt
PICTURE = 2**23  # bytes of a picture
LARGEST = 4 * (PICTURE // 3 + 1) + 2**16  # bytes of a message: a picture in base64, and the rest
MOST_CHUNKS = 64  # from one prompt to the next
QUALITY, SMALL_QUALITY = 85, 95  # of JPEG if none is asked for; of pictures that are enlarged


Check = Callable[[str, object], Any]  # of a field's name and value; raises ValueError


class BadMessage(ValueError):
    """Refusal of what is no message. about: the type that it has, or none."""

    def __init__(self, sentence: str, about: str = "") -> None:
        super().__init__(sentence)
        self.about = about


# --- Checks of fields


def _shown(value: object) -> str:
    """A value from a client, short enough for a sentence."""
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


def _number(least: int, most: int) -> Check:
    def number(name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            must = f"must be a whole number from {least} to {most}"
            raise ValueError(f"{name}={_shown(value)}: {must}")
        return value

    return number


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


def _none_or(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _field(check: Check, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


_SEED = _number(-(2**63), 2**63 - 2)  # 64 bits, which noise is drawn from


# --- Messages


@dataclass(frozen=True)
class Start:
    """A stream begins. image: a file of a picture that the video starts with. live: frames come at
    the video's rate, and those that the client does not take in time are dropped; else as fast as
    it takes them, every one. format: of frames, "jpeg" or "rgb". quality: of JPEG, 10 to 95; None
    for the usual one."""

    kind: ClassVar[str] = "start"
    prompt: str = _field(_text)
    seed: int = _field(_SEED, 0)
    image: bytes | None = _field(_none_or(_picture), None)
    live: bool = _field(_flag, True)
    format: str = _field(_format, "jpeg")
    quality: int | None = _field(_none_or(_number(10, 95)), None)


@dataclass(frozen=True)
class Prompt:
    """Another prompt from the next chunk on; over, keep_cache: as of `sfmodel generate`."""

    kind: ClassVar[str] = "prompt"
    text: str = _field(_text)
    over: int = _field(_number(1, MOST_CHUNKS), 1)
    keep_cache: bool = _field(_flag, False)


@dataclass(frozen=True)
class Seed:
    """The video begins anew, with another seed and the present prompt."""

    kind: ClassVar[str] = "seed"
    seed: int = _field(_SEED)


@dataclass(frozen=True)
class Pause:
    """Nothing more is made until `Resume`."""

    kind: ClassVar[str] = "pause"


@dataclass(frozen=True)
class Resume:
    """The stream goes on from where it was."""

    kind: ClassVar[str] = "resume"


@dataclass(frozen=True)
class Save:
    """The last of what was made becomes an MP4 file on the server."""

    kind: ClassVar[str] = "save"


@dataclass(frozen=True)
class Stop:
    """The stream ends; the connection may start another one."""

    kind: ClassVar[str] = "stop"


Message = Start | Prompt | Seed | Pause | Resume | Save | Stop
TYPES: dict[str, Any] = {each.kind: each for each in get_args(Message)}


def parse(text: str) -> Message:
    """A client's message. Raises `BadMessage`, with one sentence, for what is none."""
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise BadMessage("the message is no JSON: must be an object with a type") from None
    if not isinstance(found, dict):
        raise BadMessage("the message must be a JSON object with a type")
    kind = found.pop("type", None)
    if not isinstance(kind, str) or kind not in TYPES:
        raise BadMessage(f"type={_shown(kind)}: must be one of {', '.join(TYPES)}")
    known = {field.name: field for field in dataclasses.fields(TYPES[kind])}
    try:
        for name in found:
            if name not in known:
                takes = f"takes {', '.join(known)}" if known else "takes nothing more"
                raise ValueError(f"{_shown(name)} is not known: it {takes}")
        for name, field in known.items():
            if name not in found and field.default is dataclasses.MISSING:
                raise ValueError(f"has no {name}")
        checked = {
            name: known[name].metadata["check"](name, value) for name, value in found.items()
        }
    except ValueError as error:
        raise BadMessage(f"{kind}: {error}", kind) from None
    message: Message = TYPES[kind](**checked)
    return message


def _refuse(constant: str) -> None:
    raise ValueError(constant)
