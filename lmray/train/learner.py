"""The one learner: forward, backward and step for any method. Runs on every rank.

Losses are sums; the count they are divided by is taken over all ranks and micro-batches before the first backward
pass, so the gradient does not depend on how a step's rows are cut into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain

import torch

from lmray.adapters.base import Adapter
from lmray.data.batch import Batch, Packed
from lmray.methods.base import Objective
from lmray.models.fused import Fused
from lmray.models.precision import computing
from lmray.models.rope import follows_length
from lmray.models.sizes import row_sizes
from lmray.optim.base import use_average
from lmray.pulse import PULSE
from lmray.sharding.base import Placed

Around = Callable[[Batch], AbstractContextManager[object]]
FUSED_MULTIPLE = 64
"""Tokens. Rows behind each other are long: an eighth of them would be more than need be."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    loss: float
    """Mean over the step's supervised tokens, in nats."""
    grad_norm: float
    """Before clipping."""
    num_supervised: int
    num_tokens: int


class Learner:
    """A placed model with what it minimises. `adapter`: told of every step. `fused`: its steps take micro-batches of
    one row (see `joined`). `around`: what else holds while the loss of a micro-batch is taken."""

    def __init__(
        self,
        placed: Placed,
        objective: Objective,
        *,
        max_grad_norm: float,
        adapter: Adapter | None = None,
        fused: Fused | None = None,
        around: Sequence[Around] = (),
        device: str = "cpu",
    ):
        self.placed, self.objective, self.max_grad_norm = placed, objective, max_grad_norm
        self.adapter, self.fused, self.around = adapter, fused, around
        self._row_sizes = row_sizes(placed.model, device)
        self.padding_apart = follows_length(placed.model.config)

    @property
    def model(self) -> torch.nn.Module:
        return self.placed.model

    def padded(self, longest: int) -> int:
        """What the rows of a micro-batch are padded to, of which the longest has `longest` tokens: CPUs are given few
        sizes."""
        if self.fused:
            return -(-longest // FUSED_MULTIPLE) * FUSED_MULTIPLE
        return self._row_sizes(longest)

    def joined(self, rows: Sequence[Packed]) -> Sequence[Packed]:
        """`rows` of a micro-batch as this learner computes them: as they are, or behind each other in one."""
        return [tuple(chain.from_iterable(rows))] if self.fused else rows

    def _loss(self, batch: Batch) -> torch.Tensor:
        with ExitStack() as stack:
            fused = self.fused.running(batch.position_ids_BT) if self.fused else computing(self.model)
            for context in (fused, *(make(batch) for make in self.around)):
                stack.enter_context(context)
            return self.objective.loss(self.model, batch)

    def step(self, batches: Sequence[Batch], *, learning_rate: float, step: int = 0, num_idle: int = 0) -> StepReport:
        """Optimizer step number `step` over this rank's micro-batches, already on the device. Not applied where the
        loss or the gradient norm it reports is not finite. The last `num_idle` count nothing: every rank runs as many
        forward and backward passes, whether or not it has rows for them."""
        counted = batches[: len(batches) - num_idle]
        for group in self.placed.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        count = self.placed.all_sum(sum(self.objective.count(batch) for batch in counted))
        self.model.train()
        use_average(self.placed.optimizer, False)
        total = 0.0
        for number, batch in enumerate(batches, 1):
            PULSE.beat(f"micro-batch {number} of {len(batches)}")
            loss_sum = self._loss(batch) * (number <= len(counted))
            self.placed.backward(loss_sum / count, last=number == len(batches))
            total += float(loss_sum.detach())
        PULSE.beat("the optimizer's step")
        penalty = self.adapter.penalty(self.model) if self.adapter else None
        if penalty is not None:
            penalty.backward()
        grad_norm, loss = self.placed.clip_grad_norm(self.max_grad_norm), self.placed.all_sum(total) / count
        if math.isfinite(grad_norm) and math.isfinite(loss):  # on every rank alike; else the weights stay as they were
            self.placed.apply(then=lambda: self._follow(step))
        else:
            self.placed.optimizer.zero_grad(set_to_none=True)
        use_average(self.placed.optimizer, True)  # so that all there is between steps, measuring and saving, is of it
        num_tokens = self.placed.all_sum(sum(batch.num_tokens for batch in counted))
        return StepReport(loss, grad_norm, int(count), int(num_tokens))

    def _follow(self, step: int) -> None:
        """Tells the adapter of the step, and frees the optimizer's state of what is frozen now."""
        if self.adapter is None:
            return
        self.adapter.after_step(self.model, step)
        state = self.placed.optimizer.state
        for parameter in [one for one in state if not one.requires_grad]:
            del state[parameter]
