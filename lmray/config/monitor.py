"""What is watched about the answers of an endpoint."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lmray.config.base import Config


class Monitor(Config):
    sample_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the answers that is scored and compared with earlier ones. 0: none is looked at."""
    retention: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Scored answers that are kept in the store with their prompts, old ones giving way to new. 0: none; an answer is
    dropped when it is scored, and nothing but numbers is kept."""
    window: Annotated[int, Field(ge=20, le=10_000)] = 200
    """Scored answers of a version that are compared at a time, and as many of them before that are its baseline."""
    baseline: Literal["version", "adapter"] = "version"
    """Whether each version is compared with its own first answers, or all versions of an adapter with those of the
    first one: a promotion that changes the answers is drift then."""
    false_alarms: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.001
    """Largest share of windows that may raise an alert by chance alone; see `lmray.policies.drift`."""
    perplexity: bool = True
    """Also how likely the base model finds the answers; it reads each once more, while no request waits. With
    `min_replicas: 0` that starts a replica of it, also for answers of merged models."""
    refusals: tuple[str, ...] = ()
    """What counts as a refusal besides the phrases that are known (`lmray.serve.refusals`): regular expressions, as
    Python's `re` reads them, looked for at the start of an answer."""

    @field_validator("refusals")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                matches_nothing = re.compile(pattern).match("") is not None
            except re.error as error:
                raise ValueError(f"`{pattern}` is no regular expression: {error}") from None
            if matches_nothing:
                raise ValueError(f"`{pattern}` matches the empty text, and so every answer")
        return value
