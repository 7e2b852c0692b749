"""How an endpoint is reached and scaled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmray.config.base import Config

Seconds = Annotated[float, Field(gt=0)]


class HttpLimits(Config):
    max_body_bytes: Annotated[int, Field(ge=1)] = 2**20
    max_messages: Annotated[int, Field(ge=1)] = 2000
    """Of one conversation."""
    max_parts: Annotated[int, Field(ge=1)] = 2000
    """Parts of text and calls of functions in all messages of one conversation together."""
    body_timeout_s: Seconds = 30.0
    """For a request's body to arrive."""
    answer_timeout_s: Seconds = 600.0
    """For an answer, from the request to its last token; a replica that is to go has as long for those it has begun."""
    send_timeout_s: Seconds = 60.0
    """For a client to take a piece of its answer; one that takes longer is cut off, as if it had left. Kept by an
    update."""


class Http(Config):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys_file: str | None = None
    """File with one API key a line, or YAML with hashes and what each key may do (`lmray.serve.keys`). Empty: no key is
    asked for, so keep `host` on loopback."""
    admin_keys_file: str | None = None
    """The same for `/admin`, with other keys. Empty: there is no `/admin`."""
    page: bool = True
    """Whether there is a page at `/` to chat with the models and to watch the load."""
    limits: HttpLimits = HttpLimits()
    stream_interval_s: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    """An answer's first token is sent at once, and then so often what came meanwhile: a message between the endpoint's
    processes costs 2 to 3 ms of CPU time. 0: token by token."""


class Autoscaling(Config):
    preset: Literal["cheap", "balanced", "fast"] = "balanced"
    """How fast replicas come and go; see `lmray.policies.autoscaling`."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: while nothing is asked no replica runs, and the next request waits for one to start."""
    max_replicas: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self):
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self
