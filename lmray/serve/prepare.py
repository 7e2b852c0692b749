"""Everything that can be known before an endpoint starts: model, adapters, keys, port. Ray-free.

A replica may run on another node than the one that prepared, so a plan names things and their digests; `check_out`
finds them again where it is called and refuses anything else than what was planned.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmray.artifacts.artifact import Artifact, ArtifactRef, Artifacts
from lmray.artifacts.store import open_store
from lmray.config.endpoint import HttpLimits, TextFilter
from lmray.errors import ArtifactError, CapacityError, ConfigError
from lmray.job import ServeJob
from lmray.models.load import load_config, load_tokenizer
from lmray.models.quiet import quiet
from lmray.models.rope import RopeScaling, check_same_scaling
from lmray.models.source import ARTIFACT, FoundModel, find_model, model_of
from lmray.serve.keys import ApiKey, check_exposure, read_keys


@dataclass(frozen=True)
class ServePlan:
    """What will be served."""

    model_name: str
    """The base model's name in requests: its source, a folder's own name, or an artifact's."""
    source: str
    """Of an artifact with its version: a replica that starts after the stage moved serves what the others do."""
    revision: str | None
    digest: str
    """Of the base model's weights."""
    store: str
    """Folder of the artifact store."""
    adapters: dict[str, str]
    """Name in requests -> version id of the artifact of that name."""
    keys: tuple[ApiKey, ...]
    rope_scaling: RopeScaling | None = None
    """Of the base model's positions."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    filters: tuple[TextFilter, ...] = ()


@dataclass(frozen=True)
class CheckedOut:
    """What a plan names, on this node's disk."""

    model: Path
    adapters: dict[str, Path]


def prepare(job: ServeJob) -> ServePlan:
    """Resolves and checks all that `job` names. Raises ArtifactError, ConfigError, CapacityError."""
    keys = read_keys(job.http.api_keys_file)
    check_exposure(job.http.host, keys)
    check_port(job.http.host, job.http.port)
    if job.resources.workers.max != 1:
        hint = "set `autoscaling.min_replicas` and `max_replicas`"
        raise ConfigError("resources.workers", f"{job.resources.workers} says nothing to an endpoint", hint=hint)
    if job.model.trust_remote_code:
        hint = "serve a model whose architecture `transformers` knows"
        raise ConfigError("model.trust_remote_code", "an endpoint runs no code of a model's own", hint=hint)
    found = model_of(job)
    load_tokenizer(found.folder)
    store = open_store(job.storage)
    is_folder = Path(job.model.source).expanduser().exists()
    model_name = found.folder.name if is_folder else job.model.source.removeprefix(ARTIFACT).partition("@")[0]
    adapters = _adapters(job, Artifacts(store), found, model_name)
    plan = ServePlan(
        model_name=model_name,
        source=str(found.folder) if is_folder else found.source,
        revision=job.model.revision,
        digest=found.digest,
        store=str(store.root),
        adapters=adapters,
        keys=keys,
        rope_scaling=job.model.rope_scaling,
        limits=job.http.limits,
        filters=job.filters,
    )
    job.engine.check(load_empty_model(found.folder, job.model.rope_scaling), check_out(plan).adapters)
    return plan


def check_out(plan: ServePlan) -> CheckedOut:
    """Model and adapters of `plan` as folders of this node. Raises ArtifactError where the model is another here."""
    found = find_model(plan.source, plan.revision, storage=plan.store)
    if found.digest != plan.digest:
        what = f"has other weights on this node ({found.digest[:12]})"
        hint = "put the model where every node reads the same"
        raise ArtifactError(f"model `{plan.source}`", what, allowed=plan.digest[:12], hint=hint)
    artifacts = Artifacts(open_store(plan.store))
    folders = {name: artifacts.checkout(artifacts.find(ArtifactRef(name, id))) for name, id in plan.adapters.items()}
    return CheckedOut(found.folder, folders)


def load_empty_model(folder: Path, rope_scaling: RopeScaling | None = None) -> PreTrainedModel:
    """The model in `folder` without its weights, its positions scaled where asked for. Raises ArtifactError for a
    config that is none, ConfigError for positions that cannot be scaled."""
    try:
        with quiet(), torch.device("meta"):
            config = load_config(folder, rope_scaling=rope_scaling)
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"model folder {folder}", f"is no causal language model: {first[:200]}") from None


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


def _adapters(job: ServeJob, artifacts: Artifacts, base: FoundModel, model_name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if len(job.adapters) > job.engine.max_adapters:
        hint = f"set `engine.max_adapters` to {len(job.adapters)}"
        raise ConfigError("adapters", f"{len(job.adapters)} are more than the engine holds", hint=hint)
    for wanted in job.adapters:
        artifact = artifacts.find(ArtifactRef(wanted.artifact, wanted.stage))
        _check_base(artifact, base)
        check_same_scaling(f"artifact `{artifact.ref}`", RopeScaling.of(artifact.base), job.model.rope_scaling)
        if artifact.name in found or artifact.name == model_name:
            raise ConfigError(
                "adapters", f"the name `{artifact.name}` is taken", hint="serve one version of an artifact"
            )
        found[artifact.name] = artifact.id
    return found


def _check_base(artifact: Artifact, base: FoundModel) -> None:
    if artifact.kind != "adapter":
        hint = f"serve it as `model.source: artifact:{artifact.name}`"
        raise ArtifactError(f"artifact `{artifact.ref}`", f"is a {artifact.kind}", allowed="adapter", hint=hint)
    digest = artifact.base.get("digest")
    if digest != base.digest:
        was = f"was trained on `{artifact.base.get('source')}` ({str(digest)[:12]})"
        hint = f"set `model.source: {artifact.base.get('source')}`, or train it again on this model"
        allowed = f"adapters of `{base.source}` ({base.digest[:12]})"
        raise ArtifactError(f"artifact `{artifact.ref}`", was, allowed=allowed, hint=hint)
