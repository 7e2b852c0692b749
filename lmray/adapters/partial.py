"""Partial fine-tuning: some of the model's own weights are trained, the rest stays; what is kept is a whole model.

Differs from the paper in: nothing; there is no one paper.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

import torch
from pydantic import Field, model_validator

from lmray.adapters._whole import WholeModel, decoder_layers
from lmray.errors import ConfigError, did_you_mean


class Partial(WholeModel):
    """The last layers, or weights by name."""

    last_n: Annotated[int, Field(ge=1)] = 2
    """So many decoder layers are trained, counted from the output; `train_layers` is used instead where it is given."""
    train_layers: tuple[str, ...] = ()
    """Modules or parameters that are trained, by dotted name; `*` stands for anything: `lm_head`, `model.layers.1`,
    `*.mlp`, `*norm*`."""

    @model_validator(mode="after")
    def _one(self):
        if self.train_layers and "last_n" in self.model_fields_set:
            raise ValueError("gives `last_n` and `train_layers`; hint: give one of them")
        return self

    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        return self._open(model, self._named(model) if self.train_layers else self._last(model))

    def _last(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        layers = decoder_layers(model)
        if self.last_n > len(layers):
            raise ConfigError("adapter.last_n", f"is {self.last_n}", allowed=f"1 to {len(layers)}, the model's layers")
        return [parameter for layer in layers[-self.last_n :] for parameter in layer.parameters()]

    def _named(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        chosen = {}
        for pattern in self.train_layers:
            found = {id(one): one for name, one in parameters.items() if _matches(name, pattern)}
            if not found:
                modules = [name for name, _ in model.named_modules()]
                hint = did_you_mean(pattern, [*modules, *parameters]) or "`*` stands for anything: `*.mlp`"
                raise ConfigError("adapter.train_layers", f"`{pattern}` names no weight of the model", hint=hint)
            chosen |= found
        return list(chosen.values())


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the parameter called `name`, or a module above it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
