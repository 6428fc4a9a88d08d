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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sfmodel.config import PRESETS, DiTConfig
from sfmodel.dit import DiT
from sfmodel.files import atomic
from sfmodel.process import noting
from sfmodel.schedule import FlowSchedule
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.toy.vae import ToyVAE
from sfmodel.train import parallel
from sfmodel.train.config import TrainConfig
from sfmodel.train.data import Prompts, Source, open_source
from sfmodel.train.discriminator import Discriminator
from sfmodel.train.parallel import Ranks
from sfmodel.train.recipes import Draw, Models, Part, Setting, Update, seed_of
from sfmodel.train.report import Record, Report, means
from sfmodel.train.trajectories import Trajectories, guided, solve
from sfmodel.weights import checkpoint


class Learner:
    """Weights that are learned, of one or several modules, and their optimisers."""

    def __init__(self, modules: dict[str, nn.Module], config: TrainConfig, rate: float) -> None:
        self.config, self.rate = config, rate
        self.whole = nn.ModuleDict(modules)
        self.parameters = [p for p in self.whole.parameters() if p.requires_grad]
        muon, decay = config.optimizer == "muon", config.weight_decay
        models = [module for module in modules.values() if isinstance(module, DiT)]
        blocks = [p for model in models for p in model.blocks.parameters()]
        matrices = {id(p): p for p in blocks if muon and p.dim() == 2}
        others = [p for p in self.parameters if id(p) not in matrices]
        groups = [
            {"params": [p for p in others if p.dim() > 1], "weight_decay": 0.0 if muon else decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=rate, betas=config.betas)
        ]
        if matrices:
            options: Any = {"weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
            self.optimizers.append(torch.optim.Muon([*matrices.values()], lr=rate, **options))

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def norm(self) -> float:
        """Of the gradient, which is cut to config.clip."""
        found = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        return float(found.full_tensor() if hasattr(found, "full_tensor") else found)

    def step(self, share: float) -> None:
        """One update at a share of the peak rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * share
            optimizer.step()

    def forget(self) -> None:
        """Makes the optimisers as they were before the first update."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        return {
            "weights": get_model_state_dict(self.whole),
            "optimizers": get_optimizer_state_dict(self.whole, self.optimizers),
        }

    def restore(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.whole, state["weights"])
        set_optimizer_state_dict(self.whole, self.optimizers, state["optimizers"])


class Run:
    """A run's models, optimisers and folder.

    Raises ValueError for settings, weights or data that do not fit together."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.preset = config, ranks, config.model
        kind = config.kind
        config.check_files()
        if config.optimizer == "muon" and ranks.world > 1:
            raise ValueError("optimizer='muon' runs on one rank: use 'adamw' on several")
        for frames in config.frames:
            self._rows(config.clips(frames))
        toy = config.preset == "toy"
        self.codec = ToyVAE.from_pretrained().to(ranks.device) if toy else None
        self.text = ToyTextEncoder() if toy else None
        self.source: Source = open_source(
            config.data,
            self.preset,
            max(config.frames),
            ToyVAE() if toy else None,
            self.text,
            config.drop_word,
            config.drop_text,
        )
        if kind.needs_clips and not self.source.has_latents:
            raise ValueError(
                f"recipe={config.recipe!r} learns from clips: {config.data} holds prompts alone"
            )
        negative = torch.zeros(1, 1, self.preset.dit.text_dim)
        if config.negative is not None:
            prompts = Prompts(config.negative, self.preset, self.text)
            negative = prompts.draw(0, 1, 1, latents=False).text_BTE
        self.negative = negative.to(ranks.device)
        dark = None
        if self.codec is not None:
            black = torch.full((1, 1, 3, 8, 8), -1.0, device=ranks.device)
            dark = self.codec.encode_chunk(black)[0][0, 0]
        elif config.fade:
            raise ValueError(f"fade={config.fade}: only the toy world has a light")

        generator = self._dit(self.preset.dit, config.init)
        self.average = self._dit(self.preset.dit, None).requires_grad_(False)
        with torch.no_grad():
            for mine, theirs in self._averaged(generator):
                mine.copy_(theirs)
        self.learners = {"generator": Learner({"generator": generator}, config, config.lr)}
        real = critic = head = None
        if config.needs_teacher:
            sizes = PRESETS[config.teacher_preset or config.preset].dit
            real = self._dit(sizes, config.teacher, frozen=True)
        if kind.distils:
            critic = self._dit(self.preset.dit, config.critic or config.teacher)
            learned: dict[str, nn.Module] = {"critic": critic}
            if kind.objective == "gan":
                head = self._place(Discriminator, self.preset.dit)
                critic.head.requires_grad_(False)  # what is read are the blocks before it
                learned["discriminator"] = head
            self.learners["critic"] = Learner(learned, config, config.lr_critic)
        self.models = Models(generator, real, critic, head)
        for model in (generator, real, critic):
            if model is not None:
                # A rollout runs each exit step again as a whole, and every chunk has other shapes.
                rolls = model is generator and kind.context == "own"
                model.recompute = config.recompute and not rolls
                if config.compile and not rolls:
                    model.compile()
        trajectories = Trajectories(config.output / "trajectories", config.pairs)
        self.setting = Setting(
            config, self.models, self.source, trajectories, self.negative, dark, ranks.device
        )
        self.step = 0
        self.seconds = 0.0
        self.of_critic: list[Record] = []  # its updates of the step that is not over
        self.recent: list[Record] = []  # of steps since the last line of the log
        self.asked: Callable[[], bool] = lambda: False  # whether to stop, the same on all ranks

    def _dit(self, sizes: DiTConfig, weights: Path | None, frozen: bool = False) -> DiT:
        """Of a file's weights, or drawn from the run's seed; the same on all ranks. frozen: in the
        dtype of the arithmetic, without gradient."""
        impls = self.config.impl, self.config.attention_impl
        model = self._place(DiT, sizes, *impls, weights=weights, frozen=frozen)
        return model.requires_grad_(not frozen).train(not frozen)

    def _place(
        self, make: Callable[..., Any], *arguments: Any, weights: Path | None = None,
        frozen: bool = False,
    ) -> Any:  # fmt: skip
        state: dict[str, Tensor] = {}
        with torch.device("meta"):
            model = make(*arguments)
        if frozen and self.config.bf16:
            model = model.bfloat16()
        if weights is not None:
            # Every rank looks, so that all of them refuse a file that is not there.
            state, _ = checkpoint.matching(model, weights)
        elif self.ranks.first:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed_of(self.config.seed, make.__name__))
                state = make(*arguments).state_dict()
        return parallel.place(model, state, self.ranks, bf16=self.config.bf16)

    def _rows(self, clips: int) -> list[range]:
        """This rank's micro-batches of a global batch."""
        local, left = divmod(clips, self.ranks.world)
        micro = min(self.config.micro_batch or local, local)
        if left or not local or local % micro:
            raise ValueError(
                f"an update of {clips} clips: must divide into {self.ranks.world} ranks and "
                f"micro_batch={micro}"
            )
        begin = self.ranks.rank * local
        return [range(i, i + micro) for i in range(begin, begin + local, micro)]

    def _averaged(self, generator: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = (parallel.local(model.parameters()) for model in (self.average, generator))
        return zip(*pairs, strict=True)

    def prepare(self, told: Callable[[int], None] = lambda done: None) -> None:
        """What must be there before the first update: the teacher's trajectories."""
        config, real = self.config, self.models.real
        if config.kind.objective != "ode":
            return
        assert real is not None
        (frames,) = config.frames

        def solved(rows: range) -> tuple[Tensor, Tensor]:
            seed = seed_of(config.seed, "trajectories")
            prompts = self.source.draw(
                seed, config.pairs, frames, slice(rows.start, rows.stop), latents=False
            )
            shape = frames, self.preset.dit.channels, self.preset.height, self.preset.width
            noise = Draw(seed, rows, self.ranks.device).normal("noise", *shape)
            text = prompts.text_BTE.to(self.ranks.device)
            flow = guided(real, text, self.negative, config.guidance)
            schedule = FlowSchedule(self.preset.shift)
            with self.autocast():
                return solve(flow, noise, schedule, self.preset.steps, config.teacher_steps), text

        facts = {
            name: config.plain()[name]
                for name in (
                "preset", "teacher", "teacher_preset", "teacher_steps", "guidance", "negative",
                "data", "frames", "pairs", "drop_text", "drop_word", "seed",
            )
        }  # fmt: skip
        self.setting.trajectories.make(solved, facts, self.ranks, told)

    def train_step(self) -> Record:
        """The critic's updates and one of the generator; returns means over the ranks. Raises
        FloatingPointError, with the state before this update saved, where one is not finite, and
        Stopped where it is asked to: called again, also after `resume`, it goes on."""
        config = self.config
        record: Record = {}
        began = time.perf_counter()
        if "critic" in self.learners:
            count = config.critic_steps + (0 if self.step else config.critic_warmup)
            while (i := len(self.of_critic)) < count:
                self.of_critic.append(self._update("critic", f"critic {i}", 1.0))
            record = means(self.of_critic[-config.critic_steps :])
        record |= self._update("generator", "generator", _rate(self.step, config))
        self.of_critic = []
        self.step += 1
        after = self.step - config.ema_start
        decay = min(config.ema, (1 + after) / (10 + after)) if after > 0 else 0.0
        with torch.no_grad():
            for average, value in self._averaged(self.models.generator):
                average.lerp_(value, 1 - decay)
        self.seconds += time.perf_counter() - began
        return record

    def _update(self, which: str, name: str, share: float) -> Record:
        learner = self.learners[which]
        update = Update(self.setting, self.step, name)
        learner.zero_grad()
        rows = self._rows(update.clips)
        loss = 0.0
        with self.autocast():
            for each in rows:
                # An update may take minutes, of which a node that is taken back leaves less.
                if self.asked():
                    learner.zero_grad()
                    raise Stopped
                part = Part(update, each)
                learn = part.learn if which == "generator" else part.learn_critic
                loss += learn(1 / len(rows)) / len(rows)
        norm = learner.norm()
        found = self.ranks.mean({"loss": loss, "norm": norm})
        if not all(map(math.isfinite, found.values())):
            learner.zero_grad()
            where = self.save("failed-")
            raise FloatingPointError(
                f"{which}: loss is {found['loss']}, norm of the gradient {found['norm']} in update "
                f"{self.step + 1}; the state before it is in {where}"
            )
        learner.step(share)
        prefix = "" if which == "generator" else "critic_"
        return {f"{prefix}{key}": value for key, value in found.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.bf16)

    def state(self) -> dict[str, Any]:
        state = {name: learner.state() for name, learner in self.learners.items()}
        return {**state, "average": get_model_state_dict(self.average)}

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

    @property
    def weights(self) -> Path:
        """The file of the averaged weights."""
        return self.config.output / "model.safetensors"

    def _save_weights(self) -> None:
        weights = parallel.full_state(self.average, self.ranks)
        if self.ranks.first:
            extra = {"step": self.step, "recipe": self.config.recipe}
            checkpoint.save(weights, self.weights, self.preset.dit, **extra)

    def _has_weights(self) -> bool:
        """Whether the file of the averaged weights is of this step."""
        try:
            return int(checkpoint.read(self.weights)[1]["step"]) == self.step
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
            was = ", ".join(f"{name}={saved.get(name)!r}" for name in other)
            raise ValueError(f"{found[-1]}: is of a run with {was}: resume with the same settings")
        state = self.state()
        parallel.load(found[-1], state, self.ranks)
        for name, learner in self.learners.items():
            learner.restore(state[name])
        set_model_state_dict(self.average, state["average"])
        self.step, self.seconds = facts["step"], seconds
        self.of_critic, self.recent = of_critic, recent
        if self.step == 0:
            # It has not learned yet. To save its state, PyTorch made its optimisers step.
            self.learners["generator"].forget()
        if self.ranks.any(self.ranks.first and not self._has_weights()):
            self._save_weights()


class Stopped(Exception):
    """An update was left where what the run holds is whole."""


def train(
    config: TrainConfig, *, resume: bool = False, device: torch.device | str | None = None
) -> Path:
    """Runs to `config.steps` with progress, and returns the path of the averaged weights.

    `process.STOPS` stop it before the next micro-batch: it saves what whole updates of generator or
    critic have learned and raises KeyboardInterrupt. Raises ValueError where the folder holds
    another run and `resume` is not set, or another process trains there."""
    if config.threads:
        torch.set_num_threads(config.threads)
    with (
        parallel.started(config.shard, device, config.patience) as ranks,
        parallel.alone(config.output, ranks),
    ):
        return _train(config, resume, ranks)


def _train(config: TrainConfig, resume: bool, ranks: Ranks) -> Path:
    folder = config.output
    if not resume and parallel.checkpoints(folder / "checkpoints"):
        raise ValueError(f"{folder}: holds a run already: resume it or name another folder")
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

        def told(done: int) -> None:
            report.preparing(done)
            if asked():
                raise KeyboardInterrupt  # what is made so far is kept

        if resume and not (run.step or run.of_critic):
            report.say(f"{folder}: holds no checkpoint to resume: a new run")
        run.prepare(told)
        report.began = time.perf_counter()
        run.asked = asked
        report.sample()  # of a run that was killed before it was
        try:
            while run.step < config.steps:
                report.update(run.train_step())
                if run.step == config.steps or run.step % config.save_every == 0:
                    run.save()
                report.sample()
        except Stopped:
            learned = run.step or run.of_critic
            if learned:
                run.save()
            if report.failed is None:
                saved = f"saved in {folder}" if learned else "nothing was learned yet"
                report.say(f"stopped at update {run.step}; {saved}")
                raise KeyboardInterrupt from None
        if report.failed is not None:
            raise report.failed
    return run.weights


def _rate(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at an update."""
    fall = 1.0
    if config.fall:
        fall = min(1.0, (config.steps - step) / (config.fall * config.steps))
    return min(1.0, (step + 1) / max(config.warmup, 1)) * (0.02 + 0.98 * fall)
