"""Consistency distillation: its loss and gradient by hand, and the points that it compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfkernels import BlockLayout
from sfmodel.dit import DiT
from sfmodel.ranks import Ranks
from sfmodel.train.batch import Batch, MicroBatch
from sfmodel.train.loop import Run
from sfmodel.train.objectives.consistency import consistency_loss
from tests.tiny_runs import TINY, config, tiny

SHAPE = (2, 3, 4, 2, 2)


class Score(nn.Module):
    """A flow that can be differentiated by hand: a·x + b·t/1000 + mean of the text + clean."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, *, layout: BlockLayout, clean_BFCHW: Tensor
    ) -> Tensor:
        a, b = self.weights
        assert layout.teacher_forcing
        return a * x + (b * t / 1000 + text.mean((1, 2))).view(-1, 1, 1, 1, 1) + clean_BFCHW


def test_the_loss_and_its_gradient_by_hand() -> None:
    """x0 of the second point takes no gradient, and at σ = 0 is the point itself."""
    torch.manual_seed(0)
    x, x_next, clean = torch.randn(3, *SHAPE, dtype=torch.float64)
    text = torch.randn(2, 5, 3, dtype=torch.float64)
    sigma, following = torch.tensor([[0.9, 0.25], [0.7, 0.0]], dtype=torch.float64)
    model: Any = Score(0.7, -0.4)
    layout = BlockLayout((1, 2), 4, teacher_forcing=True)
    loss = consistency_loss(model, (x, sigma), (x_next, following), text, layout, clean)
    (got,) = torch.autograd.grad(loss, model.weights)
    a, b = model.weights.tolist()
    total, want = 0.0, torch.zeros(2, dtype=torch.float64)
    for i in range(SHAPE[0]):
        s, s_next, words = float(sigma[i]), float(following[i]), float(text[i].mean())
        values = (each[i].flatten().tolist() for each in (x, x_next, clean))
        for point, next_point, seen in zip(*values, strict=True):
            x0 = point - s * (a * point + b * s + words + seen)
            target = next_point - s_next * (a * next_point + b * s_next + words + seen)
            total += (x0 - target) ** 2
            slope = torch.tensor([-s * point, -s * s], dtype=torch.float64)
            want += 2 * (x0 - target) * slope
    assert loss.item() == pytest.approx(total / x.numel(), rel=1e-9)
    torch.testing.assert_close(got, want / x.numel(), rtol=1e-9, atol=1e-12)


class Calls:
    """Record of what a model was given, time after time, and what it said."""

    def __init__(self, model: DiT | None) -> None:
        assert model is not None
        self.all: list[tuple[Tensor, Tensor, Tensor, Any, Any, Tensor]] = []
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, given: Any, named: dict[str, Any], flow: Tensor) -> None:
        x, t, text = given
        self.all.append((x, t, text, named.get("layout"), named.get("clean_BFCHW"), flow))


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


def drawn(run: Run, step: int) -> MicroBatch:
    return Batch.draw(run.context, step, "generator").load(range(4))


@pytest.mark.parametrize(
    ("causal", "guidance", "shift"),
    [(False, 1.0, None), (False, 3.0, 8.0), (True, 1.0, 8.0), (True, 3.0, None)],
)
def test_the_second_point_is_a_step_of_the_teacher(
    causal: bool, guidance: float, shift: float | None, tmp_path: Path
) -> None:
    """From noised clips, with guidance, on the levels of a trajectory."""
    settings = config(
        tmp_path / "run", "consistency", teacher_steps=5, guidance_scale=guidance,
        causal_teacher=causal, chunks=(1,), windows=(3,), teacher_shift=shift,
    )  # fmt: skip
    run = Run(settings, Ranks(0, 1, torch.device("cpu")))
    teacher, student = Calls(run.models.real), Calls(run.models.generator)
    spaced = [1 - i / 5 for i in range(6)]
    by = shift or TINY.shift
    levels = [by * s / (1 + (by - 1) * s) for s in spaced]
    seen: set[int] = set()
    for step in range(8):
        teacher.all, student.all = [], []
        part = drawn(run, step)
        loss = run.objective.learn(part, 1.0)
        clean, noise = part.clean_BFCHW, part.noise("noise")
        assert len(teacher.all) == (1 if guidance == 1 else 2)
        x, t, text, layout, past, flow = teacher.all[-1]
        index = [int((torch.tensor(levels[:5]) - value).abs().argmin()) for value in t / 1000]
        seen |= {*index}
        now = torch.tensor([levels[i] for i in index]).view(-1, 1, 1, 1, 1)
        then = torch.tensor([levels[i + 1] for i in index]).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(t, 1000 * now.flatten())
        torch.testing.assert_close(x, (1 - now) * clean + now * noise)
        want = BlockLayout.causal(4, 1, 4, first=1, window=3, teacher_forcing=True)
        assert (layout, past is clean) == ((want, True) if causal else (None, False))
        assert torch.equal(text, part.text_BTE)
        if guidance != 1:
            against = teacher.all[0]
            assert torch.equal(against[0], x) and not against[2].any()
            flow = against[-1] + guidance * (flow - against[-1])
        target, point = student.all
        torch.testing.assert_close(target[0], x + (then - now) * flow, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target[1], 1000 * then.flatten())
        assert torch.equal(point[0], x) and torch.equal(point[1], t)
        assert all(each[3] == want and each[4] is clean for each in student.all)
        assert point[-1].requires_grad and not target[-1].requires_grad
        apart = (x - now * point[-1]) - (target[0] - then * target[-1])
        assert loss == pytest.approx(apart.square().mean().item(), rel=1e-4)
    assert seen == {0, 1, 2, 3, 4}
