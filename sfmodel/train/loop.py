"""The training loop: models, optimisers, the average of the weights, log, samples, checkpoints and
exact resume, on one rank or on many.

Everything random in update n follows from (seed, n), so that a run that is stopped and resumed is
bit for bit the run that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfmodel.dit import DiT
from sfmodel.files import atomic
from sfmodel.pretrained import load_codec
from sfmodel.process import noting
from sfmodel.ranges import phase
from sfmodel.ranks import Ranks, started
from sfmodel.schedule import FlowSchedule
from sfmodel.toy.vae import ToyVAE
from sfmodel.train import parallel
from sfmodel.train.batch import Batch, Draw, TrainContext, seed_of
from sfmodel.train.config import TrainConfig
from sfmodel.train.data import Files, Source, TextEncoder, negative_prompt, open_source
from sfmodel.train.learner import learners
from sfmodel.train.models import Models
from sfmodel.train.report import Record, Report, means
from sfmodel.train.text import KeptText, text_encoder
from sfmodel.train.trajectories import Trajectories, solve
from sfmodel.vae.codec import VideoCodec
from sfmodel.weights import checkpoint
from sfmodel.weights.known import recorded

AHEAD = 64  # prompts that a load of the text encoder is for, at least


class Run:
    """A run's models, optimisers and folder.

    source, models, vae, negative: ready ones, in place of those that config's files and seed give.
    Models lie on the device, on several ranks as `parallel.place` leaves them, and are trained in
    place; negative is the embedding [1, T, E] of the prompt that guidance leads away from. Raises
    ValueError for settings, weights or data that do not fit together."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        *,
        source: Source | None = None,
        models: Models | None = None,
        vae: VideoCodec | None = None,
        negative: Tensor | None = None,
    ) -> None:
        self.config, self.ranks, self.preset = config, ranks, config.model
        self.objective = config.objective
        if models is None:
            config.check_files()
        config.check_ranks(ranks.world)
        toy = config.preset == "toy"
        self.codec = ToyVAE.from_pretrained().to(ranks.device) if toy else None
        self.text = text_encoder(config.preset, ranks.device)
        self.source = source or source_of(config, self.text)
        check_source(config, self.source)
        vae = vae or self.codec
        if vae is None and config.longer:
            vae = load_codec(config.preset, ranks.device, "wan", config.models)
        negative_1TE = self._negative() if negative is None else negative.to(ranks.device)
        dark_CHW = self._dark()
        self.models = models or Models.load(config, ranks)
        self.models.check(config)
        self._prepare_passes()
        self.average = parallel.learned(self.models.generator)
        if config.ema:
            self.average = {name: value.clone() for name, value in self.average.items()}
        self.learners = learners(self.models, config)
        trajectories = Trajectories(config.output / "trajectories", config.pairs)
        self.context = TrainContext(
            config, self.models, self.source, trajectories, negative_1TE, dark_CHW, ranks.device,
            FlowSchedule(self.preset.shift),
            FlowSchedule(config.score_shift or self.preset.shift), vae,
        )  # fmt: skip
        self.step = 0
        self.encoded = 0  # the first step whose prompts are not encoded ahead
        self.seconds = 0.0
        self.of_critic: list[Record] = []  # its updates of the step that is not over
        self.recent: list[Record] = []  # of steps since the last line of the log
        self.asked: Callable[[], bool] = lambda: False  # whether to stop, the same on all ranks

    def _negative(self) -> Tensor:
        """Embedding [1, T, E] of the prompt that guidance leads away from; zeros without it. That
        of no words is the end token's for Wan2.1, and zeros in the toy world."""
        text_1TE = torch.zeros(1, 1, self.preset.dit.text_dim)
        if self.config.guided:
            text_1TE = negative_prompt(self.config.negative or "", self.preset, self.text)
        return text_1TE.to(self.ranks.device)

    def _dark(self) -> Tensor | None:
        """Latents [C, H, W] of the toy world without light."""
        if self.codec is None:
            return None
        black = torch.full((1, 1, 3, 8, 8), -1.0, device=self.ranks.device)
        return self.codec.encode_chunk(black)[0][0, 0]

    def _prepare_passes(self) -> None:
        """Recomputes and compiles, where settings say so, all models that see whole clips: a
        rollout runs each exit step again as a whole, and each of its chunks has other shapes."""
        for name, model in self.models._asdict().items():
            if isinstance(model, DiT):
                whole = name != "generator" or self.objective.context != "own"
                model.recompute = self.config.recompute and whole
                if self.config.compile and whole:
                    model.compile()

    def _split(self, clips: int) -> list[range]:
        """This rank's micro-batches of a global batch."""
        local, micro = self.config.split(clips, self.ranks.world)
        begin = self.ranks.rank * local
        return [range(i, i + micro) for i in range(begin, begin + local, micro)]

    def prepare(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Makes what must be there before the first update: the teacher's trajectories."""
        if not self.objective.needs_trajectories:
            return
        config = self.config
        facts = {
            name: config.plain()[name]
            for name in (
                "preset", "teacher", "teacher_preset", "teacher_steps", "teacher_shift",
                "guidance_scale", "negative", "data", "frames", "pairs", "drop_text", "drop_word",
                "seed",
            )
        }  # fmt: skip
        if config.denoising_steps is not None:  # trajectories of the preset's do without
            facts["denoising_steps"] = config.denoising_steps
        self.context.trajectories.make(self._solve, facts, self.ranks, progress)

    def _solve(self, samples: range) -> tuple[Tensor, Tensor]:
        """Points [B, S + 1, F, C, H, W] and text [B, T, E] of some trajectories of the teacher."""
        config, preset, real = self.config, self.preset, self.models.real
        assert real is not None
        (frames,) = config.frames
        seed = seed_of(config.seed, "trajectories")
        prompts = self.source.draw(
            seed, config.pairs, frames, slice(samples.start, samples.stop), latents=False
        )
        shape = frames, preset.dit.channels, preset.height, preset.width
        noise = Draw(seed, samples, self.ranks.device).normal("noise", *shape)
        text = prompts.text_BTE.to(self.ranks.device)
        with self.autocast():
            points = solve(
                lambda x, t: real(x, t, text), noise, self.context.schedule, preset.steps,
                config.teacher_steps, shift=config.teacher_shift, guidance=config.guidance_scale,
                unprompted=lambda x, t: real(x, t, self.context.negative_1TE),
            )  # fmt: skip
        return points, text

    def _encode_ahead(self) -> None:
        """Has this rank's prompts of this step and the next ones, AHEAD or more, encoded by one
        load of the text encoder, where they are sentences at full size."""
        ready = self.step < self.encoded or self.objective.needs_trajectories
        if ready or not isinstance(self.source, Files) or not isinstance(self.text, KeptText):
            return
        draws, count, self.encoded = [], 0, self.step
        while count < AHEAD and self.encoded < self.config.steps:
            names = [f"critic {i}" for i in range(self.config.critic_updates(self.encoded))]
            for name in (*names, "generator"):
                batch = Batch.draw(self.context, self.encoded, name)
                mine = self._split(batch.clips)
                draws.append(batch.rows(range(mine[0].start, mine[-1].stop)))
                count += mine[-1].stop - mine[0].start
            self.encoded += 1
        self.source.encode_ahead(draws)

    def train_step(self) -> Record:
        """The critic's updates and one of the generator; returns means over the ranks. Raises
        FloatingPointError before an update that is not finite, and Stopped where it is asked to:
        called again, also after `resume`, it goes on."""
        config = self.config
        record: Record = {}
        began = time.perf_counter()
        self._encode_ahead()
        if count := config.critic_updates(self.step):
            learner = self.learners["critic"]
            alone = 0 if self.step else config.discriminator_warmup
            while (i := len(self.of_critic)) < count:
                learner.only("discriminator" if i < alone else None)
                if alone and i == alone:
                    learner.forget()
                batch = Batch.draw(self.context, self.step, f"critic {i}")
                self.of_critic.append(self.update("critic", batch))
            record = means(self.of_critic[-config.critic_steps :])
        batch = Batch.draw(self.context, self.step, "generator")
        record |= self.update("generator", batch, _rate(self.step, config))
        self.of_critic = []
        self.step += 1
        if config.ema:
            decay = config.ema if self.step > config.ema_start else 0.0
            both = self.average, parallel.learned(self.models.generator)
            parts = (parallel.local(each.values()) for each in both)
            for mine, theirs in zip(*parts, strict=True):
                mine.lerp_(theirs, 1 - decay)
        self.seconds += time.perf_counter() - began
        return record

    def update(self, which: str, batch: Batch, rate: float = 1.0) -> Record:
        """One update of "generator" or "critic" on a global batch, at a share of the peak learning
        rate; returns its loss and the norm of its gradient. Raises as `train_step`."""
        learner, micro_batches = self.learners[which], self._split(batch.clips)
        learn = self.objective.learn if which == "generator" else self.objective.learn_critic
        share, loss = 1 / len(micro_batches), 0.0
        learner.zero_grad()
        with self.autocast():
            for samples in micro_batches:
                # An update may take minutes, of which a node that is taken back leaves less.
                if self.asked():
                    learner.zero_grad()
                    raise Stopped
                loss += learn(batch.load(samples), share) * share
        with phase("optimiser"):
            found = self.ranks.mean({"loss": loss, "norm": learner.norm()})
        if not all(map(math.isfinite, found.values())):
            learner.zero_grad()
            raise FloatingPointError(
                f"{which}: loss is {found['loss']}, norm of the gradient {found['norm']} in update "
                f"{self.step + 1}"
            )
        with phase("optimiser"):
            learner.step(rate)
        prefix = "" if which == "generator" else "critic_"
        return {f"{prefix}{key}": value for key, value in found.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.bf16)

    def state(self) -> dict[str, Any]:
        state = {name: learner.state() for name, learner in self.learners.items()}
        return {**state, "average": self.average}

    def save(self, prefix: str = "") -> Path:
        """A checkpoint of everything that a resumed run needs, and, unless it has a prefix, the
        averaged weights."""
        facts = {
            "config": self.config.plain(),
            "seconds": self.seconds,
            "ranks": self.ranks.world,
            "critic": self.of_critic,
            "recent": self.recent,
        }
        folder = self.config.output / "checkpoints"
        path = parallel.save(folder, self.step, self.state(), facts, self.ranks, prefix)
        if not prefix:
            self._save_weights()
        return path

    def averaged_weights(self) -> dict[str, Tensor]:
        """Averaged weights of the generator, a LoRA merged into them, on the first rank's CPU."""
        state = self.models.generator.state_dict() | self.average
        whole = parallel.full_state(state, self.ranks)
        return self.config.lora.merged(whole) if self.config.lora else whole

    def _save_weights(self) -> None:
        weights, lora = self.averaged_weights(), self.config.lora
        learned = parallel.full_state(self.average, self.ranks) if lora is not None else {}
        if self.ranks.first:
            if lora is not None:
                lora.save(self.config.output / "lora", learned)
            extra = {"step": self.step, "recipe": self.config.recipe}
            if self.objective.context != "whole":
                extra |= recorded(self.config.preset, self.preset)
            checkpoint.save(weights, self.config.weights, self.preset.dit, **extra)

    def _has_weights(self) -> bool:
        """Tells whether the file of the averaged weights is of this step."""
        try:
            return int(checkpoint.read(self.config.weights)[1]["step"]) == self.step
        except (ValueError, KeyError, TypeError, OSError):
            return False

    def resume(self) -> None:
        """Continues from the newest checkpoint of the run's folder, with its weights in their file
        if a kill came between the two; without one from the beginning. Raises ValueError where it
        is damaged or of a run of other settings."""
        found = parallel.checkpoints(self.config.output / "checkpoints")
        if not found:
            return
        facts = parallel.facts(found[-1])
        try:
            saved, seconds = {**facts["config"]}, float(facts["seconds"])
            of_critic, recent = (
                [
                    {key: float(value) for key, value in record.items()}
                    for record in facts.get(name, [])
                ]
                for name in ("critic", "recent")
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise parallel.damaged(found[-1], error) from None
        if other := self.config.differing(saved):
            was = ", ".join(f"{name}={value!r}" for name, value in other.items())
            raise ValueError(f"{found[-1]}: is of a run with {was}: resume with the same settings")
        if changes := self.config.changed(saved):
            raise ValueError(
                f"{found[-1]}: is of an earlier version ({'; '.join(changes)}): resume it with "
                "that one"
            )
        if facts["step"] > self.config.steps:
            raise ValueError(
                f"{found[-1]}: has {facts['step']} updates already: steps={self.config.steps} must "
                "be at least as many"
            )
        state = self.state()
        parallel.load(found[-1], state, self.ranks)
        for name, learner in self.learners.items():
            learner.restore(state[name])
        self.step, self.seconds = facts["step"], seconds
        self.of_critic, self.recent = of_critic, recent
        if self.step == 0:
            # It has not learned yet. To save its state, PyTorch made its optimisers step.
            self.learners["generator"].forget()
        if self.ranks.any(self.ranks.first and not self._has_weights()):
            self._save_weights()


def source_of(config: TrainConfig, text: TextEncoder | None) -> Source:
    """The run's data. Raises ValueError where there are none."""
    return open_source(
        config.data, config.model, max(config.frames), ToyVAE() if config.preset == "toy" else None,
        text, config.drop_word, config.drop_text,
    )  # fmt: skip


def check_source(config: TrainConfig, source: Source) -> None:
    """Raises ValueError for prompts alone where clips are learned from."""
    if config.needs_clips and not source.has_latents:
        raise ValueError(
            f"recipe={config.recipe!r} learns from clips: {config.data} holds prompts alone"
        )


class Stopped(Exception):
    """Signal that an update was left where what the run holds is whole."""


@contextmanager
def reproducible(device: torch.device, wanted: bool) -> Iterator[None]:
    """Context in which PyTorch, and attention with it, takes kernels that give the same bits in
    every run on a GPU, and warns where it has none; on a CPU all are such. Not measured on a GPU
    yet."""
    if device.type != "cuda" or not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # which takes time, for debugging
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        settings.fill_uninitialized_memory = filled


def train(
    config: TrainConfig, *, resume: bool = False, device: torch.device | str | None = None
) -> Path:
    """Runs to `config.steps` with progress, and returns the path of the averaged weights.

    `process.STOPS` stop it before the next micro-batch: it saves what whole updates of generator or
    critic have learned and raises KeyboardInterrupt. Raises FloatingPointError, with the state
    before it saved, for an update that is not finite, and ValueError where the folder holds
    another run and `resume` is not set, or another process trains there."""
    if config.threads:
        torch.set_num_threads(config.threads)
    with (
        started(config.shard, device, config.patience) as ranks,
        reproducible(ranks.device, config.deterministic),
        parallel.alone(config.output, ranks),
    ):
        return _train(config, resume, ranks)


def _train(config: TrainConfig, resume: bool, ranks: Ranks) -> Path:
    folder = config.output
    if not resume and parallel.checkpoints(folder / "checkpoints"):
        raise ValueError(
            f"{folder}: holds a run already: resume it (--resume) or name another --output"
        )
    ranks.wait()
    run = Run(config, ranks)
    if resume:
        run.resume()
    if ranks.first:
        with atomic(folder / "config.json") as part:
            part.write_text(json.dumps(config.plain(), indent=1) + "\n")
    with Report(run) as report, noting() as signals:

        def asked() -> bool:
            return ranks.any(bool(signals) or report.failed is not None)

        def progress(done: int) -> None:
            report.preparing(done)
            if asked():
                raise KeyboardInterrupt  # what is made so far is kept

        if resume and not (run.step or run.of_critic):
            report.say(f"{folder}: holds no checkpoint to resume: a new run")
        run.prepare(progress)
        report.began = time.perf_counter()
        run.asked = asked
        report.sample()  # of a run that was killed before it was
        try:
            while run.step < config.steps:
                report.update(run.train_step())
                if run.step == config.steps or run.step % config.save_every == 0:
                    run.save()
                report.sample()
        except FloatingPointError as error:
            where = run.save("failed-")
            raise FloatingPointError(f"{error}; the state before it is in {where}") from None
        except Stopped:
            learned = run.step or run.of_critic
            if learned:
                run.save()
            if report.failed is None:
                saved = f"saved in {folder}" if learned else "nothing was learned yet"
                report.say(f"stopped at update {run.step}; {saved}; --resume goes on")
                raise KeyboardInterrupt from None
        if report.failed is not None:
            raise report.failed
    return config.weights


def _rate(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at an update."""
    decay = 1.0
    if config.decay_fraction:
        decay = min(1.0, (config.steps - step) / (config.decay_fraction * config.steps))
    return min(1.0, (step + 1) / max(config.warmup, 1)) * (0.02 + 0.98 * decay)
