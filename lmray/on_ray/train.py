"""Runs the training program under Ray Train: plans in the driver, trains in a worker group that outlives failures.

The run folder alone says where a run stands (see `lmray.on_ray.context`), so the same command goes on from the last
committed checkpoint. Ctrl-C asks the workers to save and end; a second one ends them at once.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import ray.train
from ray._raylet import PlacementGroupID
from ray.exceptions import RayActorError
from ray.train.torch import get_device
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from lmray.artifacts.files import check_writable, only_writer
from lmray.artifacts.store import open_store, run_folder
from lmray.context import Result
from lmray.errors import CheckpointError, LmrayError, OutOfMemoryError, RemoteError
from lmray.job import Resources, TrainJob
from lmray.metrics.progress import follow
from lmray.on_ray.cluster import check_resources, cluster_resources, connected
from lmray.on_ray.context import STOP, RayContext
from lmray.on_ray.failures import error_inside
from lmray.on_ray.notices import heard
from lmray.on_ray.out_of_memory import EndsOutOfMemory, with_room
from lmray.on_ray.rendezvous import Rendezvous
from lmray.train.group import join_process_group
from lmray.train.hang import hang_error
from lmray.train.plan import check_same_run, make_plan
from lmray.train.program import finished
from lmray.train.program import train as train_program

RAY_FOLDER = "ray-train"
"""In the run folder: what Ray Train writes for itself."""
LOOK_S = 1.0


def train(job: TrainJob, *, progress: bool = True) -> Result:
    """Trains `job` on the cluster. Raises what planning raises before Ray is started or anything written, CapacityError
    for resources that are not there, and what a worker raised once its failures exceed `resources.max_failures`."""
    folder = run_folder(job)
    plan = make_plan(job)
    check_same_run(plan, folder)
    if progress:
        print("\n".join(plan.head()), file=sys.stderr, flush=True)
    if (done := finished(folder)) is not None:
        return done
    check_writable(folder)
    with connected():
        job = placed(job)
        _say_room(job.resources)
        with only_writer(folder), heard(folder), follow(folder) if progress else nullcontext():
            (folder / STOP).unlink(missing_ok=True)
            return _fit(job, folder)


def placed(job: Any) -> Any:
    """`job` with its store's absolute path and its workers' CPU share: workers see neither this process's environment
    nor its working directory. Raises CapacityError where the connected cluster has no room for the workers."""
    resources: Resources = job.resources
    if resources.cpus_per_worker is None:
        smallest = min(
            (node.cpus for node in cluster_resources().nodes if node.cpus), default=1.0
        )  # a head may offer none
        resources = resources.model_copy(update={"cpus_per_worker": max(1, int(smallest // resources.workers.max))})
    check_resources(resources)
    return job.model_copy(update={"storage": str(open_store(job.storage).root), "resources": resources})


def _say_room(resources: Resources) -> None:
    """Says on stderr where the cluster has no room for all workers of a range: more machines may come."""
    room = cluster_resources().room_for(cpus=resources.cpus_per_worker or 1, gpus=resources.gpus_per_worker)
    if room < resources.workers.max:
        text = f"note: {resources.workers} workers, room for {room} now; the run grows as machines come"
        print(text, file=sys.stderr, flush=True)


class _Trainer(DataParallelTrainer):
    """Without the actors that a run here has no use for, each a process of three seconds of CPU time: of data sets by
    Ray Data, which no worker asks for, and of reservations of killed controllers, which `_free_bundles` gives back."""

    UNUSED: ClassVar[frozenset[str]] = frozenset({"DatasetsCallback", "PlacementGroupCleanerCallback"})

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in self.UNUSED]


def _trainer(job: TrainJob, folder: Path) -> DataParallelTrainer:
    """The controller unpickles all of it but the workers' function, which it hands on: the job is bound to that, for
    unpickling a job imports torch, transformers and peft."""
    resources = job.resources
    return _Trainer(
        partial(_worker, job),
        backend_config=Rendezvous(),
        scaling_config=_scaling(resources),
        run_config=ray.train.RunConfig(
            name=RAY_FOLDER,  # not the run's: Ray Train puts it into metrics that hold ASCII only
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures, max_preemption_failures=-1),
            callbacks=[EndsOutOfMemory()],
        ),
    )


def _scaling(resources: Resources) -> ray.train.ScalingConfig:
    workers = resources.workers
    return ray.train.ScalingConfig(
        num_workers=(workers.min, workers.max) if workers.elastic else workers.max,
        elastic_resize_monitor_interval_s=workers.resize_interval_s,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker={"CPU": resources.cpus_per_worker or 1, "GPU": resources.gpus_per_worker},
    )


def _worker(job: TrainJob) -> Result | LmrayError:
    device = str(get_device()) if job.resources.gpus_per_worker else "cpu"
    join_process_group(device, job.resources.step_timeout_s)  # left when the process ends
    context = RayContext(run_folder(job), device=device, threads=job.resources.cpus_per_worker or 1)
    try:
        context.open()
        return train_program(job, context)
    except LmrayError as error:
        alone = isinstance(error, OutOfMemoryError)  # the other workers wait for this one
        if alone or (not error.final and not isinstance(error, CheckpointError)):
            raise
        # Wrong input stays wrong, a diverged run diverges again, and a store was waited for long enough: handed back
        # instead of raised, so that it is not tried again.
        return error
    finally:
        context.close()


def _fit(job: TrainJob, folder: Path) -> Result:
    """Fits in a thread, so that an interrupt reaches this one: Ray Train's own handler would abort without saving."""
    future: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            future.set_result(with_room(lambda: _outlasting_controllers(job, folder)))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=fit, name="lmray-fit", daemon=True).start()
    try:
        while wait([future], timeout=LOOK_S).not_done:  # a signal that another thread was given wakes nobody
            pass
    except KeyboardInterrupt:
        print("stopping: the workers save and end; once more ends them at once", file=sys.stderr, flush=True)
        _ask_to_stop(folder)
    try:
        result = future.result().return_value
    except ray.train.WorkerGroupError as error:  # a worker that hung has ended its process: Ray knows no more of it
        if error_inside(error) is None and (hung := hang_error(job.name, folder)) is not None:
            raise hung from None
        raise
    if isinstance(result, LmrayError):
        raise result
    if result is None:
        raise RemoteError(f"run {folder.name}", "ended without a result", hint=f"see the Ray Train log beside {folder}")
    return result


def _ask_to_stop(folder: Path) -> None:
    try:
        (folder / STOP).touch()
    except OSError as error:
        raise CheckpointError(
            str(folder / STOP), f"cannot be written, so the workers end unasked: {error.strerror}"
        ) from None


def _outlasting_controllers(job: TrainJob, folder: Path) -> ray.train.Result:
    """Fits; where Ray Train's controller dies, its workers do too, and another one goes on from the last checkpoint."""
    taken = set(placement_group_table())
    for attempt in range(job.resources.max_failures + 1):
        try:
            return _trainer(job, folder).fit()
        except RayActorError as error:
            _free_bundles(taken)
            if attempt == job.resources.max_failures:
                hint = "the same command goes on from the last checkpoint; `resources.max_failures` allows more"
                raise RemoteError(f"run {job.name}", f"lost its controller: {_first_line(error)}", hint=hint) from None
            print("warning: the run's controller died; going on from the last checkpoint", file=sys.stderr, flush=True)
    raise AssertionError("unreachable")


def _free_bundles(taken: set[str]) -> None:
    """Gives back what a killed controller had reserved beyond `taken`, else after a few deaths no worker would fit any
    more. (Ray Train's own cleaner left it reserved.) An id ends with that of the job it belongs to."""
    own = ray.get_runtime_context().get_job_id()
    for identity, facts in placement_group_table().items():
        if identity not in taken and identity.endswith(own) and facts["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
