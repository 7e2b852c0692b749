"""A learning rate is a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

from abc import abstractmethod

from lmray.config import MemberConfig


class Schedule(MemberConfig):
    """Base of `lmray/schedules/*.py`: what follows the warm-up."""

    @abstractmethod
    def rate(self, done: int, *, steps: int, warmup: int, peak: float) -> float:
        """Of the step after `done` others, when `steps` follow `warmup` ones; `done` counts from the warm-up's end, so
        0 is the first."""
        raise NotImplementedError


def learning_rate(schedule: Schedule, step: int, *, steps: int, peak: float, warmup_ratio: float) -> float:
    """Rate of optimizer step `step` (1 to `steps`): a linear rise to `peak` over the warm-up, then `schedule`."""
    warmup = round(warmup_ratio * steps)
    if step <= warmup:
        return peak * step / warmup
    return schedule.rate(step - 1 - warmup, steps=max(1, steps - warmup), warmup=warmup, peak=peak)
