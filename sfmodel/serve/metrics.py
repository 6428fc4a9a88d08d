"""Counters of a server, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
SESSIONS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server: two of a process do not mix."""

    def __init__(self) -> None:
        to = self.registry = CollectorRegistry()
        self.connections = Gauge("sfmodel_connections", "Clients connected", registry=to)
        self.sessions = Gauge("sfmodel_sessions", "Streams that hold a place", registry=to)
        self.places = Gauge("sfmodel_places", "Streams that there is room for", registry=to)
        self.started = Counter("sfmodel_sessions_started", "Streams started", registry=to)
        self.refused = Counter(
            "sfmodel_refused", "Messages and requests refused", ["why"], registry=to
        )
        self.failed = Counter("sfmodel_sessions_failed", "Streams ended by an error", registry=to)
        self.frames = Counter("sfmodel_frames", "Frames made", registry=to)
        self.dropped = Counter(
            "sfmodel_frames_dropped", "Frames that clients did not take in time", registry=to
        )
        self.step_seconds = Histogram(
            "sfmodel_step_seconds", "Time of a step, a chunk of each stream that is due",
            registry=to, buckets=SECONDS,
        )  # fmt: skip
        self.step_sessions = Histogram(
            "sfmodel_step_sessions", "Streams in a step", registry=to, buckets=SESSIONS
        )
        self.prompt_seconds = Histogram(
            "sfmodel_prompt_seconds", "Time from a new prompt to its first frame made",
            registry=to, buckets=SECONDS,
        )  # fmt: skip

    def text(self) -> bytes:
        """All of them, as `/metrics` gives them."""
        return generate_latest(self.registry)
