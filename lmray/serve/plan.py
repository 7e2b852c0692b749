"""What an endpoint serves, as its replicas are told.

A replica may run on another node than the one that prepared, so a plan names things and their digests; `check_out`
finds them again where it is called and refuses anything else than what was planned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmray.artifacts.served import AdapterCache, ServedAdapter
from lmray.config.endpoint import HttpLimits
from lmray.data.filters.base import TextFilter
from lmray.engines.base import EngineConfig
from lmray.errors import ArtifactError
from lmray.job import EndpointMonitor
from lmray.models.rope import RopeScaling
from lmray.models.source import FoundModel, find_model
from lmray.serve.fit import Fit
from lmray.serve.keys import ApiKey


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
    """Merged ones too."""
    cache: AdapterCache
    adapters: dict[str, str]
    """Of those that are named and not merged: name in requests -> version id of the artifact, when the endpoint was
    prepared."""
    keys: tuple[ApiKey, ...]
    admin_keys: tuple[ApiKey, ...] = ()
    """Empty: the endpoint has no admin calls."""
    rope_scaling: RopeScaling | None = None
    """Of the base model's positions."""
    stream_interval_s: float = 0.0
    """How often tokens of an answer leave a replica."""
    min_replicas: int = 1
    """0: none may run while nothing is asked."""
    quantization: str | None = None
    """Of the base model's weights."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    filters: tuple[TextFilter, ...] = ()
    merged: dict[str, ServePlan] = field(default_factory=dict)
    """Of adapters with a copy of the base model to themselves: name in requests -> what their replicas serve."""
    draft: PlannedDraft | None = None
    page: bool = True
    monitor: EndpointMonitor = field(default_factory=EndpointMonitor)

    @property
    def fit(self) -> Fit:
        """What an adapter must be."""
        most = min(self.cache.max_adapter_bytes, self.cache.max_bytes)  # a larger one would wait for room for ever
        return Fit(self.source, self.digest, self.rope_scaling, most)

    @property
    def for_engines(self) -> ServePlan:
        """What engine replicas need of it: without what the gateway alone has to know, as the keys."""
        told: dict[str, Any] = {"keys": (), "admin_keys": (), "filters": (), "merged": {}, "page": True}
        return replace(self, **told, limits=HttpLimits(), monitor=EndpointMonitor(), min_replicas=1)

    @property
    def merged_fit(self) -> Fit:
        """What an adapter must be that is merged, which no cache holds."""
        return replace(self.fit, max_adapter_bytes=self.cache.max_adapter_bytes)


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
