"""What the methods share that tune and prune: what is to remain, and in which shape. They differ in their decider,
which says where masks come from."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar

from peft.tuners.lora import LoraLayer
from pydantic import Field, model_validator

from lmray.errors import ConfigError
from lmray.methods._masking import Masking
from lmray.methods.base import Companion, Method, Objective, Ranks
from lmray.methods.sft import sft_loss
from lmray.pruning.gates import check_adapted
from lmray.pruning.masks import Budget, Shape
from lmray.pruning.search import Decider
from lmray.pruning.shrink import check_writable, group_counts
from lmray.pruning.structure import LAYOUTS, Structure, adds_alone, structure_of

MOST_AT_ONCE = 1 / 3
"""Share of the prunable weights beyond which removing them in one go costs more than in steps."""

SLACK = 0.001
"""What `remaining` may be above the share of the layers that stay, so that three digits can say it."""
ALL_STAY = "leave `layers` out: all of them stay"


class Pruning(Method):
    """Tunes LoRA weights under masks; in the end what is masked is cut out, and the smaller model kept."""

    prunes: ClassVar[bool] = True

    remaining: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Share of the prunable weights (attention and MLP of the decoder layers) that is kept."""
    multiple_of: Annotated[int, Field(ge=1)] = 64
    """What an MLP's width is a multiple of, as kernels like it; its channels are chosen one by one."""
    shape: Shape = "uniform"
    """`uniform`: layers stay alike, which loads everywhere. `padded`: each keeps as much as it is worth, and is filled
    up with zeros to the widest: better, and no faster than that one. `hetero`, experimentally: MLPs of different
    widths, written as DeciLM (Nemotron-NAS) has them, which lmray reads, and plain `transformers` does not."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Decoder layers that stay. The others, which change least what flows through them, are left out whole, before
    units are (block influence, arXiv 2403.03853); the rest of the budget is met by what the others lose. None: all."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Devices that it will be served on together; they divide what is kept: key-value heads, and the MLP's width."""
    distill: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the KL divergence (nats/token) from the same weights without masks. 0: none, and a third less time."""

    @model_validator(mode="after")
    def _divides(self):
        if self.tensor_parallel > 1 and self.shape != "uniform":
            raise ValueError("keeps different heads in every layer; hint: `shape: uniform` with `tensor_parallel`")
        if self.multiple_of % self.tensor_parallel:
            found = f"{self.tensor_parallel} devices do not divide `multiple_of: {self.multiple_of}`"
            raise ValueError(f"{found}; hint: a `multiple_of` that `tensor_parallel` divides")
        return self

    @abstractmethod
    def decider(self, budget: Budget, ranks: Ranks, *, steps: int, seed: int) -> Decider:
        """Where the masks come from in a run of `steps` steps."""
        raise NotImplementedError

    @property
    def distils(self) -> bool:
        return self.distill > 0

    @property
    def in_steps(self) -> bool:
        """Whether the budget is tightened little by little."""
        return False

    def objectives(self) -> tuple[Objective, ...]:
        return (Objective(self.name, sft_loss, lambda batch: batch.num_supervised),)

    def budget(self, model: Any, structure: Structure) -> Budget:
        """What is to remain of `model`, which `structure` describes."""
        counts = group_counts(model, structure, self.shape)
        counts = tuple(count for count in counts if count % self.tensor_parallel == 0)
        return Budget(structure.sizes, self.remaining, self.shape, counts, self.multiple_of, self.layers)

    def check(self, model: Any, *, steps: int) -> None:
        structure = structure_of(model, block=1)
        if not any(isinstance(module, LoraLayer) for module in model.modules()):
            found = "adds no LoRA to a linear layer, and what is pruned goes through one"
            raise ConfigError("adapter.name", found, allowed="lora", hint="`adapter: {name: lora}`")
        check_adapted(structure.layers(model), structure)
        sizes = structure.sizes
        if self.shape != "padded" and self.multiple_of > sizes.channels:
            found, allowed = f"is {self.multiple_of}", f"1 to {sizes.channels}, the width of the MLP"
            raise ConfigError("method.multiple_of", found, allowed=allowed)
        if sizes.groups % self.tensor_parallel:
            found = f"{self.tensor_parallel} devices do not divide {sizes.groups} key-value heads"
            raise ConfigError("method.tensor_parallel", found, hint="a divisor of them")
        if self.layers is not None:
            self._check_layers(model, structure, self.layers)
        budget = self.budget(model, structure)
        if not budget.group_counts:
            found = "no config can be written of what would be left, whichever heads are kept"
            raise ConfigError("method.name", found, hint="tune this architecture with `method: sft`")
        if self.shape != "uniform" and len(budget.group_counts) < sizes.groups:
            found = f"may keep any number of key-value heads, and there are configs of {_listed(budget)} of them only"
            raise ConfigError("method.shape", found, allowed="uniform", hint="set `method.shape: uniform`")
        check_writable(model, structure, budget.fewest_groups)
        if self.remaining < (fewest := budget.least):
            found = f"{self.remaining:g} is less than the narrowest model has that can be kept"
            width, hint = 1, None
            if self.shape != "padded":
                smaller = ["`method.multiple_of`", *(["`method.tensor_parallel`"] if self.tensor_parallel > 1 else [])]
                width, hint = self.multiple_of, f"a smaller {' or '.join(smaller)} allows less"
            allowed = f"{fewest:.3f} to 1: {budget.fewest_groups} key-value head(s) and {width} MLP channel(s)"
            raise ConfigError("method.remaining", found, allowed=allowed, hint=hint)

    def _check_layers(self, model: Any, structure: Structure, layers: int) -> None:
        total = structure.sizes.layers
        if layers > total:
            raise ConfigError("method.layers", f"the model has {total} layers, not {layers}", allowed=f"1 to {total}")
        if layers < total and structure.model_type not in LAYOUTS:
            found = (
                f"a layer of `{structure.model_type}` of which nothing is kept may still change what flows through it"
            )
            raise ConfigError("method.layers", found, allowed=f"of {', '.join(LAYOUTS)}", hint=ALL_STAY)
        if layers < total and (biased := adds_alone(model, structure)):
            found = f"`{biased}` has a bias, which a layer of which nothing is kept would add"
            raise ConfigError("method.layers", found, hint=ALL_STAY)
        if self.remaining > layers / total + SLACK:
            found = f"{layers} of {total} layers are less than the {self.remaining:g} of the weights that remain"
            hint = f"`remaining: {math.ceil(layers / total / SLACK) * SLACK:g}` or less, or more `layers`"
            allowed = f"{math.ceil((self.remaining - SLACK) * total)} to {total}"
            raise ConfigError("method.layers", found, allowed=allowed, hint=hint)

    def warnings(self) -> tuple[str, ...]:
        said = ["method.remaining: 1 removes nothing; `method: sft` tunes as well"] if self.remaining == 1 else []
        if self.shape == "hetero":
            found = "method.shape: plain `transformers` and vLLM do not read what `hetero` keeps"
            said += [f"{found}; `uniform` loads everywhere"]
        if not self.in_steps and self.remaining < 1 - MOST_AT_ONCE - 1e-9:
            found = (
                f"method: {1 - self.remaining:.0%} of the prunable weights go at once, and beyond a third quality falls"
            )
            said += [f"{found}: set `schedule: progressive`"]
        return tuple(said)

    def pruning(self, steps: int) -> str:
        layers = f"in {self.layers} layers, " if self.layers is not None else ""
        left = f"at most {self.remaining:.1%} of the weights of attention and MLP stay, {layers}`{self.shape}`"
        return f"{left}; masks are searched in {self.searched(steps)} of {steps} steps, then final"

    def passes(self, steps: int) -> float:
        """Searching takes a gradient as well; a forward pass is half of what a step of an adapter is."""
        return (steps + self.searched(steps)) * (1.5 if self.distill else 1.0)

    def searched(self, steps: int) -> int:
        """Of so many steps, those that may take gradients on the search rows."""
        return 0

    def companion(self, ranks: Ranks, *, steps: int, seed: int) -> Companion:
        structure = structure_of(ranks.model, block=1)
        budget = self.budget(ranks.model, structure)
        decider = self.decider(budget, ranks, steps=steps, seed=seed)
        return Masking(ranks, structure, budget, decider, distill=self.distill)


def _listed(budget: Budget) -> str:
    return ", ".join(map(str, budget.group_counts))
