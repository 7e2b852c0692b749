from __future__ import annotations

import pytest

from lmray.errors import CapacityError, ConfigError, DataError
from lmray.job import Resources
from lmray.models.machine import Machine
from lmray.models.shape import read_shape
from lmray.testing.jobs import run_here, tiny_job
from lmray.train.duration import forward_flops, seconds, step_flops
from lmray.train.plan import make_plan
from lmray.train.preflight import check_resources, preflight, raise_all, run_cost, worker_memory

GIB = 2**30
BIG = Machine("big", 8, 2, 64 * GIB, 80 * GIB)
SMALL = Machine("small", 4, 0, 16 * GIB)


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


def test_operations_are_those_of_the_formula(tiny_model):
    shape = read_shape(tiny_model)
    # two layers: q and o 32x32, k and v 32x16, three of 32x64, two norms; one norm at the end
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert shape.base - shape.embedding == matrices
    per_token = 4 * matrices + 12 * 2 * 10 * 32
    assert step_flops(shape, tokens=3, supervised=2, row_tokens=10) == 3 * per_token + 2 * 4 * 32 * 264
    assert forward_flops(shape, tokens=3) == 6 * matrices
    assert seconds(100.0, 10.0) == (20.0, 40.0, 100.0)


def test_a_plan_on_machines(job):
    one = job(resources={"price_per_worker_hour": 3.6})
    plan = make_plan(one)
    found = preflight(one, plan, (SMALL,), flops_per_s=1e9)
    assert found.max_micro_batch and found.max_micro_batch > 4 and not found.warnings
    assert found.total_seconds[1] == pytest.approx(plan.flops["total"] / 1e9 / 0.25)
    assert found.cost == pytest.approx([one / 1000 for one in found.total_seconds])
    assert plan.flops["total"] == pytest.approx(plan.steps * plan.flops["step"] + plan.flops["eval"])
    assert preflight(job(), plan, (SMALL,), flops_per_s=1e9).cost is None
    quarter = preflight(job(resources={"cpus_per_worker": 1}), plan, (SMALL,), flops_per_s=1e9)
    assert quarter.total_seconds[1] == pytest.approx(4 * found.total_seconds[1])
    assert "1 worker(s) with 1 core(s) and 0 GPU(s) each" in "\n".join(quarter.lines())


@pytest.mark.parametrize(("room", "advice"), [(2, "per_device_train_batch_size="), (0, "lower `data.max_length`")])
def test_a_job_that_does_not_fit_is_warned_of_with_what_would(job, room, advice):
    one = job()
    plan = make_plan(one)
    fixed = plan.memory_bytes["total"] - 4 * plan.row_bytes
    memory = int((fixed + (room + 0.5) * plan.row_bytes) / 0.9)
    found = preflight(one, plan, (Machine("tight", 2, 0, memory),), flops_per_s=1e9)
    assert found.max_micro_batch == room
    (warning,) = found.warnings
    assert advice in warning


def test_weights_alone_that_exceed_the_memory_are_refused(job):
    with pytest.raises(CapacityError, match="the weights alone"):
        preflight(job(), make_plan(job()), (Machine("tiny", 2, 0, 1000),), flops_per_s=1e9)


def test_what_workers_get_of_a_machine():
    assert worker_memory((BIG, SMALL), workers=2, on_gpu=False) == 16 * GIB
    assert worker_memory((SMALL,), workers=3, on_gpu=False) == 16 * GIB // 3
    assert worker_memory((BIG, SMALL), workers=1, on_gpu=True) == 80 * GIB
    assert worker_memory((Machine("silent", 8, 1, GIB),), workers=1, on_gpu=True) is None


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"gpus_per_worker": 1, "workers": 3}, "room for 2"),
        ({"cpus_per_worker": 9}, "room for 0"),
        ({"cpus_per_worker": 4, "workers": 4}, "room for 3"),
    ],
)
def test_resources_that_are_not_there(wanted, said):
    with pytest.raises(CapacityError, match=said):
        check_resources(Resources.model_validate(wanted), (BIG, SMALL))
    with pytest.raises(CapacityError, match="there is none"):
        check_resources(Resources(gpus_per_worker=1), (SMALL,))
    check_resources(Resources.model_validate({"cpus_per_worker": 4, "workers": 3}), (BIG, SMALL))


def test_all_problems_are_raised_together_and_one_as_it_is():
    def missing():
        raise DataError("data", "gone")

    def wrong():
        raise ConfigError("model", "odd", hint="mend it")

    with pytest.raises(DataError, match="gone"):
        raise_all([missing, lambda: None])
    with pytest.raises(ConfigError) as caught:
        raise_all([missing, wrong])
    assert "data: gone" in str(caught.value) and "hint: mend it" in str(caught.value)


def test_a_run_with_a_price_says_what_it_cost(job, tmp_path):
    resources = Resources(price_per_worker_hour=3600.0)
    assert run_cost(resources, 2.0, workers=1) == 2.0 and run_cost(resources, 2.0, workers=3) == 6.0
    metrics = run_here(job(resources={"price_per_worker_hour": 3600.0}), tmp_path / "scratch").metrics
    assert metrics["run.cost"] == pytest.approx(metrics["run.seconds"], rel=1e-3)
