"""Everything that can be known before an endpoint starts: model, adapters, keys, port. Ray-free."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmray.artifacts.artifact import Artifact, ArtifactRef, Artifacts
from lmray.artifacts.served import ServedAdapter
from lmray.artifacts.store import Store, open_store
from lmray.errors import CapacityError, ConfigError, LmrayError
from lmray.evaluate.program import prepare as prepare_evaluation
from lmray.job import ScheduledEvaluation, ServeJob
from lmray.models.load import load_empty_model, load_tokenizer
from lmray.models.quantised import check_quantised, check_unquantised
from lmray.models.source import ARTIFACT, FoundModel, find_model, model_of
from lmray.serve.fit import StoredAdapters
from lmray.serve.keys import ApiKey, check_exposure, read_keys
from lmray.serve.plan import PlannedDraft, ServePlan


def prepare(job: ServeJob, *, listens: bool = False) -> ServePlan:
    """Resolves and checks all that `job` names. `listens`: the endpoint runs, and has its port. Raises ArtifactError,
    ConfigError, CapacityError."""
    keys = read_keys(job.http.api_keys_file)
    admin_keys = _admin_keys(job, keys)
    check_exposure(job.http.host, keys)
    if not listens:
        check_port(job.http.host, job.http.port)
    if job.resources.workers.max != 1:
        hint = "set `autoscaling.min_replicas` and `max_replicas`"
        raise ConfigError("resources.workers", f"{job.resources.workers} says nothing to an endpoint", hint=hint)
    if job.model.trust_remote_code:
        hint = "serve a model whose architecture `transformers` knows"
        raise ConfigError("model.trust_remote_code", "an endpoint runs no code of a model's own", hint=hint)
    for one in job.filters:
        one.check()
    found = model_of(job)
    load_tokenizer(found.folder)
    draft = None if job.engine.draft is None else find_model(job.engine.draft, storage=job.storage)
    store = open_store(job.storage)
    is_folder = Path(job.model.source).expanduser().exists()
    model_name = found.folder.name if is_folder else job.model.source.removeprefix(ARTIFACT).partition("@")[0]
    plan = ServePlan(
        model_name=model_name,
        source=_pinned(found),
        revision=job.model.revision,
        digest=found.digest,
        store=str(store.root),
        endpoint=job.name,
        served=job.adapters,
        cache=job.adapter_cache,
        adapters={},
        keys=keys,
        admin_keys=admin_keys,
        rope_scaling=job.model.rope_scaling,
        stream_interval_s=job.http.stream_interval_s,
        min_replicas=job.autoscaling.min_replicas,
        quantization=job.model.quantization,
        limits=job.http.limits,
        filters=job.filters,
        draft=None if draft is None else PlannedDraft(_pinned(draft), draft.digest),
        page=job.http.page,
        monitor=job.monitor,
    )
    every = _named_adapters(job, store, plan)
    named = {one.artifact: every[one.artifact] for one in job.adapters if not one.is_pattern and not one.merged}
    adapters = StoredAdapters(store, plan.fit)
    folders = {name: adapters.find(artifact.ref).folder for name, artifact in named.items()}
    model = load_empty_model(found.folder, rope_scaling=job.model.rope_scaling)
    if job.engine.needs_weights:
        check_unquantised(model.config, found.folder)
    if job.model.quantization:
        check_quantised(model, job.model.quantization)
    engine = job.engine if draft is None else job.engine.with_draft(draft.folder)
    engine.check(model, folders)
    if not listens:
        check_evaluations(job)
    merged = {one.artifact: merged_plan(one, plan) for one in job.adapters if one.merged}
    return replace(plan, adapters={name: artifact.id for name, artifact in named.items()}, merged=merged)


def merged_source(served: ServedAdapter, plan: ServePlan) -> str:
    """The version that the stage of `served` holds now, as the source of a model. Raises ArtifactError for one that
    does not fit."""
    artifact = Artifacts(open_store(plan.store)).find(ArtifactRef(served.artifact, served.stage))
    plan.merged_fit.check(artifact)
    return f"{ARTIFACT}{artifact.ref}"


def merged_plan(served: ServedAdapter, plan: ServePlan) -> ServePlan:
    """What replicas of `served` alone have to serve: that version, merged into the model of `plan` here if it has not
    been. Raises ArtifactError."""
    found = find_model(merged_source(served, plan), storage=plan.store)
    alone: dict[str, Any] = {"served": (), "adapters": {}, "merged": {}, "rope_scaling": None}  # in the weights' config
    return replace(plan, source=found.source, revision=None, digest=found.digest, **alone)


def _pinned(found: FoundModel) -> str:
    """What names a model on every node, whatever a stage holds later."""
    return str(found.folder) if Path(found.source).expanduser().exists() else found.source


def check_port(host: str, port: int) -> None:
    """Raises CapacityError where nothing can listen on `host:port` of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        hint = "set `http.port` to a free one, or stop what listens there"
        raise CapacityError(f"http {host}:{port}", f"cannot listen there: {error.strerror}", hint=hint) from None


def _admin_keys(job: ServeJob, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    field = "http.admin_keys_file"
    found = read_keys(job.http.admin_keys_file, field=field)
    for key in found:
        told = sorted(key.model_fields_set - {"name", "sha256", "metrics"})
        if told:
            hint = "leave it out: who may administer an endpoint may do so without limit"
            raise ConfigError(field, f"key `{key.name}` has {', '.join(told)}, which `/admin` does not know", hint=hint)
    if {key.sha256 for key in found} & {key.sha256 for key in keys}:
        hint = "give those who administer the endpoint keys of their own"
        raise ConfigError(field, "holds a key of `http.api_keys_file`", hint=hint)
    return found


def check_evaluations(job: ServeJob, *, known: Sequence[ScheduledEvaluation] = ()) -> None:
    """Raises what is wrong with one of the scheduled evaluations of `job`, but for those that are `known`: what they
    need may be out of reach for a while, which is no reason to refuse an update."""
    for place, one in enumerate(job.evaluations):
        if one in known:
            continue
        try:
            prepare_evaluation(one.job)
        except LmrayError as error:
            where = f"monitor.evaluations.{place}.job: {error.where}"
            raise type(error)(where, error.found, allowed=error.allowed, hint=error.hint) from None


def _named_adapters(job: ServeJob, store: Store, plan: ServePlan) -> dict[str, Artifact]:
    """The versions that now stand behind the names in the job; patterns are looked at when somebody asks."""
    found: dict[str, Artifact] = {}
    beside = [one for one in job.adapters if not one.merged]
    num_named = sum(not one.is_pattern for one in beside)
    if num_named > job.engine.max_adapters or (beside and not job.engine.max_adapters):
        hint = f"set `engine.max_adapters` to {max(num_named, 1)}"
        raise ConfigError("adapters", f"{len(beside)} are more than the engine holds", hint=hint)
    for one in [one for one in job.adapters if not one.is_pattern]:
        artifact = Artifacts(store).find(ArtifactRef(one.artifact, one.stage))
        (plan.merged_fit if one.merged else plan.fit).check(artifact)
        if artifact.name in found or artifact.name == plan.model_name:
            hint = "serve one version of an artifact"
            raise ConfigError("adapters", f"the name `{artifact.name}` is taken", hint=hint)
        found[artifact.name] = artifact
    return found
