"""Serving on Ray Serve: a gateway deployment in front of engine replicas. Converts types; decides nothing.

The gateway's replica tokenises, keeps the keys and streams text; each engine replica owns a model and holds adapters.
Tokens pass between them as a streaming handle call. Runs in the driver but for the two deployment classes.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import httpx
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from lmray.artifacts.store import open_store
from lmray.engines.base import EngineConfig, Request, Sampling, TokenEvent
from lmray.errors import CapacityError, LmrayError, RemoteError
from lmray.job import ServeJob
from lmray.models.load import load_model, load_tokenizer, stop_token_ids
from lmray.models.precision import resolve_dtype
from lmray.on_ray.cluster import cluster_resources
from lmray.on_ray.failures import error_inside
from lmray.on_ray.routing import AdapterRouter
from lmray.policies.autoscaling import TokenPolicy, autoscaling_arguments, shutdown_s
from lmray.serve.admin import add_admin
from lmray.serve.canaries import Canaries
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.live import LiveEngine
from lmray.serve.prepare import ServePlan, check_out, prepare

QUEUED_PER_ROW = 4
"""Requests that may wait for each row of a replica's batch before more are told to come back later."""
READY_TIMEOUT_S = 60.0
EVERYWHERE_TIMEOUT_S = 60.0
"""How long a call to every replica may take."""
_RAISED = re.compile(r"^[A-Za-z_][\w.]*: (.*(?:\n  \w+: .*)*)", re.MULTILINE)
"""An exception as a traceback ends with it, with the lines `allowed:` and `hint:` below."""
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class EngineReplica:
    """One engine in its own process. Ray Serve restarts it when `check_health` raises."""

    async def __init__(self, plan: ServePlan, config: EngineConfig, dtype: str, num_cpus: int, num_gpus: int):
        folder, device = check_out(plan), "cuda" if num_gpus else "cpu"
        dtype, _ = resolve_dtype(dtype, device)  # type: ignore[arg-type]
        model: Any = load_model(folder, dtype, rope_scaling=plan.rope_scaling)
        model.to(device)
        tokenizer = load_tokenizer(folder)
        stops = stop_token_ids(model, tokenizer)
        self._live = LiveEngine(config.start(model, stop_token_ids=stops, threads=num_cpus, tokenizer=tokenizer), plan)
        await self._live.start()
        async for _ in self._live.stream(Request("warm-up", (0,), Sampling(max_tokens=1))):
            pass  # reserves memory and fails here rather than at a user's request

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        async with aclosing(self._live.stream(request)) as events:
            async for event in events:
                yield event

    async def stats(self) -> dict[str, Any]:
        return self._live.stats()

    async def manage(self, action: str, handle: str) -> dict[str, Any]:
        found = await self._live.manage(action, handle)
        return {"replica": ray_serve.get_replica_context().replica_id.unique_id, **found}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self._live.demand.report()

    async def check_health(self) -> None:
        await self._live.follow(again=True)
        failure = self._live.stats()["failure"]
        if failure is not None:
            raise RuntimeError(failure)


class Gateway:
    """The ingress. Its app is built in the replica, where the tokenizer's folder is."""

    def __init__(self, plan: ServePlan, max_length: int, engines: DeploymentHandle):
        self._plan, self._max_length, self._engines = plan, max_length, engines

    def __serve_build_asgi_app__(self) -> FastAPI:
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
            aliases=lambda: catalogue.aliases,
            sends_request_id=False,  # Ray Serve sends it
        )
        fleet = Fleet(_Replicas(self._engines), catalogue, Canaries(store, plan.endpoint))
        app = make_app(fleet, load_tokenizer(check_out(plan)), settings)
        add_admin(app, fleet, plan)
        return app


class _Replicas:
    """Streaming calls to whichever replica Ray Serve picks."""

    def __init__(self, engines: DeploymentHandle):
        self._streaming = engines.options(stream=True)
        self._engines = engines

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        response: Any = self._streaming.stream.remote(request)
        try:
            async for event in response:
                yield event
        except (RayError, RayServeException) as error:
            raise _plain(error) from None
        finally:
            response.cancel()

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        try:
            return await self._engines.broadcast(method, *arguments).results_async(timeout_s=EVERYWHERE_TIMEOUT_S)
        except DeploymentUnavailableError:
            return []  # none runs while nothing is asked
        except (RayError, RayServeException, TimeoutError) as error:
            raise _plain(error) from None


def _plain(error: Exception) -> LmrayError:
    """What a replica raised, or why none answered, as one of lmray's errors."""
    if isinstance(error, BackPressureError):
        return CapacityError("endpoint", "too many requests are waiting", hint="come back in a moment")
    return error_inside(error) or RemoteError("endpoint", f"no replica answered: {type(error).__name__}")


class Service:
    """A running endpoint."""

    def __init__(self, name: str, url: str):
        self.name, self.url = name, url

    def stop(self) -> None:
        """Takes the endpoint down, once the answers it has begun are done."""
        ray_serve.delete(self.name)
        ray_serve.shutdown()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def serve(job: ServeJob) -> Service:
    """Starts `job` on the connected cluster and returns once it answers.

    Raises what `prepare` raises before anything starts, CapacityError where the smallest number of replicas does not
    fit or Ray Serve is taken, RemoteError where the endpoint does not come up.
    """
    plan = prepare(job)
    num_cpus = _cpus_per_replica(job)
    _check_free(job)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(http_options={"host": job.http.host, "port": job.http.port}, logging_config=_QUIET)
    service = Service(job.name, f"http://{_reachable(job.http.host)}:{job.http.port}")
    try:
        ray_serve.run(_application(job, plan, num_cpus), name=job.name, route_prefix="/", logging_config=_QUIET)
        _await_ready(service.url)
    except BaseException as error:
        why = _why(job.name, error) if isinstance(error, RuntimeError | RayServeException) else None
        service.stop()
        if why is not None:
            raise RemoteError(f"endpoint `{job.name}`", f"did not start: {why}") from None
        raise
    return service


def _application(job: ServeJob, plan: ServePlan, num_cpus: int) -> ray_serve.Application:
    rows, num_gpus = job.engine.max_batch_size, job.resources.gpus_per_worker
    most = rows * job.autoscaling.max_replicas * (1 + QUEUED_PER_ROW)
    router: dict[str, Any] = {"request_router_class": AdapterRouter}
    router["request_router_kwargs"] = {"light": max(rows // 2, 1)}
    engines = ray_serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=rows,
        max_queued_requests=rows * QUEUED_PER_ROW,
        autoscaling_config=_autoscaling(job),
        request_router_config=RequestRouterConfig(**router),
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        graceful_shutdown_timeout_s=shutdown_s(job.engine.max_length),
        max_constructor_retry_count=2,
    )
    gateway = ray_serve.deployment(
        ray_serve.ingress()(Gateway),
        name="gateway",
        max_ongoing_requests=most,  # replicas push back, with an answer that clients understand; the gateway does not
        ray_actor_options={"num_cpus": 0},  # thin: a core of its own would cost a small machine a replica
        graceful_shutdown_timeout_s=shutdown_s(job.engine.max_length),
        max_constructor_retry_count=2,
    )
    bound = engines.bind(plan, job.engine, job.model.dtype, num_cpus, num_gpus)
    return gateway.bind(plan, job.engine.max_length, bound)


def _autoscaling(job: ServeJob) -> AutoscalingConfig:
    scaling = job.autoscaling
    settings = {"preset": scaling.preset, "max_batch_size": job.engine.max_batch_size}
    return AutoscalingConfig(
        policy=AutoscalingPolicy(policy_function=TokenPolicy, policy_kwargs=settings),
        **autoscaling_arguments(scaling.preset, min_replicas=scaling.min_replicas, max_replicas=scaling.max_replicas),
    )


def _cpus_per_replica(job: ServeJob) -> int:
    """Cores a replica reserves and computes with. Raises CapacityError where the fewest replicas do not fit."""
    offered = cluster_resources()
    smallest = min((node.cpus for node in offered.nodes), default=0.0)
    num_cpus = job.resources.cpus_per_worker or max(1, int(smallest) // job.autoscaling.max_replicas)
    num_gpus, fewest = job.resources.gpus_per_worker, max(job.autoscaling.min_replicas, 1)
    room = offered.room_for(cpus=num_cpus, gpus=num_gpus)
    if room < fewest:
        size = f"{num_cpus} CPU(s) and {num_gpus} GPU(s)"
        found = f"{fewest} replica(s) with {size} each do not fit; there is room for {room}"
        allowed = f"{offered.cpus:g} CPUs and {offered.gpus:g} GPUs on {len(offered.nodes)} node(s)"
        raise CapacityError("autoscaling.min_replicas", found, allowed=allowed, hint="lower it, or `resources`")
    return num_cpus


def _check_free(job: ServeJob) -> None:
    running = ray_serve.status().applications
    if running:
        hint = "stop it first, or serve from another cluster"
        raise CapacityError(f"endpoint `{job.name}`", f"Ray Serve already runs `{next(iter(running))}`", hint=hint)


def _why(name: str, error: Exception) -> str:
    """What a replica of application `name` raised while it started, else what Ray Serve says itself.

    Ray Serve hands on the text of a traceback only; its last entry is the exception with lmray's own lines below it.
    """
    application = ray_serve.status().applications.get(name)
    said = [one.message for one in application.deployments.values() if one.message] if application else []
    raised = [entry for text in said for entry in _RAISED.findall(text)]
    return raised[-1] if raised else str(error)


def _await_ready(url: str) -> None:
    """Returns once `url/ready` answers 200: Serve's proxy learns of a new application a moment after it runs."""
    said, deadline = "nothing", time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            response = httpx.get(f"{url}/ready", timeout=READY_TIMEOUT_S)
            if response.status_code == 200:
                return
            said = f"HTTP {response.status_code}: {response.text[:200]}"
        time.sleep(0.1)
    raise RemoteError(url, f"is not ready after {READY_TIMEOUT_S:.0f} s; it said {said}")


def _reachable(host: str) -> str:
    """An address to ask when the endpoint listens on all of them."""
    plain = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{plain}]" if ":" in plain else plain
