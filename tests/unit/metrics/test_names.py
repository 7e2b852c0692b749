"""The one list of metric names."""

from __future__ import annotations

import pytest

from lmray.metrics.names import METRICS, metric


def test_base_is_the_same_metric_of_the_untouched_model():
    assert metric("base.loss") is METRICS["eval.loss"]
    assert metric("eval.loss") is METRICS["eval.loss"]


@pytest.mark.parametrize("name", ["train.los", "base.nothing", "loss", ""])
def test_a_name_not_in_the_list_is_no_metric(name):
    with pytest.raises(KeyError):
        metric(name)
