"""Evaluating again what was evaluated before: whether an artifact, such as what is in production, got worse.

A version's weights do not change; the data that a job names, the libraries and the machine do, and a stage moves on.
So a version is compared with its own first evaluation, and at its first one with the version evaluated before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.evaluations import Evaluation, Evaluations
from lmray.artifacts.files import sha256_json
from lmray.artifacts.store import open_store
from lmray.config import dump
from lmray.errors import ConfigError, did_you_mean
from lmray.job import EvaluateJob, Target
from lmray.metrics.names import metric
from lmray.models.source import ARTIFACT


def versions(job: EvaluateJob) -> dict[str, str]:
    """`NAME@VERSION` of each target that is an artifact, by label; empty for a job without `tolerances`. Raises
    ConfigError where there is none to compare, ArtifactError for an unknown one."""
    if not job.tolerances:
        return {}
    artifacts = Artifacts(open_store(job.storage))
    references = {target.label: reference for target in job.targets if (reference := _reference(target)) is not None}
    if not references:
        hint = "name an adapter like `function-calls@production`"
        raise ConfigError("tolerances", "no target is an artifact, and only those have earlier evaluations", hint=hint)
    return {label: artifacts.find(reference).ref for label, reference in references.items()}


def is_due(job: EvaluateJob, *, every_s: float, now: float) -> bool:
    """Whether one of the versions that `job` would measure has not been for `every_s` seconds, or never. `now`: seconds
    since 1970. Raises what `versions` raises."""
    evaluations, asked = Evaluations(open_store(job.storage)), _asked(job)
    for version in versions(job).values():
        times = [
            one.time
            for one in evaluations.of(version.partition("@")[0])
            if (one.version, one.asked) == (version, asked)
        ]
        if now - max(times, default=-every_s) >= every_s:
            return True
    return False


def recheck(
    job: EvaluateJob, measured: Mapping[str, Mapping[str, float]], kept: Mapping[str, str], *, run: str
) -> list[str]:
    """Adds the metrics of targets `kept` (label -> `NAME@VERSION`) to their artifacts' records. What got worse by more
    than `job.tolerances`, in words. Raises ConfigError for a tolerance of what was not measured."""
    evaluations = Evaluations(open_store(job.storage))
    asked, words = _asked(job), []
    for label, version in kept.items():
        metrics = measured[label]
        _check_measured(job.tolerances, metrics)
        before = _earlier(evaluations.of(version.partition("@")[0]), version, asked)
        worse = {} if before is None else _worse(job.tolerances, before.metrics, metrics)
        evaluations.add(Evaluation(version, asked, dict(metrics), run, worse))
        for name, was in worse.items():
            of = "" if before is None or before.version == version else f" with {before.version}"
            words.append(f"{version}: {name} is {metrics[name]:.4g}, was {was:.4g}{of}")
    return words


def _reference(target: Target) -> str | None:
    if target.adapter is not None:
        return None if Path(target.adapter).expanduser().is_dir() else target.adapter
    if target.model is not None and target.model.startswith(ARTIFACT):
        return target.model.removeprefix(ARTIFACT)
    return None


def _asked(job: EvaluateJob) -> str:
    """Of two jobs that differ in targets or tolerances alone it is the same."""
    told = dump(job)
    return sha256_json([told[name] for name in ("model", "data", "evaluate")])


def _check_measured(tolerances: Mapping[str, float], metrics: Mapping[str, float]) -> None:
    for name in tolerances:
        if name not in metrics:
            allowed = ", ".join(one for one in metrics if metric(one).better)
            raise ConfigError(
                f"tolerances.{name}", "is not measured", allowed=allowed, hint=did_you_mean(name, metrics)
            )


def _earlier(evaluations: list[Evaluation], version: str, asked: str) -> Evaluation | None:
    """What `version` is compared with."""
    alike = [one for one in evaluations if one.asked == asked]
    own = [one for one in alike if one.version == version]
    return own[0] if own else alike[-1] if alike else None


def _worse(tolerances: Mapping[str, float], before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Metrics that got worse by more than is allowed, with what they were."""
    found = {}
    for name, allowed in tolerances.items():
        if name in before:
            loss = now[name] - before[name] if metric(name).better == "min" else before[name] - now[name]
            if not loss <= allowed:  # also where it is no number any more
                found[name] = before[name]
    return found
