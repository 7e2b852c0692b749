"""A method is a list of objectives; an objective's loss is a sum and a count, never a mean.

The learner counts supervised tokens over all ranks and micro-batches before the first backward pass, so that 1x8, 4x2
and 8x1 rows give one curve.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmray.config import MemberConfig
from lmray.data.spec import Joined

if TYPE_CHECKING:
    import torch

    from lmray.data.batch import Batch


@dataclass(frozen=True)
class Objective:
    """One thing to minimise over the trainable parameters."""

    name: str
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    """Summed loss of a micro-batch: scalar, with gradient."""
    count: Callable[[Batch], int]
    """What the sum is divided by, over all micro-batches and ranks; known before the forward pass."""


class Method(MemberConfig):
    """Base of `lmray/methods/*.py`."""

    @property
    def joins(self) -> Joined | None:
        """How examples are joined to rows of one length. None: each keeps to itself, and `data.packing` says whether
        several share a row."""
        return None

    @abstractmethod
    def objectives(self) -> tuple[Objective, ...]:
        """What one optimizer step minimises."""
        raise NotImplementedError
