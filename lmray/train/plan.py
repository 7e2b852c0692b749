"""The plan: what a job became before it started. Every `auto` resolved, digests, sizes; written as `plan.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmray.artifacts.files import sha256_json
from lmray.config import dump
from lmray.errors import ConfigError
from lmray.job import TrainJob
from lmray.models.precision import resolve_dtype
from lmray.train.prepare import Prepared, prepare
from lmray.units import human_bytes, human_count

PLACEMENT = ("name", "storage", "resources", "output", "report_to")
"""Fields of a job that are not part of what it computes."""
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
    """`source`, `revision`, `digest`, `parameters`, `trainable_parameters`."""
    data: Mapping[str, Any]
    """`digest`, `formats`, counts of examples, rows and tokens."""
    device: str
    dtype: str
    sharding: Mapping[str, Any]
    reasons: Mapping[str, str]
    """Why each `auto` became what it is."""
    rows_per_step: int
    samples: int
    """Rows of the whole run."""
    steps: int
    memory_bytes: Mapping[str, int]
    """Estimate for one worker, by part and in `total`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: one fact a line."""
        model, data, memory = self.model, self.data, self.memory_bytes
        share = model["trainable_parameters"] / model["parameters"]
        parts = ", ".join(f"{part} {human_bytes(size)}" for part, size in memory.items() if part != "total")
        return [
            f"run        {self.name}, key {self.run_key[:12]}",
            f"model      {model['source']}, {human_count(model['parameters'])} parameters, "
            f"{human_count(model['trainable_parameters'])} trained ({share:.2%}), digest {model['digest'][:12]}",
            f"precision  {self.dtype}: {self.reasons['dtype']}",
            f"sharding   {self.sharding['name']}: {self.reasons['sharding']}",
            *(f"data       {line}" for line in data["formats"]),
            f"data       {data['train_examples']} to train on, {data['eval_examples']} held out, "
            f"{data['dropped']} over {data['max_length']} tokens dropped, {data['truncated']} truncated",
            f"tokens     {human_count(data['train_tokens'])} an epoch, {data['supervised_share']:.0%} supervised, "
            f"examples of {data['tokens_median']} (median) to {data['tokens_max']} tokens, {data['rows']} rows",
            f"steps      {self.steps} of {self.rows_per_step} rows",
            f"memory     {human_bytes(memory['total'])} a worker: {parts}",
        ]


def make_plan(job: TrainJob, prepared: Prepared | None = None) -> Plan:
    """The plan of `job`; reads model config and data, loads no weights. Raises what `prepare` raises, and ConfigError
    or CapacityError for an adapter or a sharding that does not fit."""
    for tracker in job.report_to:
        tracker.check()
    ready = prepared or prepare(job)
    device = "cuda" if job.resources.gpus_per_worker else "cpu"
    dtype, dtype_reason = resolve_dtype(job.model.dtype, device if torch.cuda.is_available() else "cpu")
    sharding, sharding_reason = job.sharding.resolve(workers=job.resources.workers)
    config = AutoConfig.from_pretrained(ready.model.folder, local_files_only=True)
    sizes = _parameters(job, config)
    rows_per_step = (
        job.train.per_device_train_batch_size * job.train.gradient_accumulation_steps * job.resources.workers
    )
    samples = max(1, round(job.train.num_train_epochs * len(ready.rows)))
    steps = job.train.max_steps or math.ceil(samples / rows_per_step)
    if job.train.max_steps:
        samples = steps * rows_per_step
    model = {"source": job.model.source, "revision": job.model.revision, "digest": ready.model.digest}
    data = _data_facts(job, ready)
    fields = _flat({key: value for key, value in dump(job).items() if key not in PLACEMENT})
    fields = {key: value for key, value in fields.items() if key not in WATCHED}
    return Plan(
        name=job.name,
        run_key=sha256_json([fields, model["digest"], data["digest"]]),
        fields=fields,
        model=model | {"parameters": sizes.total, "trainable_parameters": sizes.trained},
        data=data,
        device=device,
        dtype=dtype,
        sharding=dump(sharding),
        reasons={"dtype": dtype_reason, "sharding": sharding_reason},
        rows_per_step=rows_per_step,
        samples=samples,
        steps=steps,
        memory_bytes=_memory(job, ready, sizes, dtype),
    )


def check_same_run(plan: Plan, folder: Path) -> None:
    """Raises ConfigError where `folder` holds another run under the same name, naming what differs."""
    path = folder / "plan.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["run_key"] == plan.run_key:
        return
    keys = sorted(set(before["fields"]) | set(plan.fields))
    changed = [
        f"{key}: {before['fields'].get(key)} -> {plan.fields.get(key)}"
        for key in keys
        if before["fields"].get(key) != plan.fields.get(key)
    ]
    changed += [
        f"{part} digest" for part in ("model", "data") if before[part]["digest"] != getattr(plan, part)["digest"]
    ]
    hint = f"give the job another `name`, or remove {folder} to start over"
    raise ConfigError(f"run `{plan.name}`", "is already there with other content: " + "; ".join(changed), hint=hint)


@dataclass(frozen=True)
class _Sizes:
    total: int
    trained: int
    weights_bytes: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def _parameters(job: TrainJob, config: Any) -> _Sizes:
    """Counted on a model without storage, adapter attached: target modules are checked before anything starts."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        base.requires_grad_(False)
        num_base = sum(parameter.numel() for parameter in base.parameters())
        model = job.adapter.attach(base, seed=0)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shape = (config.num_hidden_layers, config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size))
    return _Sizes(total, trained, num_base, *shape, config.vocab_size)


def _data_facts(job: TrainJob, ready: Prepared) -> dict[str, Any]:
    lengths = sorted(map(len, ready.train.examples))
    tokens, supervised = sum(lengths), sum(one.num_supervised for one in ready.train.examples)
    return {
        "digest": ready.examples.digest,
        "formats": list(ready.examples.formats),
        "train_examples": len(ready.train.examples),
        "eval_examples": len(ready.eval.examples),
        "dropped": ready.train.num_dropped + ready.eval.num_dropped,
        "truncated": ready.train.num_truncated + ready.eval.num_truncated,
        "max_length": job.data.max_length,
        "train_tokens": tokens,
        "supervised_share": round(supervised / tokens, 4),
        "tokens_median": lengths[len(lengths) // 2],
        "tokens_max": lengths[-1],
        "rows": len(ready.rows),
    }


def _memory(job: TrainJob, ready: Prepared, sizes: _Sizes, dtype: str) -> dict[str, int]:
    """Bytes by part, without the process itself (about 0.7 GiB).

    Activations: what the backward pass keeps of each layer for one micro-batch, some 24 tensors of the hidden width
    and 8 of the MLP's a token, fitted to peaks of LoRA on a Llama model on a CPU. Logits: of supervised tokens only,
    in float32 with their gradient.
    """
    width = 2 if dtype == "bfloat16" else 4
    tokens = job.train.per_device_train_batch_size * max(sum(map(len, row)) for row in ready.rows)
    supervised = sum(one.num_supervised for one in ready.train.examples) / sum(map(len, ready.train.examples))
    parts = {
        "weights": sizes.weights_bytes * width + sizes.trained * 4,
        "gradients": sizes.trained * 4,
        "optimizer": sizes.trained * 8,
        "activations": sizes.layers * tokens * width * (24 * sizes.hidden + 8 * sizes.intermediate),
        "logits": int(tokens * supervised * sizes.vocabulary * (2 * 4 + width)),
    }
    return parts | {"total": sum(parts.values())}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {name: value for key, item in tree.items() for name, value in _flat(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}
