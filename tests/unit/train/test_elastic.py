"""A range of workers in plan and pre-flight, and what a run does with its surroundings' wishes. One process."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lmray.artifacts.checkpoints import committed
from lmray.artifacts.store import run_folder
from lmray.context import LocalContext
from lmray.errors import CapacityError
from lmray.models.machine import Machine
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train.checkpoint import _set_random_state
from lmray.train.plan import make_plan
from lmray.train.preflight import check_resources, preflight
from lmray.train.program import train

GIB = 2**30
TWO_CORES = Machine("two", 2, 0, 16 * GIB)
RANGE = {"min": 1, "max": 4}


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(workers, **changes):
        changes = {"sharding": "auto", "adapter": "full", **changes}
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", resources={"workers": workers}, **changes)

    return make


def test_a_step_is_over_the_rows_of_the_most_workers_and_memory_is_that_of_the_fewest(job):
    elastic, four, one = (make_plan(job(workers)) for workers in (RANGE, 4, 1))
    assert elastic.rows_per_step == four.rows_per_step == 4 * one.rows_per_step
    assert (elastic.samples, elastic.steps) == (four.samples, four.steps)
    assert elastic.memory_bytes["weights"] == one.memory_bytes["weights"] > four.memory_bytes["weights"]
    assert elastic.run_key == four.run_key == one.run_key


@pytest.mark.parametrize(("adapter", "chosen"), [("full", "fsdp2"), ("lora", "ddp")])
def test_the_strategy_is_one_for_the_most_workers_also_where_one_is_left(job, adapter, chosen):
    assert make_plan(job(RANGE, adapter=adapter)).sharding["name"] == chosen
    assert make_plan(job({"min": 1, "max": 1}, adapter=adapter)).sharding["name"] == "single"


def test_single_cannot_grow(job):
    with pytest.raises(CapacityError, match="`single` runs on one worker, the job asks for 4"):
        make_plan(job(RANGE, sharding="single"))


def test_a_plan_is_put_on_what_there_is_room_for_now(job):
    one = job(RANGE).changed({"resources.cpus_per_worker": 1, "resources.price_per_worker_hour": 1.0})
    plan = make_plan(one)
    found = preflight(one, plan, (TWO_CORES,), flops_per_s=1e9)
    two = one.changed({"resources.workers": 2})
    same = preflight(two, plan, (TWO_CORES,), flops_per_s=1e9)
    assert (found.total_seconds, found.cost) == (same.total_seconds, same.cost)
    assert found.worker_memory_bytes == 8 * GIB
    assert "1 to 4 worker(s)" in found.resources and "room for 2 now" in found.resources
    assert "now" not in same.resources


def test_the_fewest_of_a_range_must_fit(job):
    resources = job({"min": 3, "max": 4}).resources
    with pytest.raises(CapacityError, match=r"at least 3 .*room for 2"):
        check_resources(resources, (TWO_CORES,))
    check_resources(job({"min": 2, "max": 9}).resources, (TWO_CORES,))


class Surroundings:
    """Says "a machine goes" or "stop" before the steps it is told."""

    def __init__(self, *, notices: tuple[int, ...] = (), stop: int = 0):
        self.notices, self.stop, self.step = notices, stop, 0

    def asks_to_stop(self) -> bool:
        self.step += 1
        return self.step == self.stop

    def warns(self) -> bool:
        return self.step in self.notices


def run(job, tmp_path, around: Surroundings):
    context = LocalContext(run_folder(job), scratch=tmp_path / "scratch", stop=around.asks_to_stop, warned=around.warns)
    return train(job, context)


def test_a_notice_saves_the_next_step_and_the_run_goes_on(job, tmp_path):
    one, straight = (job(1, name=name, adapter="lora", train__save_steps=100) for name in ("noticed", "straight"))
    run_here(straight, tmp_path / "scratch")
    assert run(one, tmp_path, Surroundings(notices=(2, 5))).status == "succeeded"
    assert [path.name[-1] for path in committed(run_folder(one))] == ["5", "6"]
    assert curve(one) == curve(straight)


def test_asked_for_both_a_run_ends(tmp_path):
    around = Surroundings(notices=(1, 2), stop=2)
    ctx = LocalContext(tmp_path / "run", scratch=tmp_path / "s", stop=around.asks_to_stop, warned=around.warns)
    assert [ctx.wish() for _ in range(3)] == ["save", "stop", "go on"]


def test_a_rank_without_a_random_state_of_its_own_does_not_begin_its_stream_again(tmp_path):
    draws = []
    for step in (0, 4, 8):
        torch.manual_seed(7)
        _set_random_state(tmp_path / "missing.safetensors", step=step)
        draws.append(torch.rand(3).tolist())
    assert draws[0] != draws[1] != draws[2] != draws[0]
    torch.manual_seed(7)
    _set_random_state(tmp_path / "missing.safetensors", step=4)
    assert torch.rand(3).tolist() == draws[1], "the same at every attempt"
    save_file({"cpu": torch.get_rng_state()}, tmp_path / "there.safetensors")
    expected = torch.rand(3).tolist()
    _set_random_state(tmp_path / "there.safetensors", step=8)
    assert torch.rand(3).tolist() == expected
