"""The deployments of an endpoint: engine replicas, and the gateway that asks them. Runs in their own processes.

The gateway's replica tokenises, keeps the keys and streams text; each engine replica owns a model and holds adapters.
Tokens pass between them as a streaming handle call.
"""

from __future__ import annotations

import gc
import logging
import logging.handlers
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from lmray.artifacts.store import open_store
from lmray.engines._loading import load_for
from lmray.engines.base import EngineConfig, Request, Sampling, TokenEvent
from lmray.errors import CapacityError, LmrayError, RemoteError
from lmray.models.load import load_tokenizer, stop_token_ids
from lmray.models.precision import resolve_dtype
from lmray.models.source import ARTIFACT
from lmray.on_ray.failures import error_inside, reason
from lmray.on_ray.waiting import WaitsForAdapter, waits, waits_no_more
from lmray.serve.account import ACCESS_LOG, FILTERS_LOG
from lmray.serve.admin import add_admin
from lmray.serve.canaries import Canaries
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.gathered import gathered
from lmray.serve.live import LiveEngine
from lmray.serve.monitor import Monitoring
from lmray.serve.plan import ServePlan, check_out, check_out_engine

ENGINE = "engine"
"""Name of the deployment of engine replicas, in each application."""
EVERYWHERE_TIMEOUT_S = 60.0
"""How long a call to every replica may take."""
_LOG = logging.getLogger("ray.serve")


class EngineReplica:
    """One engine in its own process. Where the engine ends the process does, and Ray Serve starts another."""

    async def __init__(self, plan: ServePlan, config: EngineConfig, dtype: str, num_cpus: int, num_gpus: int):
        self._interval_s, self._version = plan.stream_interval_s, plan.source.removeprefix(ARTIFACT)
        folder, device = check_out(plan), "cuda" if num_gpus else "cpu"
        dtype, _ = resolve_dtype(dtype, device)  # type: ignore[arg-type]
        how: Any = {"quantization": plan.quantization, "rope_scaling": plan.rope_scaling}
        model = load_for(config, folder, dtype=dtype, device=device, **how)
        tokenizer = load_tokenizer(folder)
        stops = stop_token_ids(model, tokenizer)
        config = check_out_engine(plan, config)
        self._live = LiveEngine(config.start(model, stop_token_ids=stops, threads=num_cpus, tokenizer=tokenizer), plan)
        await self._live.start()
        async for _ in self._live.stream(Request("warm-up", (0,), Sampling(max_tokens=1))):
            pass  # reserves memory and fails here rather than at a user's request

    async def stream(self, request: Request) -> AsyncGenerator[list[TokenEvent] | WaitsForAdapter, None]:
        version: str | None = self._version  # said once
        try:
            if not self._live.holds(request.adapter):
                yield WaitsForAdapter(ray_serve.get_replica_context().replica_id.unique_id)
            async with aclosing(gathered(self._live.stream(request), self._interval_s)) as lists:
                async for first, *others in lists:
                    yield [replace(first, version=version), *others]
                    version = None
        except LmrayError:
            self._leave_with_engine()
            raise

    async def stats(self) -> dict[str, Any]:
        replica = ray_serve.get_replica_context().replica_id.unique_id
        return {"replica": replica, "version": self._version, **self._live.stats()}

    async def manage(self, action: str, handle: str) -> dict[str, Any]:
        found = await self._live.manage(action, handle)
        return {"replica": ray_serve.get_replica_context().replica_id.unique_id, **found}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self._live.demand.report()

    async def check_health(self) -> None:
        await self._live.follow(again=True)
        self._leave_with_engine()

    def _leave_with_engine(self) -> None:
        """Ends this process where its engine has ended, before any request hears of it: those without a token go to
        another replica then, as from any replica that died, and nobody is sent here until a check of health fails."""
        if (failure := self._live.failure) is not None:
            _LOG.error("this replica ends with its engine: %s", failure)
            os._exit(1)


class Gateway:
    """The ingress. Its app is built in the replica, where the tokenizer's folder is."""

    def __init__(self, plan: ServePlan, max_length: int, engines: DeploymentHandle, merged: dict[str, str]):
        """`merged`: name in requests -> the application whose replicas serve that model."""
        self._plan, self._max_length, self._engines, self._merged = plan, max_length, engines, merged

    def __serve_build_asgi_app__(self) -> FastAPI:
        _log_requests()
        plan = self._plan
        store = open_store(plan.store)
        catalogue = Catalogue(store, plan.served, plan.fit, reserved=plan.model_name)
        catalogue.refresh()
        settings = GatewaySettings(
            plan.model_name,
            self._max_length,
            keys=plan.keys,
            limits=plan.limits,
            filters=plan.filters,
            page=plan.page,
            aliases=lambda: catalogue.aliases,
            sends_request_id=False,  # Ray Serve sends it
        )
        canaries = Canaries(store, plan.endpoint)
        tokenizer = load_tokenizer(check_out(plan))
        monitoring = Monitoring(RoutedReplicas(self._engines), plan, tokenizer, store)
        merged = {
            name: monitoring.merged(RoutedReplicas(ray_serve.get_deployment_handle(ENGINE, application)))
            for name, application in self._merged.items()
        }
        fleet = Fleet(monitoring.replicas, catalogue, canaries, merged=merged, min_replicas=plan.min_replicas)
        app = make_app(fleet, tokenizer, settings)
        monitoring.add_to(app, fleet)
        add_admin(app, fleet, plan, monitoring.drift)
        gc.collect()
        gc.freeze()  # what is there by now stays: looking through it again and again takes a third of a second each
        return app


class RoutedReplicas:
    """Streaming calls to whichever replica Ray Serve picks."""

    def __init__(self, engines: DeploymentHandle):
        self._streaming = engines.options(stream=True)
        self._engines = engines

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        response: Any = self._streaming.stream.remote(request)
        waiting: str | None = None
        try:
            async for events in response:
                if isinstance(events, WaitsForAdapter):
                    waiting = events.replica
                    waits(waiting)
                    continue
                waits_no_more(waiting)
                waiting = None
                for event in events:
                    yield event
        except (RayError, RayServeException) as error:
            raise as_lmray_error(error) from None
        finally:
            waits_no_more(waiting)
            response.cancel()

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        try:
            asked = self._engines.broadcast(method, *arguments)
            found = await asked.results_async(timeout_s=EVERYWHERE_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            return []  # none runs while nothing is asked
        except (RayError, RayServeException, TimeoutError) as error:
            raise as_lmray_error(error) from None
        answers = [one for one in found if not isinstance(one, RayActorError)]  # a replica that died is none any more
        for one in answers:
            if isinstance(one, Exception):
                raise as_lmray_error(one) from None
        return answers


def _log_requests() -> None:
    """Writes what is told of requests into this replica's file among Ray Serve's logs, and not to the driver's
    terminal."""
    files = [one for one in _LOG.handlers if isinstance(one, logging.handlers.MemoryHandler)]
    for log in (logging.getLogger(ACCESS_LOG), logging.getLogger(FILTERS_LOG)):
        log.setLevel(logging.INFO)
        log.propagate, log.handlers = False, list(files)


def as_lmray_error(error: Exception) -> LmrayError:
    """What a replica raised, or why none answered, as one of lmray's errors; RemoteError where it may be asked of
    another."""
    if isinstance(error, BackPressureError):
        return CapacityError("endpoint", "too many requests are waiting", hint="come back in a moment")
    if (inner := error_inside(error)) is not None:
        return inner
    if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
        return LmrayError("endpoint", f"a replica failed: {reason(error)}")
    return RemoteError("endpoint", f"no replica answered: {type(error).__name__}")
