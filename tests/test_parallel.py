"""Any split of a global batch, into ranks and micro-batches, learns the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from sfmodel.cli.main import run_command
from sfmodel.ranks import started
from sfmodel.train.loop import train
from sfmodel.weights import checkpoint
from tests.tiny_runs import apart, config, saved, tiny
from tests.torchrun import torchrun
from tests.two_ranks import RUNS, trajectories

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


class Done(NamedTuple):
    """folder: of runs on one and on two ranks. out: what these printed. ranks: what each wrote."""

    folder: Path
    out: str
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("ranks")
    with tiny():
        for name, (recipe, change) in RUNS.items():
            train(config(folder / f"one {name}", recipe, **change), device="cpu")
            part = shutil.copytree(folder / f"one {name}", folder / f"one then two {name}")
            shutil.rmtree(part / "checkpoints" / "step-000002")
        train(trajectories(folder / "one trajectories"), device="cpu")
    ended = torchrun(2, "-m", "tests.two_ranks", folder)
    assert ended.returncode == 0, ended.stderr
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return Done(folder, ended.stdout, ranks)


def assert_close(one: Path, other: Path, step: int = 2) -> None:
    """Weights, their averages and the states of the optimisers, to the order of sums."""
    a, b = (saved(folder / "checkpoints" / f"step-{step:06d}") for folder in (one, other))
    learned = {name for name in a if "/optimizers/" not in name and "/critic/" not in name}
    assert any("/average/" in name for name in learned) and len(learned) < len(a)
    assert apart({k: a[k] for k in learned}, {k: b[k] for k in learned}) < 1e-4
    assert apart(a, b) < 2e-3  # the GAN's penalties divide small differences
    read = (checkpoint.read(folder / "model.safetensors")[0] for folder in (one, other))
    assert apart(*read) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_learn_what_one_does(done: Done, name: str) -> None:
    """From the start, and from a checkpoint of one rank."""
    one = done.folder / f"one {name}"
    assert_close(one, done.folder / f"two {name}")
    assert_close(one, done.folder / f"one then two {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_one_rank_goes_on_from_two(done: Done, name: str) -> None:
    part, (recipe, change) = done.folder / f"two then one {name}", RUNS[name]
    shutil.copytree(done.folder / f"two {name}", part)
    shutil.rmtree(part / "checkpoints" / "step-000002")
    train(config(part, recipe, **change), resume=True, device="cpu")
    assert_close(done.folder / f"one {name}", part)


@pytest.mark.slow
def test_ranks_with_copies_of_the_weights_learn_the_same(done: Done) -> None:
    """In micro-batches, too."""
    assert_close(done.folder / "one sf+dmd", done.folder / "copies")


@pytest.mark.slow
def test_ranks_stop_together_in_an_update_and_go_on(done: Done) -> None:
    assert_close(done.folder / "one sf+dmd", done.folder / "stopped")


@pytest.mark.slow
def test_ranks_have_a_folder_alone(done: Done) -> None:
    first, second = (rank["taken"] for rank in done.ranks)
    assert "taken: another process writes there" in first and "the first rank" in second


def share_fate(fate: str, said: Path, environment: dict[str, str]) -> None:
    """Act as one rank, in a process of its own, and say into a file how it went."""
    os.environ.update(environment)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())

    def share() -> None:
        with started(device="cpu", patience=3) as ranks:
            ranks.wait()
            if ranks.first:
                ranks.any(True)
            elif fate == "hangs":
                time.sleep(60)
            elif fate == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise ValueError("a file of this rank is bad")

    run_command("sfmodel", {"share": share}, ["share"])


@pytest.mark.slow
def test_a_rank_that_is_lost_ends_the_others_with_one_sentence(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # which imports once for all of them
    started: dict[tuple[str, int], multiprocessing.context.ForkServerProcess] = {}
    try:
        for fate in ("hangs", "is killed", "raises"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for rank in (0, 1):
                environment = common | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
                arguments = fate, tmp_path / f"{fate} {rank}", environment
                process = context.Process(target=share_fate, args=arguments)
                process.start()
                started[fate, rank] = process
        lost = "rank 0 of 2: another rank ended, or did not answer for 3 seconds"
        for (fate, rank), process in started.items():
            if fate == "raises" or not rank:
                process.join(60)
                assert process.exitcode == 2
                said = lost if not rank else "a file of this rank is bad"
                assert (tmp_path / f"{fate} {rank}").read_text() == f"sfmodel: {said}\n"
    finally:
        for process in started.values():
            process.kill()
            process.join()


@pytest.mark.slow
def test_ranks_share_the_making_of_trajectories(done: Done) -> None:
    one, two = (done.folder / f"{count} trajectories" for count in ("one", "two"))
    assert_close(one, two, 1)
    files = sorted(path.name for path in (one / "trajectories").glob("*.safetensors"))
    assert len(files) == 2 and (two / "samples" / "update-000001.png").is_file()
    for name in files:
        read = [load_file(folder / "trajectories" / name) for folder in (one, two)]
        assert apart(*read) < 1e-4
    assert "trajectory 66 of 66" in done.out


@pytest.mark.slow
def test_the_first_rank_alone_tells(done: Done) -> None:
    """Once for each of the four runs, which resume, too, the copies and what was stopped."""
    assert done.out.count("update 2/2") == 10 and done.out.count("update 1/2") == 6
    assert done.out.count("stopped at update 0") == 1
    lines = (done.folder / "two tf" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    alone = (done.folder / "one tf" / "log.jsonl").read_text().splitlines()
    assert losses == pytest.approx([json.loads(line)["loss"] for line in alone], rel=1e-5)


@pytest.mark.slow
def test_what_ranks_refuse(done: Done) -> None:
    said = done.ranks[0]["said"]
    assert said == done.ranks[1]["said"] and not (done.folder / "refused").exists()
    assert said["muon"] == "optimizer='muon' runs on one rank: use 'adamw' on several"
    assert said["batch"].startswith("an update of 3 clips: must divide into 2 ranks")
    assert said["micro-batch"].endswith("must divide into 2 ranks and micro_batch=2")


@pytest.mark.slow
def test_ranks_end_together(done: Done) -> None:
    """One that left while another one still worked would take it down."""
    first, second = done.ranks
    assert second["begun"] < first["begun"] < second["ended"]


@pytest.mark.parametrize("name", RUNS)
def test_micro_batches_learn_what_a_whole_batch_does(name: str, tmp_path: Path) -> None:
    recipe, change = RUNS[name]
    for size in (0, 1):
        settings = config(tmp_path / str(size), recipe, **change, micro_batch=size)
        train(settings, device="cpu")
    assert_close(tmp_path / "0", tmp_path / "1", 2)
