"""What lmray puts into Ray Serve's HTTP proxies, which hold the connections of an endpoint's clients.

A proxy hands on to its client what comes from the gateway, and has no limit of its own for how long the client takes.
"""

from __future__ import annotations

import os

from starlette.middleware import Middleware

from lmray.config.endpoint import HttpLimits
from lmray.serve.slow_clients import SlowClients

SEND_TIMEOUT = "LMRAY_SEND_TIMEOUT_S"


def proxy_environment(limits: HttpLimits) -> dict[str, str]:
    """Variables of Ray Serve's controller, which the proxies inherit."""
    call = f"{middlewares.__module__}.{middlewares.__qualname__}"
    return {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": call, SEND_TIMEOUT: str(limits.send_timeout_s)}


def middlewares() -> list[Middleware]:
    """Called by Ray Serve in each proxy."""
    return [Middleware(SlowClients, send_timeout_s=float(os.environ[SEND_TIMEOUT]))]
