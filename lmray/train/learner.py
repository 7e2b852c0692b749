"""The one learner: forward, backward and step for any method. Runs on every rank.

Losses are sums; the count they are divided by is taken over all ranks and micro-batches before the first backward
pass, so the gradient does not depend on how a step's rows are cut into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch

from lmray.adapters.base import Adapter
from lmray.data.batch import Batch, Packed
from lmray.methods.base import Companion, Objective
from lmray.models.fused import Fused
from lmray.models.layers import decoder_layers
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
class Share:
    """This rank's micro-batches of a step. The last `num_idle` count nothing: every rank runs as many forward and
    backward passes, whether or not it has rows for them."""

    batches: Sequence[Batch] = ()
    num_idle: int = 0

    @property
    def counted(self) -> Sequence[Batch]:
        return self.batches[: len(self.batches) - self.num_idle]

    def to(self, device: str) -> Share:
        return Share([batch.to(device) for batch in self.batches], self.num_idle)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    loss: float
    """Mean over the step's supervised tokens, in nats."""
    grad_norm: float
    """Before clipping."""
    num_supervised: int
    num_tokens: int


NONE = Share()


class Learner:
    """A placed model with what it minimises. `adapter`: told of every step. `fused`: its steps take micro-batches of
    one row (see `joined`). `around`: what else holds while the loss of a micro-batch is taken. `companion`: what
    the method keeps beside the model."""

    def __init__(
        self,
        placed: Placed,
        objective: Objective,
        *,
        max_grad_norm: float,
        adapter: Adapter | None = None,
        fused: Fused | None = None,
        around: Sequence[Around] = (),
        companion: Companion | None = None,
        device: str = "cpu",
    ):
        self.placed, self.max_grad_norm, self.companion = placed, max_grad_norm, companion
        self.objective = companion.objective(objective) if companion else objective
        self.adapter, self.fused, self.around = adapter, fused, around
        self._row_sizes = row_sizes(placed.model, device)
        self.padding_apart = follows_length(placed.model.config)

    @property
    def model(self) -> torch.nn.Module:
        return self.placed.model

    @property
    def settled(self) -> bool:
        """Whether losses are those of the kind of model that is kept."""
        return self.companion is None or self.companion.settled

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

    def _gradients(self, share: Share, leaves: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """See `Gradients`. They are taken by themselves, so that neither a weight nor a strategy that shares gradients
        among the ranks learns of them."""
        count = self.placed.all_sum(sum(self.objective.count(batch) for batch in share.counted))
        self.model.eval()
        for layer in decoder_layers(self.model):  # what is kept of it follows the layer's own flag alone
            layer.training = layer.gradient_checkpointing
        total, sums = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
        for number, batch in enumerate(share.batches, 1):
            PULSE.beat(f"search batch {number} of {len(share.batches)}")
            counted = number <= len(share.counted)
            loss = self._loss(batch if counted else replace(batch, lengths=())) * counted / count  # of no tokens at all
            for summed, gradient in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                summed += gradient
            total += float(loss.detach())
        return self.placed.all_sum(total), [self.placed.sum_tensor(one) for one in sums]

    def step(
        self, batches: Sequence[Batch], *, learning_rate: float, step: int = 0, num_idle: int = 0, search: Share = NONE
    ) -> StepReport:
        """Optimizer step number `step` over this rank's micro-batches, already on the device (see `Share`), after the
        companion's over `search`. Not applied where the loss or the gradient norm it reports is not finite."""
        if self.companion is not None:
            use_average(self.placed.optimizer, False)
            self.companion.before_step(step, partial(self._gradients, search))
        counted = Share(batches, num_idle).counted
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
            self.placed.apply(then=lambda: self._follow(step, learning_rate))
        else:
            self.placed.optimizer.zero_grad(set_to_none=True)
        use_average(self.placed.optimizer, True)  # so that all there is between steps, measuring and saving, is of it
        num_tokens = self.placed.all_sum(sum(batch.num_tokens for batch in counted))
        return StepReport(loss, grad_norm, int(count), int(num_tokens))

    def _follow(self, step: int, learning_rate: float) -> None:
        """Tells companion and adapter of the step, and frees the optimizer's state of what is frozen now."""
        if self.companion is not None:
            self.companion.after_step(step, learning_rate)
        if self.adapter is None:
            return
        self.adapter.after_step(self.model, step)
        state = self.placed.optimizer.state
        for parameter in [one for one in state if not one.requires_grad]:
            del state[parameter]
