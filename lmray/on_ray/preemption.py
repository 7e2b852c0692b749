"""Notice that a machine is about to be taken away (a spot instance, a drained node), as Ray Train passes it on."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.context import get_train_context

from lmray.units import human_seconds


def told() -> PreemptionInfo | None:
    """What this worker was told last. Ray Train's watcher tells every worker of a group, so one that asks for all of
    them reads its own memory; `ray.train.get_preemption_info` makes all of them meet in an actor at every step."""
    return get_train_context().preemption_context.preemption_info


class PreemptionNotice:
    """True once for each notice: the first time it is asked after that came. `say` hears of it."""

    def __init__(self, say: Callable[[str], None], *, told: Callable[[], PreemptionInfo | None] = told):
        self._say, self._told = say, told
        self._heard: PreemptionInfo | None = None

    def __call__(self) -> bool:
        info = self._told()
        if info is None or info == self._heard:
            return False
        self._heard = info
        self._say(_text(info))
        return True


def _text(info: PreemptionInfo) -> str:
    workers = ", ".join(map(str, info.preempted_ranks))
    left = max(0.0, info.deadline_ms / 1000 - time.time()) if info.deadline_ms else None
    when = "soon" if left is None else f"in {human_seconds(left)}"
    return f"notice: the machine of worker {workers} is taken away {when}; saving after the next step"
