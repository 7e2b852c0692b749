"""What training is to be measured by is looked at before it starts."""

from __future__ import annotations

import pytest

from lmray.errors import DataError
from lmray.testing.jobs import tiny_job
from lmray.train.prepare import prepare


def test_a_task_that_the_held_out_data_does_not_fit_stops_a_job_before_it_trains(tiny_model, tiny_data, tmp_path):
    job = tiny_job(tiny_model, tiny_data, tmp_path / "store", evaluate={"tasks": ["multiple_choice"]})
    with pytest.raises(DataError, match="column `choices`: is missing"):
        prepare(job)
