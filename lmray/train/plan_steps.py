"""What the plan decides of training steps: attention, loss, kernels, sharding, and what of it goes together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmray.config import dump
from lmray.errors import ConfigError
from lmray.job import TrainArgs, TrainJob
from lmray.models.machine import this_machine
from lmray.models.quantised import check_library
from lmray.models.shape import ModelShape
from lmray.sharding.base import Need, Sharding
from lmray.train.memory import USABLE, Rows, memory_parts

QUANTISED = {
    "nf4": "nf4 with double quantisation in the linear layers, frozen",
    "int8": "int8 in the linear layers, frozen",
}
"""What weights are quantised to, for the plan."""

GPU_ATTENTION = {
    "flash_attention_2": "its kernels are a GPU's",
    "flex_attention": "PyTorch takes its gradient on GPUs only",
}
"""Why an attention cannot train on a CPU."""


def attention_asked(name: str, device: str) -> str | None:
    """The attention a model is to be made with; None leaves it to `transformers`. Raises ConfigError for one that
    cannot train on `device`."""
    if device == "cpu" and name in GPU_ATTENTION:
        found = f"`{name}` cannot train on a CPU: {GPU_ATTENTION[name]}"
        raise ConfigError("model.attn_implementation", found, allowed="auto, eager, sdpa")
    return None if name == "auto" else name


def check_layers(args: TrainArgs, shape: ModelShape) -> None:
    """Raises ConfigError where decoder layers are to be run again or compiled, and the model's code has none that
    can."""
    for name in ("gradient_checkpointing", "torch_compile"):
        if getattr(args, name) and not shape.layers_again:
            found = f"`{name}` needs decoder layers as `transformers` builds them, and this model has none"
            raise ConfigError(f"train.{name}", found, hint="leave it out")


def fused_conflict(job: TrainJob) -> str | None:
    """Why fused kernels and what the job says of its steps do not go together, or None."""
    if job.model.attn_implementation != "auto":
        return f"attention is to be computed by `{job.model.attn_implementation}`"
    if job.method.prunes:
        return "masks lie between the model's layers"
    return "`torch_compile` compiles the model's own layers" if job.train.torch_compile else None


def step_reasons(job: TrainJob, shape: ModelShape, steps: int) -> dict[str, str]:
    """Why attention and loss are computed as they are, and what the method does in a run of `steps` steps."""
    chosen = "what `transformers` takes for the architecture"
    loss = "chunk by chunk: nothing follows the output head"
    if not shape.plain_head:
        loss = "from all logits at once: something follows or adapts the head"
    elif job.method.distils:
        loss = "from all logits at once: beside a teacher's"
    return {
        "attention": chosen if job.model.attn_implementation == "auto" else "as the job says",
        "loss": loss,
        **({"quantization": QUANTISED[job.model.quantization]} if job.model.quantization else {}),
        **({"pruning": how} if (how := job.method.pruning(steps)) else {}),
    }


def sharding_of(job: TrainJob, shape: ModelShape, rows: Rows, settings: Mapping[str, Any]) -> tuple[Sharding, str]:
    """The strategy that will run, and why. Machines are taken to be like this one, which its workers share."""
    workers = job.resources.workers.max  # what runs on several also runs on one
    job.sharding.check(dump(job.train), workers=workers, dtype=settings["dtype"])
    total = memory_parts(shape, rows, **settings)["total"]
    room = this_machine().worker_bytes(on_gpu=settings["device"] == "cuda")
    room = room // workers if room and settings["device"] == "cpu" else room
    fits = room is None or total <= USABLE * room
    return job.sharding.resolve(workers=workers, need=Need(job.adapter.kept == "adapter", fits))


def loading_of(job: TrainJob, shape: ModelShape, sharding: Sharding) -> tuple[str, dict[str, str]]:
    """How a worker reads the weights, `whole` or `by part`; and why, where the workers divide them."""
    if "weights" not in sharding.divides:
        return "whole", {}
    why_whole = shape.reads_whole
    if job.adapter.starts_from_base:
        why_whole = f"`{job.adapter.name}` as it is set starts from the model's weights"
    if why_whole:
        return "whole", {"loading": f"on every worker, before they are divided: {why_whole}"}
    return "by part", {"loading": "each worker reads no more of the weights than it keeps"}


def kernels_of(job: TrainJob, unfit: str | None, device: str, sharding: Sharding) -> tuple[str, str]:
    reason = fused_conflict(job) or (unfit if device == "cpu" else "the fused functions run on CPUs")
    if "weights" in sharding.divides:
        reason = "the fused functions need whole weights, the workers share them"
    asked = job.model.kernels
    if asked == "fused" and reason:
        hint = "`kernels: auto` uses them where they fit"
        raise ConfigError("model.kernels", f"`fused` does not fit: {reason}", allowed="auto, plain", hint=hint)
    if asked == "auto":
        return ("plain", reason) if reason else ("fused", "the model's parts are known to the fused functions")
    return asked, "as the job says"


def check_virtual_tokens(job: TrainJob) -> None:
    """Raises ConfigError for what cannot be done with an adapter whose tokens lie before every row."""
    if not job.adapter.virtual_tokens:
        return
    apart = job.method.joins == "apart"
    if apart or job.data.packing:
        field, allowed = ("method.cross_document_attention", "true") if apart else ("data.packing", "false")
        found = f"the virtual tokens of `{job.adapter.name}` would lie before the first example of a row only"
        raise ConfigError(field, found, allowed=allowed)
    if asking := [task.name for task in job.evaluate.tasks if task.needs == "answers"]:
        found = f"`{asking[0]}` needs answers, which the native engine cannot generate with `{job.adapter.name}`"
        raise ConfigError("evaluate.tasks", found, hint="`loss` and tasks that choose between answers need none")


def check_divided(job: TrainJob, sharding: Sharding) -> None:
    """Raises ConfigError where a worker steps on parts of weights that the job's adapter or optimizer needs whole."""
    if "optimizer" not in sharding.divides:
        return
    for field, one, has_parts in (
        ("sharding.name", job.adapter, not job.adapter.needs_whole_weights),
        ("train.optim", job.train.optim, job.train.optim.elementwise),
    ):
        if not has_parts:
            found = f"`{sharding.name}` divides the weights, which `{one.name}` needs whole on every worker"
            raise ConfigError(field, found, hint="with `sharding: ddp` every worker holds them whole")


def check_quantization(job: TrainJob, sharding: Sharding) -> None:
    """Raises ConfigError where quantised weights cannot be trained on: the library is missing, or the adapter or the
    strategy changes or divides them."""
    check_library()
    if job.adapter.changes_base:
        found = f"`{job.adapter.name}` as it is set changes the model's own weights, which stay quantised"
        hint = "an adapter beside them, like `lora`, can be trained, or the model as it is: `model.quantization: null`"
        raise ConfigError("model.quantization", found, hint=hint)
    if "weights" in sharding.divides:
        found = f"`{sharding.name}` divides weights, which quantised ones cannot be"
        raise ConfigError("model.quantization", found, allowed="sharding: single, ddp, or `deepspeed` at stage 1 or 2")


def check_pruned(job: TrainJob, sharding: Sharding | None = None) -> None:
    """Raises ConfigError for what does not go with a method that prunes."""
    if not job.method.prunes:
        return
    if job.model.quantization:
        found = f"`{job.method.name}` cuts weights, and those of a quantised model cannot be cut"
        hint = "prune the model as it is, `model.quantization: null`, and quantise what is left"
        raise ConfigError("model.quantization", found, hint=hint)
    if job.adapter.takes_from_base:
        found = "begins with parts of the base's weights, which units that are removed for a while would lose"
        raise ConfigError("adapter.init_lora_weights", found, allowed="true, gaussian, orthogonal")
    if job.train.torch_compile:
        found = f"compiled layers would not see the masks of `{job.method.name}`, which change every step"
        raise ConfigError("train.torch_compile", found, allowed="false")
    if job.train.optim.averages:
        found = f"`{job.train.optim.name}` averages weights, so that what `{job.method.name}` sets to zero would not be"
        raise ConfigError("train.optim", found, hint="`adamw_torch` does not")
    if sharding is not None and sharding.owns_backward:
        found = f"gradients of masks cannot be taken through the engine of `{sharding.name}`"
        raise ConfigError("sharding.name", found, allowed="single, ddp, fsdp2")


def check_goes_on(job: TrainJob, sharding: Sharding) -> None:
    """Raises ConfigError where the job would go on from its checkpoints by itself, and `sharding` cannot."""
    if sharding.goes_on:
        return
    hint = "offload to the `cpu` instead of `nvme`"
    if job.resources.workers.elastic:
        found = "a number of workers that changes goes on from checkpoints, which weights on a disk cannot"
        raise ConfigError("resources.workers", found, hint=hint)
    if job.resources.on_oom == "halve":
        found = "`halve` goes on from checkpoints, which weights on a disk cannot"
        raise ConfigError("resources.on_oom", found, hint=hint)


def check_start(job: TrainJob, shape: ModelShape) -> None:
    """Raises ConfigError where the adapter starts from what quantising took, and nothing was quantised, or the weights
    as they were cannot be read one by one."""
    if not job.adapter.starts_from_residual:
        return
    if job.model.quantization != "nf4":
        how = f"as {job.model.quantization}" if job.model.quantization else "as they are"
        found = f"`loftq` starts from what NF4 takes from the weights, and the job keeps them {how}"
        hint = "set `model.quantization: nf4`, or `init_lora_weights: true`"
        raise ConfigError("adapter.init_lora_weights", found, hint=hint)
    if shape.reads_whole:
        found = f"`loftq` reads every weight as it was, and cannot: {shape.reads_whole}"
        raise ConfigError("adapter.init_lora_weights", found, hint="`init_lora_weights: true` needs none")
