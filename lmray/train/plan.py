"""The plan: what a job became before it started. Every `auto` resolved, digests, sizes; written as `plan.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmray.artifacts.files import read_json, sha256_json
from lmray.artifacts.same_plan import check_same_plan
from lmray.config import dump
from lmray.data import batch
from lmray.data.stream import Stream
from lmray.errors import ArtifactError
from lmray.job import TrainJob
from lmray.models.precision import resolve_dtype
from lmray.models.rope import RopeScaling
from lmray.models.shape import ModelShape, read_shape
from lmray.sharding.base import Sharding
from lmray.train.data_facts import data_facts, data_warnings
from lmray.train.duration import forward_flops, step_flops
from lmray.train.memory import Rows, bytes_per_row, memory_parts, process_bytes, worst_rows
from lmray.train.plan_steps import (
    attention_asked,
    check_divided,
    check_goes_on,
    check_layers,
    check_pruned,
    check_quantization,
    check_start,
    check_virtual_tokens,
    kernels_of,
    loading_of,
    sharding_of,
    step_reasons,
)
from lmray.train.prepare import Prepared, prepare
from lmray.units import human_bytes, human_count

PLACEMENT = ("name", "storage", "sharding", "resources", "output", "report_to")
"""Fields of a job that are not part of what it computes."""
KEPT = ("rows_per_step", "samples", "steps")
"""What a run keeps of the plan that it began with."""
WATCHED = ("train.divergence_factor",)
"""Fields below those that decide when a run is given up, not what it computes: a run may go on under another value."""


@dataclass(frozen=True)
class Plan:
    """All that can be known before a worker starts."""

    name: str
    run_key: str
    fields: Mapping[str, Any]
    """The job's semantic fields, flat, by dotted path: what `run_key` is made of."""
    model: Mapping[str, Any]
    """`source`, `revision`, `digest`, `parameters`, `trainable_parameters`; `rope_scaling` where there is one."""
    data: Mapping[str, Any]
    """`digest`, `formats`, counts of examples, rows and tokens, lengths, stop token and BOS."""
    device: str
    dtype: str
    attention: str
    """How the model's own code computes it, by the name that `transformers` has."""
    kernels: str
    """`fused` or `plain`; see `lmray.models.fused`."""
    sharding: Mapping[str, Any]
    loading: str
    """`whole` or `by part`: what a worker reads of the weights at first."""
    reasons: Mapping[str, str]
    """Why each `auto` became what it is."""
    rows_per_step: int
    samples: int
    """Rows of the whole run."""
    steps: int
    memory_bytes: Mapping[str, int]
    """Estimate for one worker, by part and in `total`, of the micro-batch that takes most."""
    row_bytes: int
    """What one more row in the micro-batch takes."""
    flops: Mapping[str, float]
    """Floating point operations: `step` (one optimizer step, all workers), `eval` (one pass over what is held out),
    `total` (all steps, all passes)."""
    warnings: tuple[str, ...]
    """What is no error and yet likely not meant."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: one fact a line."""
        model, data, memory = self.model, self.data, self.memory_bytes
        share = model["trainable_parameters"] / model["parameters"]
        parts = ", ".join(f"{part} {human_bytes(size)}" for part, size in memory.items() if part != "total")
        empty = f"{data['empty']} without an answer token left out: {', '.join(data['empty_rows'])}"
        return [
            *self._first_lines(),
            f"precision  {self.dtype}: {self.reasons['dtype']}",
            *([f"weights    {quantised}"] if (quantised := self.reasons.get("quantization")) else []),
            f"attention  {self.attention}: {self.reasons['attention']}",
            f"loss       {self.reasons['loss']}",
            f"kernels    {self.kernels}: {self.reasons['kernels']}",
            f"sharding   {self.sharding['name']}: {self.reasons['sharding']}",
            *([f"pruning    {how}"] if (how := self.reasons.get("pruning")) else []),
            *([f"loading    {self.loading}: {why}"] if (why := self.reasons.get("loading")) else []),
            *self._positions(),
            f"trained    {human_count(model['trainable_parameters'])} of {human_count(model['parameters'])} parameters "
            f"({share:.2%}), digest of the base {model['digest'][:12]}",
            *(f"data       {line}" for line in data["formats"]),
            f"data       {data['train_examples']} to train on, {self._searched()}{data['eval_examples']} held out, "
            f"{data['dropped']} over {data['max_length']} tokens dropped, {data['truncated']} truncated",
            *([f"data       {empty}"] if data["empty"] else []),
            *self._mixture(),
            *self._joined(),
            f"tokens     {human_count(data['train_tokens'])} an epoch, {data['supervised_share']:.0%} supervised",
            f"lengths    {data['tokens_median']} (median), {data['tokens_p90']} (p90), {data['tokens_p95']} (p95), "
            f"{data['tokens_p99']} (p99), {data['tokens_max']} (longest) tokens an example",
            *self._special_tokens(),
            f"memory     {human_bytes(memory['total'])} a worker: {parts}",
            *(f"warning    {line}" for line in self.warnings),
        ]

    def _searched(self) -> str:
        count = self.data.get("search_examples", 0)
        return f"{count} to search masks on, " if count else ""

    def _positions(self) -> list[str]:
        scaling = RopeScaling.of(self.model)
        return [f"positions  {scaling}"] if scaling else []

    def _mixture(self) -> list[str]:
        tokens, total = self.data["mixture"], self.data["train_tokens"]
        shares = ", ".join(f"{source} {count / total:.1%}" for source, count in tokens.items())
        return [f"mixture    {shares} of the tokens"] if tokens else []

    def _joined(self) -> list[str]:
        how = {"through": "seeing the ones before it", "apart": "seeing only itself"}
        if not self.data["joined"]:
            return []
        row = f"{self.data['rows']} of {self.data['max_length']} tokens, the last may be shorter"
        return [f"rows       {row}: the examples joined, each {how[self.data['joined']]}"]

    def head(self) -> list[str]:
        """The few lines a run begins with."""
        memory = f"memory     about {human_bytes(self.memory_bytes['total'])} a worker"
        return [*self._first_lines(), memory, *(f"warning    {line}" for line in self.warnings)]

    def _first_lines(self) -> list[str]:
        model, data = self.model, self.data
        return [
            f"run        {self.name}, key {self.run_key[:12]}",
            f"model      {model['source']}, {human_count(model['parameters'])} parameters, "
            f"{human_count(model['trainable_parameters'])} trained, {self.dtype} on {self.device}",
            f"steps      {self.steps} of {self.rows_per_step} rows, {data['rows']} rows an epoch",
        ]

    def _special_tokens(self) -> list[str]:
        stop, bos = self.data["stop"], self.data["bos"]
        begin = "no BOS token" if bos["id"] is None else f"BOS {bos['token']} (id {bos['id']})"
        return [
            f"stop       {stop['token']} (id {stop['id']}): the last supervised token of {stop['share']:.0%} of the "
            f"examples",
            f"begin      {begin}: starts {bos['examples']} examples, doubled in {bos['doubled']}",
        ]


def make_plan(job: TrainJob, prepared: Prepared | None = None) -> Plan:
    """The plan of `job`; reads model config and data, loads no weights. Raises what `prepare` raises, and ConfigError
    or CapacityError for an adapter or a sharding that does not fit."""
    for tracker in job.report_to:
        tracker.check()
    ready = prepared or prepare(job)
    device = "cuda" if job.resources.gpus_per_worker else "cpu"
    dtype, dtype_reason = resolve_dtype(job.model.dtype, device if torch.cuda.is_available() else "cpu")
    check_virtual_tokens(job)
    check_pruned(job)
    rows_per_step, samples, steps = _schedule(job, len(ready.rows))
    shape = read_shape(
        ready.model.folder,
        lambda model: _attached(job, model, steps),
        dtype=dtype,
        quantization=job.model.quantization,
        attn_implementation=attention_asked(job.model.attn_implementation, device),
        trust_remote_code=job.model.trust_remote_code,
        rope_scaling=job.model.rope_scaling,
    )
    check_layers(job.train, shape)
    job.train.optim.check(shape.trained_shapes, device=device)
    rows, settings = _largest(job, ready, shape), _settings(job, shape, dtype, device)
    sharding, sharding_reason = sharding_of(job, shape, rows, settings)
    check_divided(job, sharding)
    check_start(job, shape)
    check_goes_on(job, sharding)
    check_pruned(job, sharding)
    if job.model.quantization:
        check_quantization(job, sharding)
    kernels, kernels_reason = kernels_of(job, shape.unfit, device, sharding)
    loading, loading_reason = loading_of(job, shape, sharding)
    model = _model_facts(job, ready, shape)
    data = data_facts(ready, max_length=job.data.max_length) | {"joined": job.method.joins}
    rows = replace(rows, fused=kernels == "fused")
    fields = _flat({key: value for key, value in dump(job).items() if key not in PLACEMENT})
    fields = {key: value for key, value in fields.items() if key not in WATCHED}
    return Plan(
        name=job.name,
        run_key=sha256_json([fields, model["digest"], data["digest"]]),
        fields=fields,
        model=model,
        data=data,
        device=device,
        dtype=dtype,
        attention=shape.attention,
        kernels=kernels,
        sharding=dump(sharding),
        loading=loading,
        reasons={"dtype": dtype_reason, "sharding": sharding_reason, "kernels": kernels_reason}
        | loading_reason
        | step_reasons(job, shape, steps),
        rows_per_step=rows_per_step,
        samples=samples,
        steps=steps,
        memory_bytes=memory_parts(shape, rows, **settings, sharding=sharding, reads_whole=loading == "whole"),
        row_bytes=bytes_per_row(shape, rows, dtype, device=device),
        flops=_flops(job, shape, data, rows_per_step=rows_per_step, steps=steps),
        warnings=(*_job_warnings(job), *_disk_warnings(sharding), *data_warnings(data)),
    )


def _attached(job: TrainJob, model: Any, steps: int) -> Any:
    adapted = job.adapter.for_steps(steps).attach(model, seed=0)
    job.method.check(adapted, steps=steps)
    return adapted


def _schedule(job: TrainJob, num_rows: int) -> tuple[int, int, int]:
    """Rows of a step, rows of the whole run, steps."""
    args = job.train
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * job.resources.workers.max
    if args.max_steps:
        return rows_per_step, args.max_steps * rows_per_step, args.max_steps
    samples = max(1, round(args.num_train_epochs * num_rows))
    return rows_per_step, samples, math.ceil(samples / rows_per_step)


def _largest(job: TrainJob, ready: Prepared, shape: ModelShape) -> Rows:
    """The micro-batch that takes most memory."""
    again, eager = job.train.gradient_checkpointing, shape.attention == "eager"

    def worst(rows: batch.Rows | Stream, count: int) -> Rows:
        found = worst_rows(rows, count)
        how = {"eager": eager, "again": again, "distilled": job.method.distils}
        return replace(found, tokens=found.tokens + job.adapter.virtual_tokens, **how)

    largest = worst(ready.rows, job.train.per_device_train_batch_size)
    if not ready.search_rows:
        return largest
    return replace(largest, search=replace(worst(ready.search_rows, 1), searched=True))


def _settings(job: TrainJob, shape: ModelShape, dtype: str, device: str) -> dict[str, Any]:
    """Of the memory estimate. Optimizers say their size for float32 weights."""
    optimizer_bytes = job.train.optim.state_bytes(shape.trained_shapes) * shape.trained_bytes
    optimizer_bytes //= 4 * max(1, shape.trained)
    sizes = {"process_bytes": process_bytes(), "optimizer_bytes": optimizer_bytes}
    fewest = job.resources.workers.min  # each holds most then
    return {"dtype": dtype, "device": device, "workers": fewest, **sizes}


def _model_facts(job: TrainJob, ready: Prepared, shape: ModelShape) -> dict[str, Any]:
    found = ready.model
    model: dict[str, Any] = {"source": found.source, "revision": found.revision, "digest": found.digest}
    if job.model.rope_scaling is not None:
        model["rope_scaling"] = dump(job.model.rope_scaling)
    return model | {"parameters": shape.total, "trainable_parameters": shape.trained}


def check_same_run(plan: Plan, folder: Path) -> None:
    """Raises ConfigError where `folder` holds another run under the same name, naming what differs."""
    before = _earlier(folder)
    if before is not None:
        check_same_plan(before, plan.to_json(), folder)


def continued(plan: Plan, folder: Path) -> Plan:
    """`plan` with the steps that the run in `folder` began with: at another number of workers they stay what they
    were, so that the curve does."""
    before = _earlier(folder)
    return replace(plan, **{name: before[name] for name in KEPT}) if before else plan


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The plan that the run in `folder` began with, if there is one. Raises ArtifactError where it is spoilt."""
    path = folder / "plan.json"
    if not path.is_file():
        return None
    hint = f"remove it, and the job as it was goes on from its last checkpoint; or remove {folder} to start over"
    found = read_json(path, hint=hint)
    if not isinstance(found, dict) or not {"run_key", "fields", "model", "data", *KEPT} <= found.keys():
        raise ArtifactError(str(path), "is spoilt: it is no plan", hint=hint)
    return found


def _job_warnings(job: TrainJob) -> list[str]:
    return [*_trust_warnings(job), *job.method.warnings(), *_schedule_warnings(job)]


def _trust_warnings(job: TrainJob) -> list[str]:
    if not job.model.trust_remote_code:
        return []
    return [f"Python code that comes with `{job.model.source}` runs on every worker: `model.trust_remote_code` is true"]


def _disk_warnings(sharding: Sharding) -> list[str]:
    if sharding.goes_on:
        return []
    return ["sharding: with `nvme` a failure ends the run; it goes on from its checkpoint with `cpu` instead"]


def _schedule_warnings(job: TrainJob) -> list[str]:
    name = job.train.lr_scheduler_type.name
    if not job.train.optim.averages or name == "constant":
        return []
    found = f"`{job.train.optim.name}` averages weights in place of a schedule, and `{name}` lowers its learning rate"
    return [f"{found}: set `train.lr_scheduler_type: constant`"]


def _flops(
    job: TrainJob, shape: ModelShape, data: Mapping[str, Any], *, rows_per_step: int, steps: int
) -> dict[str, float]:
    row_tokens = data["train_tokens"] / data["rows"]
    supervised = rows_per_step * data["supervised_tokens"] / data["rows"]
    step = step_flops(shape, tokens=rows_per_step * row_tokens, supervised=supervised, row_tokens=row_tokens)
    held_out = forward_flops(shape, tokens=data["eval_tokens"])
    passes = 1 + (steps - 1) // job.train.eval_steps if job.train.eval_steps else 1
    passes += 2 * bool(job.evaluate.tasks and job.evaluate.base)  # the base, and the tuned model by example
    return {"step": step, "eval": held_out, "total": job.method.passes(steps) * step + passes * held_out}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {name: value for key, item in tree.items() for name, value in _flat(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}
