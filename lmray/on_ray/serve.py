"""Serving on Ray Serve: starts, updates and stops the deployments of an endpoint. Converts types; decides nothing.

Runs in the driver; what it starts is in `lmray.on_ray.replicas`.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from typing import Any

import httpx
import ray
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from lmray.errors import CapacityError, ConfigError, RemoteError
from lmray.job import ServeJob
from lmray.on_ray.cluster import cluster_resources
from lmray.on_ray.replicas import EngineReplica, Gateway
from lmray.on_ray.routing import AdapterRouter
from lmray.policies.autoscaling import TokenPolicy, autoscaling_arguments, shutdown_s
from lmray.serve.prepare import ServePlan, prepare

QUEUED_PER_ROW = 4
"""Requests that may wait for each row of a replica's batch before more are told to come back later."""
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
"""For Ray Serve to end, besides the answers that were begun."""
HEALTH_S = 2.0
"""So soon Ray Serve learns of a dead replica and starts another; its own default is 10 s. Requests learn of it at
once."""
SURGE_PERCENT = 20
"""Of the replicas, and one at least, run besides while an update replaces them, where there is room."""
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
"""Where Ray Serve's own actor is found."""
_RAISED = re.compile(r"^[A-Za-z_][\w.]*: (.*(?:\n  \w+: .*)*)", re.MULTILINE)
"""An exception as a traceback ends with it, with the lines `allowed:` and `hint:` below."""
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Service:
    """A running endpoint."""

    def __init__(self, job: ServeJob):
        self._job = job
        self.name, self.url = job.name, f"http://{_reachable(job.http.host)}:{job.http.port}"

    def update(self, job: ServeJob) -> None:
        """Serves `job` instead, at the same address: another model, other keys, limits or bounds of its replicas.

        Replicas are replaced one after another and end with their last answer, so no request is refused; where the
        cluster has no room for one more meanwhile, requests wait for the first new one. Raises ConfigError for another
        name or address, what `prepare` raises, and RemoteError where the new replicas do not start: then the old ones
        go on.
        """
        for field in ("name", "http.host", "http.port"):
            old, new = (_field(one, field) for one in (self._job, job))
            if old != new:
                hint = "stop the endpoint and start it again"
                raise ConfigError(field, f"is {new}, and a running endpoint keeps {old}", hint=hint)
        plan = prepare(job, listens=True)
        _deploy(job, plan, _cpus_per_replica(job))
        self._job = job

    def stop(self) -> None:
        """Takes the endpoint down, once the answers it has begun are done."""
        ray_serve.delete(self.name, _blocking=False)  # which would wait for a minute at most
        deadline = time.monotonic() + shutdown_s(self._job.engine.max_length) + STOP_TIMEOUT_S
        while self.name in ray_serve.status().applications and time.monotonic() < deadline:
            time.sleep(0.1)
        _end_ray_serve()

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
    service = Service(job)
    try:
        _deploy(job, plan, num_cpus)
        _await_ready(service.url)
    except BaseException:
        service.stop()
        raise
    return service


def _deploy(job: ServeJob, plan: ServePlan, num_cpus: int) -> None:
    """Returns once all replicas are those of `job`. Raises RemoteError where they do not start."""
    try:
        ray_serve.run(_application(job, plan, num_cpus), name=job.name, route_prefix="/", logging_config=_QUIET)
    except (RuntimeError, RayServeException) as error:
        raise RemoteError(f"endpoint `{job.name}`", f"did not start: {_why(job.name, error)}") from None


def _end_ray_serve() -> None:
    """`serve.shutdown()` whose call to the controller, which the controller's end answers, is not tried again: Ray
    prints of each such call that it failed."""
    with suppress(ValueError, RayActorError):
        controller: Any = ray.get_actor(CONTROLLER, NAMESPACE)
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    ray_serve.shutdown()


def _application(job: ServeJob, plan: ServePlan, num_cpus: int) -> ray_serve.Application:
    rows, num_gpus = job.engine.max_batch_size, job.resources.gpus_per_worker
    most = rows * job.autoscaling.max_replicas * (1 + QUEUED_PER_ROW)
    router: dict[str, Any] = {"request_router_class": AdapterRouter}
    router["request_router_kwargs"] = {"light": max(rows // 2, 1)}
    lasting: dict[str, Any] = {
        "graceful_shutdown_timeout_s": shutdown_s(job.engine.max_length),
        "max_constructor_retry_count": 2,
        "health_check_period_s": HEALTH_S,
    }
    engines = ray_serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=rows,
        max_queued_requests=rows * QUEUED_PER_ROW,
        autoscaling_config=_autoscaling(job),
        request_router_config=RequestRouterConfig(**router),
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        max_surge_percent=_surge_percent(job, num_cpus),
        **lasting,
    )
    gateway = ray_serve.deployment(
        ray_serve.ingress()(Gateway),
        name="gateway",
        max_ongoing_requests=most,  # replicas push back, with an answer that clients understand; the gateway does not
        ray_actor_options={"num_cpus": 0},  # thin: a core of its own would cost a small machine a replica
        max_surge_percent=SURGE_PERCENT,
        **lasting,
    )
    bound = engines.bind(plan, job.engine, job.model.dtype, num_cpus, num_gpus)
    return gateway.bind(plan, job.engine.max_length, bound)


def _surge_percent(job: ServeJob, num_cpus: int) -> int:
    """None where one more than the most replicas does not fit: an update would wait for it for ever."""
    room = cluster_resources().room_for(cpus=num_cpus, gpus=job.resources.gpus_per_worker)
    return SURGE_PERCENT if room > job.autoscaling.max_replicas else 0


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


def _field(job: ServeJob, name: str) -> Any:
    value: Any = job
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _reachable(host: str) -> str:
    """An address to ask when the endpoint listens on all of them."""
    plain = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{plain}]" if ":" in plain else plain
