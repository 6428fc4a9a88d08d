"""The stream: video from a few-step causal model, chunk by chunk through the ring cache, frames out
as they are ready (arXiv 2506.08009, algorithm 2).

Shapes: B samples, F latent frames of a chunk, T pixel frames, C channels, h×w latents, H×W pixels,
E text dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sfkernels import Noise, euler_step, normal, sampler_step
from sfkernels.arguments import check_shape
from sfkernels.attention import differs_when_full
from sfmodel.config import Preset, check_seed
from sfmodel.dit import DiT
from sfmodel.frames import FrameStream, Run, copy_all
from sfmodel.ranges import phase
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule
from sfmodel.vae.codec import VideoDecoder

PROMPT, NOISE, STEP, UPDATE = "prompt keys and values", "noise", "step ", "cache update"
MERGED = f"{STEP}1 and {UPDATE}"


def few_step(
    flow: Tensor,
    x: Tensor,
    i: int,
    sigmas: Sequence[Tensor] | Tensor,
    renoise: Callable[[int], Tensor | Noise],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Step i of a few-step sampler: from the flow [B, F, C, h, w] at x, x0, and x at the σ of step
    i + 1 with fresh noise, `renoise(i + 1)`; after the last of the falling `sigmas` both are x0."""
    following = () if i + 1 == len(sigmas) else (sigmas[i + 1], renoise(i + 1))
    return sampler_step(x, flow, sigmas[i], *following, impl=impl)


def check_euler(steps: int) -> None:
    """Raises ValueError for a number of Euler steps that the schedule does not have; 0 is none."""
    if not 0 <= steps <= TRAIN_STEPS:
        raise ValueError(f"euler={steps}: must be 0 to {TRAIN_STEPS} steps")


class Stream(FrameStream):
    """A model's stream, eager or in CUDA graphs, one for each phase of a chunk: noise, the steps,
    decoding, the copy to host memory. The first step of a chunk runs in one pass with the cache
    update of the chunk before, which leaves the clean keys and values of that in the cache: its
    frames are out by then.

    Each phase works on tensors that stay where they are; what changes from chunk to chunk, the
    place in the ring and with it the noise, is read on the device. What is the same for all passes
    is computed once: for good the modulations, for a prompt its keys and values, for a chunk its
    place. A clip's first decoding and the copy are never part of a graph. `sfmodel.ranges.timed`
    times the phases.

    codec: None for latents alone. text [1 or batch, T, E]: prompt embeddings. preset: sizes,
    chunks, window, sink, steps. Sample b is the video of seed + b, the same on any device, in any
    batch and by any implementation, up to rounding. euler: so many equal Euler steps, for models
    that are not distilled, instead of the preset's few steps with fresh noise in between. graph:
    phases become CUDA graphs now, which takes seconds; not measured on a GPU yet. merge: False runs
    the cache update as a pass of its own, which gives the same video up to rounding. low_latency:
    the latent frames of a chunk are decoded one by one, so that the first ones leave earlier.
    noise: `noise(i)` gives the next chunk's initial noise (i = 0) and the fresh noise before step
    i, without graphs; None draws it from the seed.

    notes: why a phase is no graph, where that was asked for. Raises ValueError where sizes do not
    fit together and MemoryError where the cache does not fit.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: DiT,
        codec: VideoDecoder | None,
        text_BTE: Tensor,
        preset: Preset,
        *,
        seed: int = 0,
        batch: int = 1,
        euler: int = 0,
        graph: bool = False,
        merge: bool = True,
        low_latency: bool = False,
        noise: Callable[[int], Tensor | Noise] | None = None,
    ) -> None:
        check_seed(seed, batch)
        check_euler(euler)
        if text_BTE.dim() != 3 or len(text_BTE) not in (1, batch):
            raise ValueError(
                f"text has shape {[*text_BTE.shape]}: must be [1, T, {model.config.text_dim}], or "
                f"have a prompt for each of the batch of {batch}"
            )
        self.model, self.euler, self.merge, self.noise = model, euler, merge, noise
        if graph and noise is not None:
            raise ValueError("noise: CUDA graphs call no function again, give it without graph")
        steps = (
            [round(TRAIN_STEPS * (1 - i / euler)) for i in range(euler)] if euler else preset.steps
        )
        schedule, device = FlowSchedule(preset.check().shift), model.device
        t = schedule.warp(steps).to(device)
        self.sigmas = [*schedule.sigma(t)]
        self.modulations = [model.modulation(one) for one in t]
        self.clean = model.modulation(torch.zeros((), device=device))
        self.cache = model.new_cache(batch, preset.window, preset.grid, preset.sink)
        self.seed_B = torch.arange(seed, seed + batch, device=device)
        text_size = len(text_BTE), model.config.text_len, model.config.text_dim
        self.text_BTE = torch.zeros(text_size, device=device)
        super().__init__(codec, preset, batch, device, graph, low_latency)
        sizes = self.latents_BFCHW.keys()
        # By a chunk's size: what is being denoised, and the place in the ring.
        self.x = {frames: torch.zeros_like(x) for frames, x in self.latents_BFCHW.items()}
        self.places = {frames: model.place(self.cache, frames, preset.grid) for frames in sizes}
        self._set_text = self.launch(lambda: model.set_text(self.cache, self.text_BTE))
        # By a chunk's size and that of the chunk before it, whose cache update is merged with its
        # first step (0: none is): what this step sees, which graphs read by address.
        first = self.modulations[0]
        self.firsts = {(frames, 0): ([self.places[frames]], first) for frames in sizes}
        for before in sizes if merge else ():
            places = [pytree.tree_map(torch.clone, self.places[before]), self.places[preset.chunk]]
            modulation = first.behind(self.clean, before, preset.chunk)
            self.firsts[preset.chunk, before] = places, modulation
        # Some attention computes otherwise once the ring is full, which the host knows.
        fullness = [False] + [True] * differs_when_full(model.attention_impl, device)
        self.can_be_full = len(fullness) > 1
        self.draws = {key: self._draw(*key) for key in self.firsts}
        self.begin = {(*key, full): self._begin(*key, full)
                      for key in self.firsts for full in fullness}  # fmt: skip
        self.steps = {(frames, full): self._steps(frames, full)
                      for frames in sizes for full in fullness}  # fmt: skip
        self.updates = {frames: self._update(frames) for frames in sizes}
        self.restart(text_BTE, seed)

    def _draw(self, frames: int, before: int) -> Run:
        """Place and initial noise of a chunk, behind one of `before` frames whose cache update is
        merged with its first step; 0: behind none."""
        model, x, (places, _) = self.model, self.x[frames], self.firsts[frames, before]

        def draw() -> None:
            if before:
                copy_all(places[0], self.places[before])
            copy_all(places[-1], model.place(self.cache, frames, self.preset.grid, before))
            noise = self._noise(frames, 0)
            x.copy_(noise if isinstance(noise, Tensor) else normal(noise, x.shape, impl=model.impl))

        return self.launch(draw)

    def _begin(self, frames: int, before: int, full: bool) -> Run:
        """The first step of a chunk; before: as of `_draw`."""
        model, cache, (places, modulation) = self.model, self.cache, self.firsts[frames, before]
        x, clean = self.x[frames], self.latents_BFCHW[before] if before else None

        def step() -> None:
            flow = model(x, modulation, None, clean_BFCHW=clean, cache=cache, places=places,
                         full=full)  # fmt: skip
            self._advance(frames, 0, flow)
            if before:
                cache.commit(before)

        return self.launch(step)

    def _steps(self, frames: int, full: bool) -> dict[str, Run]:
        """The steps of a chunk after the first one."""
        model, x, places = self.model, self.x[frames], [self.places[frames]]

        def step(i: int) -> None:
            modulation = self.modulations[i]
            flow = model(x, modulation, None, cache=self.cache, places=places, full=full)
            self._advance(frames, i, flow)

        later = range(1, len(self.sigmas))
        return {f"{STEP}{i + 1}": self.launch(functools.partial(step, i)) for i in later}

    def _update(self, frames: int) -> Run:
        model, cache, latents = self.model, self.cache, self.latents_BFCHW[frames]

        def update() -> None:
            model.append(latents, self.clean, None, cache=cache)
            cache.commit(frames)

        return self.launch(update)

    def _noise(self, frames: int, i: int) -> Tensor | Noise:
        if self.noise is not None:
            return self.noise(i)
        return Noise(self.seed_B, self.places[frames].chunk.frame_F, i)

    def _advance(self, frames: int, i: int, flow_BFCHW: Tensor) -> None:
        """Step i of the sampler: x, or after the last one the chunk's latents."""
        x, last, impl = self.x[frames], i + 1 == len(self.sigmas), self.model.impl
        if self.euler:
            after = torch.zeros_like(self.sigmas[0]) if last else self.sigmas[i + 1]
            out = euler_step(x, flow_BFCHW, self.sigmas[i], after, impl=impl)
        else:
            renoise = functools.partial(self._noise, frames)
            out = few_step(flow_BFCHW, x, i, self.sigmas, renoise, impl)[1]
        (self.latents_BFCHW[frames] if last else x).copy_(out)

    def launch(self, run: Run, pool: str = "") -> Run:
        """As `FrameStream.launch`; what a run moves, the place in the ring, is put back."""
        start = self.cache.start.clone()
        launched = super().launch(run, pool)
        self.cache.start.copy_(start)
        return launched

    @torch.no_grad()
    def restart(self, text_BTE: Tensor | None = None, seed: int | None = None) -> None:
        """Goes back to before the first chunk, of another prompt [as many as before, T, E] or of
        another seed where one is given. Raises ValueError for a prompt that does not fit."""
        if seed is not None:
            check_seed(seed, self.batch)
        if text_BTE is not None:
            prompts, rows, channels = self.text_BTE.shape
            check_shape("text", text_BTE, (prompts, "T", channels))
            if text_BTE.shape[1] > rows:
                raise ValueError(f"text has {text_BTE.shape[1]} rows: must be at most {rows}")
            self.text_BTE.zero_()[:, : text_BTE.shape[1]].copy_(text_BTE)
            self.set_text()
        if seed is not None:
            self.seed_B.copy_(torch.arange(seed, seed + self.batch))
        self.cache.reset()
        super().restart()
        self.pending = 0  # frames of the one that is there, while its cache update is to come
        self.past = 0  # frames that are past

    @torch.no_grad()
    def set_text(self) -> None:
        """Computes the keys and values of the prompt that lies in `text_BTE`."""
        with phase(PROMPT):
            self._set_text()

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """The next chunk's clean latents x0 [B, F, C, h, w] in float32, after the cache update of
        the one before, in memory that the next one overwrites."""
        self.finish_decoding()
        if self.pending and not self.merge:
            self.update()
        before, self.size = self.pending, self.next
        seen = self.past + (before or self.size)  # by the first chunk of the first pass
        runs = {
            NOISE: self.draws[self.size, before],
            MERGED if before else f"{STEP}1": self.begin[self.size, before, self._full(seen)],
            **self.steps[self.size, self._full(self.past + before + self.size)],
        }
        for i, (name, run) in enumerate(runs.items(), 1):
            if i == len(runs):
                self.before_overwriting()
            with phase(name):
                run()
            if name == MERGED:  # at once: what is interrupted now goes on from here
                self.past, self.pending = self.past + before, 0
        self.pending, self.next = self.size, self.preset.chunk
        return self.latents_BFCHW[self.size]

    def _full(self, seen: int) -> bool:
        return self.can_be_full and seen >= self.preset.window

    @torch.no_grad()
    def update(self, clean_BFCHW: Tensor | None = None) -> None:
        """The chunk's cache update as a pass of its own. Clean latents [B, F, C, h, w] replace the
        chunk that was just denoised; where there is none they are the next one. Raises ValueError
        for latents of another shape."""
        if clean_BFCHW is None and not self.pending:
            raise ValueError("no chunk's cache update is to come: give the latents of the next one")
        self.finish_decoding()
        self.size = self.pending or self.next
        if clean_BFCHW is not None:
            check_shape("latents", clean_BFCHW, tuple(self.x[self.size].shape))
            self.before_overwriting()
            self.latents_BFCHW[self.size].copy_(clean_BFCHW)
        with phase(UPDATE):
            self.updates[self.size]()
        self.past += self.size
        self.pending, self.next = 0, self.preset.chunk

    @torch.no_grad()
    def prefill(self, latents_BFCHW: Tensor) -> None:
        """Makes given latents [B, F, C, h, w] the stream's newest past: whole chunks, the first of
        the preset's `first` frames at the start of the stream. They are not decoded: the next chunk
        is the first one that is, as the start of a clip. Raises ValueError for others."""
        shape = (*self.x[self.next].shape[2:],)
        check_shape("latents", latents_BFCHW, (self.batch, "F", *shape))
        if self.pending:
            self.update()
        given = latents_BFCHW.shape[1]
        if given and (given < self.next or (given - self.next) % self.preset.chunk):
            raise ValueError(
                f"latents have {given} frames: must be {self.next} plus a multiple of "
                f"{self.preset.chunk}"
            )
        while latents_BFCHW.shape[1]:
            size = self.next
            self.update(latents_BFCHW[:, :size])
            latents_BFCHW = latents_BFCHW[:, size:]

    def latents(self) -> Iterator[Tensor]:
        """Endless clean latents, a chunk [B, F, C, h, w] in float32 at a time, as soon as its last
        step is done."""
        while True:
            yield self.denoise().clone()
