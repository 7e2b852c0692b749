"""Everything that can be known before an endpoint starts: model, adapters, keys, port. Ray-free.

A replica may run on another node than the one that prepared, so a plan names things and their digests; `check_out`
finds them again where it is called and refuses anything else than what was planned.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmray.artifacts.artifact import Artifact, ArtifactRef, Artifacts
from lmray.artifacts.served import AdapterCache, ServedAdapter
from lmray.artifacts.store import Store, open_store
from lmray.config.endpoint import HttpLimits, TextFilter
from lmray.engines.base import EngineConfig
from lmray.errors import ArtifactError, CapacityError, ConfigError
from lmray.job import ServeJob
from lmray.models.load import load_config, load_tokenizer
from lmray.models.quiet import quiet
from lmray.models.rope import RopeScaling
from lmray.models.source import ARTIFACT, FoundModel, find_model, model_of
from lmray.serve.fit import Fit, StoredAdapters
from lmray.serve.keys import ApiKey, check_exposure, read_keys


@dataclass(frozen=True)
class PlannedDraft:
    """The model that an engine drafts with, named as the base model is."""

    source: str
    digest: str


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
    endpoint: str
    """Name of the job."""
    served: tuple[ServedAdapter, ...]
    cache: AdapterCache
    adapters: dict[str, str]
    """Of those that are named: name in requests -> version id of the artifact, when the endpoint was prepared."""
    keys: tuple[ApiKey, ...]
    admin_keys: tuple[ApiKey, ...] = ()
    """Empty: the endpoint has no admin calls."""
    rope_scaling: RopeScaling | None = None
    """Of the base model's positions."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    filters: tuple[TextFilter, ...] = ()
    draft: PlannedDraft | None = None

    @property
    def fit(self) -> Fit:
        """What an adapter must be."""
        return Fit(self.source, self.digest, self.rope_scaling, self.cache.max_adapter_bytes)


def prepare(job: ServeJob) -> ServePlan:
    """Resolves and checks all that `job` names. Raises ArtifactError, ConfigError, CapacityError."""
    keys = read_keys(job.http.api_keys_file)
    admin_keys = _admin_keys(job, keys)
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
        limits=job.http.limits,
        filters=job.filters,
        draft=None if draft is None else PlannedDraft(_pinned(draft), draft.digest),
    )
    named = _named_adapters(job, store, plan)
    adapters = StoredAdapters(store, plan.fit)
    folders = {name: adapters.find(artifact.ref).folder for name, artifact in named.items()}
    engine = job.engine if draft is None else job.engine.with_draft(draft.folder)
    engine.check(load_empty_model(found.folder, job.model.rope_scaling), folders)
    return replace(plan, adapters={name: artifact.id for name, artifact in named.items()})


def check_out(plan: ServePlan) -> Path:
    """The model of `plan` as a folder of this node. Raises ArtifactError where it is another model here."""
    return _same(find_model(plan.source, plan.revision, storage=plan.store), plan.digest)


def check_out_engine(plan: ServePlan, config: EngineConfig) -> EngineConfig:
    """`config` with the draft model of `plan`, where it has one, as a folder of this node. Raises ArtifactError where
    it is another model here."""
    if plan.draft is None:
        return config
    return config.with_draft(_same(find_model(plan.draft.source, storage=plan.store), plan.draft.digest))


def _same(found: FoundModel, digest: str) -> Path:
    if found.digest != digest:
        what = f"has other weights on this node ({found.digest[:12]})"
        hint = "put the model where every node reads the same"
        raise ArtifactError(f"model `{found.source}`", what, allowed=digest[:12], hint=hint)
    return found.folder


def _pinned(found: FoundModel) -> str:
    """What names a model on every node, whatever a stage holds later."""
    return str(found.folder) if Path(found.source).expanduser().exists() else found.source


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


def _named_adapters(job: ServeJob, store: Store, plan: ServePlan) -> dict[str, Artifact]:
    """The versions that now stand behind the names in the job; patterns are looked at when somebody asks."""
    found: dict[str, Artifact] = {}
    wanted = [one for one in job.adapters if not one.is_pattern]
    if len(wanted) > job.engine.max_adapters or (job.adapters and not job.engine.max_adapters):
        hint = f"set `engine.max_adapters` to {max(len(wanted), 1)}"
        raise ConfigError("adapters", f"{len(job.adapters)} are more than the engine holds", hint=hint)
    for one in wanted:
        artifact = Artifacts(store).find(ArtifactRef(one.artifact, one.stage))
        plan.fit.check(artifact)
        if artifact.name in found or artifact.name == plan.model_name:
            hint = "serve one version of an artifact"
            raise ConfigError("adapters", f"the name `{artifact.name}` is taken", hint=hint)
        found[artifact.name] = artifact
    return found
