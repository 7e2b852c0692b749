"""How a worker's shortage of memory ends its group, and when the driver starts another. No cluster needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.train import ControllerError, WorkerGroupError

from lmray.errors import DataError, OutOfMemoryError
from lmray.on_ray.out_of_memory import EndsOutOfMemory, with_room


def shortage(micro_batch: int | None) -> OutOfMemoryError:
    error = OutOfMemoryError("run `x`", "ran out of memory")
    error.micro_batch = micro_batch
    return error


def test_the_controller_ends_with_what_the_worker_that_ran_out_raised():
    end = EndsOutOfMemory().after_exception
    end(SimpleNamespace(), {0: RuntimeError("connection closed"), 1: DataError("rows", "are empty")})
    with pytest.raises(OutOfMemoryError) as caught:
        end(SimpleNamespace(), {0: RuntimeError("connection closed"), 1: shortage(2)})
    assert caught.value.micro_batch == 2


def test_it_is_fitted_again_as_long_as_there_is_a_smaller_micro_batch():
    ends = [ControllerError(shortage(4)), WorkerGroupError("died", {1: shortage(2)}), "result"]

    def fit():
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    assert with_room(fit) == "result"
    ends += [ControllerError(shortage(1)), ControllerError(shortage(None)), "never"]
    with pytest.raises(OutOfMemoryError):
        with_room(fit)
    assert ends.pop() == "never"


@pytest.mark.parametrize("error", [ControllerError(ValueError("x")), DataError("rows", "are empty")])
def test_what_else_ends_a_fit_passes(error):
    def fit():
        raise error

    with pytest.raises(type(error)) as caught:
        with_room(fit)
    assert caught.value is error
