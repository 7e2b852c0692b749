"""The evaluation program: several targets on one base model, side by side, on the same held-out examples."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import write_json
from lmray.artifacts.store import open_store
from lmray.config import dump
from lmray.context import Result, RunContext
from lmray.data.base import Example
from lmray.data.batch import pack
from lmray.data.cache import tokenise_cached
from lmray.data.examples import read_examples
from lmray.data.rules import Rules
from lmray.errors import ArtifactError, DataError
from lmray.evaluate.measure import HeldOut, measure
from lmray.job import EvaluateJob
from lmray.models.load import load_model, load_tokenizer
from lmray.models.precision import resolve_dtype
from lmray.models.source import FoundModel, find_model


@dataclass(frozen=True)
class Prepared:
    """What an evaluation needs before a weight is loaded."""

    model: FoundModel
    tokenizer: Any
    held_out: HeldOut
    solved: tuple[Example, ...]
    """Training examples, for the shots."""


def prepare(job: EvaluateJob) -> Prepared:
    """Finds the model and reads the data. Raises DataError where nothing is held out, ArtifactError for an adapter that
    is unknown or belongs to another base model."""
    found = find_model(job.model.source, job.model.revision)
    for target in job.targets:
        _adapter_folder(job, target.adapter, found)
    tokenizer = load_tokenizer(found.folder)
    examples = read_examples(job.data)
    if not examples.eval:
        raise DataError("data.eval", "holds nothing to measure on", hint="add `eval: {split: 0.1}`")
    tokens = tokenise_cached(tokenizer, examples.eval, Rules.of(job.data, found.folder))
    held_out = HeldOut(examples.eval, pack(tokens.examples, max_length=job.data.max_length))
    return Prepared(found, tokenizer, held_out, examples.train)


def evaluate(job: EvaluateJob, ctx: RunContext) -> Result:
    """Measures every target of `job`; writes `job.yaml`, `answers-LABEL.jsonl` and, last, `result.json` into the run
    folder.

    `Result.details["targets"]` holds each target's metrics by label. Raises what `prepare` raises.
    """
    started = time.time()
    torch.set_num_threads(ctx.threads)
    ready = prepare(job)
    tokenizer, found = ready.tokenizer, ready.model
    adapters = {target.label: _adapter_folder(job, target.adapter, found) for target in job.targets}
    dtype, _ = resolve_dtype(job.model.dtype, ctx.device)
    model: Any = load_model(found.folder, dtype)
    model.to(ctx.device)
    for label, folder in adapters.items():
        if folder is not None:
            model = _with_adapter(model, folder, label)
    targets = {}
    for target in job.targets:
        handle = target.label if adapters[target.label] is not None else None
        if handle is not None:
            model.set_adapter(handle)
        measured = measure(
            model,
            tokenizer,
            ready.held_out,
            job.evaluate,
            adapter=handle,
            shots=shortest(ready.solved, target.num_fewshot),
            device=ctx.device,
            threads=ctx.threads,
        )
        measured.save_answers(ctx.folder / f"answers-{target.label}.jsonl")
        targets[target.label] = measured.metrics
    metrics = targets[job.targets[-1].label] | {"run.seconds": round(time.time() - started, 3)}
    result = Result(
        "succeeded", str(ctx.folder), metrics=metrics, seconds=time.time() - started, details={"targets": targets}
    )
    write_json(ctx.folder / "result.json", result.to_json() | {"job": dump(job)})
    return result


def shortest(examples: Any, count: int) -> list[Any]:
    """The `count` shortest solved examples: what fits before every question."""
    return sorted(examples, key=lambda one: (sum(len(message["content"]) for message in one.messages), one.where))[
        :count
    ]


def _adapter_folder(job: EvaluateJob, adapter: str | None, base: FoundModel) -> Path | None:
    if adapter is None:
        return None
    folder = Path(adapter).expanduser()
    if (folder / "adapter_config.json").is_file():
        return folder
    artifacts = Artifacts(open_store(job.storage))
    artifact = artifacts.find(adapter)
    if artifact.base.get("digest") != base.digest:
        allowed = f"{artifact.base.get('source')} with digest {str(artifact.base.get('digest'))[:12]}"
        raise ArtifactError(
            f"artifact `{artifact.ref}`", f"was trained on another base than `{base.source}`", allowed=allowed
        )
    return artifacts.checkout(artifact)


def _with_adapter(model: Any, folder: Path, handle: str) -> Any:
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), handle)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name=handle).eval()
