"""A method is a list of objectives; an objective's loss is a sum and a count, never a mean.

The learner counts supervised tokens over all ranks and micro-batches before the first backward pass, so that 1x8, 4x2
and 8x1 rows give one curve. What a method remembers from step to step is in its companion, which lives in the learner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lmray.config import MemberConfig
from lmray.data.spec import Joined

if TYPE_CHECKING:
    import torch

    from lmray.data.batch import Batch

Gradients = Callable[[Sequence["torch.Tensor"]], tuple[float, "list[torch.Tensor]"]]
"""Of tensors that the model's layers read: the mean loss in nats/token over this step's search rows, the model in
evaluation mode, and its gradient by each; over all ranks, the same on each. No weight gets one."""


@dataclass(frozen=True)
class Objective:
    """One thing to minimise over the trainable parameters."""

    name: str
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    """Summed loss of a micro-batch: scalar, with gradient."""
    count: Callable[[Batch], int]
    """What the sum is divided by, over all micro-batches and ranks; known before the forward pass."""


class Ranks(Protocol):
    """What a companion asks of the placed model; all ranks ask together."""

    @property
    def model(self) -> torch.nn.Module: ...

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor`, on every rank."""
        ...

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, on each the same."""
        ...


class Kept(Protocol):
    """What becomes of a trained model in the end."""

    def model(self, adapted: Any, dtype: torch.dtype) -> Any:
        """What is kept, its weights rounded to `dtype` and held in the type of `adapted`, a whole model with its
        adapter, which is used up."""
        ...

    def record(self, folder: Path, model: Any, parent: Mapping[str, Any]) -> None:
        """Writes beside the saved `model` what was made of its `parent`."""
        ...


class Companion(ABC):
    """What a method keeps beside the model: alike on every rank, and part of every checkpoint."""

    LOG: ClassVar[str]
    """The file in the run folder that `record` goes to, one JSON object a line."""
    search_steps: int
    """Steps, from the first, that may ask for gradients."""
    settled: bool
    """Whether the model is of the kind that is kept, so that its losses can be compared with each other."""

    @abstractmethod
    def objective(self, objective: Objective) -> Objective:
        """What is minimised in place of `objective`."""
        raise NotImplementedError

    @abstractmethod
    def before_step(self, step: int, gradients: Gradients) -> None:
        """Called before optimizer step `step` (1, 2, ...)."""
        raise NotImplementedError

    @abstractmethod
    def after_step(self, step: int, learning_rate: float) -> None:
        """Called after the weights' step, where it was applied."""
        raise NotImplementedError

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Of the last step."""
        raise NotImplementedError

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """For the log, what the last step was taken with: JSON types."""
        raise NotImplementedError

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs."""
        raise NotImplementedError

    @abstractmethod
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `state` gave."""
        raise NotImplementedError

    @abstractmethod
    def kept(self) -> Kept:
        """What becomes of the model; holds nothing of it."""
        raise NotImplementedError


class Method(MemberConfig):
    """Base of `lmray/methods/*.py`."""

    prunes: ClassVar[bool] = False
    """Masks lie between the model's layers while it is trained, and what is kept is the smaller model."""

    @property
    def joins(self) -> Joined | None:
        """How examples are joined to rows of one length. None: each keeps to itself, and `data.packing` says whether
        several share a row."""
        return None

    @property
    def distils(self) -> bool:
        """Whether the loss takes logits of a teacher, too, at all supervised tokens at once."""
        return False

    @property
    def set_aside(self) -> float:
        """Share of the training examples that no weight is trained on: the search rows."""
        return 0.0

    @abstractmethod
    def objectives(self) -> tuple[Objective, ...]:
        """What one optimizer step minimises."""
        raise NotImplementedError

    def check(self, model: Any, *, steps: int) -> None:
        """Raises ConfigError where `model`, with its adapter and on the meta device, cannot be trained so in a run of
        `steps` steps."""

    def warnings(self) -> tuple[str, ...]:
        """What is no error and yet likely not meant."""
        return ()

    def pruning(self, steps: int) -> str | None:
        """How weights are removed in a run of `steps` steps, for the plan; None: none are."""
        return None

    def passes(self, steps: int) -> float:
        """The work of a run of `steps` steps, in steps that take the loss's gradient alone."""
        return steps

    def companion(self, ranks: Ranks, *, steps: int, seed: int) -> Companion | None:
        """What it keeps beside the placed model in a run of `steps` optimizer steps."""
        return None
