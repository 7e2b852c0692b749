"""MLflow: runs of an experiment on a tracking server, or in a database file in the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator

from lmray.trackers.base import Session, TrackedRun, Tracker

STATUS = {"succeeded": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
MAX_PARAMS = 100
"""MLflow takes so many at a time."""
MAX_PARAM_LENGTH = 6000


def _without_password(uri: str | None) -> str | None:
    if uri is not None and urlsplit(uri).password:
        raise ValueError(
            "holds a password; hint: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the workers"
        )
    return uri


class Mlflow(Tracker):
    """A run in an MLflow experiment."""

    package: ClassVar[str] = "mlflow"

    tracking_uri: Annotated[str | None, AfterValidator(_without_password)] = None
    """Address of a tracking server, or `sqlite:///FILE`. Empty: `mlflow.db` in the store."""
    experiment: str = "lmray"

    def open(self, run: TrackedRun, *, session_id: str | None, after: int) -> Session:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking_uri or f"sqlite:///{run.store / 'mlflow.db'}")
        if session_id is not None:
            client.update_run(session_id, status="RUNNING")
            return _Session(client, session_id)
        experiment = client.get_experiment_by_name(self.experiment)
        place = experiment.experiment_id if experiment else client.create_experiment(self.experiment)
        made: str = client.create_run(place, run_name=run.name, tags={"lmray.run": str(run.folder)}).info.run_id
        _log_params(client, made, run.fields)
        return _Session(client, made)


def _log_params(client: Any, run_id: str, fields: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in fields.items()]
    for first in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[first : first + MAX_PARAMS])


class _Session:
    """Every call has reached the server when it returns."""

    def __init__(self, client: Any, run_id: str):
        self.id, self._client = run_id, client
        held = client.get_metric_history(run_id, "train.loss")
        self.last_step = max((one.step for one in held), default=0)

    def log(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        when = int(time_s * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, when, step) for name, value in metrics.items()])

    def flush(self) -> None:
        pass  # see the class

    def finish(self, status: str) -> None:
        self._client.set_terminated(self.id, status=STATUS[status])
