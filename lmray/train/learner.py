"""The one learner: forward, backward and step for any method. Runs on every rank.

Losses are sums; the count they are divided by is taken over all ranks and micro-batches before the first backward
pass, so the gradient does not depend on how a step's rows are cut into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmray.data.batch import Batch
from lmray.methods.base import Objective
from lmray.models.precision import computing
from lmray.sharding.base import Placed


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
    """A placed model with what it minimises."""

    def __init__(self, placed: Placed, objective: Objective, *, max_grad_norm: float):
        self.placed, self.objective, self.max_grad_norm = placed, objective, max_grad_norm

    @property
    def model(self) -> torch.nn.Module:
        return self.placed.model

    def step(self, batches: Sequence[Batch], *, learning_rate: float) -> StepReport:
        """One optimizer step over this rank's micro-batches, already on the device. Not applied where the loss or the
        gradient norm it reports is not finite."""
        optimizer = self.placed.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        count = self.placed.all_sum(sum(self.objective.count(batch) for batch in batches))
        self.model.train()
        total = 0.0
        for batch in batches:
            with computing(self.model):
                loss_sum = self.objective.loss(self.model, batch)
            (loss_sum / count).backward()
            total += float(loss_sum.detach())
        grad_norm, loss = self.placed.clip_grad_norm(self.max_grad_norm), self.placed.all_sum(total) / count
        if math.isfinite(grad_norm) and math.isfinite(loss):  # on every rank alike; else the weights stay as they were
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens = self.placed.all_sum(sum(batch.num_tokens for batch in batches))
        return StepReport(loss, grad_norm, int(count), int(num_tokens))
