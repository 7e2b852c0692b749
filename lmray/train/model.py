"""The model of a run: with its adapter, placed to be trained on every rank; and what came of it, kept and measured by
rank 0 alone, which holds no more than one whole model at a time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from gc import collect
from pathlib import Path
from typing import Any

import torch

from lmray.artifacts.files import replace_folder
from lmray.config import Member
from lmray.context import RunContext
from lmray.job import TrainJob
from lmray.methods.base import Kept
from lmray.models.deferred import Deferred
from lmray.models.fused import Fused
from lmray.models.load import load_config, load_model
from lmray.models.machine import map_large_tensors, release_heap
from lmray.models.precision import round_weights, stored_dtype
from lmray.models.quiet import quiet
from lmray.registry import SHARDINGS
from lmray.train.learner import Learner
from lmray.train.plan import Plan
from lmray.train.prepare import Prepared
from lmray.train.step import layers_and_noise


def make_learner(job: TrainJob, plan: Plan, prepared: Prepared, ctx: RunContext) -> Learner:
    """The model with its adapter, placed, and its optimizer; a function of the job and the plan alone."""
    sharding: Any = Member(SHARDINGS).decode(plan.sharding)
    if sharding.divides and plan.device == "cpu":  # who shares a model is short of memory
        map_large_tensors()
    fill: dict[str, Any] = {}
    with ctx.together():
        if plan.loading == "by part":
            deferred = Deferred(prepared.model.folder, plan.dtype, **_how(job, plan))
            fill = {"fill": deferred.fill}
            with deferred.standing_in() if job.adapter.kept == "adapter" else nullcontext():
                adapted = attached(job, plan, deferred.model)
        else:
            adapted = attached(job, plan, base_model(job, plan, prepared, ctx.device))
    torch.manual_seed(job.train.seed + ctx.rank)  # dropout: workers see other rows
    placed = sharding.place(
        adapted,
        lambda placed_model: job.train.optim.make_optimizer(
            job.adapter.parameter_groups(placed_model),
            learning_rate=job.train.learning_rate,
            weight_decay=job.train.weight_decay,
        ),
        ctx.device,
        dtype=plan.dtype,
        **fill,
    )
    (objective,) = job.method.objectives()
    companion = job.method.companion(placed, steps=plan.steps, seed=job.train.seed)
    fused = Fused(placed.model) if plan.kernels == "fused" else None
    around = layers_and_noise(job.train, placed.model, fused)
    release_heap()
    return Learner(
        placed,
        objective,
        max_grad_norm=job.train.max_grad_norm,
        adapter=job.adapter,
        fused=fused,
        around=around,
        companion=companion,
        device=ctx.device,
    )


def base_model(job: TrainJob, plan: Plan, prepared: Prepared, device: str) -> torch.nn.Module:
    """The model as it was before the run, whole, on the CPU unless it is quantised."""
    return load_model(
        prepared.model.folder, plan.dtype, quantization=job.model.quantization, device=device, **_how(job, plan)
    )


def attached(job: TrainJob, plan: Plan, model: torch.nn.Module) -> torch.nn.Module:
    """`model` with the job's adapter as it begins."""
    return job.adapter.for_steps(plan.steps).attach(model.requires_grad_(False), seed=job.train.seed)


def _how(job: TrainJob, plan: Plan) -> dict[str, Any]:
    return {
        "attn_implementation": None if job.model.attn_implementation == "auto" else plan.attention,
        "trust_remote_code": job.model.trust_remote_code,
        "rope_scaling": job.model.rope_scaling,
    }


@dataclass
class Learnt:
    """What a run learnt: the model, or, where no rank holds it whole, the folder with what the adapter saved of it.
    `kept`: what becomes of it, where its method says so."""

    job: TrainJob
    plan: Plan
    prepared: Prepared
    device: str
    found: torch.nn.Module | Path
    kept: Kept | None = None
    made: bool = False
    """Whether that was done to it."""

    def whole(self) -> torch.nn.Module:
        """The model, to be measured: as it is kept."""
        if self.kept is None:
            return self._trained()
        if not self.made:
            self.found, self.made = self.kept.model(self._trained(), self._kept_in()), True
            free_memory()
        smaller: Any = self.found
        return smaller.to(self.device)

    def _kept_in(self) -> torch.dtype:
        """The type that it was trained in, or the base's files where they have a narrower one: a smaller model in a
        wider type would be no smaller."""
        job = self.job
        config = load_config(self.prepared.model.folder, trust_remote_code=job.model.trust_remote_code)
        trained, stored = getattr(torch, self.plan.dtype), stored_dtype(config)
        return stored if stored.itemsize < trained.itemsize else trained

    def _trained(self) -> torch.nn.Module:
        if isinstance(self.found, torch.nn.Module):
            return self.found
        if self.job.adapter.kept == "model":  # its config says how positions are scaled
            how = _how(self.job, self.plan) | {"rope_scaling": None}
            return load_model(self.found, self.plan.dtype, **how).to(self.device)  # type: ignore[arg-type]
        model = attached(self.job, self.plan, base_model(self.job, self.plan, self.prepared, self.device))
        self.job.adapter.load(model, self.found)
        return model.to(self.device)

    @property
    def num_parameters(self) -> int:
        """Of the model, with its adapter."""
        smaller: Any = self.found
        return smaller.num_parameters() if self.made else self.plan.model["parameters"]

    def save(self, folder: Path) -> None:
        """Keeps it in `folder`."""
        if self.kept is not None:
            model: Any = round_weights(self.whole(), self._kept_in())
            with quiet():
                model.save_pretrained(folder)
            self.kept.record(folder, model, self.plan.model)
        elif isinstance(self.found, torch.nn.Module):
            self.job.adapter.save(self.found, folder)
        else:
            replace_folder(self.found, folder)


def measures_base_again(job: TrainJob) -> bool:
    """Whether the untouched model is loaded to be measured, for what was trained does not give it back: it takes the
    other's place in memory."""
    return (job.method.prunes or job.adapter.changes_base) and job.evaluate.base and bool(job.evaluate.tasks)


def free_memory() -> None:
    """Gives back what no name is bound to any more; a placed model's parts refer to each other."""
    collect()
    release_heap()
