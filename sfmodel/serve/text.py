"""The thread that encodes prompts, beside the engines: a text encoder that was loaded stays."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from sfmodel.pretrained import TextEncoder


class TextThread:
    """Prompts to embeddings [T, E] on the CPU, one after the other."""

    def __init__(self, encoder: TextEncoder, device: torch.device) -> None:
        self.encoder, self.device = encoder, device
        self._asked: queue.SimpleQueue[tuple[str, Future[Tensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="text", daemon=True)
        self._thread.start()

    def encode(self, prompt: str) -> Future[Tensor]:
        """An embedding to come. Its result raises ValueError for what is no prompt of the
        encoder's."""
        future: Future[Tensor] = Future()
        self._asked.put((prompt, future))
        return future

    def stop(self) -> None:
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        present = ""

        def prompts() -> Iterator[str]:
            while True:
                yield present

        rows = None
        while (asked := self._asked.get()) is not None:
            present, future = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                # The encoder is there as long as what it encodes has no end; an error is one.
                rows = self.encoder.rows(prompts(), self.device) if rows is None else rows
                future.set_result(next(rows))
            except BaseException as error:  # its caller's to tell
                rows = None
                future.set_exception(error)
