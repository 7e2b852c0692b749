"""The evaluation program: several targets on one base model, side by side, on the same held-out examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import write_atomic, write_json
from lmray.artifacts.store import open_store
from lmray.config import dump
from lmray.context import Result, RunContext
from lmray.data.base import Example
from lmray.data.batch import pack
from lmray.data.cache import tokenise_cached
from lmray.data.examples import read_examples
from lmray.data.rules import Rules
from lmray.errors import ArtifactError, DataError
from lmray.evaluate.comparison import write_comparison
from lmray.evaluate.confidence import deltas, reference_label
from lmray.evaluate.measure import HeldOut, Measured, Progress, check_tasks, measure
from lmray.evaluate.progress import ProgressFile, Standing
from lmray.job import EvaluateJob
from lmray.models.load import load_model, load_tokenizer
from lmray.models.precision import resolve_dtype
from lmray.models.source import FoundModel, find_model

RESULT = "result.json"


@dataclass(frozen=True)
class Prepared:
    """What an evaluation needs before a weight is loaded."""

    model: FoundModel
    tokenizer: Any
    held_out: HeldOut
    solved: Sequence[Example]
    """Training examples, for the shots."""


def prepare(job: EvaluateJob) -> Prepared:
    """Finds the model and reads the data. Raises DataError where nothing is held out, ArtifactError for an adapter that
    is unknown or belongs to another base model."""
    found = find_model(job.model.source, job.model.revision, trust_remote_code=job.model.trust_remote_code)
    for target in job.targets:
        _adapter_folder(job, target.adapter, found)
    examples = read_examples(job.data)
    if not examples.eval:
        raise DataError("data.eval", "holds nothing to measure on", hint="add `eval: {split: 0.1}`")
    check_tasks(job.evaluate.tasks, examples.eval)
    chats = any(example.text is None for example in examples.eval)
    tokenizer = load_tokenizer(found.folder, chat=chats, trust_remote_code=job.model.trust_remote_code)
    tokens = tokenise_cached(
        tokenizer, examples.eval, Rules.of(job.data, found.folder, trust_remote_code=job.model.trust_remote_code)
    )
    held_out = HeldOut(examples.eval, pack(tokens.examples, max_length=job.data.max_length))
    return Prepared(found, tokenizer, held_out, examples.train)


def evaluate(job: EvaluateJob, ctx: RunContext) -> Result:
    """Measures every target of `job`; writes `job.yaml`, `answers-LABEL.jsonl`, `comparison.html` and, last,
    `result.json` into the run folder.

    `Result.metrics` are the last target's. `Result.details` holds each target's metrics by label (`targets`), the label
    that others are compared with (`reference`), and by label and metric each difference to it with its interval
    (`deltas`). Raises what `prepare` raises.
    """
    started = time.time()
    torch.set_num_threads(ctx.threads)
    ready = prepare(job)
    for old in (ctx.folder / RESULT, *ctx.folder.glob("answers-*.jsonl")):
        old.unlink(missing_ok=True)
    write_atomic(ctx.folder / "job.yaml", yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True))
    measured = _measure(job, ready, ctx)
    for label, one in measured.items():
        one.save_answers(ctx.folder / f"answers-{label}.jsonl")
    compared = deltas({label: one.evidence for label, one in measured.items()})
    details = {
        "targets": {label: one.metrics for label, one in measured.items()},
        "reference": reference_label([*measured]),
        "deltas": {label: {name: asdict(one) for name, one in found.items()} for label, found in compared.items()},
    }
    seconds = time.time() - started
    metrics = measured[job.targets[-1].label].metrics | {"run.seconds": round(seconds, 3)}
    result = Result("succeeded", str(ctx.folder), metrics=metrics, seconds=seconds, details=details)
    answers = {label: one.answers for label, one in measured.items()}
    write_comparison(ctx.folder / "comparison.html", name=job.name, result=result, answers=answers)
    write_json(ctx.folder / RESULT, result.to_json() | {"job": dump(job)})
    return result


def _measure(job: EvaluateJob, ready: Prepared, ctx: RunContext) -> dict[str, Measured]:
    """Every target on one loaded model, by label."""
    folders = [_adapter_folder(job, target.adapter, ready.model) for target in job.targets]
    handles = [None if folder is None else f"target_{place}" for place, folder in enumerate(folders)]
    dtype, _ = resolve_dtype(job.model.dtype, ctx.device)
    model: Any = load_model(ready.model.folder, dtype, trust_remote_code=job.model.trust_remote_code)
    model.to(ctx.device)
    for folder, handle in zip(folders, handles, strict=True):
        if folder is not None and handle is not None:
            model = _with_adapter(model, folder, handle)
    progress = ProgressFile(ctx.folder)
    measured = {}
    for target, handle in zip(job.targets, handles, strict=True):
        if handle is not None:
            model.set_adapter(handle)
        measured[target.label] = measure(
            model,
            ready.tokenizer,
            ready.held_out,
            job.evaluate,
            adapter=handle,
            shots=shortest(ready.solved, target.num_fewshot),
            device=ctx.device,
            threads=ctx.threads,
            progress=_told(progress, target.label),
        )
    return measured


def _told(progress: ProgressFile, label: str) -> Progress:
    return lambda doing, done, total: progress.tell(Standing(label, doing, done, total))


def shortest(examples: Any, count: int) -> list[Any]:
    """The `count` shortest solved examples: what fits before every question."""
    return nsmallest(
        count, examples, key=lambda one: (sum(len(message["content"]) for message in one.messages), one.where)
    )


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
