from __future__ import annotations

import pytest
from jsonschema import Draft202012Validator

from lmray.config import Config, Document, decode, dump
from lmray.errors import CapacityError, ConfigError
from lmray.job import Resources
from lmray.models.machine import Machine
from lmray.models.room import check_room
from lmray.models.workers import ONE

GIB = 2**30
FOUR = Machine("four", 4, 0, 16 * GIB)


def resources(**tree) -> Resources:
    return decode(Resources, Document("job.yaml", tree))


def test_a_number_stays_a_number_and_a_range_a_range():
    for written, text in ((2, "2"), ({"min": 1, "max": 4, "resize_interval_s": 5.0}, "1 to 4")):
        asked = resources(workers=written)
        assert str(asked.workers) == text and dump(asked)["workers"] == written
        assert decode(Resources, Document("job.yaml", dump(asked))) == asked
    assert Resources().workers == ONE and dump(Resources())["workers"] == 1
    kept = {"min": 2, "max": 2, "resize_interval_s": 5.0}
    assert dump(resources(workers=kept))["workers"] == kept, "nothing that was written is lost"


def test_only_a_range_is_elastic_and_takes_what_there_is_room_for():
    fixed, one_to_four = resources(workers=2).workers, resources(workers={"min": 1, "max": 4}).workers
    assert not fixed.elastic and one_to_four.elastic and one_to_four.resize_interval_s == 60
    assert [fixed.within(room) for room in (0, 2, 9)] == [2, 2, 2]
    assert [one_to_four.within(room) for room in (0, 2, 9)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("written", "where", "said"),
    [
        (0, "resources.workers:", "0 is no number of workers"),
        (True, "resources.workers:", "{min: 1, max: 4}"),
        ("two", "resources.workers:", "'two' is no number of workers"),
        (1.5, "resources.workers:", "1.5 is no number of workers"),
        ({"min": 0, "max": 2}, "resources.workers.min:", "greater than or equal to 1"),
        ({"min": 3, "max": 2}, "resources.workers:", "`min` 3 is above `max` 2"),
        ({"min": 1}, "resources.workers.max:", "is missing"),
        ({"min": 1, "max": 2, "resize_interval_s": 0}, "resources.workers.resize_interval_s:", "greater than 0"),
        ({"min": 1, "most": 2}, "resources.workers.most:", "allowed: min, max, resize_interval_s"),
    ],
)
def test_what_is_no_number_of_workers_is_named(written, where, said):
    with pytest.raises(ConfigError) as caught:
        decode(_Job, Document("job.yaml", {"resources": {"workers": written}}))
    assert where in str(caught.value) and said in str(caught.value)


class _Job(Config):
    """A config with the section, so that problems carry its whole path."""

    resources: Resources


def test_parts_of_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"gpus_per_worker.*0\.5"):
        resources(workers={"min": 1, "max": 2}, gpus_per_worker=0.5)


def test_the_schema_for_editors_takes_both():
    schema = Draft202012Validator(Resources.model_json_schema())
    assert schema.is_valid({"workers": 2}) and schema.is_valid({"workers": {"min": 1, "max": 4}})
    assert not schema.is_valid({"workers": "two"}) and not schema.is_valid({"workers": {"min": 1, "most": 4}})


def test_an_elastic_range_that_no_cluster_can_meet_is_refused_with_what_there_is():
    asked = resources(workers={"min": 3, "max": 8}).workers
    check_room((FOUR,), workers=asked, cpus=1, gpus=0)
    with pytest.raises(CapacityError) as caught:
        check_room((FOUR,), workers=asked, cpus=2, gpus=0)
    assert "at least 3 worker(s) with 2 core(s)" in str(caught.value) and "room for 2" in str(caught.value)
    assert "4 cores and 0 GPUs on 1 machine(s)" in str(caught.value)
    assert "lower `resources.workers.min` to 2" in str(caught.value)
