"""What `python -m bench train` times: iterations of teacher, diffusion and self forcing, in phases.

TF and DF are the flow-matching loss on a clip, forward, backward and AdamW's step. SF-n rolls out a
clip that exits at step n, scores it by DMD (three bidirectional passes), runs the exit steps again
with their gradient and steps; its critic rolls out the same and learns the flow of what it sees.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import sfkernels as sf
from bench import timing
from bench.inputs import random_model
from sfmodel import ranges
from sfmodel.config import Preset
from sfmodel.cost import clip_chunks
from sfmodel.dit import DiT, SelfAttention
from sfmodel.schedule import FlowSchedule
from sfmodel.train.objectives import (
    critic_loss,
    diffusion_forcing_loss,
    dmd_loss,
    score_timesteps,
    scores,
    teacher_forcing_loss,
)
from sfmodel.train.rollout import Rollout

QKV = "blocks.{}.self_attn.qkv.weight"

Phases = dict[str, Callable[[], Any]]


class Scores(NamedTuple):
    """optimizer: of the fake one."""

    real: DiT
    fake: DiT
    optimizer: torch.optim.Optimizer


class Training:
    """A generator, what it learns from and one batch of a clip."""

    def __init__(self, preset: Preset, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.preset, self.device, self.dtype = preset, device, dtype
        self.model, self.optimizer = self._trained()
        self.scores: Scores | None = None
        chunks, tokens = clip_chunks(preset), math.prod(preset.grid)
        self.layouts = {
            name: sf.BlockLayout(chunks, tokens, teacher_forcing=name == "TF")
            for name in ("TF", "DF", "SF")
        }
        size = 1, sum(chunks), preset.dit.channels, preset.height, preset.width
        self.clean, self.noise, self.context = torch.randn(3, *size, device=device)
        self.renoise = torch.randn(*size[:2], len(preset.steps) - 1, *size[2:], device=device)
        self.text = torch.randn(1, preset.dit.text_len, preset.dit.text_dim, device=device)
        self.schedule = FlowSchedule(preset.shift)
        sigma = self.schedule.shifted(torch.rand(1, len(chunks)))
        self.sigma = sigma.repeat_interleave(torch.tensor(chunks), 1).to(device)
        self.t = score_timesteps(torch.rand(1), self.schedule).to(device)

    def _trained(self) -> tuple[DiT, torch.optim.Optimizer]:
        """A model of random weights and its optimiser."""
        model = random_model(self.preset.dit, self.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, fused=True
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes room for the averages, which no iteration then pays for
        optimizer.zero_grad()
        return model, optimizer

    def prepare(self, row: str) -> None:
        """Makes what a row needs beside the generator: self forcing a real score, in the dtype of
        the arithmetic, and a fake one with its optimiser."""
        if row not in self.layouts and self.scores is None:
            fake, optimizer = self._trained()
            fake.recompute = True
            real = random_model(self.preset.dit, self.device).to(self.dtype).requires_grad_(False)
            self.scores = Scores(real, fake, optimizer)

    @property
    def models(self) -> list[DiT]:
        return [self.model, *(self.scores[:2] if self.scores else ())]

    def phases(self, row: str) -> Phases:
        """One iteration of a row, once it is prepared."""
        if row in ("TF", "DF"):
            return self._flow_matching(row)
        exit_step = exit_step_of(row)
        return self._critic(exit_step) if row.endswith("critic") else self._generator(exit_step)

    def _flow_matching(self, row: str) -> Phases:
        made: list[Tensor] = []
        return {
            "forward": lambda: made.append(self.loss(row)),
            "backward": lambda: made.pop().backward(),
            "optimiser": self.optimizer.step,
        }

    def loss(self, row: str) -> Tensor:
        """Of TF or DF."""
        self.model.recompute = True
        shared = self.noise, self.sigma, self.text, self.layouts[row]
        if row == "TF":
            return teacher_forcing_loss(self.model, self.clean, self.clean, *shared)
        return diffusion_forcing_loss(self.model, self.clean, *shared)

    def rollout(self, exit_step: int) -> Rollout:
        self.model.recompute = False  # a rollout runs each exit step again as a whole
        return Rollout(
            *(self.model, self.layouts["SF"], self.schedule, self.preset.steps, exit_step),
            *(self.noise, self.renoise, self.text),
            context_noise_BFCHW=self.context,
        )

    def _generator(self, exit_step: int) -> Phases:
        made: list[Any] = []
        assert self.scores is not None
        real, fake, _ = self.scores

        def score() -> None:
            x = made[0].video.requires_grad_()
            loss = dmd_loss(x, functools.partial(
                scores, noise_BFCHW=self.noise, t_B=self.t, text_BTE=self.text,
                unprompted_BTE=torch.zeros_like(self.text), real=real, fake=fake,
                schedule=self.schedule,
            ))  # fmt: skip
            made.append(torch.autograd.grad(loss, x)[0])

        def backward() -> None:
            upstream, rollout = made.pop(), made.pop()
            rollout.backward(upstream)

        return {
            "rollout": lambda: made.append(self.rollout(exit_step)),
            "score": score,
            "backward": backward,
            "optimiser": self.optimizer.step,
        }

    def _critic(self, exit_step: int) -> Phases:
        made: list[Tensor] = []
        assert self.scores is not None
        _, fake, optimizer = self.scores

        def forward() -> None:
            x = made.pop()
            made.append(critic_loss(fake, x, self.noise, self.t, self.text, self.schedule))

        return {
            "rollout": lambda: made.append(self.rollout(exit_step).video),
            "forward": forward,
            "backward": lambda: made.pop().backward(),
            "optimiser": optimizer.step,
        }

    def iteration(self, row: str) -> dict[str, float]:
        """Milliseconds of each phase."""
        times = {}
        with self.autocast():
            for name, run in self.phases(row).items():
                with ranges.phase(name):
                    timing.wait(self.device)
                    began = time.perf_counter()
                    run()
                    timing.wait(self.device)
                    times[name] = 1e3 * (time.perf_counter() - began)
        self.free()
        return times

    def results(self, row: str) -> dict[str, Tensor]:
        """What two contestants are to agree in: the loss or the video, and gradients. That of a
        rollout is of a loss drawn at random, since scores of random weights magnify every error.
        Leaves no gradient behind."""
        found, learner = {}, self.model
        with self.autocast():
            if row in self.layouts:
                found["loss"] = loss = self.loss(row)
                loss.backward()
            else:
                made = self.rollout(exit_step_of(row))
                found["video"] = made.video
                if row.endswith("critic"):
                    assert self.scores is not None
                    learner = self.scores.fake
                    shared = self.noise, self.t, self.text, self.schedule
                    found["loss"] = loss = critic_loss(learner, self.clean, *shared)
                    loss.backward()
                else:
                    made.backward(self.context)
        grads = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
        found["norm of the gradient"] = torch.nn.utils.get_total_norm([*grads.values()])
        for i in (0, len(learner.blocks) - 1):
            found[f"gradient of {QKV.format(i)}"] = grads[QKV.format(i)]
        self.free()
        return {name: tensor.detach() for name, tensor in found.items()}

    def autocast(self) -> torch.autocast:
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)

    def free(self) -> None:
        for model in self.models:
            model.zero_grad()


def exit_step_of(row: str) -> int:
    """Its index, of "SF-n" or "SF-n critic"."""
    return int(row[len("SF-")]) - 1


@contextlib.contextmanager
def attending(
    training: Training, impl: str, flex: Callable[..., Tensor] | None = None
) -> Iterator[None]:
    """Self-attention by `impl`, or by `flex` of q, k and v if given, as the public trainer has it:
    until the backward pass is done, which recomputes the blocks."""
    for model in training.models:
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.attention_impl = impl
    if flex is None:
        yield
        return
    with mock.patch.object(sf, "block_causal_attention", lambda q, k, v, *_, **__: flex(q, k, v)):
        yield


def check(got: dict[str, Tensor], want: dict[str, Tensor], half: bool) -> None:
    """Raises AssertionError unless loss and gradients agree to rounding. half: in bfloat16."""
    for name, theirs in want.items():
        error = float((got[name] - theirs).norm() / theirs.norm())
        allowed = (1e-2 if name == "loss" else 5e-2) if half else 1e-4
        assert error <= allowed, f"{name} is off by {error:.1e}, allowed {allowed:.0e}"  # NaN too
