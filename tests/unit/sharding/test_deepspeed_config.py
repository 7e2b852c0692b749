"""What a DeepSpeed file may say, and what DeepSpeed is told; deepspeed itself has no part in it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from lmray.errors import CapacityError, ConfigError
from lmray.registry import SHARDINGS
from lmray.sharding._deepspeed_config import MAX_BUCKET, check_config, engine_config, job_says
from lmray.sharding.deepspeed import Deepspeed
from lmray.testing.jobs import tiny_job
from lmray.train.plan import make_plan

TRAIN = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "optim": {"name": "adamw_torch"},
}
ZERO = {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}


def check(config: dict, *, dtype: str = "bfloat16", optim: dict | None = None, **fields) -> None:
    says = job_says(TRAIN if optim is None else TRAIN | {"optim": optim}, workers=2, dtype=dtype)
    check_config(config, says | {f"zero_optimization.{key}": (value, key) for key, value in fields.items()}, "ds.json")


def test_a_file_may_repeat_the_job_or_leave_it_to_auto():
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}}
    check(
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1,
            "bf16": {"enabled": True},
            "fp16": {"enabled": False, "loss_scale": "auto"},
            "optimizer": optimizer,
            "scheduler": "auto",
            "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
            "prescale_gradients": False,
        },
        stage=3,
    )


def test_every_contradiction_is_named_at_once_with_what_is_allowed():
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True, "loss_scale_window": 100},
        "bf16": {"enabled": False},
        "optimizer": {"type": "Lamb", "params": {"lr": 3e-4, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 1000},
        "data_efficiency": {"enabled": True},
    }
    with pytest.raises(ConfigError) as caught:
        check(config, stage=3)
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) == {
        f"ds.json: {key}"
        for key in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "fp16.enabled",
            "fp16.loss_scale_window",
            "bf16.enabled",
            "optimizer.type",
            "optimizer.params.lr",
            "optimizer.params.torch_adam",
            "scheduler.type",
            "zero_optimization.stage",
            "data_efficiency.enabled",
        )
    }
    rate = found["ds.json: optimizer.params.lr"]
    assert rate.found == "0.0003 contradicts the job"
    assert rate.allowed == '0.0001 as `train.learning_rate` says, "auto", or no such key'
    assert "train.lr_scheduler_type" in found["ds.json: scheduler.type"].hint
    assert found["ds.json: data_efficiency.enabled"].allowed == 'false, "auto", or no such key'


def test_the_optimizer_is_the_one_that_the_job_names():
    momentum = {"name": "sgd", "momentum": 0.9}
    check({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, optim=momentum)
    with pytest.raises(ConfigError) as caught:
        check({"optimizer": {"type": "AdamW", "params": {"momentum": 0.5, "eps": 1e-8}}}, optim=momentum)
    found = {problem.where.removeprefix("ds.json: optimizer."): problem.allowed for problem in caught.value.problems}
    assert set(found) == {"type", "params.momentum", "params.eps"}
    assert found["type"] == '"SGD" as `train.optim` says, "auto", or no such key'


def test_the_strategy_checks_the_file_it_names(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    Deepspeed(stage=3, offload_optimizer="cpu", config=str(path)).check(TRAIN, workers=2, dtype="float32")
    with pytest.raises(
        ConfigError, match=r"zero_optimization\.stage: 3 contradicts the job\n  allowed: 2 as"
    ) as caught:
        Deepspeed(config=str(path)).check(TRAIN, workers=2, dtype="float32")
    assert "`sharding.offload_optimizer`" in str(caught.value)
    Deepspeed().check(TRAIN, workers=2, dtype="float32")


def test_what_the_job_decides_and_auto_are_not_passed_on():
    config = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": True,
        "zero_optimization": {"overlap_comm": True, "stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": 7},
    }
    given = engine_config(config, ZERO, num_trained=1000)
    assert given["zero_optimization"].items() >= {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 7}.items()
    assert "stage3_prefetch_bucket_size" not in given["zero_optimization"]
    assert given["wall_clock_breakdown"] is True
    assert given["gradient_accumulation_steps"] == 1
    assert not {"train_batch_size", "optimizer", "bf16", "gradient_clipping"} & set(given)


@pytest.mark.parametrize(("num_trained", "bucket"), [(1000, 1000), (10**10, MAX_BUCKET), (0, 1)])
def test_a_bucket_is_no_larger_than_what_is_trained(num_trained, bucket):
    for stage, sizes in (
        (2, ("reduce_bucket_size", "allgather_bucket_size")),
        (3, ("reduce_bucket_size",)),
    ):
        given = engine_config({}, ZERO | {"stage": stage}, num_trained=num_trained)["zero_optimization"]
        assert [given[size] for size in sizes] == [bucket] * len(sizes)
    assert Deepspeed().buffer_bytes(num_trained) == 3 * 4 * bucket


def test_stage_3_keeps_no_more_gathered_weights_than_it_may_unless_the_file_says_so():
    given = engine_config({}, ZERO, num_trained=10, num_live=20)["zero_optimization"]
    assert (given["stage3_max_live_parameters"], given["stage3_max_reuse_distance"]) == (20, 0)
    own = {"zero_optimization": {"stage3_max_live_parameters": 9}}
    given = engine_config(own, ZERO, num_trained=10, num_live=20)["zero_optimization"]
    assert given["stage3_max_live_parameters"] == 9
    assert "stage3_max_live_parameters" not in engine_config({}, ZERO, num_trained=10)["zero_optimization"]


def test_an_offloading_section_keeps_what_the_file_says_of_it():
    config = {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}
    given = engine_config(config, ZERO | {"offload_optimizer": {"device": "cpu"}}, num_trained=1)
    assert given["zero_optimization"]["offload_optimizer"] == {"pin_memory": True, "device": "cpu"}
    assert "offload_param" not in given["zero_optimization"]


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    """Two workers under DeepSpeed with the settings in a file of this text."""

    def make(text: str | None):
        path = tmp_path / "ds.json"
        if text is not None:
            path.write_bytes(text.encode("latin-1"))
        sharding = {"name": "deepspeed", "config": str(path)}
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", sharding=sharding, resources={"workers": 2})

    return make


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "holds no object"), ("\xff", "is not JSON")],
)
def test_the_plan_refuses_a_file_that_holds_no_settings_and_names_it(job, tmp_path, text, found):
    with pytest.raises(ConfigError, match=rf"ds\.json {found}") as caught:
        make_plan(job(text))
    (problem,) = caught.value.problems
    assert problem.where == "sharding.config" and str(tmp_path / "ds.json") in problem.found


def test_the_plan_refuses_a_file_that_contradicts_the_job_and_names_its_keys(job, tmp_path):
    batch = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    config = {**batch, "bf16": {"enabled": True}, "optimizer": {"params": {"lr": 1.0}}}
    with pytest.raises(ConfigError) as caught:
        make_plan(job(json.dumps(config)))
    keys = [*batch, "bf16.enabled", "optimizer.params.lr"]
    assert [problem.where for problem in caught.value.problems] == [f"{tmp_path / 'ds.json'}: {key}" for key in keys]


def test_weights_are_offloaded_at_stage_3_only():
    with pytest.raises(ValueError, match="`offload_param` needs stage 3, found 2"):
        Deepspeed(stage=2, offload_param="cpu")


def test_an_optimizer_that_needs_whole_tensors_is_refused():
    with pytest.raises(ConfigError, match="Adafactor cannot be split") as caught:
        Deepspeed().place(torch.nn.Linear(2, 2), lambda model: torch.optim.Adafactor(model.parameters()), "cpu")
    assert "AdamW" in caught.value.allowed


def test_without_the_package_the_plan_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lmray.sharding.deepspeed.find_spec", lambda name: None)
    with pytest.raises(CapacityError, match=r"lmray\[deepspeed\]"):
        Deepspeed().resolve(workers=2)


def test_naming_the_strategy_does_not_import_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    strategy, reason = SHARDINGS.load("deepspeed")(stage=3).resolve(workers=2)
    assert "weights" in strategy.divides and "stage 3" in reason
    assert "deepspeed" not in sys.modules
