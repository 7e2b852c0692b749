"""A connection to a cluster's Jobs API: which address, with which token, and every failure as a RemoteError.

The token comes from `$RAY_AUTH_TOKEN`, the file `$RAY_AUTH_TOKEN_PATH` names or `~/.ray/auth_token`; Ray's own client
reads it only where RAY_AUTH_MODE=token is set, so a cluster that asks is answered here. It is never put into a job.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from lmray.errors import ConfigError, RemoteError
from lmray.on_ray.cluster import user_token

DEFAULT_URL = "http://127.0.0.1:8265"
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
"""Loggers of Ray that tell every upload and every end of a stream."""
_TOKEN_HINT = (
    "put the cluster's token into a file only you can read, then set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
    " (`ray get-auth-token` on the head prints it)"
)


def api_url(address: str | None = None) -> str:
    """`address`, else what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, else this machine's dashboard."""
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return DEFAULT_URL if named in (None, "", "local") else named.rstrip("/")


def connect(address: str | None = None) -> JobSubmissionClient:
    """A client for the cluster at `address`. Raises RemoteError where nothing answers or the token is refused."""
    url = api_url(address)
    if url.startswith("ray://"):
        hint = "give the address of its dashboard, like http://HOST:8265"
        raise ConfigError(
            f"address `{url}`", "is a Ray Client's", allowed="http(s)://HOST:8265, HOST:6379, auto", hint=hint
        )
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    with speaking(url):
        try:
            return _client(url)
        except AuthenticationError as error:
            token = user_token()
            if token is None or _was_refused(error):
                raise
            return _client(url, {"Authorization": f"Bearer {token}"})


def _client(url: str, headers: dict[str, str] | None = None) -> JobSubmissionClient:
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray lets the environment win over an address that was given
    try:
        return JobSubmissionClient(url, headers=headers)
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


@contextmanager
def speaking(where: str) -> Iterator[None]:
    """Every failure of a call to the Jobs API as a RemoteError that says what to set or start."""
    try:
        yield
    except AuthenticationError as error:
        found = "the token was refused (403)" if _was_refused(error) else "asks for a token, and none was sent (401)"
        raise RemoteError(where, found, hint=_TOKEN_HINT) from None
    except (ConnectionError, requests.exceptions.ConnectionError):
        hint = "start one with `ray start --head`, or name another with --address or RAY_API_SERVER_ADDRESS"
        raise RemoteError(where, "no cluster's Jobs API answers here", hint=hint) from None
    except (RuntimeError, ValueError, requests.exceptions.RequestException) as error:
        raise RemoteError(where, f"the Jobs API failed: {_first_line(error)}") from error


def _was_refused(error: AuthenticationError) -> bool:
    """Whether a token was sent: Ray says so in words only."""
    return str(error).startswith("Authentication failed")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
