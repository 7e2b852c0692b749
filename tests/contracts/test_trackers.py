"""What every tracker keeps to: it holds each step once, also when the run was interrupted or the tracker was."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from lmray.artifacts.store import run_folder
from lmray.metrics.events import read_events
from lmray.registry import TRACKERS
from lmray.testing.jobs import run_here, tiny_job
from lmray.testing.waiting import wait_until
from lmray.trackers.base import TrackedRun
from lmray.train import loop

CONFIGS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": {"name": "wandb", "mode": "offline"}}
Seen = dict[str, list[tuple[int, float]]]


def of_tensorboard(folder: Path, store: Path) -> Seen:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    seen: Seen = {
        tag.replace("/", ".", 1): [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    return seen


def of_mlflow(folder: Path, store: Path) -> Seen:
    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lmray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == folder.name and run.data.params["adapter.r"] == "4"
    seen: Seen = {}
    for name in run.data.metrics:
        seen[name] = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
    return seen


def of_wandb(folder: Path, store: Path) -> Seen:
    """What `wandb sync` would send, all its folders together."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len({path.name for path in files}) == 1, "one run, however often it was opened"

    def written() -> bool:  # by a process of the library's own, which is not done when a session is
        return all([kind for kind, _ in wandb_records(path.read_bytes())][-1:] == ["exit"] for path in files)

    wait_until(written, "wandb's files", timeout_s=60)
    seen: Seen = defaultdict(list)
    for kind, record in (one for path in files for one in wandb_records(path.read_bytes())):
        if kind != "history":
            continue
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for name, value in items.items():
            if not name.startswith("_"):
                seen[name.replace("/", ".", 1)].append((record.history.step.num, float(value)))
    return seen


def wandb_records(content: bytes):
    """The records of a `.wandb` file: LevelDB's log format after seven bytes."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            whole = b""
            yield record.WhichOneof("record_type"), record


READ = {"tensorboard": of_tensorboard, "mlflow": of_mlflow, "wandb": of_wandb}


@pytest.fixture(params=TRACKERS.names())
def name(request):
    return request.param


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path, name):
    changes = {"report_to": [CONFIGS[name]], "evaluate": {"tasks": ["loss"]}, "train__eval_steps": 3}
    return tiny_job(tiny_model, tiny_data, tmp_path / "store", name="実験", **changes)


def check_is_all_there(job, name, result):
    events = read_events(run_folder(job) / "events.jsonl")
    seen = READ[name](run_folder(job), run_folder(job).parent.parent)
    for metric in ("train.loss", "eval.loss", "train.learning_rate"):
        expected = [(event["step"], event[metric]) for event in events if metric in event]
        assert [step for step, _ in seen[metric]] == [step for step, _ in expected], metric
        assert [value for _, value in seen[metric]] == pytest.approx([value for _, value in expected], rel=1e-5)
    assert seen["base.loss"] == [(6, pytest.approx(result.metrics["base.loss"], rel=1e-5))]
    assert seen["model.parameters"][0][1] == result.metrics["model.parameters"]


def test_it_holds_what_the_run_reported(job, name, tmp_path, capsys):
    result = run_here(job, tmp_path / "scratch")
    check_is_all_there(job, name, result)
    assert "tracker" not in capsys.readouterr().err


def test_stopped_and_resumed_every_step_is_there_once(job, name, tmp_path, capsys):
    assert run_here(job, tmp_path / "scratch", stop_at=2).status == "stopped"
    assert run_here(job, tmp_path / "scratch", stop_at=2).status == "stopped"
    check_is_all_there(job, name, run_here(job, tmp_path / "scratch"))
    assert "tracker" not in capsys.readouterr().err


def test_killed_after_steps_that_were_not_saved_every_step_is_there_once(job, name, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real = loop.Loop._report

    def dying(self, step, metrics, *, save):
        real(self, step, metrics, save=False if step == 4 else save)
        if step == 5:
            raise Killed

    monkeypatch.setattr(loop.Loop, "_report", dying)
    with pytest.raises(Killed):
        run_here(job, tmp_path / "scratch")
    monkeypatch.setattr(loop.Loop, "_report", real)
    assert [path.name for path in run_folder(job).glob("checkpoint-*")] == ["checkpoint-00000002"]
    check_is_all_there(job, name, run_here(job, tmp_path / "scratch"))


def test_a_session_goes_on_where_it_was(name, tmp_path):
    tracker = member_named(name)
    run = TrackedRun("実験", tmp_path, tmp_path, {"adapter.r": 4}, "kind: train")
    first = tracker.open(run, session_id=None, after=0)
    first.log(1, 1.0, {"train.loss": 2.0})
    first.flush()
    first.finish("stopped")
    second = tracker.open(run, session_id=first.id, after=1)
    assert second.id == first.id and second.last_step in (0, 1)
    second.finish("succeeded")


def member_named(name):
    config = CONFIGS[name]
    fields = {key: value for key, value in config.items() if key != "name"} if isinstance(config, dict) else {}
    return TRACKERS.load(name)(**fields)
