"""Twenty kills over one run, of worker, controller and driver by turns: nothing is lost and nothing is done twice."""

from __future__ import annotations

import random

import psutil
import pytest

from lmray.job import load
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here
from lmray.testing.waiting import wait_until
from tests.e2e.conftest import last_step, one_json, words

TURNS = ("RayTrainWorker", "TrainController", "RayTrainWorker", "TrainController", "driver")
KILLS, STEPS, SAVE_STEPS, SEED = 20, 800, 10, 0
CHANGES = (f"train.max_steps={STEPS}", f"train.save_steps={SAVE_STEPS}", "resources.max_failures=50")


def victims(shell, driver, name: str, run, target: int) -> list[psutil.Process]:
    """Once the run is at step `target`: the driver itself, or what it started that runs the actor `name`."""
    found = []

    def there() -> bool:
        if driver.poll() is None and last_step(run) >= target:
            found[:] = [one for one in shell.alive(driver) if name in words(one)]
            found[:] = [psutil.Process(driver.pid)] if name == "driver" else found
        return bool(found) or driver.poll() is not None

    wait_until(there, f"{name} at step {target}", timeout_s=300)
    assert driver.poll() is None, driver.communicate()
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_cost_no_step_and_repeat_none(shell, train_file, tmp_path):
    chance = random.Random(SEED)
    run = tmp_path / "store" / "runs" / "tiny"
    straight = load(str(train_file), *CHANGES, f"storage={tmp_path / 'straight'}")
    run_here(straight, tmp_path / "scratch")
    command = ("run", "train.yaml", *CHANGES, "--json")
    drivers = [shell.start(*command)]
    for kill in range(KILLS):
        target = (kill + 1) * STEPS // (KILLS + 2) + chance.randrange(STEPS // (KILLS + 2))
        for victim in victims(shell, drivers[-1], TURNS[kill % len(TURNS)], run, target):
            victim.kill()
        if TURNS[kill % len(TURNS)] == "driver":
            drivers[-1].communicate()
            drivers.append(shell.start(*command))
    driver = drivers[-1]
    out, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    # A worker outlives its killed driver by seconds, which may be all the last steps took.
    assert one_json(out)["status"] in ("succeeded", "already-done")
    events = read_events(run / "events.jsonl")
    assert [event["step"] for event in events] == list(range(1, STEPS + 1))
    assert [event["train.loss"] for event in events] == pytest.approx(curve(straight), abs=1e-6)
    assert len(list(run.glob("*checkpoint-*"))) == 2 and not list((tmp_path / "store").rglob(".*.tmp"))
    wait_until(lambda: not any(shell.alive(one) for one in drivers), "all processes to end")
