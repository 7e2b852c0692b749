"""Draws against `transformers`' own warpers."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lmray.engines._sampling import CANDIDATES, draw
from lmray.engines.base import Sampling
from lmray.errors import DataError

VOCABULARY = 2 * CANDIDATES
GRID = [(place + 0.5) / 4000 for place in range(4000)]


def logits(spread: float) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread


def expected(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    scores = logits_V.double()[None]
    unused = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(unused, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(unused, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(unused, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, temperature=1.0),
        Sampling(1, temperature=0.5),
        Sampling(1, temperature=1.0, top_k=5),
        Sampling(1, temperature=1.0, top_p=0.9),
        Sampling(1, temperature=1.5, top_k=40, top_p=0.5),
        Sampling(1, temperature=1.0, top_p=0.01),
        Sampling(1, temperature=1.0, top_k=10 * VOCABULARY),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_transformers_says(sampling, spread):
    logits_V = logits(spread)
    drawn = torch.bincount(torch.tensor([draw(logits_V, sampling, uniform) for uniform in GRID]), minlength=VOCABULARY)
    probability = expected(logits_V, sampling)
    torch.testing.assert_close(drawn.double() / len(GRID), probability, atol=2 / len(GRID), rtol=0)
    assert not drawn[probability == 0].any()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_range_are_tokens_too(uniform):
    for sampling in (Sampling(1, temperature=1.0), Sampling(1, temperature=1.0, top_k=3, top_p=0.7)):
        assert 0 <= draw(logits(1.0), sampling, uniform) < VOCABULARY


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(DataError, match=rf"{field}: is {value}"):
        Sampling(**{"max_tokens": 1, field: value})
