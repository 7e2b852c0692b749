"""The page at `/` of an endpoint: chat with one or two of its models, and how busy it is, from `/load`.

One file without a build and without anything from elsewhere. The browser is told to run this file's own script and
style alone, to speak to this server alone, and to make no HTML of text: what a model says is not to be trusted.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from lmray.serve.answer import Backend
from lmray.serve.metrics import Metrics

FILE = Path(__file__).with_name("index.html")


def add_page(app: FastAPI, backend: Backend, metrics: Metrics, check: Callable[[Request], object]) -> None:
    """Adds `/` and `/load` to `app`. `check` raises for a request that may not see the load; the page tells nothing of
    the endpoint and is for everyone who reaches it."""
    html = FILE.read_text(encoding="utf-8")
    headers = headers_of(html)

    async def page() -> Response:
        return HTMLResponse(html, headers=headers)

    async def load_now(http: Request) -> Response:
        check(http)
        engines = await backend.stats()
        running = [sample.value for family in metrics.running.collect() for sample in family.samples]
        load = load_of(engines, num_requests=int(sum(running)))
        return JSONResponse(load, headers={"Cache-Control": "no-store"})

    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/load", load_now, methods=["GET"], include_in_schema=False)


def headers_of(html: str) -> Mapping[str, str]:
    """What a browser is to hold the page `html` to."""
    [script], [style] = (re.findall(rf"<{name}>(.*?)</{name}>", html, re.DOTALL) for name in ("script", "style"))
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {allowed}" for name, allowed in rules.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def load_of(engines: Sequence[Mapping[str, Any]], *, num_requests: int) -> dict[str, Any]:
    """All replicas in one: `replicas running waiting generated_tokens adapters free_blocks num_blocks`, and `seen_s`,
    which tells two looks apart.

    `engines` are the engines' stats, `num_requests` the requests that the gateway has not answered to their end: of
    those some wait before the engines, for a replica or for a place in one.
    """

    def total(name: str) -> int:
        return sum(int(engine.get(name, 0)) for engine in engines)

    running, now_s = total("running"), time.monotonic()
    return {
        "replicas": len(engines),
        "running": running,
        "waiting": max(total("waiting"), num_requests - running),
        "generated_tokens": total("generated_tokens"),
        "adapters": sorted({handle for engine in engines for handle in engine.get("adapters", ())}),
        "free_blocks": total("free_blocks"),
        "num_blocks": total("num_blocks"),
        "seen_s": max((engine.get("seen_s", now_s) for engine in engines), default=now_s),
    }
