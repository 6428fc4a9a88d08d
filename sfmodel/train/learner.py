"""Weights that are learned, with the optimisers that change them."""

from __future__ import annotations

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


class Learner:
    """Weights that are learned, of one or several modules, and their optimisers."""

    def __init__(self, modules: dict[str, nn.Module], config: TrainConfig, rate: float) -> None:
        self.config, self.rate = config, rate
        self.whole = nn.ModuleDict(modules)
        self.parameters = [p for p in self.whole.parameters() if p.requires_grad]
        muon, decay = config.optimizer == "muon", config.weight_decay
        models = [module for module in modules.values() if isinstance(module, DiT)]
        blocks = [p for model in models for p in model.blocks.parameters()]
        matrices = {id(p): p for p in blocks if muon and p.requires_grad and p.dim() == 2}
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
        """The norm of the gradient, which is then cut to config.clip."""
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
    found = {"generator": Learner({"generator": generator}, config, config.lr)}
    if critic is not None:
        learned: dict[str, nn.Module] = {"critic": critic}
        if head is not None:
            critic.head.requires_grad_(False)  # what is read are the blocks before it
            learned["discriminator"] = head
        found["critic"] = Learner(learned, config, config.lr_critic)
    return found
