"""Memory that runs out: in one process for real, and on one of two ranks, where the other waits for nobody."""

from __future__ import annotations

import ctypes
import json
import resource
from pathlib import Path

import psutil
import pytest
import torch

from lmray.artifacts.store import run_folder
from lmray.errors import OutOfMemoryError
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job, write_jsonl
from lmray.testing.ranks import outcomes, run_ranks
from lmray.testing.tiny import tiny_model_folder
from lmray.train.group import torchrun_context
from lmray.train.learner import Learner
from lmray.train.program import train

ROOM_BYTES = 200 * 2**20
"""Several times what one row of the wide model takes, and less than eight."""
M_MMAP_THRESHOLD = -3


def memory(job) -> dict:
    return json.loads((run_folder(job) / "memory.json").read_text(encoding="utf-8"))


def _limited(rank: int, job, scratch: Path) -> dict:
    """Trains `job` here. During steps the process may map little more than it had before its attempt began them. Every
    tensor is mapped on its own, so that what one attempt frees is no hole in what the next may have."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    real, hard = Learner.step, resource.getrlimit(resource.RLIMIT_AS)[1]

    def step(self, batches, **given):
        if not hasattr(self, "limit"):  # a learner an attempt
            self.limit = psutil.Process().memory_info().vms + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (self.limit, hard))
        try:
            return real(self, batches, **given)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    Learner.step = step
    return dict(run_here(job, scratch).details)


@pytest.fixture
def wide_job(tmp_path):
    """Of a model whose MLP keeps about 200 KiB of each of some 200 tokens a row."""
    model = tiny_model_folder(tmp_path / "wide", intermediate_size=8192)
    rows = [{"prompt": f"say {index} " * 20, "completion": "red", "topic": f"t{index % 6}"} for index in range(24)]
    data = write_jsonl(tmp_path / "long.jsonl", rows)

    def make(name: str, **changes):
        changes = {"train__per_device_train_batch_size": 8, "train__max_steps": 2, "model__kernels": "plain", **changes}
        return tiny_job(model, data, tmp_path / "store", name=name, **changes)

    return make


def test_a_process_whose_memory_is_limited_ends_with_what_was_planned(wide_job, tmp_path):
    one = wide_job("failing")
    (error,) = outcomes(1, _limited, one, tmp_path / "scratch")
    assert isinstance(error, OutOfMemoryError)
    assert "at step 1 with 8 row(s) a forward pass, on worker 0: " in str(error)
    assert "could not be allocated" in str(error) and "activations" in str(error)
    assert "train.per_device_train_batch_size=" in error.hint and "on_oom=halve" in error.hint


def test_a_process_whose_memory_is_limited_halves_until_its_steps_fit(wide_job, tmp_path):
    straight, one = wide_job("straight"), wide_job("halving", resources={"on_oom": "halve"})
    run_here(straight, tmp_path / "scratch")
    (details,) = run_ranks(1, _limited, one, tmp_path / "scratch")
    assert details["micro_batch"] < 8 and memory(one)["history"][0]["micro_batch"] == 8
    assert curve(one) == pytest.approx(curve(straight), abs=1e-5)


def _short_of_memory(rank: int, job, poor: int):
    """Rank `poor` has room for two rows from step 3 on."""
    real_loss, real_step, steps = Learner._loss, Learner.step, []

    def loss(self, batch):
        if rank == poor and steps[-1] >= 3 and sum(map(len, batch.lengths)) > 2:
            torch.empty(2**60, dtype=torch.uint8)
        return real_loss(self, batch)

    def step(self, batches, **given):
        steps.append(given["step"])
        return real_step(self, batches, **given)

    Learner._loss, Learner.step = loss, step
    with torchrun_context(run_folder(job)) as ctx:
        return train(job, ctx)


@pytest.mark.parametrize(("sharding", "poor"), [("ddp", 1), ("fsdp2", 0)])
def test_one_rank_that_runs_out_ends_all_and_all_begin_anew_with_half(tiny_model, tiny_data, tmp_path, sharding, poor):
    straight = tiny_job(tiny_model, tiny_data, tmp_path / "store", name="one", train__per_device_train_batch_size=8)
    run_here(straight, tmp_path / "scratch")
    job = tiny_job(
        tiny_model, tiny_data, tmp_path / "store", sharding=sharding, resources={"workers": 2, "on_oom": "halve"}
    )
    found = outcomes(2, _short_of_memory, job, poor)
    error, other = found[poor], found[1 - poor]
    assert isinstance(error, OutOfMemoryError) and error.micro_batch == 2
    assert f"at step 3 with 4 row(s) a forward pass, on worker {poor}: " in str(error)
    assert isinstance(other, Exception) and not isinstance(other, OutOfMemoryError), "it did not wait for ever"
    assert memory(job)["micro_batch"] == 2 and [one["rank"] for one in memory(job)["history"]] == [poor]
    result = run_ranks(2, _short_of_memory, job, poor)[0]
    assert result.status == "succeeded" and result.details["micro_batch"] == 2
    assert curve(job) == pytest.approx(curve(straight), abs=1e-5)
    assert [event["step"] for event in read_events(run_folder(job) / "events.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_one_rank_that_runs_out_of_a_job_that_is_to_fail_says_what_would_fit(tiny_model, tiny_data, tmp_path):
    job = tiny_job(tiny_model, tiny_data, tmp_path / "store", sharding="ddp", resources={"workers": 2})
    other, error = outcomes(2, _short_of_memory, job, 1)
    assert isinstance(error, OutOfMemoryError) and error.micro_batch is None and "on_oom=halve" in error.hint
    assert isinstance(other, Exception)
