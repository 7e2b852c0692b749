"""What Ray Train's controller is given imports nothing heavy: no worker starts before it has. No cluster needed."""

from __future__ import annotations

import pytest
from ray import cloudpickle
from ray.train.v2._internal.execution.failure_handling import create_failure_policy
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from lmray.on_ray.train import _Trainer, _trainer
from lmray.testing.jobs import tiny_job
from tests.architecture.source import python

HEAVY = {"torch", "transformers", "peft", "matplotlib", "scipy", "sklearn", "lmray.job"}
CONTROLLER = """
import sys
from ray import cloudpickle
from ray.train.v2._internal.execution.controller.controller import TrainController
before = set(sys.modules)
cloudpickle.loads(open(sys.argv[1], "rb").read())
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize("workers", [2, {"min": 1, "max": 2}])
def test_the_controller_imports_neither_torch_nor_what_a_job_needs(tiny_model, tiny_data, tmp_path, workers):
    job = tiny_job(tiny_model, tiny_data, tmp_path / "store", resources={"workers": workers}, sharding="ddp")
    trainer = _trainer(job, tmp_path)
    given = {
        "scaling_policy": create_scaling_policy(trainer.scaling_config),
        "failure_policy": create_failure_policy(trainer.run_config.failure_config),
        "train_run_context": trainer.train_run_context,
        "callbacks": trainer._create_default_callbacks(),
    }
    path = tmp_path / "given"
    path.write_bytes(cloudpickle.dumps(given))
    done = python(CONTROLLER, str(path))
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert "lmray.on_ray.rendezvous" in found, "else this test says nothing"
    assert sorted(found & HEAVY) == []


def test_no_process_is_started_for_what_no_run_uses(tiny_model, tiny_data, tmp_path):
    trainer = _trainer(tiny_job(tiny_model, tiny_data, tmp_path / "store"), tmp_path)
    made, own = DataParallelTrainer._create_default_callbacks(trainer), trainer._create_default_callbacks()
    assert {type(one).__name__ for one in made} - {type(one).__name__ for one in own} == _Trainer.UNUSED
