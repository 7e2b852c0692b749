"""Serving on Ray Serve: starts, updates and stops the deployments of an endpoint. Converts types; decides nothing.

Runs in the driver; what it starts is in `lmray.on_ray.replicas`.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import ray
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from lmray.artifacts.served import ServedAdapter
from lmray.errors import CapacityError, ConfigError, LmrayError, RemoteError
from lmray.job import ServeJob
from lmray.on_ray.cluster import cluster_resources
from lmray.on_ray.deployments import endpoint_application, engine_application, merged_application, num_models
from lmray.policies.autoscaling import shutdown_s
from lmray.serve.catalogue import EVERY_S
from lmray.serve.prepare import ServePlan, merged_plan, merged_source, prepare

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
"""For Ray Serve to end, besides the answers that were begun."""
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
"""Where Ray Serve's own actor is found."""
_RAISED = re.compile(r"^[A-Za-z_][\w.]*: (.*(?:\n  \w+: .*)*)", re.MULTILINE)
"""An exception as a traceback ends with it, with the lines `allowed:` and `hint:` below."""
_LOG = logging.getLogger(__name__)
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Service:
    """A running endpoint."""

    def __init__(self, job: ServeJob):
        self._job = job
        self.name, self.url = job.name, f"http://{_reachable(job.http.host)}:{job.http.port}"
        self._merged: dict[str, str] = {}
        """Name in requests -> source of what is served, or was tried last; of merged models."""
        self._turn, self._ends = threading.Lock(), threading.Event()
        self._follower = threading.Thread(target=self._follow, name="lmray-merged", daemon=True)

    def _start(self, job: ServeJob, plan: ServePlan, num_cpus: int) -> None:
        """Returns once all replicas serve `plan`. Raises RemoteError where they do not start."""
        for name in plan.merged:
            self._deploy_merged(job, name, plan.merged[name], num_cpus)
        _deploy(self.name, endpoint_application(job, plan, num_cpus), route_prefix="/")
        for name in sorted(self._merged.keys() - plan.merged.keys()):
            ray_serve.delete(merged_application(self.name, name), _blocking=False)
            del self._merged[name]
        self._job, self._plan = job, plan
        if plan.merged and not self._follower.is_alive():
            self._follower.start()

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
        num_cpus = _cpus_per_replica(job)
        with self._turn:
            self._start(job, plan, num_cpus)

    def stop(self) -> None:
        """Takes the endpoint down, once the answers it has begun are done."""
        self._ends.set()
        with self._turn:
            for name in ray_serve.status().applications:
                ray_serve.delete(name, _blocking=False)  # which would wait for a minute at most
            deadline = time.monotonic() + shutdown_s(self._job.engine.max_length) + STOP_TIMEOUT_S
            while ray_serve.status().applications and time.monotonic() < deadline:
                time.sleep(0.1)
            _end_ray_serve()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _deploy_merged(self, job: ServeJob, name: str, plan: ServePlan, num_cpus: int) -> None:
        self._merged[name] = plan.source
        application = engine_application(job, plan, num_cpus)
        _deploy(merged_application(self.name, name), application, route_prefix=None)

    def _follow(self) -> None:
        """Replaces the replicas of merged models whose stage has moved, until the endpoint stops."""
        while not self._ends.wait(EVERY_S):
            with self._turn:
                for served in [one for one in self._job.adapters if one.merged and not self._ends.is_set()]:
                    self._look(served)

    def _look(self, served: ServedAdapter) -> None:
        """A version that cannot be served is named in the log, and tried once; what was served goes on."""
        name = served.artifact
        try:
            source = merged_source(served, self._plan)
            if source != self._merged[name]:
                self._merged[name] = source
                plan = merged_plan(served, self._plan)
                self._deploy_merged(self._job, name, plan, _cpus_per_replica(self._job))
        except (LmrayError, OSError) as error:
            _LOG.warning("merged model `%s` stays as it is: %s", name, error)


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
        service._start(job, plan, num_cpus)
        _await_ready(service.url)
    except BaseException:
        service.stop()
        raise
    return service


def _deploy(name: str, application: ray_serve.Application, *, route_prefix: str | None) -> None:
    """Returns once all replicas of `application` are new. Raises RemoteError where they do not start."""
    try:
        ray_serve.run(application, name=name, route_prefix=route_prefix, logging_config=_QUIET)
    except (RuntimeError, RayServeException) as error:
        raise RemoteError(f"endpoint `{name}`", f"did not start: {_why(name, error)}") from None


def _end_ray_serve() -> None:
    """`serve.shutdown()` whose call to the controller, which the controller's end answers, is not tried again: Ray
    prints of each such call that it failed."""
    with suppress(ValueError, RayActorError):
        controller: Any = ray.get_actor(CONTROLLER, NAMESPACE)
        client: Any = _get_global_client()
        client.shutdown_cached_handles()  # or they would start another Ray once this one is gone
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    ray_serve.shutdown()


def _cpus_per_replica(job: ServeJob) -> int:
    """Cores a replica reserves and computes with. Raises CapacityError where the fewest replicas do not fit."""
    offered = cluster_resources()
    smallest = min((node.cpus for node in offered.nodes), default=0.0)
    num_cpus = job.resources.cpus_per_worker or max(
        1, int(smallest) // (job.autoscaling.max_replicas * num_models(job))
    )
    num_gpus, fewest = job.resources.gpus_per_worker, max(job.autoscaling.min_replicas, 1) * num_models(job)
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
