"""LoRA: low-rank changes of a DiT's linear layers, which learn while its own weights are frozen
(arXiv 2106.09685). Written as PEFT writes it, under the public model's names.

Shapes: L tokens, C channels in, O channels out, R rank, P projections that one layer fuses, each
with a pair of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfmodel.dit import DiT
from sfmodel.files import atomic
from sfmodel.weights import names
from sfmodel.weights.saving import save_tensors


class LoraLinear(nn.Linear):
    """A linear layer's own weight and bias, frozen, and the change of its weight, alpha/R · B·A.

    A [P·R, C] and B [O, R] hold the pairs one below the other: the p-th R rows of A go with the
    p-th O/P rows of B. Both in float32, whatever the dtype of the layer."""

    def __init__(self, layer: nn.Linear, parts: int, rank: int, scale: float) -> None:
        device = layer.weight.device
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.lora_A = nn.Parameter(torch.zeros(parts * rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y, down = super().forward(x), F.linear(x, self.lora_A)
        parts = len(self.lora_A) // self.lora_B.shape[1]
        pairs = zip(down.chunk(parts, -1), self.lora_B.chunk(parts), strict=True)
        return torch.add(y, torch.cat([F.linear(*pair) for pair in pairs], -1), alpha=self.scale)


class Adapter(NamedTuple):
    """Settings of a LoRA. targets: the layers of the blocks that it changes, by the ends of their
    public names, as PEFT's target_modules."""

    rank: int
    alpha: float
    targets: Sequence[str] = names.LORA_TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def layers(self) -> dict[str, int]:
        """Number of projections that each layer fuses, by the layers' names in a block of the DiT.
        Raises ValueError for targets that are no layer, or a part of one."""
        found: dict[str, list[str]] = {}
        for name in names.targeted(self.targets):
            own = next((f for f, parts in names.FUSED.items() if name in parts), name)
            found.setdefault(own, []).append(name)
        for own, parts in found.items():
            if len(parts) < len(whole := names.FUSED.get(own, (own,))):
                raise ValueError(
                    f"lora_targets={[*self.targets]}: {', '.join(whole)} are one layer here: must "
                    "be all of them or none"
                )
        return {own: len(parts) for own, parts in found.items()}

    def add(self, model: DiT) -> DiT:
        """Freezes a model and gives its layers changes that learn, which are zero."""
        model.requires_grad_(False)
        for own, parts in self.layers().items():
            for block in model.blocks:
                layer = cast(nn.Linear, block.get_submodule(own))
                block.set_submodule(own, LoraLinear(layer, parts, self.rank, self.scale))
        return model

    def initial(self, model: nn.Module, seed: int) -> dict[str, Tensor]:
        """A and B of a model's layers at the start: A is drawn, as PEFT draws it, and B is zero."""
        generator, state = torch.Generator().manual_seed(seed), {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                state[name] = torch.zeros(parameter.shape)
                if name.endswith("lora_A"):
                    nn.init.kaiming_uniform_(state[name], math.sqrt(5), generator=generator)
        return state

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a model without LoRA that computes the same, from those of one with it: what
        is changed is in float32."""
        out = {}
        for name, value in state.items():
            stem, _, leaf = name.rpartition(".")
            if leaf == "weight" and f"{stem}.lora_A" in state:
                a, b = state[f"{stem}.lora_A"], state[f"{stem}.lora_B"]
                parts = len(a) // self.rank
                pairs = zip(b.chunk(parts), a.chunk(parts), strict=True)
                value = value.float() + self.scale * torch.cat([up @ down for up, down in pairs])
            if leaf not in ("lora_A", "lora_B"):
                out[name] = value
        return out

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Writes A and B of all layers as PEFT does, under public names. Each file is atomic."""
        alpha = int(self.alpha) if self.alpha == int(self.alpha) else self.alpha
        settings: dict[str, Any] = {
            "peft_type": "LORA", "r": self.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
            "target_modules": [*self.targets], "bias": "none", "inference_mode": True,
        }  # fmt: skip
        with atomic(folder / "adapter_config.json") as part:
            part.write_text(json.dumps(settings, indent=1) + "\n")
        # A fused layer's A and B fall apart as its weight does.
        public = names.to_official(state).items()
        tensors = {f"base_model.model.{name}.weight": value for name, value in public}
        save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
