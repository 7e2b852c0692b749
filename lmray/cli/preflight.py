"""What `lmray check` finds out of each kind of job: the value for `--json`, lines for people, examples to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmray.job import EvaluateJob, GenerateJob, ServeJob, SweepJob, TrainJob
    from lmray.models.machine import Machine
    from lmray.train.data_facts import Piece

BENCHMARK_TOKENS = 1024
"""Taken for a question where the job has no data: benchmarks bring their own."""


@dataclass
class Found:
    """What a check found; problems are raised instead."""

    value: dict[str, Any]
    lines: list[str]
    examples: list[list[Piece]] = field(default_factory=list)


def wants_cluster(asked: bool) -> bool:
    """Whether to ask a cluster: where one is named, or the user says so."""
    return asked or os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def look(dtype: str, *, on_gpu: bool, cluster: bool) -> tuple[tuple[Machine, ...], float]:
    """The machines a job would run on, and the speed of the slowest; this one, or the nodes of the cluster."""
    if cluster:
        from lmray.on_ray.cluster import connected
        from lmray.on_ray.resources import cluster_machines

        with connected():
            return cluster_machines(dtype, on_gpu=on_gpu)
    from lmray.models.machine import measure_flops, this_machine

    here = this_machine()
    return (here,), measure_flops(dtype, "cuda" if on_gpu and here.gpus else "cpu")


def check_train(job: TrainJob, *, cluster: bool, examples: int, trial: bool = False) -> Found:
    """The plan, the machines beside it, and examples with their loss mask; of a sweep's `trial`, which has no run
    folder yet, no more than that."""
    from lmray.artifacts.files import check_writable
    from lmray.artifacts.store import run_folder
    from lmray.errors import LmrayError
    from lmray.models.machine import this_machine
    from lmray.train.data_facts import preview
    from lmray.train.plan import check_same_run, make_plan
    from lmray.train.preflight import check_parts, check_resources, preflight
    from lmray.train.prepare import prepare

    here = None if cluster else (this_machine(),)
    try:
        if here is not None:
            check_resources(job.resources, here)
        ready = prepare(job)
        plan = make_plan(job, ready)
    except LmrayError:
        check_parts(job, here)
        raise
    if not trial:
        check_same_run(plan, run_folder(job))
        check_writable(run_folder(job))
    on_gpu = job.resources.gpus_per_worker > 0
    machines, speed = look(plan.dtype, on_gpu=on_gpu, cluster=cluster)
    report = preflight(job, plan, machines, flops_per_s=speed)
    shown = preview(ready, examples)
    value = report.to_json()
    value["examples"] = [[asdict(piece) for piece in one] for one in shown]
    return Found(value, plan.lines() + report.lines(), shown)


def check_sweep(job: SweepJob, *, cluster: bool, examples: int) -> Found:
    """The plan of one trial, how many there are, and how many run side by side."""
    from lmray.artifacts.files import check_writable
    from lmray.artifacts.store import run_folder
    from lmray.sweep.program import check_sweep as check_folder
    from lmray.sweep.program import job_of
    from lmray.units import human_bytes, human_seconds

    check_folder(job, run_folder(job))
    check_writable(run_folder(job))
    found = check_train(job_of(job), cluster=cluster, examples=examples, trial=True)
    trials, together = job.search.num_trials, min(job.max_concurrent_trials, job.search.num_trials)
    flight = found.value["preflight"]
    alone = job.job.resources.gpus_per_worker > 0  # trials on CPUs share the cores of a machine
    sharing = 1.0 if alone else max(1.0, together / len(flight["machines"]))
    longest = -(-trials // together) * sharing * flight["total_seconds"][1]
    lines = [
        f"sweep      {trials} trials, {together} side by side, over {', '.join(job.space)}",
        f"           {_objective(job)}; search {job.search.name}, early stopping {job.scheduler.name}",
        f"           up to {human_seconds(longest)} where no trial is stopped early; below, the plan of one trial",
    ]
    needed, there = together * found.value["memory_bytes"]["total"], flight["worker_memory_bytes"]
    if there is not None and len(flight["machines"]) == 1 and needed > there:
        warning = f"{together} trials side by side take about {human_bytes(needed)} of {human_bytes(there)}"
        found.value["warnings"].append(f"{warning}: lower `max_concurrent_trials`")
        lines.append(f"warning    {found.value['warnings'][-1]}")
    head = {"trials": trials, "max_concurrent_trials": together, "space": list(job.space), "seconds": longest}
    return Found({"sweep": head, **found.value}, lines + found.lines, found.examples)


def _objective(job: SweepJob) -> str:
    from lmray.sweep.program import objective_of

    return " of ".join(reversed(objective_of(job)))


def check_evaluate(job: EvaluateJob, *, cluster: bool, examples: int) -> Found:
    """The targets, the held-out data, and the memory that answering takes."""
    from lmray.artifacts.files import check_writable
    from lmray.artifacts.store import run_folder
    from lmray.evaluate.program import prepare

    ready = prepare(job)
    check_writable(run_folder(job))
    args = job.evaluate
    held_out = len(ready.held_out.examples)
    answered = min(held_out, args.max_examples or held_out)
    length = job.data.max_length if job.data else BENCHMARK_TOKENS
    rows = {"rows": args.batch_size, "tokens": length + args.max_new_tokens}
    memory, lines = _generation(job, ready.model.folder, cluster=cluster, **rows)
    tasks = ", ".join(task.name for task in args.tasks)
    head = [
        f"evaluate   {len(job.targets)} target(s): {', '.join(target.label for target in job.targets)}",
        f"data       {held_out} held out, {answered} answered for {tasks}" if job.data else f"data       of {tasks}",
    ]
    value = {
        "targets": [target.label for target in job.targets],
        "tasks": [task.name for task in args.tasks],
        "eval_examples": held_out,
        "answered": answered,
        "model": {"source": job.model.source, "digest": ready.model.digest},
    }
    return Found(value | memory, head + lines)


def check_serve(job: ServeJob, *, cluster: bool, examples: int) -> Found:
    """Adapters, keys and port, and the memory of weights and cache."""
    from lmray.models.source import find_model
    from lmray.serve.prepare import prepare

    plan = prepare(job)
    folder = find_model(plan.source, plan.revision, storage=plan.store).folder
    rows = {"rows": job.engine.max_batch_size, "tokens": job.engine.max_length}
    replicas = max(1, job.autoscaling.min_replicas) * (1 + len(plan.merged))  # a merged model has its own
    memory, lines = _generation(job, folder, cluster=cluster, replicas=replicas, **rows)
    named = [f"{name} ({version[:12]})" for name, version in plan.adapters.items()]
    asked_for = [f"{one.artifact} at {one.stage or 'newest'}, when asked for" for one in plan.served if one.is_pattern]
    merged = [f"{name} (merged, {own.digest[:12]})" for name, own in plan.merged.items()]
    adapters = ", ".join(named + merged + asked_for) or "none"
    head = [
        f"serve      {plan.model_name}, digest {plan.digest[:12]}",
        f"adapters   {adapters}",
        f"http       {job.http.host}:{job.http.port} is free, {len(plan.keys)} key(s)",
        f"replicas   {job.autoscaling.min_replicas} to {job.autoscaling.max_replicas}"
        + (f" of each of {1 + len(plan.merged)} models" if plan.merged else ""),
    ]
    if job.evaluations:
        head.append("evaluates  " + ", ".join(f"{one.job.name} every {one.every_hours:g} h" for one in job.evaluations))
    value: dict[str, Any] = {"evaluations": [one.job.name for one in job.evaluations]}
    value |= {"model": plan.model_name, "digest": plan.digest, "adapters": plan.adapters, "keys": len(plan.keys)}
    return Found(value | memory, head + lines)


def check_generate(job: GenerateJob, *, cluster: bool, examples: int) -> Found:
    """The plan, and the memory of a worker's weights and cache."""
    from lmray.generate.plan import answers_folder, check_begin, make_plan, prepare

    ready = prepare(job)
    plan = make_plan(job, ready)
    check_begin(job, plan)
    rows = {"rows": job.engine.max_batch_size, "tokens": job.engine.max_length}
    memory, lines = _generation(job, ready.model.folder, cluster=cluster, **rows)
    head = [*plan.lines(), f"answers    {answers_folder(job)} ({job.output.format})"]
    return Found(plan.to_json() | {"answers": str(answers_folder(job))} | memory, head + lines)


def _generation(
    job: Any, folder: Any, *, cluster: bool, rows: int, tokens: int, replicas: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Memory of a worker that answers `rows` sequences of `tokens` tokens side by side; of an endpoint, of each of the
    fewest `replicas` that run. Raises CapacityError."""
    import torch

    from lmray.models.precision import resolve_dtype
    from lmray.models.shape import read_shape
    from lmray.train.memory import CUDA_PROCESS_BYTES, process_bytes
    from lmray.train.preflight import check_resources, check_weights, worker_memory
    from lmray.units import human_bytes

    on_gpu = job.resources.gpus_per_worker > 0
    dtype, reason = resolve_dtype(job.model.dtype, "cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    shape = read_shape(folder, dtype=dtype, trust_remote_code=job.model.trust_remote_code)
    machines, _ = look(dtype, on_gpu=on_gpu, cluster=cluster)
    check_resources(job.resources, machines)
    parts = {
        "weights": shape.weights_bytes,
        "cache": shape.cache_bytes(dtype, rows=rows, tokens=tokens),
        "process": CUDA_PROCESS_BYTES if on_gpu else process_bytes(),
    }
    workers = replicas or job.resources.workers.max
    total, there = sum(parts.values()), worker_memory(machines, workers=workers, on_gpu=on_gpu)
    whole = f", {human_bytes(workers * total)} for {workers} of them" if workers > 1 else ""
    text = ", ".join(f"{part} {human_bytes(size)}" for part, size in parts.items())
    lines = [
        f"precision  {dtype}: {reason}",
        f"memory     at most {human_bytes(total)} a worker{whole}: {text}; the cache is of {rows} rows of {tokens}"
        " tokens",
        *_machines(machines),
    ]
    warnings = []
    if there is not None:
        check_weights(parts["weights"], there)
        if total > there:
            warnings.append(
                f"a full cache takes about {human_bytes(total)} of {human_bytes(there)}: lower rows or length"
            )
    lines += [f"warning    {line}" for line in warnings]
    memory = {"dtype": dtype, "memory_bytes": parts | {"total": total}, "worker_memory_bytes": there}
    return memory | {"workers": workers, "machines": [asdict(one) for one in machines], "warnings": warnings}, lines


def _machines(machines: Sequence[Machine]) -> list[str]:
    from lmray.train.preflight import machine_text

    return [f"machines   {', '.join(map(machine_text, machines))}"]


CHECKS = {
    "train": check_train,
    "sweep": check_sweep,
    "evaluate": check_evaluate,
    "serve": check_serve,
    "generate": check_generate,
}
"""Kind of job -> what looks at it."""
