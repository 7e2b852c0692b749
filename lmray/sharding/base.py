"""A strategy places a model on its worker and owns the order of wrapping, optimizer creation, summing and clipping."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from lmray.config import MemberConfig

if TYPE_CHECKING:
    import torch


class Placed(Protocol):
    """A model on this worker with its optimizer."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def all_sum(self, value: float) -> float:
        """`value` summed over all ranks."""
        ...

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scales the gradients to at most `max_norm`; returns their norm over all ranks before that."""
        ...


class Sharding(MemberConfig):
    """Base of `lmray/sharding/*.py`."""

    @abstractmethod
    def resolve(self, *, workers: int) -> tuple[Sharding, str]:
        """The strategy that will run on so many workers, and why. Raises CapacityError where none can."""
        raise NotImplementedError

    @abstractmethod
    def place(
        self, model: torch.nn.Module, make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer], device: str
    ) -> Placed:
        """Puts `model` on `device` and makes its optimizer, in the order the strategy needs."""
        raise NotImplementedError
