"""Small jobs on a tiny model: what tests of programs start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from lmray.artifacts.store import run_folder
from lmray.config import Document, decode
from lmray.config.decode import set_value
from lmray.context import LocalContext, Result
from lmray.job import GenerateJob, TrainJob
from lmray.metrics.events import read_events
from lmray.train.program import train

J = TypeVar("J", TrainJob, GenerateJob)
WORDS = ("red", "green", "blue", "赤", "緑", "青", "one", "two")


def tiny_rows(count: int = 24) -> list[dict[str, Any]]:
    """Questions of different lengths with short answers, in two scripts."""
    return [
        {
            "prompt": f"say {WORDS[index % len(WORDS)]} " * (1 + index % 3),
            "completion": f"{WORDS[index % len(WORDS)]} {index % 5}",
            "topic": f"t{index % 6}",
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON line a row."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_job(model: Path, data: Path, storage: Path, **changes: Any) -> TrainJob:
    """LoRA on the model in folder `model` with the rows in `data`; `changes` are dotted keys with `__` for the dot."""
    document = Document(
        "tiny job",
        {
            "kind": "train",
            "name": "tiny",
            "storage": str(storage),
            "model": {"source": str(model), "dtype": "float32"},
            "data": {"train": [{"source": str(data)}], "eval": {"split": 0.25, "by": "topic"}, "max_length": 256},
            "method": "sft",
            "adapter": {"name": "lora", "r": 4, "lora_alpha": 8},
            "sharding": "single",
            "train": {"per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 6, "save_steps": 2},
        },
    )
    return _decoded(TrainJob, document, changes)


def tiny_generate_job(model: Path, data: Path, storage: Path, **changes: Any) -> GenerateJob:
    """Greedy answers of the model in folder `model` to the rows in `data`, four to a shard; `changes` as above."""
    document = Document(
        "tiny job",
        {
            "kind": "generate",
            "name": "batch",
            "storage": str(storage),
            "model": {"source": str(model), "dtype": "float32"},
            "data": {"sources": [{"source": str(data)}]},
            "engine": {"name": "native", "max_batch_size": 3, "max_adapters": 2, "max_length": 128},
            "sampling": {"max_tokens": 8},
            "output": {"shard_size": 4},
            "resources": {"cpus_per_worker": 1},
        },
    )
    return _decoded(GenerateJob, document, changes)


def _decoded(kind: type[J], document: Document, changes: dict[str, Any]) -> J:
    for key, value in changes.items():
        document = set_value(document, key.split("__"), value, f"change {key}")
    return decode(kind, document)


def run_here(job: TrainJob, scratch: Path, *, stop_at: int | None = None) -> Result:
    """Trains `job` in this process; `stop_at`: asks it to stop after that many steps of this attempt."""
    asked = iter(range(1, 10**9))
    context = LocalContext(
        run_folder(job), scratch=scratch, stop=lambda: stop_at is not None and next(asked) >= stop_at
    )
    return train(job, context)


def curve(job: TrainJob, name: str = "train.loss") -> list[float]:
    """The values of metric `name` that the run of `job` reported, by step."""
    return [event[name] for event in read_events(run_folder(job) / "events.jsonl") if name in event]
