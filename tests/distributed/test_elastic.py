"""One job on a number of ranks that changes while it trains."""

from __future__ import annotations

import json

import pytest

from lmray.artifacts.checkpoints import committed
from lmray.artifacts.store import run_folder
from lmray.errors import CapacityError
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.ranks import train_ranks

ROWS = ("train.tokens", "train.supervised_tokens", "train.epoch")


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(name: str, **changes):
        elastic = {"sharding": "ddp", "resources": {"workers": {"min": 1, "max": 2}}, "train__save_steps": 2}
        return tiny_job(tiny_model, tiny_data, tmp_path / "store", name=name, **elastic | changes)

    return make


def two_one_two(job) -> None:
    assert train_ranks(job, workers=2, stop_at=2).status == "stopped"
    assert train_ranks(job, workers=1, stop_at=2).status == "stopped"
    assert [path.name[-1] for path in committed(run_folder(job))] == ["2", "4"]
    assert train_ranks(job, workers=2).status == "succeeded"


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_the_curve_is_that_of_the_most_workers_however_many_there_are(job, tmp_path, sharding):
    straight = job("straight", sharding="single", resources={"workers": 1}, train__per_device_train_batch_size=8)
    run_here(straight, tmp_path / "scratch")
    elastic = job("elastic", sharding=sharding)
    two_one_two(elastic)
    assert curve(elastic, "step") == [1, 2, 3, 4, 5, 6]
    assert curve(elastic) == pytest.approx(curve(straight), abs=1e-5)
    for name in ROWS:
        assert curve(elastic, name) == curve(straight, name)
    plan = json.loads((run_folder(elastic) / "plan.json").read_text(encoding="utf-8"))
    assert plan["rows_per_step"] == 8


def test_with_dropout_the_same_changes_give_the_same_curve(job):
    dropout = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.3}
    both = [job(name, adapter=dropout) for name in ("once", "again")]
    for one in both:
        two_one_two(one)
    assert curve(both[0]) == curve(both[1])


def test_no_other_number_than_the_range_says(job):
    with pytest.raises(CapacityError, match="asks for 1 to 2, 3 were started"):
        train_ranks(job("three"), workers=3)
