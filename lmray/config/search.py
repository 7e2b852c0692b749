"""What a sweep varies, how it chooses, and when it gives up."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmray.config.base import Config

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What torch, numpy and optuna all take."""


class Space(Config):
    """Where one key's values are drawn from: exactly one of the three."""

    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one(self):
        given = [self.choice, self.uniform, self.loguniform]
        if sum(value is not None for value in given) != 1:
            raise ValueError("needs exactly one of `choice`, `uniform`, `loguniform`; hint: `{choice: [4, 8, 16]}`")
        bounds = self.uniform or self.loguniform
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds {list(bounds)} are not ascending")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("`loguniform` needs bounds above 0")
        if self.choice == ():
            raise ValueError("`choice` is empty")
        return self


class Search(Config):
    name: Literal["optuna", "random"] = "optuna"
    num_trials: Annotated[int, Field(ge=1)] = 8
    seed: Seed = 0


class Scheduler(Config):
    name: Literal["asha", "none"] = "asha"
    grace_steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps before a trial may be stopped."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """One in this many trials goes on at each rung."""
