"""LISA: everything outside the decoder layers is trained all the time, and a few layers, drawn anew every so often.

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", arXiv
2403.17919, algorithm 1. Gradients and optimizer state exist of the drawn layers only.
Differs from the paper in: layers are drawn with equal chances, as in its experiments; a layer's optimizer state starts
anew whenever it is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from lmray.adapters._whole import WholeModel, decoder_layers
from lmray.errors import ConfigError


class Lisa(WholeModel):
    """All weights, few layers at a time."""

    lisa_activated_layers: Annotated[int, Field(ge=1)] = 2
    """Decoder layers that are trained at a time."""
    lisa_interval_steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps after which others are drawn."""

    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        layers: Any = model
        count = len(decoder_layers(model))
        if self.lisa_activated_layers > count:
            found, allowed = f"is {self.lisa_activated_layers}", f"1 to {count}, the model's layers"
            raise ConfigError("adapter.lisa_activated_layers", found, allowed=allowed)
        self._open(model, list(model.parameters()))
        layers.lisa_seed = seed
        self._draw(model, 0)
        return model

    @property
    def needs_whole_weights(self) -> bool:
        return True

    def trained(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return dict(model.named_parameters())

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        if step % self.lisa_interval_steps == 0:
            self._draw(model, step)

    def resume(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], *, step: int) -> None:
        self._draw(model, step)

    def _draw(self, model: Any, step: int) -> None:
        """Opens the layers that are trained after step `step`, a function of the seed and the interval alone."""
        layers = decoder_layers(model)
        chance = random.Random(f"{model.lisa_seed} {step // self.lisa_interval_steps}")
        drawn = set(chance.sample(range(len(layers)), self.lisa_activated_layers))
        for index, layer in enumerate(layers):
            layer.requires_grad_(index in drawn)
