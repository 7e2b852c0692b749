"""A worker that ran out of memory ends its worker group at once; the driver starts another where the run can go on.

The other workers wait for it in a collective, which only their end resolves. What a group ends with here is Ray Train's
controller's error, not a worker's, so none of `resources.max_failures` is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ray.train import UserCallback

from lmray.errors import OutOfMemoryError
from lmray.on_ray.failures import error_inside

T = TypeVar("T")


class EndsOutOfMemory(UserCallback):
    """Runs in the controller. What a callback raises is not tried again, and `fit` raises it."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        for error in worker_exceptions.values():
            inner = error_inside(error)
            if isinstance(inner, OutOfMemoryError):
                raise inner


def with_room(fit: Callable[[], T]) -> T:
    """What `fit()` gives, done again while the run goes on with a smaller micro-batch, which its folder says: at most
    half of the one before. Raises OutOfMemoryError where it does not go on."""
    while True:
        try:
            return fit()
        except Exception as error:
            inner = error_inside(error)
            if not isinstance(inner, OutOfMemoryError):
                raise
            if inner.micro_batch is None:
                raise inner from None
