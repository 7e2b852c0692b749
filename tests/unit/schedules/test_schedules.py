"""Held to the schedules of `transformers`, whose warm-up begins at zero: ours is one step ahead until its end."""

from __future__ import annotations

import pytest
import torch
from transformers import optimization

from lmray.registry import SCHEDULES
from lmray.schedules.base import learning_rate
from lmray.schedules.inverse_sqrt import InverseSqrt
from lmray.schedules.polynomial import Polynomial
from lmray.schedules.warmup_stable_decay import WarmupStableDecay

STEPS, PEAK = 40, 2e-3


def rates(schedule, *, steps=STEPS, peak=PEAK, warmup=0.2):
    return [learning_rate(schedule, step, steps=steps, peak=peak, warmup_ratio=warmup) for step in range(1, steps + 1)]


def theirs(make, **settings) -> list[float]:
    """The rates that one of their schedules gives to steps 1 to STEPS."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer, **settings)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


CASES = {
    "constant": (
        "constant",
        {},
        lambda o, warm: optimization.get_constant_schedule_with_warmup(o, num_warmup_steps=warm),
    ),
    "linear": ("linear", {}, lambda o, warm: optimization.get_linear_schedule_with_warmup(o, warm, STEPS)),
    "cosine": ("cosine", {}, lambda o, warm: optimization.get_cosine_schedule_with_warmup(o, warm, STEPS)),
    "cosine to a lowest": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.25},
        lambda o, warm: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, warm, STEPS, min_lr_rate=0.25),
    ),
    "polynomial": (
        "polynomial",
        {"power": 2.0, "lr_end": 1e-4},
        lambda o, warm: optimization.get_polynomial_decay_schedule_with_warmup(o, warm, STEPS, lr_end=1e-4, power=2.0),
    ),
    "inverse square root": (
        "inverse_sqrt",
        {},
        lambda o, warm: optimization.get_inverse_sqrt_schedule(o, num_warmup_steps=warm),
    ),
    "inverse square root with a scale": (
        "inverse_sqrt",
        {"timescale": 30},
        lambda o, warm: optimization.get_inverse_sqrt_schedule(o, num_warmup_steps=warm, timescale=30),
    ),
    **{
        f"stable, then {shape}": (
            "warmup_stable_decay",
            {"decay_ratio": 0.25, "decay_type": shape, "min_lr_ratio": 0.1},
            lambda o, warm, shape=shape: optimization.get_wsd_schedule(
                o,
                num_warmup_steps=warm,
                num_decay_steps=round(0.25 * (STEPS - warm)),
                num_training_steps=STEPS,
                min_lr_ratio=0.1,
                decay_type=shape,
            ),
        )
        for shape in ("cosine", "linear", "1-sqrt")
    },
}


@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_that_of_transformers(case, warmup):
    name, settings, make = case
    ours = rates(SCHEDULES.load(name)(**settings), warmup=warmup / STEPS)
    want = theirs(lambda optimizer: make(optimizer, warmup))
    assert ours[warmup:] == pytest.approx(want[warmup:], rel=1e-6, abs=1e-12)
    if "min_lr_ratio" not in settings:  # theirs rises from that, ours from zero
        assert ours[: max(0, warmup - 1)] == pytest.approx(want[1:warmup])


def test_every_schedule_is_among_the_cases():
    assert {name for name, _, _ in CASES.values()} == set(SCHEDULES.names())


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_it_rises_to_the_peak_and_never_above(name):
    values = rates(SCHEDULES.load(name)(), steps=10, peak=1.0)
    assert values[:2] == [0.5, 1.0] and max(values) == 1.0 and min(values) > 0


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_no_warm_up_and_a_single_step(name):
    schedule = SCHEDULES.load(name)()
    assert rates(schedule, warmup=0.0)[0] == pytest.approx(PEAK)
    assert rates(schedule, steps=1, peak=1.0, warmup=0.0) == [pytest.approx(1.0)]
    assert rates(schedule, steps=2, peak=1.0, warmup=1.0) == [0.5, 1.0]


def test_extremes():
    assert rates(Polynomial(lr_end=1.0), peak=0.5, warmup=0.0) == [0.5] * STEPS, "an end above the peak is none"
    assert rates(InverseSqrt(), warmup=0.0)[-1] > 0.99 * PEAK, "without a warm-up it falls over ten thousand steps"
    stays = rates(WarmupStableDecay(decay_ratio=0.1), steps=100, peak=1.0, warmup=0.0)
    assert stays[:91] == [1.0] * 91 and stays[91] < 1.0
