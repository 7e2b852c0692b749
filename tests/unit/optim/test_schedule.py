import pytest

from lmray.optim.schedule import learning_rate


def rates(shape, steps=10, warmup=0.2):
    return [
        learning_rate(step, steps=steps, peak=1.0, warmup_ratio=warmup, shape=shape) for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_it_rises_to_the_peak_and_never_above(shape):
    values = rates(shape)
    assert values[:2] == [0.5, 1.0] and max(values) == 1.0 and min(values) > 0


def test_the_shapes():
    assert rates("constant")[-1] == 1.0
    assert rates("linear")[2:4] == [1.0, pytest.approx(1 - 1 / 8)]
    assert rates("cosine")[6] == pytest.approx(0.5)


def test_no_warm_up_and_a_single_step():
    assert rates("cosine", warmup=0.0)[0] == 1.0
    assert rates("linear", steps=1, warmup=0.0) == [1.0]
    assert rates("cosine", steps=2, warmup=1.0) == [0.5, 1.0]
