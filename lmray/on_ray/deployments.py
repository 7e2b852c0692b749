"""An endpoint's applications for Ray Serve: one of the gateway and the base model's replicas, and one for each merged
model, so that new weights replace that model's replicas alone. Runs in the driver."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from lmray.job import ServeJob
from lmray.on_ray.cluster import cluster_resources
from lmray.on_ray.replicas import ENGINE, EngineReplica, Gateway
from lmray.on_ray.routing import AdapterRouter
from lmray.policies.autoscaling import TokenPolicy, autoscaling_arguments, shutdown_s
from lmray.serve.plan import ServePlan

QUEUED_PER_ROW = 4
"""Requests that may wait for each row of a replica's batch before more are told to come back later."""
SPARE_SLOTS = 8
"""Calls that a replica takes besides requests: those that ask every replica, of which a gateway has one at a time and
operators some. They would wait for the end of an answer else."""
HEALTH_S = 2.0
"""So soon Ray Serve learns of a dead replica and starts another; its own default is 10 s. Requests learn of it at
once."""
SURGE_PERCENT = 20
"""Of the replicas, and one at least, run besides while an update replaces them, where there is room."""


def merged_application(endpoint: str, name: str) -> str:
    """What the application of a merged model is called."""
    return f"{endpoint}.{name}"


def endpoint_application(job: ServeJob, plan: ServePlan, num_cpus: int, *, num_lost: int = 0) -> ray_serve.Application:
    """The gateway, before the base model's replicas. `num_lost`: as `engine_version` has it."""
    rows = job.engine.max_batch_size * job.autoscaling.max_replicas * (1 + len(plan.merged))
    most = rows * (2 + QUEUED_PER_ROW) + SPARE_SLOTS
    gateway = ray_serve.deployment(
        ray_serve.ingress()(Gateway),
        name="gateway",
        max_ongoing_requests=most,  # replicas push back, with an answer that clients understand; the gateway does not
        ray_actor_options={"num_cpus": 0},  # thin: a core of its own would cost a small machine a replica
        max_surge_percent=SURGE_PERCENT,
        **_lasting(job),
    )
    merged = {name: merged_application(job.name, name) for name in plan.merged}
    engines = engine_application(job, plan, num_cpus, num_lost=num_lost)
    return gateway.bind(plan, job.engine.max_length, engines, merged)


def engine_application(job: ServeJob, plan: ServePlan, num_cpus: int, *, num_lost: int = 0) -> ray_serve.Application:
    """Replicas of one model, with the adapters of `plan` beside it. Those that run stay, where they are of the same
    `engine_version`."""
    rows, num_gpus = job.engine.max_batch_size, job.resources.gpus_per_worker
    router: dict[str, Any] = {"request_router_class": AdapterRouter}
    router["request_router_kwargs"] = {"light": max(rows // 2, 1), "rows": rows}
    engines = ray_serve.deployment(
        EngineReplica,
        name=ENGINE,
        max_ongoing_requests=2 * rows + SPARE_SLOTS,  # as many again may wait there for their adapters
        max_queued_requests=rows * QUEUED_PER_ROW,
        autoscaling_config=_autoscaling(job),
        request_router_config=RequestRouterConfig(**router),
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        max_surge_percent=surge_percent(job, num_cpus),
        **_lasting(job),
    )
    # By itself Ray Serve takes each deployment for another version, and replaces all replicas.
    engines = engines.options(version=engine_version(job, plan, num_cpus, num_lost=num_lost), _internal=True)
    return engines.bind(plan.for_engines, job.engine, job.model.dtype, num_cpus, num_gpus)


def engine_version(job: ServeJob, plan: ServePlan, num_cpus: int, *, num_lost: int = 0) -> str:
    """Differs where engine replicas have to be replaced: not by what the gateway alone has to know, nor by what stages
    hold, which replicas follow by themselves. `num_lost`: another number for replicas that failed to start, which Ray
    Serve does not try a second time."""
    served = [(one.artifact, one.stage, one.merged, one.canary and one.canary.stage) for one in plan.served]
    model = replace(plan.for_engines, served=(), adapters={})
    told = (model, served, job.engine, job.engine.stamp(), job.model.dtype, job.resources.gpus_per_worker)
    return hashlib.sha256(repr((*told, num_cpus, num_lost)).encode()).hexdigest()


def _lasting(job: ServeJob) -> dict[str, Any]:
    """How long replicas may take to end, and how they are watched."""
    return {
        "graceful_shutdown_timeout_s": shutdown_s(job.http.limits.answer_timeout_s),
        "max_constructor_retry_count": 2,
        "health_check_period_s": HEALTH_S,
    }


def surge_percent(job: ServeJob, num_cpus: int) -> int:
    """Of replicas that may run besides during an update. None where one more than the most does not fit: the update
    would wait for it for ever."""
    room = cluster_resources().room_for(cpus=num_cpus, gpus=job.resources.gpus_per_worker)
    return SURGE_PERCENT if room > job.autoscaling.max_replicas * num_models(job) else 0


def num_models(job: ServeJob) -> int:
    """Models with replicas of their own: the base, and those that are merged."""
    return 1 + sum(one.merged for one in job.adapters)


def _autoscaling(job: ServeJob) -> AutoscalingConfig:
    scaling = job.autoscaling
    settings = {"preset": scaling.preset, "max_batch_size": job.engine.max_batch_size}
    return AutoscalingConfig(
        policy=AutoscalingPolicy(policy_function=TokenPolicy, policy_kwargs=settings),
        **autoscaling_arguments(scaling.preset, min_replicas=scaling.min_replicas, max_replicas=scaling.max_replicas),
    )
