"""What DeepSpeed is told: the strategy's settings over a user's own file. Pure functions; deepspeed is not imported.

A file may say how DeepSpeed works (buckets, overlap, prefetching, offloading). What is computed, the job alone says: a
file that says it too must say the same, or `"auto"`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmray.errors import ConfigError, Problem

AUTO = "auto"
ROWS = "train.per_device_train_batch_size x train.gradient_accumulation_steps x resources.workers"
DECIDED = {
    "train_batch_size": ROWS,
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train",
    "scheduler": "train.lr_scheduler_type",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
}
"""Keys and sections that the job decides, and where; DeepSpeed is not given them."""
FIXED = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "checkpoint.load_universal": False,
    "elasticity.enabled": False,
    "autotuning.enabled": False,
    "curriculum_learning.enabled": False,
    "data_efficiency.enabled": False,
}
"""Settings under which the loop, the data or the gradients would be DeepSpeed's and no longer the job's."""
MAX_BUCKET = 1 << 24
"""Elements that are summed at once, 64 MiB in float32. DeepSpeed's own default is thirty times as many,
of which it holds several, however small the model."""


def read_config(path: str) -> dict[str, Any]:
    """The settings in the file `path`. Raises ConfigError where it is missing, no JSON or no object."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("sharding.config", f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError("sharding.config", f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError("sharding.config", f"{path} holds no object", allowed='{"zero_optimization": {...}}')
    return config


def job_says(train: Mapping[str, Any], *, workers: int, dtype: str) -> dict[str, tuple[Any, str]]:
    """What a file may repeat: for a key its value in the job and the field it comes from. `train`: the job's section
    of that name."""
    size, steps = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
    return {
        "bf16.enabled": (dtype == "bfloat16", "model.dtype"),
        "bfloat16.enabled": (dtype == "bfloat16", "model.dtype"),
        "fp16.enabled": (dtype == "float16", "model.dtype"),
        "train_batch_size": (size * steps * workers, ROWS),
        "train_micro_batch_size_per_gpu": (size, DECIDED["train_micro_batch_size_per_gpu"]),
        "gradient_accumulation_steps": (steps, DECIDED["gradient_accumulation_steps"]),
        "gradient_clipping": (train["max_grad_norm"], DECIDED["gradient_clipping"]),
        "optimizer.params.lr": (train["learning_rate"], "train.learning_rate"),
        "optimizer.params.weight_decay": (train["weight_decay"], "train.weight_decay"),
    } | {f"optimizer.{key}": (value, "train.optim") for key, value in _optimizer(train["optim"]).items()}


def _optimizer(optim: Mapping[str, Any]) -> dict[str, Any]:
    """What is particular to the job's optimizer, in the words of DeepSpeed; others than these two cannot be split."""
    if optim["name"] == "sgd":
        return {"type": "SGD", "params.momentum": optim["momentum"]}
    return {"type": "AdamW", "params.betas": [0.9, 0.999], "params.eps": 1e-8}


def check_config(config: Mapping[str, Any], says: Mapping[str, tuple[Any, str]], where: str) -> None:
    """Raises one ConfigError with every key of `config` that contradicts what the job `says`."""
    problems = []
    for key, found in _leaves(config):
        section = key.partition(".")[0]
        if key in says:
            expected, field = says[key]
            allowed = f'{json.dumps(expected)} as `{field}` says, "auto", or no such key'
        elif key in FIXED:
            expected = FIXED[key]
            allowed = f'{json.dumps(expected)}, "auto", or no such key'
        elif section in DECIDED:
            expected, allowed = AUTO, '"auto", or no such key'
        else:
            continue
        if found in (AUTO, expected):
            continue
        hint = f"change the job: `{DECIDED[section]}`" if section in DECIDED else None
        problems.append(Problem(f"{where}: {key}", f"{json.dumps(found)} contradicts the job", allowed, hint))
    if problems:
        raise ConfigError.of(problems)


def engine_config(
    config: Mapping[str, Any], zero: Mapping[str, Any], *, num_trained: int, num_live: int | None = None
) -> dict[str, Any]:
    """What DeepSpeed is given: `config` without what the job decides and without `"auto"`s, `zero` laid over its
    section `zero_optimization`; an offloading section without a device is left out. `num_trained`: elements;
    `num_live`: those of weights that may be gathered at a time."""
    kept = {key: value for key, value in _without_auto(config).items() if key not in DECIDED}
    merged = {**_sizes(zero["stage"], num_trained, num_live), **kept.get("zero_optimization", {})}
    for key, value in zero.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
    merged = {key: value for key, value in merged.items() if not key.startswith("offload") or value["device"] != "none"}
    return {
        **kept,
        "train_micro_batch_size_per_gpu": 1,  # it counts samples for a log that is off; steps are the learner's
        "gradient_accumulation_steps": 1,
        "zero_optimization": merged,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def bucket_size(num_trained: int) -> int:
    """Elements of a bucket."""
    return min(MAX_BUCKET, max(1, num_trained))


def _sizes(stage: int, num_trained: int, num_live: int | None) -> dict[str, int]:
    """Stage 3 also holds no more gathered weights than `num_live`: it would fetch and keep a billion."""
    size = bucket_size(num_trained)
    if stage < 3:
        return {"reduce_bucket_size": size, "allgather_bucket_size": size}
    live = {} if num_live is None else {"stage3_max_live_parameters": num_live}
    return {"reduce_bucket_size": size, "stage3_max_reuse_distance": 0, **live}


def flat(zero: Mapping[str, Any]) -> dict[str, Any]:
    """The strategy's settings by dotted key of DeepSpeed's file."""
    return {f"zero_optimization.{key}": value for key, value in _leaves(zero)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without_auto(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value != AUTO
    }
