"""The evaluation program: several targets side by side, on the same held-out examples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from lmray.artifacts.files import folder_digests, write_atomic, write_json
from lmray.config import dump
from lmray.context import Result, RunContext
from lmray.data.base import Example
from lmray.data.batch import pack
from lmray.data.cache import examples_digest, tokenise_cached, tokenizer_digest
from lmray.data.examples import Examples, read_examples
from lmray.data.rules import Rules
from lmray.errors import ArtifactError, DataError
from lmray.evaluate.answers import answers_path, save_answers
from lmray.evaluate.comparison import write_comparison
from lmray.evaluate.confidence import deltas_json, reference_label
from lmray.evaluate.kept import Kept, forget, kept_path
from lmray.evaluate.measure import HeldOut, Measured, Progress, check_tasks, measure
from lmray.evaluate.progress import ProgressFile
from lmray.evaluate.recheck import pinned, recheck, versions
from lmray.job import EvaluateJob, Target
from lmray.metrics.display import Standing
from lmray.models.adapters import find_adapter
from lmray.models.load import load_config, load_model, load_tokenizer
from lmray.models.machine import keep_few_products
from lmray.models.precision import resolve_dtype
from lmray.models.quantised import check_unquantised
from lmray.models.rope import RopeScaling, check_positions
from lmray.models.source import FoundModel, find_model, model_of

RESULT = "result.json"


@dataclass(frozen=True)
class Prepared:
    """What an evaluation needs before a weight is loaded."""

    model: FoundModel
    models: Mapping[str, FoundModel]
    """By label, what each target is measured on: `model`, or one of its own."""
    tokenizer: Any
    held_out: HeldOut
    solved: Sequence[Example]
    """Training examples, for the shots."""


def prepare(job: EvaluateJob) -> Prepared:
    """Finds the models and reads the data. Raises DataError where nothing is held out, ArtifactError for an adapter
    that is unknown or belongs to another base model, and for a model that has another tokenizer, ConfigError for rows
    longer than a model has positions."""
    found = model_of(job)
    models = {target.label: _model_of(job, target, found) for target in job.targets}
    for one in {model.folder: model for model in (found, *models.values())}.values():
        scaling = _scaling(job, one, found)
        config = load_config(one.folder, trust_remote_code=job.model.trust_remote_code, rope_scaling=scaling)
        check_unquantised(config, one.folder)
        if job.data:
            check_positions(config, job.data.max_length, scaling)
    versions(job)
    for target in job.targets:
        _adapter_folder(job, target.adapter, models[target.label])
    examples = read_examples(job.data) if job.data else Examples((), (), ())
    if job.data and not examples.eval:
        raise DataError("data.eval", "holds nothing to measure on", hint="add `eval: {split: 0.1}`")
    check_tasks(job.evaluate.tasks, examples.eval)
    chats = any(example.text is None for example in examples.eval)
    tokenizer = load_tokenizer(found.folder, chat=chats, trust_remote_code=job.model.trust_remote_code)
    for one in models.values():
        _check_tokenizer(one, tokenizer, found, trust_remote_code=job.model.trust_remote_code)
    return Prepared(found, models, tokenizer, _held_out(job, examples.eval, tokenizer, found), examples.train)


def _held_out(job: EvaluateJob, examples: Sequence[Example], tokenizer: Any, found: FoundModel) -> HeldOut:
    if job.data is None:
        return HeldOut((), ())
    rules = Rules.of(job.data, found.folder, trust_remote_code=job.model.trust_remote_code)
    tokens = tokenise_cached(tokenizer, examples, rules)
    return HeldOut(examples, pack(tokens.examples, max_length=job.data.max_length))


def evaluate(job: EvaluateJob, ctx: RunContext) -> Result:
    """Measures every target of `job`, of an interrupted attempt only what it had not asked yet; writes `job.yaml`,
    `answers-LABEL.jsonl`, `comparison.html` and, last, `result.json` into the run folder.

    `Result.metrics` are the last target's. `Result.details` holds each target's metrics by label (`targets`), the label
    that others are compared with (`reference`), and by label and metric each difference to it with its interval
    (`deltas`), and for a job with `tolerances` what got worse than before (`worse`); it has failed then. Raises what
    `prepare` raises.
    """
    started = time.time()
    torch.set_num_threads(ctx.threads)
    keep_few_products()
    kept = versions(job)
    ready = prepare(pinned(job, kept))
    if (ctx.folder / RESULT).is_file():
        forget(ctx.folder)  # what is kept beside no result is an interrupted run's: go on from there
    for old in (ctx.folder / RESULT, *ctx.folder.glob("answers-*.jsonl")):
        old.unlink(missing_ok=True)
    write_atomic(ctx.folder / "job.yaml", yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True))
    measured = _measure(pinned(job, kept), ready, ctx)
    for label, one in measured.items():
        save_answers(one.answers, answers_path(ctx.folder, label))
    details = {
        "targets": {label: one.metrics for label, one in measured.items()},
        "reference": reference_label([*measured]),
        "deltas": deltas_json({label: one.evidence for label, one in measured.items()}),
    }
    if kept:
        details["worse"] = recheck(job, details["targets"], kept, run=str(ctx.folder))
    seconds = time.time() - started
    metrics = measured[job.targets[-1].label].metrics | {"run.seconds": round(seconds, 3)}
    status = "failed" if details.get("worse") else "succeeded"
    result = Result(status, str(ctx.folder), metrics=metrics, seconds=seconds, details=details)
    answers = {label: one.answers for label, one in measured.items()}
    write_comparison(ctx.folder / "comparison.html", name=job.name, result=result, answers=answers)
    write_json(ctx.folder / RESULT, result.to_json() | {"job": dump(job)})
    forget(ctx.folder)
    return result


def _scaling(job: EvaluateJob, model: FoundModel, base: FoundModel) -> RopeScaling | None:
    """The job's, for its base model; a whole model has that of its training in its config."""
    return job.model.rope_scaling if model.folder == base.folder else None


def _measure(job: EvaluateJob, ready: Prepared, ctx: RunContext) -> dict[str, Measured]:
    """Every target, by label; one model is loaded at a time, for all targets that are measured on it."""
    measured: dict[str, Measured] = {}
    for found in {one.folder: one for one in ready.models.values()}.values():
        targets = [target for target in job.targets if ready.models[target.label].folder == found.folder]
        measured |= _measure_on(found, targets, job, ready, ctx)
    return {target.label: measured[target.label] for target in job.targets}


def _measure_on(
    found: FoundModel, targets: Sequence[Target], job: EvaluateJob, ready: Prepared, ctx: RunContext
) -> dict[str, Measured]:
    folders = [_adapter_folder(job, target.adapter, found) for target in targets]
    handles = [None if folder is None else f"target_{place}" for place, folder in enumerate(folders)]
    dtype, _ = resolve_dtype(job.model.dtype, ctx.device)
    model: Any = load_model(
        found.folder,
        dtype,
        quantization=job.model.quantization,
        device=ctx.device,
        trust_remote_code=job.model.trust_remote_code,
        rope_scaling=_scaling(job, found, ready.model),
    )
    if not job.model.quantization:
        model.to(ctx.device)
    for folder, handle in zip(folders, handles, strict=True):
        if folder is not None and handle is not None:
            model = _with_adapter(model, folder, handle)
    progress = ProgressFile(ctx.folder)
    shared = [{name: dump(job)[name] for name in ("evaluate", "data", "model")}, found.digest, dtype]
    shared += [examples_digest(ready.held_out.examples), examples_digest(ready.solved)]
    measured = {}
    for target, handle, folder in zip(targets, handles, folders, strict=True):
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
            kept=Kept(kept_path(ctx.folder, target.label), [shared, dump(target), folder and folder_digests(folder)]),
        )
    return measured


def _told(progress: ProgressFile, label: str) -> Progress:
    return lambda doing, done, total: progress.tell(Standing(f"{label}: {doing}", done, total))


def shortest(examples: Any, count: int) -> list[Any]:
    """The `count` shortest solved examples: what fits before every question."""
    return nsmallest(
        count, examples, key=lambda one: (sum(len(message["content"]) for message in one.messages), one.where)
    )


def _model_of(job: EvaluateJob, target: Target, model: FoundModel) -> FoundModel:
    if target.model is None:
        return model
    return find_model(target.model, storage=job.storage, trust_remote_code=job.model.trust_remote_code)


def _check_tokenizer(found: FoundModel, tokenizer: Any, model: FoundModel, *, trust_remote_code: bool) -> None:
    """Losses are in nats a token: other tokens, other losses."""
    if found.folder == model.folder:
        return
    own = load_tokenizer(found.folder, chat=False, trust_remote_code=trust_remote_code)
    if tokenizer_digest(own) != tokenizer_digest(tokenizer):
        what, hint = f"has another tokenizer than `{model.source}`", "measure it by itself, as `model.source`"
        raise ArtifactError(
            f"model `{found.source}`", what, allowed="models that share tokenizer and template", hint=hint
        )


def _adapter_folder(job: EvaluateJob, adapter: str | None, base: FoundModel) -> Path | None:
    if adapter is None:
        return None
    return find_adapter(adapter, base, storage=job.storage, rope_scaling=job.model.rope_scaling).folder


def _with_adapter(model: Any, folder: Path, handle: str) -> Any:
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), handle)
            return model
        return PeftModel.from_pretrained(model, str(folder), adapter_name=handle).eval()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = "give the base model it was trained on: `--model`, or `model.source` of the job"
        raise ArtifactError(f"adapter in {folder}", f"does not fit the model: {lines[0][:200]}", hint=hint) from None
