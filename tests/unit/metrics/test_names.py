"""The one list of metric names."""

from __future__ import annotations

import pytest

from lmray.metrics.names import METRICS, metric


def test_base_is_the_same_metric_of_the_untouched_model():
    assert metric("base.loss") is METRICS["eval.loss"]
    assert metric("eval.loss") is METRICS["eval.loss"]


def test_a_benchmarks_metric_is_of_a_family():
    better = {
        "eval.lm_eval.arc_easy.acc": "max",
        "base.lm_eval.gsm8k.exact_match.strict-match": "max",
        "eval.lm_eval.wikitext.word_perplexity": "min",
        "eval.lm_eval.lambada.perplexity": "min",
        "eval.lm_eval.wikitext.bits_per_byte": "min",
        "eval.lm_eval.wmt16.ter": "min",
        "eval.lm_eval.arc_easy.acc_stderr": "",
    }
    assert {name: metric(name).better for name in better} == better
    assert "Standard error" in metric("base.lm_eval.gsm8k.exact_match.strict-match_stderr").help


@pytest.mark.parametrize(
    "name", ["eval.lm_eval", "eval.lm_eval.acc", "train.lm_eval.a.b", "train.los", "base.nothing", "loss", ""]
)
def test_a_name_not_in_the_list_is_no_metric(name):
    with pytest.raises(KeyError):
        metric(name)
