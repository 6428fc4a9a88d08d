"""Work of test_parallel on two ranks, by torchrun: `python -m tests.two_ranks FOLDER` trains, and
each rank writes what was refused."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sfmodel.files import alone
from sfmodel.ranks import started
from sfmodel.train import parallel, report
from sfmodel.train.batch import MicroBatch
from sfmodel.train.config import TrainConfig
from sfmodel.train.loop import train
from sfmodel.train.trajectories import IN_FILE
from tests.tiny_runs import config, tiny

CPU = "cpu"
SAMPLE = report.Report.sample
SHORT: dict[str, Any] = {"steps": 2, "save_every": 1, "chunks": (3,)}
# A LoRA begins at zeros, so that all it has are steps: of one size each without second moments,
# which divide what is left of gradients near zero, their rounding.
SIGNS = {"betas": (0.0, 0.0), "betas_critic": (0.0, 0.0)}
# Recipes and their settings by the names of runs.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{recipe: (recipe, SHORT) for recipe in ("tf", "sf+dmd", "sf+gan")},
    "lora": ("sf+dmd", SHORT | SIGNS | {"lora_rank": 2, "lora_critic": True, "lr_critic": 0.03}),
}
REFUSED: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon"},
    "batch": {"batch": 3},
    "micro-batch": {"batch": 6, "micro_batch": 2},
}


def trajectories(folder: Path) -> TrainConfig:
    """A run whose trajectories lie in two files."""
    return config(folder, "ode", steps=1, save_every=1, pairs=IN_FILE + 2, teacher_steps=20)


def stopped(config: TrainConfig, second: bool) -> None:
    """Trains until the second rank alone has a signal, in the third micro-batch of the first
    update, and then goes on."""
    objective, calls = config.objective, []
    learn = objective.learn_critic

    def signalled(batch: MicroBatch, share: float) -> float:
        calls.append(share)
        if second and len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return learn(batch, share)

    with mock.patch.object(objective, "learn_critic", signalled):
        try:
            train(config, device=CPU)
        except KeyboardInterrupt:
            (saved,) = parallel.checkpoints(config.output / "checkpoints")
            assert saved.name == "step-000000" and len(parallel.facts(saved)["critic"]) == 1
            train(config, resume=True, device=CPU)
        else:
            raise AssertionError("it was not stopped")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    said: dict[str, str] = {}
    with started(device=CPU) as ranks, tiny():
        for name, (recipe, change) in RUNS.items():
            train(config(folder / f"two {name}", recipe, **change), device=CPU)
            resumed = config(folder / f"one then two {name}", recipe, **change)
            train(resumed, resume=True, device=CPU)
        copies = config(folder / "copies", "sf+dmd", **SHORT, shard=1, micro_batch=1)
        train(copies, device=CPU)
        settings = config(folder / "stopped", "sf+dmd", **SHORT, micro_batch=1)
        stopped(settings, not ranks.first)
        with mock.patch.object(report.Report, "sample", SAMPLE):
            train(trajectories(folder / "two trajectories"), device=CPU)
        for name, change in REFUSED.items():
            try:
                train(config(folder / "refused", **change), device=CPU)
            except ValueError as error:
                said[name] = str(error)
        with alone(folder / "taken") if ranks.first else contextlib.nullcontext():
            ranks.wait()
            try:
                train(config(folder / "taken"), device=CPU)
            except ValueError as error:
                taken = str(error)
        if ranks.first:
            time.sleep(1)
        begun = time.time()
    ended = {"begun": begun, "ended": time.time(), "said": said, "taken": taken}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
