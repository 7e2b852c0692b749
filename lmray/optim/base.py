"""What an optimizer is to the rest: made of groups of parameters, of known size, kept as tensors and JSON.

Its learning rate is set at every step. State on disk is what `state_dict` gives: `optimizer.safetensors` holds its
tensors, `optimizer.json` everything else.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lmray.config import MemberConfig
from lmray.errors import CheckpointError, ConfigError
from lmray.models.tensors import load_tree, save_tree

if TYPE_CHECKING:
    import torch

Shapes = Sequence[tuple[int, ...]]
"""Of the trained parameters."""
Groups = Sequence[Mapping[str, Any]]
"""Each holds `params`, and what else is said of them."""


class OptimizerConfig(MemberConfig):
    """Base of `lmray/optim/*.py`."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Optional packages it needs; lmray's extra `optimizers` brings them."""
    needs_gpu: ClassVar[str] = ""
    """Why it runs on GPUs only; empty where it runs on CPUs as well."""
    elementwise: ClassVar[bool] = False
    """Its step treats every number by itself, so that a rank can take its share of it."""
    averages: ClassVar[bool] = False
    """It needs no schedule: it measures and keeps an average of the weights it went through."""

    def check(self, shapes: Shapes, *, device: str) -> None:
        """Raises ConfigError where it cannot train parameters of `shapes` on `device` (`cpu`, `cuda`)."""
        if self.needs_gpu and device == "cpu":
            hint = "ask for `resources.gpus_per_worker: 1`, or take `adamw_torch`"
            raise ConfigError("train.optim", f"`{self.name}` runs on GPUs only: {self.needs_gpu}", hint=hint)
        for package in self.packages:
            if find_spec(package) is None:
                hint = 'pip install "lmray[optimizers]", here and on the workers'
                raise ConfigError("train.optim", f"`{self.name}` needs the package `{package}`", hint=hint)

    @abstractmethod
    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Over the parameters of `groups`, each a mapping with `params`. Decay reaches matrices only: see
        `decayed`."""
        raise NotImplementedError

    @abstractmethod
    def state_bytes(self, shapes: Shapes) -> int:
        """What it keeps for float32 parameters of `shapes`, gradients not counted."""
        raise NotImplementedError


def decayed(groups: Groups, weight_decay: float) -> list[dict[str, Any]]:
    """`groups` with `weight_decay` for their matrices; biases and norms keep their size."""
    split = [
        {**group, "params": [one for one in group["params"] if (one.dim() > 1) == decays], "weight_decay": decay}
        for group in groups
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    return [group for group in split if group["params"]]


def num_parameters(shapes: Shapes) -> int:
    """Of parameters of `shapes` together."""
    return sum(map(prod, shapes))


def use_average(optimizer: torch.optim.Optimizer, average: bool) -> None:
    """Sets the weights of an optimizer that averages to the average, or back to where gradients are taken; others have
    one set of weights only."""
    switch = getattr(optimizer, "eval" if average else "train", None)
    if switch is not None:
        switch()


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes the optimizer's whole state into `folder`. Raises CheckpointError for state that is neither tensors nor
    JSON."""
    save_tree(optimizer.state_dict(), folder / "optimizer")


def load_optimizer(
    optimizer: torch.optim.Optimizer, folder: Path, laid_out: Callable[[int, Any], Any] | None = None
) -> None:
    """Sets the state to that in `folder`; `laid_out` is given each parameter's index and values, and gives them as this
    rank holds them. Raises CheckpointError where it is another optimizer's."""
    state = load_tree(folder / "optimizer")
    if laid_out is not None:
        state["state"] = {
            index: {key: laid_out(index, value) for key, value in facts.items()}
            for index, facts in state["state"].items()
        }
    want, found = (
        [(set(group), len(group["params"])) for group in groups]
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if want != found:
        raise CheckpointError(str(folder), "holds the state of another optimizer, or of other parameters")
    optimizer.load_state_dict(state)
