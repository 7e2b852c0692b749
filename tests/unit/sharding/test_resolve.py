"""Which strategy runs on so many workers, and what the plan makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lmray.adapters.lora import Lora
from lmray.errors import CapacityError, ConfigError
from lmray.models.machine import this_machine
from lmray.models.shape import read_shape
from lmray.sharding.auto import Auto
from lmray.sharding.base import Need
from lmray.sharding.ddp import Ddp
from lmray.sharding.deepspeed import Deepspeed
from lmray.sharding.fsdp2 import Fsdp2
from lmray.sharding.single import Single
from lmray.testing.jobs import tiny_job
from lmray.train import plan_steps
from lmray.train.memory import Rows, memory_parts
from lmray.train.plan import continued, make_plan


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)

    return make


@pytest.mark.parametrize(
    ("workers", "need", "name", "why"),
    [
        (1, Need(adapter_only=False, fits=False), "single", "one worker"),
        (2, Need(adapter_only=True, fits=True), "ddp", "only an adapter"),
        (2, Need(adapter_only=True, fits=False), "fsdp2", "does not fit"),
        (2, Need(adapter_only=False, fits=True), "fsdp2", "shared among 2"),
        (4, None, "fsdp2", "shared among 4"),
    ],
)
def test_auto_takes_the_strategy_that_fits_and_says_why(workers, need, name, why):
    sharding, reason = Auto().resolve(workers=workers, need=need)
    assert sharding.name == name and why in reason


def test_one_that_cannot_run_with_the_workers_asked_names_one_that_can():
    with pytest.raises(CapacityError, match="one worker") as caught:
        Single().resolve(workers=2)
    assert "sharding: auto" in str(caught.value)


def test_the_plan_says_which_and_why_and_takes_the_plain_kernels_where_weights_are_shared(job, monkeypatch):
    both = make_plan(job(sharding="auto", resources={"workers": 2}))
    assert both.sharding["name"] == "ddp" and both.kernels == "fused" and both.rows_per_step == 8
    assert any("only an adapter" in line for line in both.lines())
    small = replace(this_machine(), memory_bytes=2**20)
    monkeypatch.setattr(plan_steps, "this_machine", lambda: small)
    shared = make_plan(job(sharding="auto", resources={"workers": 2}))
    assert (shared.sharding["name"], shared.kernels) == ("fsdp2", "plain")
    assert "whole weights" in shared.reasons["kernels"]
    assert shared.run_key == both.run_key, "how a model lies on its workers is not what is computed"
    with pytest.raises(ConfigError, match="whole weights"):
        make_plan(job(sharding="fsdp2", resources={"workers": 2}, model__kernels="fused"))


@pytest.mark.parametrize("changes", [{"adapter": "adalora"}, {"train__optim": "adafactor"}])
def test_what_looks_at_whole_weights_needs_them_whole(job, changes):
    make_plan(job(sharding="ddp", resources={"workers": 2}, **changes))
    with pytest.raises(ConfigError, match="needs whole on every worker"):
        make_plan(job(sharding="fsdp2", resources={"workers": 2}, **changes))
    with pytest.raises(ConfigError, match="needs whole on every worker"):
        make_plan(job(sharding={"name": "deepspeed", "stage": 1}, resources={"workers": 2}, **changes))


@pytest.mark.parametrize(
    ("sharding", "divided"),
    [
        (Ddp(), ()),
        (Deepspeed(stage=1), ("optimizer",)),
        (Deepspeed(stage=2), ("optimizer", "gradients")),
        (Deepspeed(stage=3), ("optimizer", "gradients", "weights")),
        (Fsdp2(), ("optimizer", "gradients", "weights")),
    ],
    ids=["ddp", "stage 1", "stage 2", "stage 3", "fsdp2"],
)
def test_what_a_strategy_divides_is_divided_by_the_workers(tiny_model, sharding, divided):
    shape = read_shape(tiny_model, lambda model: Lora(r=4).attach(model, seed=0))
    settings = {"dtype": "float32", "device": "cpu", "process_bytes": 0, "optimizer_bytes": 1000, "workers": 4}
    rows = Rows(1, 8, 4, packed=False)
    whole, shared = (memory_parts(shape, rows, **settings, sharding=one) for one in (None, sharding))
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] == (-(-whole[part] // 4) if part in divided else whole[part])
    assert ("gathered" in shared) == ("weights" in divided), "what is gathered of a block counts"
    assert shared["total"] == sum(size for part, size in shared.items() if part != "total")
    large = replace(shape, weights_bytes=10**9)  # beside which buffers are small
    again = memory_parts(large, rows, **settings, sharding=sharding, reads_whole=True)
    assert ("loading" in again) == ("weights" in divided)
    assert again["total"] >= large.weights_bytes


@pytest.mark.parametrize(
    ("changes", "loading", "why"),
    [
        ({}, "by part", "no more of the weights than it keeps"),
        ({"sharding": {"name": "deepspeed", "stage": 3}}, "by part", "no more"),
        ({"adapter": "full"}, "by part", "no more"),
        ({"adapter": {"name": "lora", "init_lora_weights": "olora"}}, "whole", "starts from the model's weights"),
        ({"adapter": {"name": "lora", "modules_to_save": ["lm_head"]}}, "whole", "starts from the model's weights"),
        ({"sharding": "ddp"}, "whole", None),
        ({"sharding": {"name": "deepspeed", "stage": 2}}, "whole", None),
    ],
)
def test_the_plan_says_what_a_worker_reads_of_weights_that_are_divided(job, changes, loading, why):
    plan = make_plan(job(**{"sharding": "fsdp2", "resources": {"workers": 2}, **changes}))
    said = [line for line in plan.lines() if line.startswith("loading")]
    assert plan.loading == loading
    assert (why is None and not said) or (why in said[0] and loading in said[0])


def test_a_run_goes_on_with_the_steps_it_began_with(job, tmp_path):
    one, two = make_plan(job()), make_plan(job(sharding="ddp", resources={"workers": 2}))
    assert continued(two, tmp_path) == two
    (tmp_path / "plan.json").write_text(json.dumps(one.to_json()), encoding="utf-8")
    went_on = continued(two, tmp_path)
    assert (went_on.rows_per_step, went_on.samples, went_on.steps) == (one.rows_per_step, one.samples, one.steps)
    assert went_on.sharding["name"] == "ddp"


def test_blocks_that_an_architecture_does_not_name():
    with pytest.raises(ConfigError, match="_no_split_modules"):
        Fsdp2().place(torch.nn.Linear(2, 2), lambda model: torch.optim.SGD(model.parameters()), "cpu")


@pytest.mark.parametrize(
    ("resources", "found"),
    [({"workers": {"min": 1, "max": 2}}, "resources.workers"), ({"workers": 2, "on_oom": "halve"}, "resources.on_oom")],
)
def test_what_cannot_go_on_is_told_to_jobs_that_would(job, resources, found):
    disk = {"name": "deepspeed", "stage": 3, "offload_param": "nvme", "nvme_path": "/disk"}
    (warning,) = [one for one in make_plan(job(sharding=disk, resources={"workers": 2})).warnings if "nvme" in one]
    assert "a failure ends the run" in warning
    with pytest.raises(ConfigError, match=f"{found}: .* goes on from checkpoints, which weights on a disk cannot"):
        make_plan(job(sharding=disk, resources=resources))
