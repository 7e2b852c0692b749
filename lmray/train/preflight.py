"""What can be said of a training job before it takes a worker: the plan beside the machines that would run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmray.data.examples import read_examples
from lmray.errors import CapacityError, ConfigError, LmrayError, Problem
from lmray.job import Resources, TrainJob
from lmray.models.machine import Machine
from lmray.models.room import check_room, room_for
from lmray.models.source import model_of
from lmray.train.duration import EFFICIENCY, FORMULA, seconds
from lmray.train.memory import USABLE, largest_micro_batch
from lmray.train.plan import Plan
from lmray.units import human_bytes, human_seconds


@dataclass(frozen=True)
class Preflight:
    """A plan on machines."""

    plan: Plan
    resources: str
    """What the job asks for, for people."""
    machines: tuple[Machine, ...]
    worker_memory_bytes: int | None
    """What the smallest machine gives one worker; None where a GPU did not say."""
    max_micro_batch: int | None
    """Rows of one forward pass that fit."""
    flops_per_s: float
    """Measured here, of plain matrix products."""
    step_seconds: tuple[float, float, float]
    """Shortest, likely, longest."""
    total_seconds: tuple[float, float, float]
    cost: tuple[float, float, float] | None
    """In the currency of `resources.price_per_worker_hour`."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name not in ("plan", "warnings")}
        plan = self.plan.to_json()
        return plan | {"preflight": own | {"efficiency": EFFICIENCY}, "warnings": [*plan["warnings"], *self.warnings]}

    def lines(self) -> list[str]:
        """For people: what the plan's own lines do not say."""
        low, likely, high = self.total_seconds
        there = human_bytes(self.worker_memory_bytes) if self.worker_memory_bytes else "an unknown amount"
        lines = [
            f"resources  {self.resources}",
            f"machines   {', '.join(map(machine_text, self.machines))}",
        ]
        if self.max_micro_batch is not None:
            lines.append(
                f"fits       at most {self.max_micro_batch} rows a forward pass into {USABLE:.0%} of {there} a worker"
            )
        lines.append(
            f"time       about {human_seconds(likely)} of steps and held-out loss, likely between {human_seconds(low)} "
            f"and {human_seconds(high)}; answers are not counted"
        )
        lines.append(
            f"           {self.plan.flops['total']:.2e} operations ({FORMULA}) at "
            f"{EFFICIENCY[0]:.0%} to {EFFICIENCY[2]:.0%} of the {self.flops_per_s / 1e9:.0f} GFLOP/s measured here"
        )
        if self.cost:
            lines.append(
                f"cost       about {self.cost[1]:.2f}, likely between {self.cost[0]:.2f} and {self.cost[2]:.2f}"
            )
        return lines + [f"warning    {line}" for line in self.warnings]


def preflight(job: TrainJob, plan: Plan, machines: Sequence[Machine], *, flops_per_s: float) -> Preflight:
    """Puts `plan` on `machines`. Raises CapacityError where the workers, or the weights alone, can never fit."""
    resources = job.resources
    on_gpu = resources.gpus_per_worker > 0
    check_resources(resources, machines)
    workers = workers_now(resources, machines)
    memory = worker_memory(machines, workers=workers, on_gpu=on_gpu)
    warnings, most = [], None
    if memory is not None:
        count = job.train.per_device_train_batch_size
        most = largest_micro_batch(
            plan.memory_bytes["total"], rows=count, row_bytes=plan.row_bytes, memory_bytes=memory
        )
        fewest = worker_memory(machines, workers=resources.workers.min, on_gpu=on_gpu)
        check_weights(plan.memory_bytes["weights"], fewest or memory)
        if plan.memory_bytes["total"] > USABLE * memory:
            warnings.append(_too_large(plan, memory, most, count))
    speed = workers * flops_per_s * (1.0 if on_gpu else _share_of_cores(resources, machines))
    total = seconds(plan.flops["total"], speed)
    price = resources.price_per_worker_hour
    return Preflight(
        plan=plan,
        resources=_asked(resources, now=workers),
        machines=tuple(machines),
        worker_memory_bytes=memory,
        max_micro_batch=most,
        flops_per_s=flops_per_s,
        step_seconds=seconds(plan.flops["step"], speed),
        total_seconds=total,
        cost=None if price is None else tuple(run_cost(resources, one, workers=workers) for one in total),  # type: ignore[arg-type]
        warnings=tuple(warnings),
    )


def _share_of_cores(resources: Resources, machines: Sequence[Machine]) -> float:
    """The part of a machine that one worker computes with; the speed was measured with all of it."""
    cores = min(one.cpus for one in machines)
    if resources.cpus_per_worker is not None:
        return min(1.0, resources.cpus_per_worker / cores)
    return 1 / -(-workers_now(resources, machines) // len(machines))


def _asked(resources: Resources, *, now: int) -> str:
    cores = (
        "an even share of the cores" if resources.cpus_per_worker is None else f"{resources.cpus_per_worker} core(s)"
    )
    room = f"; room for {now} now, figures are for so many" if resources.workers.elastic else ""
    return f"{resources.workers} worker(s) with {cores} and {resources.gpus_per_worker} GPU(s) each{room}"


def run_cost(resources: Resources, num_seconds: float, *, workers: int) -> float:
    """What so many workers cost for so long; the price must be given."""
    assert resources.price_per_worker_hour is not None
    return workers * resources.price_per_worker_hour * num_seconds / 3600


def check_resources(resources: Resources, machines: Sequence[Machine]) -> None:
    """Raises CapacityError where `machines` can never hold the workers, or the fewest of a range."""
    check_room(machines, workers=resources.workers, cpus=resources.cpus_per_worker, gpus=resources.gpus_per_worker)


def workers_now(resources: Resources, machines: Sequence[Machine]) -> int:
    """How many workers run where `machines` are all there is."""
    return resources.workers.within(
        room_for(machines, cpus=resources.cpus_per_worker or 1, gpus=resources.gpus_per_worker)
    )


def worker_memory(machines: Sequence[Machine], *, workers: int, on_gpu: bool) -> int | None:
    """What one of `workers` gets on the smallest machine that runs any; workers on one machine share its memory."""
    if on_gpu:
        sizes = [one.gpu_memory_bytes for one in machines if one.gpus]
        return None if None in sizes else min(filter(None, sizes), default=None)
    shared = -(-workers // len(machines))
    return min(one.memory_bytes for one in machines) // shared


def check_weights(weights_bytes: int, memory_bytes: int) -> None:
    """Raises CapacityError where the weights alone exceed a worker's memory."""
    if weights_bytes > memory_bytes:
        hint = "use a smaller model, `model.dtype: bfloat16`, or a machine with more memory"
        found = f"the weights alone take {human_bytes(weights_bytes)}"
        raise CapacityError("model", found, allowed=f"{human_bytes(memory_bytes)} a worker", hint=hint)


def _too_large(plan: Plan, memory: int, most: int, count: int) -> str:
    advice = (
        f"set `train.per_device_train_batch_size={most}` and raise `gradient_accumulation_steps` instead"
        if 0 < most < count
        else "lower `data.max_length`, or take a machine with more memory"
    )
    return (
        f"the job takes about {human_bytes(plan.memory_bytes['total'])} a worker of {human_bytes(memory)}, and may be "
        f"ended for it: {advice}"
    )


def machine_text(one: Machine) -> str:
    """`one` for people."""
    gpus = f", {one.gpus:g} GPU(s)" if one.gpus else ""
    size = f" of {human_bytes(one.gpu_memory_bytes)}" if one.gpu_memory_bytes else ""
    return f"{one.name} ({one.cpus:g} cores, {human_bytes(one.memory_bytes)}{gpus}{size})"


def check_parts(job: TrainJob, machines: Sequence[Machine] | None) -> None:
    """Raises every problem of model, data, sharding and resources (where the machines are known) at once, not only the
    first."""
    steps: tuple[Callable[[], Any], ...] = (
        lambda: model_of(job),
        lambda: read_examples(job.data),
        lambda: job.sharding.resolve(workers=job.resources.workers.max),
        lambda: check_resources(job.resources, machines) if machines else None,
    )
    raise_all(steps)


def raise_all(steps: Sequence[Callable[[], Any]]) -> None:
    """Takes every step; raises what one raised, or one ConfigError with the problems of all."""
    errors: list[LmrayError] = []
    for step in steps:
        try:
            step()
        except LmrayError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [
            problem
            for error in errors
            for problem in getattr(error, "problems", (Problem(error.where, error.found, error.allowed, error.hint),))
        ]
        raise ConfigError.of(problems)
