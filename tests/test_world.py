"""The toy world: what is drawn is what was meant, and what is measured is what was drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sfmodel.toy import world


@pytest.fixture(scope="module")
def sample() -> world.Sample:
    return world.sample(32, 33, seed=5)


@pytest.fixture(scope="module")
def measured(sample: world.Sample) -> world.Measurement:
    return world.measure(sample.pixels_BTCHW)


def blur(pixels_BTCHW: Tensor, size: int, rounds: int = 2) -> Tensor:
    pixels_NCHW = pixels_BTCHW.flatten(0, 1) + 1
    for _ in range(rounds):
        pixels_NCHW = F.avg_pool2d(pixels_NCHW, size, stride=1, padding=size // 2)
    return pixels_NCHW.view_as(pixels_BTCHW) - 1


def test_pixels_are_dark_but_for_a_ball_inside_the_box(sample: world.Sample) -> None:
    pixels_BTCHW, truth, sentences = sample
    assert pixels_BTCHW.shape == (32, 33, 3, 64, 64)
    assert pixels_BTCHW.dtype == torch.float32
    assert pixels_BTCHW.min() == -1
    assert pixels_BTCHW.max() <= 1
    assert len(sentences) == 32
    radius_B11 = truth.radius_B[:, None, None]
    assert (truth.position_BT2 >= radius_B11 - 1e-4).all()
    assert (truth.position_BT2 <= 64 - radius_B11 + 1e-4).all()
    area_B = math.pi * truth.radius_B.square()
    torch.testing.assert_close(
        world.coverage(truth).sum((2, 3)), area_B[:, None].expand(-1, 33), rtol=0.01, atol=0
    )


def test_measured_position_size_and_colour_are_the_truth(
    sample: world.Sample, measured: world.Measurement
) -> None:
    truth = sample.truth
    assert (measured.position_BT2 - truth.position_BT2).norm(dim=-1).max() < 0.05
    assert (measured.radius_BT - truth.radius_B[:, None]).abs().max() < 0.1
    assert (measured.rgb_BT3 - truth.rgb_B3[:, None]).abs().max() < 1e-3
    assert (measured.brightness_BT - truth.brightness_B[:, None]).abs().max() < 1e-3
    assert (measured.colour_BT == truth.colour_B[:, None]).all()
    assert measured.clean_BT.all()


def test_measured_movement_is_uniform_away_from_the_walls(
    sample: world.Sample, measured: world.Measurement
) -> None:
    free_BT, speed_BT = measured.free_BT, measured.velocity_BT2[:, :-1].norm(dim=-1)
    assert 0.4 < free_BT.float().mean() < 0.9
    assert measured.acceleration_BT2.norm(dim=-1)[free_BT].max() < 0.15
    assert (speed_BT - sample.truth.speed_B[:, None])[free_BT].abs().max() < 0.1


def test_bounces_are_elastic_reflections() -> None:
    """Against a ball moved in small steps, whose velocity changes sign at the walls."""
    radius_B, parts = torch.tensor([8.0, 14.0], dtype=torch.float64), 8
    start_B2 = torch.tensor([[10.0, 50.0], [15.0, 14.5]], dtype=torch.float64)
    step_B2 = torch.tensor([[-2.0, 1.25], [2.5, -0.5]], dtype=torch.float64)
    position_BT2 = world.bounce(start_B2, step_B2, radius_B, frames=80)
    now_B2, velocity_B2, bounces = start_B2.clone(), step_B2 / parts, 0
    for t in range(80):
        torch.testing.assert_close(position_BT2[:, t], now_B2, rtol=0, atol=1e-9)
        for _ in range(parts):
            now_B2 = now_B2 + velocity_B2
            # Where it would be beyond a wall, it is as far inside, going back.
            for wall_B1, side in ((radius_B[:, None], 1), (64 - radius_B[:, None], -1)):
                beyond_B2 = (now_B2 - wall_B1) * side < 0
                now_B2 = torch.where(beyond_B2, 2 * wall_B1 - now_B2, now_B2)
                velocity_B2 = torch.where(beyond_B2, -velocity_B2, velocity_B2)
                bounces += int(beyond_B2.sum())
    assert bounces > 10


def test_no_bounce_in_the_first_frames() -> None:
    truth = world.draw(500, world.FREE_FRAMES + 1, seed=1)
    velocity_BT2 = truth.position_BT2.diff(dim=1)
    assert (velocity_BT2 - velocity_BT2[:, :1]).abs().max() < 1e-4


def test_a_seed_gives_one_video_however_long() -> None:
    first, again = world.sample(3, 5, seed=7), world.sample(3, 5, seed=7)
    assert torch.equal(first.pixels_BTCHW, again.pixels_BTCHW)
    assert first.sentences == again.sentences
    longer, other = world.sample(3, 9, seed=7), world.sample(3, 5, seed=8)
    assert torch.equal(first.pixels_BTCHW, longer.pixels_BTCHW[:, :5])
    assert not torch.equal(first.pixels_BTCHW, other.pixels_BTCHW)
    generator = torch.Generator().manual_seed(7)
    from_generator, next_one = (world.sample(3, 5, generator) for _ in range(2))
    assert torch.equal(first.pixels_BTCHW, from_generator.pixels_BTCHW)
    assert not torch.equal(first.pixels_BTCHW, next_one.pixels_BTCHW)


def test_sentences_are_true_to_the_pixels(
    sample: world.Sample, measured: world.Measurement
) -> None:
    move_B2 = measured.position_BT2[:, world.FREE_FRAMES] - measured.position_BT2[:, 0]
    for b, sentence in enumerate(sample.sentences):
        words = (
            world.bucket(world.RADIUS, float(measured.radius_BT[b, 0])),
            world.bucket(world.BRIGHTNESS, float(measured.brightness_BT[b, 0])),
            list(world.COLOURS)[int(measured.colour_BT[b, 0])],
            "ball moves",
            # Vertical before horizontal; up is towards smaller y.
            _direction(*move_B2[b].tolist()),
            world.bucket(world.SPEED, float(move_B2[b].norm()) / world.FREE_FRAMES),
        )
        assert sentence == " ".join(("a", *words))


def _direction(x: float, y: float) -> str:
    diagonal = math.tan(math.pi / 8)
    vertical = ("down" if y > 0 else "up") if abs(y) > diagonal * abs(x) else ""
    horizontal = ("right" if x > 0 else "left") if abs(x) > diagonal * abs(y) else ""
    return " and ".join(filter(None, (vertical, horizontal)))


def test_words_are_dropped_as_often_as_asked() -> None:
    truth = world.draw(4000, 1, seed=2)
    assert set(world.sentences(truth, drop=1.0)) == {"a ball"}
    assert set(world.sentences(truth, empty=1.0)) == {""}
    full = world.sentences(truth)
    some = world.sentences(truth, 3, drop=0.3, empty=0.1)
    assert some == world.sentences(truth, 3, drop=0.3, empty=0.1)
    assert some != world.sentences(truth, 4, drop=0.3, empty=0.1)
    said = [s.split() for s in some if s]
    assert 0.08 < 1 - len(said) / 4000 < 0.12
    for words in (world.RADIUS, world.BRIGHTNESS, world.COLOURS, world.SPEED):
        share = sum(any(w in s for w in words) for s in said) / len(said)
        assert 0.66 < share < 0.74
    for short, long in zip(some, full, strict=True):
        assert set(short.split()) <= set(long.split())
        assert ("moves" in short) == (short.split()[-1:] not in ([], ["ball"]))


def test_every_kind_of_ball_is_drawn() -> None:
    truth = world.draw(4000, 1, seed=3)
    assert truth.colour_B.bincount().min() > 4000 / len(world.COLOURS) * 0.8
    sectors_B = (truth.angle_B / (math.pi / 4)).round().long() % 8
    assert sectors_B.bincount().min() > 4000 / 8 * 0.8
    for value_B, buckets in (
        (truth.radius_B, world.RADIUS),
        (truth.brightness_B, world.BRIGHTNESS),
        (truth.speed_B, world.SPEED),
    ):
        inside_B = torch.zeros(4000, dtype=torch.bool)
        for low, high in buckets.values():
            here_B = (value_B > low - 1e-6) & (value_B < high + 1e-6)
            inside_B |= here_B
            assert 0.45 < here_B.float().mean() < 0.55
            assert value_B[here_B].mean() == pytest.approx((low + high) / 2, rel=0.02)
        assert inside_B.all()


def test_an_empty_frame_is_not_a_ball(sample: world.Sample) -> None:
    noise = 0.01 * torch.randn(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for pixels in (torch.full_like(noise, -1.0), noise - 1):
        measured = world.measure(pixels)
        assert not measured.clean_BT.any()
    nothing = world.measure(torch.full_like(noise, -1.0))
    assert nothing.position_BT2.isnan().all()
    assert nothing.radius_BT.isnan().all()
    assert (nothing.colour_BT == -1).all()


def test_two_balls_and_ghosts_are_not_one_ball(sample: world.Sample) -> None:
    one = sample.pixels_BTCHW[:, :1] + 1
    # The same ball in the opposite place, where that is far enough not to be the same.
    other = one.flip(3, 4)
    far_B = (sample.truth.position_BT2[:, 0] - 32).norm(dim=1) > sample.truth.radius_B * 0.7
    assert far_B.sum() > 8
    for share in (1.0, 0.1):
        pixels = torch.maximum(one, share * other)[far_B] - 1
        assert not world.measure(pixels).clean_BT.any()


def test_blur_is_measured_and_much_of_it_is_not_clean(
    sample: world.Sample, measured: world.Measurement
) -> None:
    pixels, truth = sample.pixels_BTCHW[:, :3], sample.truth
    slightly, strongly = world.measure(blur(pixels, 3)), world.measure(blur(pixels, 9))
    assert slightly.clean_BT.all()
    assert (slightly.position_BT2 - truth.position_BT2[:, :3]).norm(dim=-1).max() < 0.15
    assert (slightly.radius_BT - truth.radius_B[:, None]).abs().max() < 0.3
    assert (slightly.colour_BT == truth.colour_B[:, None]).all()
    assert (slightly.edge_BT > measured.edge_BT[:, :3] + 0.02).all()
    assert not strongly.clean_BT.any()


def test_an_oval_and_a_ring_are_not_clean() -> None:
    y_HW, x_HW = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    disc = x_HW.square() + y_HW.square() < 12**2
    oval = (x_HW / 12).square() + (y_HW / 8.5).square() < 1
    ring = disc & (x_HW.square() + y_HW.square() > 3.5**2)
    shapes_THW = torch.stack([disc, oval, ring]).float()
    pixels = 2 * shapes_THW[None, :, None].expand(1, 3, 3, 64, 64) - 1
    assert world.measure(pixels).clean_BT.tolist() == [[True, False, False]]


def test_a_jump_and_a_curve_show_as_acceleration() -> None:
    truth = world.draw(1, 9, seed=11)
    straight = torch.arange(9.0)[None, :, None] * torch.tensor([1.0, 0.0]) + 28
    for change in ({5: 3.0}, {t: 0.25 * t * t for t in range(9)}):
        position = straight.clone()
        for t, y in change.items():
            position[0, t, 1] += y - 6
        pixels = world.render(replace(truth, position_BT2=position, radius_B=torch.tensor([7.0])))
        measured = world.measure(pixels)
        assert measured.acceleration_BT2.norm(dim=-1)[measured.free_BT].max() > 0.4


def test_bad_arguments_are_refused() -> None:
    for batch, frames in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            world.sample(batch, frames, seed=0)
    truth = world.draw(1, 1, seed=0)
    with pytest.raises(ValueError, match=r"drop=1\.5"):
        world.sentences(truth, drop=1.5)
    with pytest.raises(ValueError, match=r"empty=-1"):
        world.sentences(truth, empty=-1)
    for shape in ((1, 3, 64, 64), (1, 1, 1, 64, 64), (1, 1, 3, 32, 64)):
        with pytest.raises(ValueError, match=r"must be \[B, T, 3, 64, 64\]"):
            world.measure(torch.zeros(shape))
