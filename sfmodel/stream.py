"""The stream: video from a few-step causal model, chunk by chunk through the ring cache, frames out
as they are ready (arXiv 2506.08009, algorithm 2).

Shapes: B samples, F latent frames of a chunk, T pixel frames, C channels, h×w latents, H×W pixels,
E text dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from sfkernels import Noise, euler_step, normal, rotate_keys
from sfkernels.arguments import check_count, check_shape, check_tensor
from sfkernels.attention import differs_when_full
from sfmodel.config import Preset, check_seed
from sfmodel.dit import DiT
from sfmodel.frames import FrameStream, Run, copy_all
from sfmodel.ranges import phase
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule, check_euler, few_step
from sfmodel.vae.codec import VideoDecoder

PROMPT, NOISE, STEP, UPDATE = "prompt keys and values", "noise", "step ", "cache update"
GIVEN = "given latents"
MERGED = f"{STEP}1 and {UPDATE}"


class Given(NamedTuple):
    """A chunk's latents [B, F, C, h, w] to go on from, and the sampler's step that does; one past
    the last for none."""

    latents_BFCHW: Tensor
    step: int


# Latents, frames that are dropped, and what is put back (`Stream.recompute`).
_Window = tuple[Tensor, int, tuple[Tensor, list["Given"], int, int, int]]


class Prompt(NamedTuple):
    """A prompt to come, from a latent frame on, over so many chunks. begun: some are over."""

    frame: int
    text_BTE: Tensor
    over: int
    recompute: bool
    begun: bool = False


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
        check_tensor("text", text_BTE)
        if text_BTE.dim() != 3 or len(text_BTE) not in (1, batch):
            raise ValueError(
                f"text has shape {[*text_BTE.shape]}: must be [1, T, {model.config.text_dim}], or "
                f"have a prompt for each of the batch of {batch}"
            )
        self.model, self.euler, self.merge, self.noise = model, euler, merge, noise
        if graph and noise is not None:
            raise ValueError("noise: CUDA graphs call no function again, give it without graph")
        self.timesteps = (
            [round(TRAIN_STEPS * (1 - i / euler)) for i in range(euler)] if euler else preset.steps
        )
        schedule, device = FlowSchedule(preset.check().shift), model.device
        t = schedule.warp(self.timesteps)
        t = (torch.tensor(self.timesteps).float() if preset.warped and not euler else t).to(device)
        self.sigmas = [*schedule.sigma(t)]
        self.modulations = [model.modulation(one) for one in t]
        self.clean = model.modulation(torch.zeros((), device=device))
        sink = preset.sink, preset.positions
        self.cache = model.new_cache(batch, preset.window, preset.grid, *sink)
        self.seed_B = torch.arange(seed, seed + batch, device=device)
        # Frames that the noise counts and the cache does not, since its window was computed anew.
        self.uncounted = torch.zeros((), dtype=torch.int32, device=device)
        text_size = len(text_BTE), model.config.text_len, model.config.text_dim
        self.text_BTE = torch.zeros(text_size, device=device)
        super().__init__(codec, preset, batch, device, graph, low_latency)
        sizes = self.latents_BFCHW.keys()
        some = self.latents_BFCHW[self.first][:, :1]
        # The window's clean latents, in the slots of their keys.
        self.recent_BFCHW = some.repeat(1, preset.window, 1, 1, 1)
        # By a chunk's size: what is being denoised, and the place in the ring.
        self.x = {frames: torch.zeros_like(x) for frames, x in self.latents_BFCHW.items()}
        self.places = {frames: model.place(self.cache, frames, preset.grid) for frames in sizes}
        self.noise_F = {frames: self.places[frames].chunk.frame_F.clone() for frames in sizes}
        self._set_text = self.launch(lambda: model.set_text(self.cache, self.text_BTE))
        # By a chunk's size and that of the chunk before it, whose cache update is merged with its
        # first step (0: none is): what this step sees, which graphs read by address.
        first = self.modulations[0]
        self.firsts = {(frames, 0): ([self.places[frames]], first) for frames in sizes}
        for before in sizes if merge else ():
            past = self.places[before]._replace(sink=())
            places = [pytree.tree_map(torch.clone, past), self.places[preset.chunk]]
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
        self.prompts: list[Prompt] = []  # to come
        self.restart(text_BTE, seed)

    def _draw(self, frames: int, before: int) -> Run:
        """Place and initial noise of a chunk, behind one of `before` frames whose cache update is
        merged with its first step; 0: behind none."""
        model, x, (places, _) = self.model, self.x[frames], self.firsts[frames, before]

        def draw() -> None:
            if before:
                clean = model.place(self.cache, before, self.preset.grid)
                copy_all(places[0], clean._replace(sink=()))
            copy_all(places[-1], model.place(self.cache, frames, self.preset.grid, before))
            self.noise_F[frames].copy_(places[-1].chunk.frame_F + self.uncounted)
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
            if clean is not None:
                self._commit(clean, places[0].chunk.slot_F)

        return self.launch(step)

    def _steps(self, frames: int, full: bool) -> dict[str, Run]:
        """The steps of a chunk after the first one."""
        model, x, places = self.model, self.x[frames], [self.places[frames]._replace(sink=())]

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
            self._commit(latents, cache.chunk(frames).slot_F)

        return self.launch(update)

    def _commit(self, clean_BFCHW: Tensor, slot_F: Tensor) -> None:
        self.recent_BFCHW.index_copy_(1, slot_F.long(), clean_BFCHW)
        self.cache.commit(len(slot_F))

    def _noise(self, frames: int, i: int) -> Tensor | Noise:
        if self.noise is not None:
            return self.noise(i)
        return Noise(self.seed_B, self.noise_F[frames], i)

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
        if text_BTE is None:
            text_BTE = next((each.text_BTE for each in self.prompts if each.begun), self.text_BTE)
        self.text_BTE.copy_(self._padded(text_BTE))
        self.set_text()
        if seed is not None:
            self.seed_B.copy_(torch.arange(seed, seed + self.batch))
        self.cache.reset()
        self.uncounted.zero_()
        super().restart()
        self.pending = 0  # frames of the one that is there, while its cache update is to come
        self.past = 0  # frames that are past
        self.begun = 0  # frames of all chunks so far
        self.given: list[Given] = []  # chunks to come
        self.prompts = []
        self.torn: _Window | None = None  # what the window is computed anew from, after an error

    def _padded(self, text_BTE: Tensor) -> Tensor:
        """A prompt as `text_BTE` has it. Raises ValueError for one that does not fit."""
        prompts, rows, channels = self.text_BTE.shape
        check_shape("text", text_BTE, (prompts, "T", channels))
        if text_BTE.shape[1] > rows:
            raise ValueError(f"text has {text_BTE.shape[1]} rows: must be at most {rows}")
        return F.pad(text_BTE.to(self.text_BTE), (0, 0, 0, rows - text_BTE.shape[1]))

    @torch.no_grad()
    def set_text(self) -> None:
        """Computes the keys and values of the prompt that lies in `text_BTE`."""
        with phase(PROMPT):
            self._set_text()

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """The next chunk's clean latents x0 [B, F, C, h, w] in float32, after the cache update of
        the one before, in memory that the next one overwrites. After an error it begins the chunk
        again; where that tore a full window, its keys and values are computed anew first."""
        self.finish_decoding()
        self.mend()
        while self.prompts and self.prompts[0].frame < self.begun + self.next:
            self._take_prompt()
        if self.pending and (not self.merge or self._holds_sink() or self.given):
            self.update()
        before, self.size = self.pending, self.next
        seen = self.past + (before or self.size)  # by the first chunk of the first pass
        runs = {
            NOISE: self.draws[self.size, before],
            MERGED if before else f"{STEP}1": self.begin[self.size, before, self._full(seen)],
            **self.steps[self.size, self._full(self.past + before + self.size)],
        }
        if self.given:
            given = self.given[0]
            take = functools.partial(self._take, given)
            runs = {NOISE: runs[NOISE], GIVEN: take, **dict([*runs.items()][1 + given.step :])}
        for i, (name, run) in enumerate(runs.items(), 1):
            if i == len(runs):
                self.before_overwriting()
            try:
                with phase(name):
                    run()
            except BaseException:
                if name == MERGED and self.past + before + self.size > self.preset.window:
                    # It has written over what it has yet to see in other layers.
                    self.torn = self._window()
                raise
            if name == MERGED:  # at once: what is interrupted now goes on from here
                self.past, self.pending = self.past + before, 0
        self.given, self.begun = self.given[1:], self.begun + self.size
        self.pending, self.next = self.size, self.preset.chunk
        return self.latents_BFCHW[self.size]

    def _take(self, given: Given) -> None:
        """Makes a given chunk the noisy one of a step, of its own noise, or the chunk's latents."""
        x = self.x[self.size]
        if given.step:  # or the first step does it
            self._move_sink(self.size)
        if given.step == len(self.sigmas):
            self.latents_BFCHW[self.size].copy_(given.latents_BFCHW)
        else:
            x.copy_(torch.lerp(given.latents_BFCHW.to(x), x, self.sigmas[given.step]))

    def _move_sink(self, frames: int) -> None:
        """Moves the sink to where the chunk of so many frames sees it."""
        if self.places[frames].sink:
            table_SP2, count = self.places[frames].sink
            for kept, ring in zip(self.cache.sink_k, self.cache.k, strict=True):
                rotate_keys(kept, table_SP2, count, ring)

    def _full(self, seen: int) -> bool:
        return self.can_be_full and seen >= self.preset.window

    def _holds_sink(self) -> bool:
        """Tells whether the chunk after those that are past has frames of a sink that will move."""
        return bool(self.cache.sink_k.numel()) and self.past < self.preset.sink

    @torch.no_grad()
    def update(self, clean_BFCHW: Tensor | None = None) -> None:
        """The chunk's cache update as a pass of its own. Clean latents [B, F, C, h, w] replace the
        chunk that was just denoised; where there is none they are the next one. Raises ValueError
        for latents of another shape."""
        if clean_BFCHW is None and not self.pending:
            raise ValueError("no chunk's cache update is to come: give the latents of the next one")
        self.mend()
        self._append(clean_BFCHW)

    def _append(self, clean_BFCHW: Tensor | None = None) -> None:
        """As `update`, of a cache that is whole or computed anew."""
        self.finish_decoding()
        self.size = self.pending or self.next
        if clean_BFCHW is not None:
            if self.given:
                raise ValueError("given latents are to come: they are the next chunks")
            check_shape("latents", clean_BFCHW, tuple(self.x[self.size].shape))
            self.before_overwriting()
            self.latents_BFCHW[self.size].copy_(clean_BFCHW)
        with phase(UPDATE):
            self.updates[self.size]()
            if self._holds_sink():
                self.cache.keep_sink()
        self.past += self.size
        self.pending, self.next = 0, self.preset.chunk

    @torch.no_grad()
    def prefill(self, latents_BFCHW: Tensor) -> None:
        """Makes given latents [B, F, C, h, w] the stream's newest past: whole chunks, the first of
        the preset's `first` frames at the start of the stream. They are not decoded: the next chunk
        is the first one that is, as the start of a clip. Raises ValueError for others."""
        if self.given:
            raise ValueError("given latents are to come: they are the next chunks")
        self.mend()
        if self.pending:
            self._append()
        for chunk in self._chunks(latents_BFCHW):
            self._append(chunk)

    def _chunks(self, latents_BFCHW: Tensor) -> list[Tensor]:
        """Latents cut into the next chunks of the stream. Raises ValueError for others."""
        size, chunk = self.next if not self.given else self.preset.chunk, self.preset.chunk
        check_shape("latents", latents_BFCHW, (self.batch, "F", *self.x[size].shape[2:]))
        given = latents_BFCHW.shape[1]
        if given and (given < size or (given - size) % chunk):
            raise ValueError(
                f"latents have {given} frames: must be {size} plus a multiple of {chunk}"
            )
        sizes = [size, *[chunk] * ((given - size) // chunk)] if given else []
        return [*latents_BFCHW.split(sizes, 1)]

    def give(self, latents_BFCHW: Tensor, strength: float = 0.0) -> None:
        """Makes given latents [B, F, C, h, w] the next chunks of the video: an image or a clip that
        it starts with, or is made of. Shapes as of `prefill`.

        strength: 0 keeps them; more, up to 1, makes noise of so much of them, down to a step of the
        sampler, which goes on from there. Raises ValueError for one below the last step."""
        at = sum(step > 1000 * strength for step in self.timesteps)
        if not 0 <= strength <= 1 or (strength and at == len(self.timesteps)):
            raise ValueError(
                f"strength={strength}: must be 0, or {self.timesteps[-1] / TRAIN_STEPS:g} to 1"
            )
        self.given += [Given(chunk.clone(), at) for chunk in self._chunks(latents_BFCHW)]

    def set_prompt(
        self, text_BTE: Tensor, *, frame: int = 0, over: int = 1, recompute: bool = True
    ) -> None:
        """Goes on with another prompt [as many as before, T, E] from the next chunk on, or from the
        one that shows latent frame `frame`. May be called while the stream runs.

        over: chunks that go from the old embeddings to the new ones in equal steps. recompute: the
        window's keys and values are computed anew with the last of them, as a stream that is given
        its latents would have them; False keeps them, which fades the old prompt out. Raises
        ValueError for a prompt that does not fit."""
        check_count("frame", frame, least=0)
        check_count("over", over)
        new = Prompt(frame, self._padded(text_BTE), over, recompute)
        self.prompts = sorted([*self.prompts, new], key=lambda each: each.frame)

    def _take_prompt(self) -> None:
        """Takes the next prompt, or a step towards it."""
        new, *others = self.prompts
        if not new.begun:  # it ends what was on the way to another
            others = [each for each in others if not each.begun]
        if new.over > 1:
            frame = self.begun + self.next
            rest = new._replace(frame=frame, over=new.over - 1, begun=True)
            others = sorted([rest, *others], key=lambda each: each.frame)
        old = self.text_BTE.clone()
        try:
            self.text_BTE.lerp_(new.text_BTE, 1 / new.over)
            self.set_text()
        except BaseException:
            self.text_BTE.copy_(old)  # and the prompt is still to come
            raise
        self.prompts = others
        if new.over == 1 and new.recompute:
            self.recompute()

    def mend(self) -> None:
        """Computes anew what an error has torn of the cache."""
        if self.torn is not None:
            self.recompute()

    @torch.no_grad()
    def recompute(self) -> None:
        """Computes the window's keys and values anew, as a stream has them that is given its
        latents, the sink's first. The oldest others that are no whole chunk are dropped."""
        self.finish_decoding()
        if self.torn is None:
            self.torn = self._window()
        held_BFCHW, dropped, before = self.torn
        if not held_BFCHW.shape[1]:  # not yet a chunk, which is written again anyway
            self.torn = None
            return
        # Until the end an error leaves `torn` there, to begin again from.
        waiting, self.given, given = before[0], [], before[1]
        self.cache.reset()
        self.past, self.pending, self.next = 0, 0, self.first
        for chunk in self._chunks(held_BFCHW):
            self._append(chunk)
        self.uncounted += dropped
        size, pending, following = before[2:]
        self.before_overwriting()
        self.latents_BFCHW[size].copy_(waiting)
        copy_all(self.places[size], self.model.place(self.cache, size, self.preset.grid))
        self._move_sink(size)
        self.size, self.pending, self.next, self.given = size, pending, following, given
        self.torn = None

    def _window(self) -> _Window:
        """The window's latents that are computed anew, and what is put back after that."""
        preset, past = self.preset, self.past
        sink, rolling = min(preset.sink, past), preset.window - preset.sink
        frames = [*range(sink), *range(max(sink, past - rolling), past)]
        count = len(frames) - (len(frames) - self.first) % preset.chunk
        count = count if count >= self.first else 0
        frames = frames[:sink] + frames[len(frames) - count + sink :] if count else []
        slots = [f if f < sink else sink + (f - sink) % rolling for f in frames]
        held_BFCHW = self.recent_BFCHW[:, :0]
        if slots:
            held_BFCHW = torch.stack([self.recent_BFCHW[:, slot] for slot in slots], 1)
        size = self.pending or self.size
        waiting = self.latents_BFCHW[size].clone()
        back = waiting, self.given, size, self.pending, self.next
        return held_BFCHW, past - count, back

    def latents(self) -> Iterator[Tensor]:
        """Endless clean latents, a chunk [B, F, C, h, w] in float32 at a time, as soon as its last
        step is done."""
        while True:
            yield self.denoise().clone()
