"""Serving on Ray Serve: starts, updates and stops the deployments of an endpoint. Converts types; decides nothing.

Runs in the driver; what it starts is in `lmray.on_ray.replicas`.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from ray import serve as ray_serve
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from lmray.artifacts.served import ServedAdapter
from lmray.errors import CapacityError, ConfigError, RemoteError
from lmray.job import ServeJob
from lmray.on_ray.cluster import cluster_resources
from lmray.on_ray.deployments import endpoint_application, engine_application, merged_application, num_models
from lmray.on_ray.evaluations import Evaluator
from lmray.on_ray.proxy import proxy_environment
from lmray.policies.autoscaling import shutdown_s
from lmray.serve.catalogue import EVERY_S
from lmray.serve.plan import ServePlan
from lmray.serve.prepare import check_evaluations, merged_plan, merged_source, prepare

POLL_S = 0.1
START_TIMEOUT_S = 600.0
"""For a replica to find room and load its model, besides the answers that the one it replaces has begun."""
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
"""For Ray Serve to end, besides the answers that were begun."""
RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
"""After so long a merged version that could not be served is tried again; each time twice as long, up to the second."""
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
"""Where Ray Serve's own actor is found."""
_RAISED = re.compile(r"^[A-Za-z_][\w.]*: (.*(?:\n  \w+: .*)*)", re.MULTILINE)
"""An exception as a traceback ends with it, with the lines `allowed:` and `hint:` below."""
_LOG = logging.getLogger(__name__)
_START_ERRORS = (RayError, RayServeException, RuntimeError, TimeoutError)
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_CONTROLLER = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{READY_TIMEOUT_S:.0f}",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
}
"""For Ray Serve's controller, which else kills a proxy that takes 5 s to start, as one does on a busy machine, and
looks at its replicas ten times a second, which took a third of what an idle endpoint costs."""


@dataclass(frozen=True)
class _Serving:
    """What an endpoint serves, or is to."""

    job: ServeJob
    plan: ServePlan
    num_cpus: int
    """Of each replica."""


@dataclass(frozen=True)
class _Refused:
    """A version of a merged model that could not be served."""

    source: str
    wait_s: float
    until_s: float
    """When it is tried again, though its stage has not moved: what was in the way of merging it may have passed."""


class Service:
    """A running endpoint."""

    def __init__(self, serving: _Serving, *, ended: Callable[[], bool]):
        job = serving.job
        self.name, self.url = job.name, f"http://{_reachable(job.http.host)}:{job.http.port}"
        self._serving, self._told_to_end = serving, ended
        self._turn, self._ends = threading.Lock(), threading.Event()
        self._follower = threading.Thread(target=self._follow, name="lmray-merged", daemon=True)
        self._evaluator = Evaluator(lambda: self._serving.job, self._ends)
        self._refused: dict[str, _Refused] = {}
        """Name of a merged model -> the version that its stage holds and that cannot be served."""
        self._failing: set[str] = set()
        """Applications that did not start when they were deployed last."""
        self._num_lost: Counter[str] = Counter()
        """Application -> how often neither what was new nor what ran before would start."""
        self._said: dict[str, str] = {}
        """Name of a merged model -> what is wrong with it."""

    def _ended(self) -> bool:
        return self._ends.is_set() or self._told_to_end()

    def _start(self, new: _Serving, old: _Serving | None = None) -> None:
        """Returns once all replicas serve `new`, and none `old`. Raises RemoteError where they do not start."""
        for name in sorted(old.plan.merged.keys() - new.plan.merged.keys()) if old else ():
            ray_serve.delete(merged_application(self.name, name), _blocking=False)  # what comes may need its room
        for name, plan in new.plan.merged.items():
            self._deploy_merged(new, name, plan)
        application = endpoint_application(new.job, new.plan, new.num_cpus, num_lost=self._num_lost[self.name])
        self._deploy(new, self.name, application, route_prefix="/")
        self._serving = new
        if new.plan.merged and not self._follower.is_alive():
            self._follower.start()
        if new.job.evaluations:
            self._evaluator.start()

    def update(self, job: ServeJob) -> None:
        """Serves `job` instead, at the same address: other adapters, keys, limits or bounds of its replicas.

        Replicas that have to be replaced are, one after another, and end with their last answer, so no request is
        refused but for a merged model that is left out; where the cluster has no room for one more meanwhile, requests
        wait for the first new one. Replicas keep their number of CPUs unless `job` names another. Raises ConfigError
        for another name, address, time to read or base model, what `prepare` raises, and RemoteError where the new
        replicas do not start: then what ran has been started again, and the error says so where that failed too.
        """
        for field in ("name", "http.host", "http.port", "http.limits.send_timeout_s"):
            _check_kept(field, *(_field(one, field) for one in (self._serving.job, job)))
        plan = prepare(job, listens=True)
        check_evaluations(job, known=self._serving.job.evaluations)
        if plan.digest != self._serving.plan.digest:  # prompts are tokenised for one model, wherever they go
            _check_kept("model.source", self._serving.job.model.source, f"`{job.model.source}`, with other weights")
        new = _Serving(job, plan, _cpus_per_replica(job, running=self._serving.num_cpus))
        with self._turn:
            old = self._serving
            with self._or_again(lambda: self._start(old, new)):
                self._start(new, old)

    def stop(self) -> None:
        """Takes the endpoint down, once the answers it has begun are done."""
        self._ends.set()
        with self._turn:
            for name in ray_serve.status().applications:
                ray_serve.delete(name, _blocking=False)  # which would wait for a minute at most
            deadline = time.monotonic() + shutdown_s(self._serving.job.http.limits.answer_timeout_s) + STOP_TIMEOUT_S
            while ray_serve.status().applications and time.monotonic() < deadline:
                time.sleep(POLL_S)
            self._evaluator.join(STOP_TIMEOUT_S)
            _end_ray_serve()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @contextmanager
    def _or_again(self, start: Callable[[], None]) -> Iterator[None]:
        """Calls `start`, which starts what ran, where the block raises RemoteError; unless the endpoint ends."""
        try:
            yield
        except RemoteError as error:
            if not self._ended():
                try:
                    start()
                except RemoteError as again:
                    self._num_lost.update(self._failing)
                    found = f"{error.found}\nand what ran does not start again: {again.found}"
                    raise RemoteError(error.where, found, allowed=error.allowed, hint=error.hint) from None
            raise

    def _deploy_merged(self, serving: _Serving, name: str, plan: ServePlan) -> None:
        where = merged_application(self.name, name)
        application = engine_application(serving.job, plan, serving.num_cpus, num_lost=self._num_lost[where])
        self._deploy(serving, where, application, route_prefix=None)

    def _deploy(
        self, serving: _Serving, name: str, application: ray_serve.Application, *, route_prefix: str | None
    ) -> None:
        """Returns once all replicas of `application` are new. Raises RemoteError where they do not start, find no room
        in time, or the endpoint ends before."""
        one_s = START_TIMEOUT_S + shutdown_s(serving.job.http.limits.answer_timeout_s)
        limit_s = serving.job.autoscaling.max_replicas * one_s
        target = ray_serve.RunTarget(application, name=name, route_prefix=route_prefix, logging_config=_QUIET)
        where, deadline = f"endpoint `{name}`", time.monotonic() + limit_s
        self._failing.discard(name)
        try:
            ray_serve.run_many([target], wait_for_applications_running=False)
            while (found := ray_serve.status().applications[name]).status != ApplicationStatus.RUNNING:
                if found.status == ApplicationStatus.DEPLOY_FAILED:
                    raise RemoteError(where, f"did not start: {_why(found)}")
                if self._ended():
                    raise RemoteError(where, "was stopped before it answered")
                if time.monotonic() > deadline:
                    hint = "its replicas may find no room: lower `resources`, or stop the endpoint and start it again"
                    raise RemoteError(where, f"did not start within {limit_s:.0f} s: {_why(found)}", hint=hint)
                time.sleep(POLL_S)
        except (RemoteError, *_START_ERRORS) as error:
            self._failing.add(name)
            if isinstance(error, RemoteError):
                raise
            raise RemoteError(where, f"did not start: {error}") from None

    def _follow(self) -> None:
        """Replaces the replicas of merged models whose stage has moved, until the endpoint stops."""
        while not self._ends.wait(EVERY_S):
            serving = self._serving
            for served in [one for one in serving.job.adapters if one.merged and not self._ended()]:
                self._look(served, serving)

    def _look(self, served: ServedAdapter, serving: _Serving) -> None:
        """A version that cannot be served is named in the log, and tried again later, ever more seldom, where it could
        not be merged; else once the stage has moved. What was served goes on."""
        name, source, said = served.artifact, "", self._said.get(served.artifact, "")
        try:
            source = merged_source(served, serving.plan)
            runs = merged_application(self.name, name) not in self._failing
            if source == serving.plan.merged[name].source and runs:
                self._refused.pop(name, None)
                said = ""
            elif self._is_due(name, source):
                self._replace(serving, name, merged_plan(served, serving.plan))
                said = ""
        except Exception as error:  # whatever it is, this thread goes on
            said = str(error) or type(error).__name__
            if isinstance(error, OSError):  # which pass: looked at again at once
                pass
            elif source:
                self._refuse(name, source, again=not isinstance(error, RemoteError))
            else:  # the stage holds nothing that could be tried
                self._refused.pop(name, None)
        if said and said != self._said.get(name) and not self._ended():
            _LOG.warning("merged model `%s` stays as it is: %s", name, said)
        self._said[name] = said

    def _is_due(self, name: str, source: str) -> bool:
        known = self._refused.get(name)
        return known is None or known.source != source or time.monotonic() >= known.until_s

    def _refuse(self, name: str, source: str, *, again: bool) -> None:
        """`again`: to be tried again; not where its replicas did not start, which may have cost those that ran."""
        known = self._refused.get(name)
        wait_s = RETRY_S
        if known is not None and known.source == source:
            wait_s = min(2 * known.wait_s, LONGEST_RETRY_S)
        self._refused[name] = _Refused(source, wait_s, time.monotonic() + wait_s if again else math.inf)

    def _replace(self, serving: _Serving, name: str, plan: ServePlan) -> None:
        """Does nothing where the endpoint has been changed meanwhile: the next look is at that."""
        with self._turn:
            if self._serving is serving and not self._ended():
                before = serving.plan.merged[name]
                with self._or_again(lambda: self._deploy_merged(serving, name, before)):
                    self._deploy_merged(serving, name, plan)
                serving.plan.merged[name] = plan  # an update that fails goes back to this one


def serve(job: ServeJob, *, ended: Callable[[], bool] = lambda: False) -> Service:
    """Starts `job` on the connected cluster and returns once it answers. `ended` says whether to give up: it is asked
    again and again while replicas start, now and in an update.

    Raises what `prepare` raises before anything starts, CapacityError where the smallest number of replicas does not
    fit or Ray Serve is taken, RemoteError where the endpoint does not come up.
    """
    service = Service(_Serving(job, prepare(job), _cpus_per_replica(job)), ended=ended)
    _check_free(job)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _start_ray_serve(job)
        service._start(service._serving)
        _await_ready(service.url)
    except BaseException:
        service.stop()
        raise
    return service


def _start_ray_serve(job: ServeJob) -> None:
    """Raises RemoteError where it cannot, as where the port is taken."""
    http = {"host": job.http.host, "port": job.http.port}
    controller = {"runtime_env": {"env_vars": {**_CONTROLLER, **proxy_environment(job.http.limits)}}}
    try:
        ray_serve.start(http_options=http, logging_config=_QUIET, controller_options=controller)
    except _START_ERRORS as error:
        found = f"Ray Serve did not start: {str(error).strip().splitlines()[-1]}"
        raise RemoteError(f"endpoint `{job.name}`", found, hint="is the port free, and the machine idle?") from None


def _end_ray_serve() -> None:
    """`serve.shutdown()` whose call to the controller, which the controller's end answers, is not tried again: Ray
    prints of each such call that it failed."""
    with suppress(ValueError, RayActorError, GetTimeoutError):  # a controller that is slow to end is ended below
        controller: Any = ray.get_actor(CONTROLLER, NAMESPACE)
        client: Any = _get_global_client()
        client.shutdown_cached_handles()  # or they would start another Ray once this one is gone
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    ray_serve.shutdown()


def _cpus_per_replica(job: ServeJob, *, running: int = 0) -> int:
    """Cores a replica reserves and computes with; `running`: those of the endpoint's replicas now. Raises CapacityError
    where the fewest replicas do not fit."""
    offered = cluster_resources()
    smallest = min((node.cpus for node in offered.nodes), default=0.0)
    share = int(smallest) // (job.autoscaling.max_replicas * num_models(job))
    num_cpus = job.resources.cpus_per_worker or running or max(1, share)
    num_gpus, fewest = job.resources.gpus_per_worker, max(job.autoscaling.min_replicas, 1) * num_models(job)
    room = offered.room_for(cpus=num_cpus, gpus=num_gpus)
    if room < fewest:
        size = f"{num_cpus} CPU(s) and {num_gpus} GPU(s)"
        found = f"{fewest} replica(s) with {size} each do not fit; there is room for {room}"
        allowed = f"{offered.cpus:g} CPUs and {offered.gpus:g} GPUs on {len(offered.nodes)} node(s)"
        raise CapacityError("autoscaling.min_replicas", found, allowed=allowed, hint="lower it, or `resources`")
    return num_cpus


def _check_free(job: ServeJob) -> None:
    where, hint = f"endpoint `{job.name}`", "stop it first, or serve from another cluster"
    for name in ray_serve.status().applications:
        raise CapacityError(where, f"Ray Serve already runs `{name}`", hint=hint)
    with suppress(ValueError):
        ray.get_actor(CONTROLLER, NAMESPACE)
        hint = "end it with `serve shutdown`, or serve from another cluster"
        raise CapacityError(where, "Ray Serve already runs there, with an address and limits of its own", hint=hint)


def _why(application: ApplicationStatusOverview) -> str:
    """What a replica of `application` raised while it started, else what Ray Serve says itself.

    Ray Serve hands on the text of a traceback only; its last entry is the exception with lmray's own lines below it.
    """
    said = [one.message for one in application.deployments.values() if one.message]
    raised = [entry for text in said for entry in _RAISED.findall(text)]
    return (raised or said or [application.message])[-1]


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


def _check_kept(field: str, old: object, new: object) -> None:
    if old != new:
        hint = "stop the endpoint and start it again"
        raise ConfigError(field, f"is {new}, and a running endpoint keeps {old}", hint=hint)


def _field(job: ServeJob, name: str) -> Any:
    value: Any = job
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _reachable(host: str) -> str:
    """An address to ask when the endpoint listens on all of them."""
    plain = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{plain}]" if ":" in plain else plain
