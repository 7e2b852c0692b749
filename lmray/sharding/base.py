"""A strategy places a model on its worker and owns the order of wrapping, optimizer creation, summing and clipping."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lmray.config import MemberConfig

if TYPE_CHECKING:
    import torch

MakeOptimizer = Callable[["torch.nn.Module"], "torch.optim.Optimizer"]
Fill = Callable[["torch.nn.Module", str], None]
"""Gives the weights of a module that are still on the meta device their values, on a device."""
Part = Literal["weights", "gradients", "optimizer"]


@dataclass(frozen=True)
class Need:
    """What is to be placed."""

    adapter_only: bool
    """The model's own weights are frozen."""
    fits: bool
    """All of it fits into one worker's memory."""


class Placed(Protocol):
    """A model on this worker with its optimizer. Every call but `model` and `optimizer` is made by all ranks together
    and in the same order, whether or not a rank has rows."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    whole: bool
    """Whether every rank holds all weights."""
    saves_alone: bool
    """Whether `save` asks nothing of the other ranks, so that one may do it again."""

    def all_sum(self, value: float) -> float:
        """`value` summed over all ranks."""
        ...

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, on each the same."""
        ...

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor`, on every rank."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`. After the `last` micro-batch of a step the gradients are summed over all ranks:
        a sum, never a mean, for the learner has divided by the count of all ranks."""
        ...

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scales the gradients to at most `max_norm`; returns their norm over all ranks before that."""
        ...

    def apply(self, *, then: Callable[[], None] | None = None) -> None:
        """The optimizer's step; `then` is called after it, and then the gradients are gone."""
        ...

    def gathered_state(self, *, trained_only: bool = True) -> dict[str, torch.Tensor] | None:
        """The model's `state_dict` in full, on the CPU of rank 0 (None elsewhere): what the optimizer holds, or
        everything."""
        ...

    def save(self, folder: Path) -> None:
        """Writes this rank's part of trained weights and optimizer state into its own `folder`. The folders of all
        ranks become one, so no two ranks write a file of the same name."""
        ...

    def load(self, folder: Path) -> None:
        """Sets weights and optimizer to those in `folder`, which all ranks have saved, at whatever world size. Raises
        CheckpointError where it holds another model's or another strategy's."""
        ...


class Sharding(MemberConfig):
    """Base of `lmray/sharding/*.py`."""

    divides: ClassVar[frozenset[Part]] = frozenset()
    """What the workers share among them: each holds its part of these, and all of the rest. Dividing `weights`, none
    holds the whole model; dividing `optimizer`, each steps on its part of the weights alone."""
    keeps_masters: ClassVar[bool] = False
    """The optimizer steps on float32 copies of its part of the weights, beside those that are computed with."""
    gathers_masters: ClassVar[bool] = False
    """Divided weights are gathered in the type they are kept in, and cast one by one as they are multiplied with."""

    owns_backward: ClassVar[bool] = False
    """Gradients are an engine's, which takes those of the trained weights and no others."""

    @property
    def goes_on(self) -> bool:
        """Whether it loads the checkpoints that it saves."""
        return True

    def check(self, train: Mapping[str, Any], *, workers: int, dtype: str) -> None:
        """Raises ConfigError where a setting contradicts the rest of the job; `train` is its section of that name."""

    def buffer_bytes(self, trained: int) -> int:
        """What it keeps for gradients and weights on their way, of so many trained parameters."""
        return 0

    @abstractmethod
    def resolve(self, *, workers: int, need: Need | None = None) -> tuple[Sharding, str]:
        """The strategy that will run on so many workers, and why; `need` is what it is to place, where that is known.
        Raises CapacityError where none can."""
        raise NotImplementedError

    @abstractmethod
    def place(
        self, model: torch.nn.Module, make_optimizer: MakeOptimizer, device: str, *, dtype: str = "float32"
    ) -> Placed:
        """Puts `model` on `device`, to be computed with in `dtype`, and makes its optimizer, in the order the strategy
        needs. One that divides weights also takes `fill`, for a model that has none yet: it says when they are read, so
        that a worker holds little more than its part at any time."""
        raise NotImplementedError
