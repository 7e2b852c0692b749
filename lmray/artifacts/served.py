"""What of a store an endpoint serves, and how: the part of a serving job that is about artifacts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lmray.config import Config, checked_name

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Canary(Config):
    """A share of an adapter's requests goes to its next version, until it is promoted or does worse than allowed. A
    request that it does not answer, as when it ends its replicas, is answered by the current version; three of these
    can be enough to take it back."""

    stage: Literal["candidate", "staging"] = "staging"
    """Holds the next version."""
    share: Share = 0.05
    sticky: Literal["key", "request"] = "key"
    """Whether an API key always gets the same version; requests without a key are drawn one by one."""
    min_requests: Annotated[int, Field(ge=10)] = 50
    """Of each version, before the next one can be taken back."""
    max_error_increase: Share = 0.02
    """How much larger its share of failed requests may be."""
    max_latency_increase: Annotated[float, Field(ge=0.0)] = 0.5
    """How much longer, as a fraction, its first token may take (geometric mean)."""
    max_score_drop: Annotated[float, Field(ge=0.0)] = 0.05
    """How much lower the mean of its scores may be (`POST /admin/canaries/scores`)."""


class ServedAdapter(Config):
    artifact: str
    """Name of an artifact, which is loaded before the endpoint answers, or a pattern with `*`: all artifacts of the
    store that it fits and that fit the model, each loaded when it is first asked for."""
    stage: str | None = None
    """The stage whose version is served; once another version is promoted to it, that one. Empty: the newest."""
    canary: Canary | None = None
    merged: bool = False
    """Merged into a copy of the base model, with replicas of its own, which answer as fast as the base model's; another
    version that is promoted to `stage` replaces them one after another. There is nothing of it to load or pin. Else it
    is one of many beside the base."""

    @model_validator(mode="after")
    def _merged_by_name(self):
        if self.merged and self.is_pattern:
            raise ValueError(f"`{self.artifact}` names many, and `merged` makes replicas for each; name one")
        if self.merged and self.canary is not None:
            raise ValueError("`canary` is for adapters beside the base model; leave out `merged`, or the canary")
        return self

    @property
    def is_pattern(self) -> bool:
        return "*" in self.artifact

    @field_validator("artifact")
    @classmethod
    def _named(cls, value: str):
        return value if "*" in value else checked_name(value)


class AdapterCache(Config):
    max_bytes: Annotated[int, Field(ge=1)] = 8 * 2**30
    """Of the adapters' files that a replica holds at a time; what is least recently used goes first."""
    max_adapter_bytes: Annotated[int, Field(ge=1)] = 2**30
    """An adapter with larger files is not served."""
    missing_s: Annotated[float, Field(ge=0.0)] = 10.0
    """For so long after an adapter could not be loaded it is refused without another look."""
