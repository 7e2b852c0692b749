"""Evaluating again what was evaluated before: whether an artifact, such as what is in production, got worse.

A version's weights do not change; the data that a job names, the libraries and the machine do, and a stage moves on.
So a version is compared with its own first evaluation, and at its first one with the version evaluated before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

AHEAD_S = 3600.0
"""So far clocks of a cluster may lie apart."""


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


def pinned(job: EvaluateJob, kept: Mapping[str, str]) -> EvaluateJob:
    """`job` with the targets `kept` (label -> `NAME@VERSION`) named by their versions: a stage may move while it
    runs."""
    return job.model_copy(update={"targets": tuple(_pinned(target, kept.get(target.label)) for target in job.targets)})


@dataclass(frozen=True)
class Standing:
    """What is known of one target's version."""

    label: str
    version: str
    """`NAME@VERSION`."""
    last: Evaluation | None
    """When it was asked the same last."""

    def is_due(self, *, every_s: float, now: float) -> bool:
        """Whether that was `every_s` seconds ago or more, or never."""
        return self.last is None or now - self.last.time >= every_s


def standings(job: EvaluateJob, *, now: float) -> list[Standing]:
    """Of each target that is an artifact, in the version that `job` would measure now. `now`: seconds since 1970;
    records of much later were written by a wrong clock, and do not count. Raises what `versions` raises."""
    evaluations, labels = Evaluations(open_store(job.storage)), versions(job)
    found = []
    for target in [one for one in job.targets if one.label in labels]:
        version, asked = labels[target.label], _asked(job, target)
        records = evaluations.newest_first(version.partition("@")[0])
        alike = (one for one in records if (one.version, one.asked) == (version, asked) and one.time < now + AHEAD_S)
        found.append(Standing(target.label, version, next(alike, None)))
    return found


def recheck(
    job: EvaluateJob, measured: Mapping[str, Mapping[str, float]], kept: Mapping[str, str], *, run: str
) -> list[str]:
    """Adds the metrics of targets `kept` (label -> `NAME@VERSION`) to their artifacts' records. What got worse by more
    than `job.tolerances`, in words. Raises ConfigError for a tolerance of what was not measured."""
    evaluations, words = Evaluations(open_store(job.storage)), []
    targets = [one for one in job.targets if one.label in kept]
    names = {version.partition("@")[0] for version in kept.values()}
    known = {name: evaluations.of(name) for name in names}  # before this run adds to them
    for target in targets:
        version, metrics, asked = kept[target.label], measured[target.label], _asked(job, target)
        _check_measured(job.tolerances, metrics)
        before = _earlier(known[version.partition("@")[0]], version, asked)
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


def _pinned(target: Target, version: str | None) -> Target:
    if version is None:
        return target
    if target.adapter is not None:
        return target.model_copy(update={"adapter": version})
    return target.model_copy(update={"model": f"{ARTIFACT}{version}"})


def _asked(job: EvaluateJob, target: Target) -> str:
    """Of two jobs that differ in other targets or tolerances alone it is the same."""
    told = dump(job)
    more = [target.num_fewshot] * bool(target.num_fewshot) + ["model"] * (target.model is not None)
    return sha256_json([*(told[name] for name in ("model", "data", "evaluate")), *more])


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
