"""Ranks that decide alike: what one finds wrong ends all, what one saves of a checkpoint is part of one folder."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmray.artifacts.checkpoints import committed
from lmray.artifacts.files import read_sealed
from lmray.artifacts.patience import Patience
from lmray.artifacts.store import run_folder
from lmray.errors import CapacityError, CheckpointError, ConfigError, DataError
from lmray.metrics.events import read_events
from lmray.sharding.ddp import Ddp
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.ranks import RankDiedError, outcomes, run_ranks, train_ranks, train_until_killed
from lmray.train import checkpoint, group
from lmray.train.group import GroupContext, torchrun_context
from lmray.train.program import train


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        changes = {"sharding": "ddp", "resources": {"workers": 2}, "train__save_steps": 2, **changes}
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)

    return make


def part(folder: Path, rank: int) -> Path:
    """A rank's part of a checkpoint; the first's is larger."""
    path = folder / f"part-{rank}"
    (path / "shards").mkdir(parents=True)
    (path / "shards" / f"__{rank}_0").write_bytes(bytes([rank]))
    if rank == 0:
        (path / "progress.json").write_text("{}", encoding="utf-8")
    return path


def _report(rank: int, folder: Path, parts: Path) -> tuple[str | None, list[str]]:
    asked = iter([False, False, False, rank == 0])  # only rank 0 is asked, or its word counts
    warned = iter([False, rank == 0, rank == 1])
    with torchrun_context(folder, stop=lambda: next(asked), warned=lambda: next(warned)) as ctx:
        assert ctx.resume_from() is None
        wishes = [ctx.wish() for _ in range(4)]
        ctx.report(1, {"train.loss": 1.0})
        ctx.report(3, {"train.loss": 0.5})
        ctx.commit(3, part(parts, rank), run_key="key")
        found = ctx.resume_from()
        return (found and found.name), wishes


def test_parts_of_all_ranks_become_one_checkpoint_and_all_ranks_hear_the_same(tmp_path):
    found = run_ranks(3, _report, tmp_path / "run", tmp_path)
    assert found == [("checkpoint-00000003", ["go on", "save", "go on", "stop"])] * 3
    (checkpoint,) = committed(tmp_path / "run")
    manifest = read_sealed(checkpoint)
    assert (manifest["step"], manifest["run_key"]) == (3, "key")
    assert list(manifest["files"]) == ["progress.json", "shards/__0_0", "shards/__1_0", "shards/__2_0"]
    assert {path.name for path in checkpoint.iterdir()} == {"manifest.json", "progress.json", "shards"}
    assert [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl")] == [1, 3]
    assert sorted(path.name for path in (tmp_path / "run").glob(".*.tmp")) == []


def test_a_part_that_cannot_be_written_ends_all_ranks_and_leaves_the_checkpoint_before(tmp_path):
    found = outcomes(2, _full_disk, tmp_path / "run", tmp_path)
    assert [type(one) for one in found] == [CheckpointError, CheckpointError]
    assert all("No space left" in str(one) and "checkpoint-00000003 is good" in str(one) for one in found)
    assert [path.name for path in committed(tmp_path / "run")] == ["checkpoint-00000003"]


def _full_disk(rank: int, folder: Path, parts: Path) -> None:
    with torchrun_context(folder, patience=Patience(total_s=0)) as ctx:
        ctx.commit(3, part(parts, rank))
        if rank == 1:
            group.add_part = _no_space
        ctx.commit(4, part(parts, rank + 10))


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def _full_scratch(rank: int, job) -> None:
    if rank == 1:
        checkpoint.save_tensors = _no_space
    with torchrun_context(run_folder(job), patience=Patience(total_s=0)) as ctx:
        train(job, ctx)


def test_a_scratch_that_stays_full_on_one_rank_ends_all(job):
    found = outcomes(2, _full_scratch, job(resources={"workers": 2}))
    assert [type(error) for error in found] == [CheckpointError, CheckpointError]
    assert all("No space left" in str(error) and "needs room" in str(error) for error in found)


def _full_disk_beside(rank: int, job) -> None:
    """Rank 1 cannot write its part of the second checkpoint."""
    add = group.add_part

    def add_part(part: Path, staging: Path, at: int) -> None:
        if rank == 1 and "checkpoint-00000004" in staging.name:
            raise OSError(28, "No space left on device")
        add(part, staging, at)

    group.add_part = add_part
    with torchrun_context(run_folder(job), patience=Patience(total_s=0)) as ctx:
        try:
            train(job, ctx)
        finally:
            assert not [one.name for one in threading.enumerate() if one.name.startswith("lmray-")]


def test_a_commit_that_fails_beside_the_steps_ends_all_ranks_with_what_one_found(job):
    one = job(resources={"workers": 2, "async_checkpoints": True})
    found = outcomes(2, _full_disk_beside, one)
    assert [type(error) for error in found] == [CheckpointError, CheckpointError]
    assert str(found[0]) == str(found[1]) and "No space left" in str(found[0])
    assert "checkpoint-00000002 is good" in str(found[0])
    assert [path.name[-1] for path in committed(run_folder(one))] == ["2"]
    assert train_ranks(one).status == "succeeded"
    assert [event["step"] for event in read_events(run_folder(one) / "events.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list(run_folder(one).glob(".*.tmp"))


def _slow_store(rank: int, job) -> list[str]:
    """The first checkpoint is committed once both ranks have done the step after it; what rank 0 saw, in order."""
    log, make, begun, let = list[str](), GroupContext._make_checkpoint, threading.Event(), threading.Event()

    def commit(ctx: GroupContext, staging: Path, folder: Path, step: int) -> None:
        begun.set()
        assert step != 2 or let.wait(60)
        make(ctx, staging, folder, step)
        log.append(f"committed {step}")

    GroupContext._make_checkpoint = commit
    with torchrun_context(run_folder(job)) as ctx:
        report = ctx.report

        def reported(step: int, metrics) -> None:
            report(step, metrics)
            log.append(f"step {step}")
            if step == 3:
                assert rank or begun.wait(60)
                let.set()

        ctx.report = reported
        train(job, ctx)
    return log


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_ranks_go_on_while_their_checkpoint_is_committed(job, sharding):
    one = job(sharding=sharding, resources={"workers": 2, "async_checkpoints": True})
    log, other = run_ranks(2, _slow_store, one)
    assert log.index("step 3") < log.index("committed 2") < log.index("committed 4") < log.index("committed 6")
    assert other == [f"step {step}" for step in range(1, 7)]
    again, straight = (one.model_copy(update={"name": name}) for name in ("again", "straight"))
    straight = straight.changed({"resources.async_checkpoints": False})
    assert train_ranks(again, stop_at=3).status == "stopped"
    assert [path.name[-1] for path in committed(run_folder(again))] == ["2", "3"]
    assert train_ranks(again).status == train_ranks(straight).status == "succeeded"
    assert curve(one) == curve(again) == curve(straight)


def _apart(rank: int, job) -> None:
    """Rank 1 reads other data, as from a folder of its own machine."""
    if rank == 1:
        rows = write_jsonl(Path(job.storage).parent / "other.jsonl", tiny_rows(20))
        job = job.changed({"data.train": [{"source": str(rows)}]})
    with torchrun_context(run_folder(job)) as ctx:
        train(job, ctx)


def test_ranks_that_read_other_data_end_with_an_error_on_every_rank(job):
    found = outcomes(2, _apart, job())
    assert [type(one) for one in found] == [DataError, DataError]
    assert "worker 1 reads another data than worker 0" in str(found[0])


def _missing(rank: int, job) -> None:
    if rank == 1:
        job = job.changed({"model.source": str(Path(job.storage).parent / "nowhere")})
    with torchrun_context(run_folder(job)) as ctx:
        train(job, ctx)


def test_what_one_rank_lacks_ends_all(job):
    found = outcomes(2, _missing, job())
    assert type(found[0]) is type(found[1]) and "nowhere" in str(found[0]) == str(found[1])
    assert not (run_folder(job()) / "plan.json").exists()


def _too_few(rank: int, job) -> None:
    with torchrun_context(run_folder(job)) as ctx:
        train(job, ctx)


def test_another_number_of_ranks_than_the_job_asks_for(job):
    for one in outcomes(2, _too_few, job(resources={"workers": 3})):
        assert isinstance(one, CapacityError) and "3, 2 were started" in str(one)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on_from_its_checkpoint(job, tmp_path, sharding):
    one = job(sharding=sharding, name="killed")
    straight = job(sharding="single", resources={"workers": 1}, name="straight", train__per_device_train_batch_size=8)
    run_here(straight, tmp_path / "scratch")
    survivor, dead = train_until_killed(one, step=4)  # before it adds its part of the checkpoint of step 4
    assert isinstance(dead, RankDiedError) and isinstance(survivor, Exception)
    assert [path.name for path in committed(run_folder(one))] == ["checkpoint-00000002"]
    assert train_ranks(one).status == "succeeded"
    assert curve(one) == pytest.approx(curve(straight), abs=1e-5)
    assert [event["step"] for event in read_events(run_folder(one) / "events.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list(run_folder(one).glob(".*.tmp"))


def test_a_checkpoint_whose_manifest_is_cut_off_is_set_aside_and_all_ranks_take_the_one_before(job):
    one = job(sharding="fsdp2")
    assert train_ranks(one, stop_at=4).status == "stopped"
    assert [path.name[-1] for path in committed(run_folder(one))] == ["2", "4"]
    manifest = committed(run_folder(one))[1] / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8")[:50], encoding="utf-8")
    assert train_ranks(one, stop_at=1).status == "stopped"
    assert (run_folder(one) / "rejected-checkpoint-00000004").is_dir(), "until the run is past it"
    assert [path.name[-1] for path in committed(run_folder(one))] == ["2", "3"]
    assert train_ranks(one).status == "succeeded"
    assert [event["step"] for event in read_events(run_folder(one) / "events.jsonl")] == [1, 2, 3, 4, 5, 6]


def _gradients(rank: int) -> dict:
    dist.init_process_group("gloo")
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(3)) for name in ("both", "one", "none")})
    placed = Ddp().place(model, lambda it: torch.optim.SGD(it.parameters(), lr=1.0), "cpu")
    for last in (False, True):
        loss = model["both"].sum() * (rank + 1) + (model["one"].sum() * 5 if rank == 1 else 0)
        placed.backward(loss, last=last)
    found = {name: None if one.grad is None else one.grad.tolist() for name, one in model.items()}
    dist.destroy_process_group()
    return found


def test_gradients_are_summed_once_also_of_what_only_one_rank_used():
    expected = {"both": [6.0] * 3, "one": [10.0] * 3, "none": None}
    assert run_ranks(2, _gradients) == [expected] * 2


def test_the_plan_at_another_number_of_workers_keeps_the_steps(job):
    one = job(train__max_steps=4)
    assert train_ranks(one, stop_at=2).status == "stopped"
    again = one.changed({"resources.workers": 1, "sharding": "single"})
    assert train_ranks(again).status == "succeeded"
    plan = json.loads((run_folder(again) / "plan.json").read_text(encoding="utf-8"))
    assert (plan["rows_per_step"], plan["steps"], len(curve(again))) == (8, 4, 4)


def _apart_on_disk(rank: int, root: Path) -> None:
    with torchrun_context(root / f"machine-{rank}" / "run"):
        raise AssertionError("opened")


def test_ranks_that_share_no_folder_end_before_a_part_of_a_checkpoint_is_lost(tmp_path):
    found = outcomes(2, _apart_on_disk, tmp_path)
    assert [type(one) for one in found] == [ConfigError, ConfigError]
    assert "storage: worker 1 on " in str(found[0]) == str(found[1]) and "all machines share" in str(found[0])
    assert not list(tmp_path.rglob(".*.tmp"))
