"""Weights that are learned, with the optimisers that change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sfmodel.dit import DiT
from sfmodel.train import parallel
from sfmodel.train.config import TrainConfig
from sfmodel.train.models import Models

WARM_UP = 0.9  # β1 of the discriminator while the critic rests (public Self Forcing)


class Learner:
    """Weights that are learned, of one or several modules, and their optimisers.

    rates: peak learning rate of each module. betas: of AdamW. clip: largest norm of the gradient of
    all modules together."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        config: TrainConfig,
        rates: Mapping[str, float],
        betas: tuple[float, float],
        clip: float,
    ) -> None:
        self.betas, self.clip = betas, clip
        self.whole = nn.ModuleDict(modules)
        self.parameters = [p for p in self.whole.parameters() if p.requires_grad]
        # Each module's are its own: one that rests has no state, which PyTorch does not save.
        self.optimizers: list[torch.optim.Optimizer] = []
        self.rates: list[float] = []  # of the optimisers
        muon, decay = config.optimizer == "muon", config.weight_decay
        of_others = 0.0 if muon else decay
        for name, module in modules.items():
            rate, learned = rates[name], [p for p in module.parameters() if p.requires_grad]
            blocks = module.blocks.parameters() if muon and isinstance(module, DiT) else ()
            matrices = {id(p): p for p in blocks if p.requires_grad and p.dim() == 2}
            others = [p for p in learned if id(p) not in matrices]
            groups = [
                {"params": [p for p in others if p.dim() > 1], "weight_decay": of_others},
                {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
            ]
            self.optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas))
            if matrices:
                options: Any = {"weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
                self.optimizers.append(torch.optim.Muon([*matrices.values()], lr=rate, **options))
            self.rates += [rate] * (len(self.optimizers) - len(self.rates))
        self.only(None)

    def only(self, name: str | None) -> None:
        """Lets one module alone learn from now on, with β1 = 0.9, or with None all of them."""
        others = (module for each, module in self.whole.items() if name not in (None, each))
        self.resting = [p for module in others for p in module.parameters()]
        betas = self.betas if name is None else (WARM_UP, self.betas[1])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "betas" in group:  # Muon has none
                    group["betas"] = betas

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def norm(self) -> float:
        """The norm of the gradient of what learns, which is then cut to `clip`."""
        for parameter in self.resting:
            parameter.grad = None
        found = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        return float(found.full_tensor() if hasattr(found, "full_tensor") else found)

    def step(self, share: float) -> None:
        """One update at a share of the peak rates."""
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()

    def forget(self) -> None:
        """Makes the optimisers as they were before the first update."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        """The learned weights themselves, which loading fills, and the optimisers' state."""
        return {
            "weights": parallel.learned(self.whole),
            "optimizers": get_optimizer_state_dict(self.whole, self.optimizers),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the optimisers' part of a `state` that was loaded."""
        set_optimizer_state_dict(self.whole, self.optimizers, state["optimizers"])


def learners(models: Models, config: TrainConfig) -> dict[str, Learner]:
    """Learners of the generator and, where there is one, of the critic, by these names."""
    generator, _, critic, head = models
    rates = {
        "generator": config.lr,
        "critic": config.lr_critic,
        "discriminator": config.lr_critic * config.discriminator_lr_multiplier,
    }
    betas, clip = config.betas, config.clip
    found = {"generator": Learner({"generator": generator}, config, rates, betas, clip)}
    if critic is not None:
        learned: dict[str, nn.Module] = {"critic": critic}
        if head is not None:
            critic.head.requires_grad_(False)  # what is read are the blocks before it
            learned["discriminator"] = head
        betas = config.betas_critic or betas
        clip = clip if config.clip_critic is None else config.clip_critic
        found["critic"] = Learner(learned, config, rates, betas, clip)
    return found
