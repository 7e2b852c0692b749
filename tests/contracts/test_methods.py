"""What every method keeps to: sums that add up, counts known before the forward pass."""

from __future__ import annotations

import pytest

from lmray.data.batch import collate
from lmray.data.tokenise import Tokenised
from lmray.models.load import load_model
from lmray.registry import METHODS

ROWS = [(Tokenised(tuple(range(start, start + 6)), tuple(range(start, start + 6))),) for start in (10, 40, 80, 120)]


@pytest.fixture(params=METHODS.names())
def objectives(request):
    return METHODS.load(request.param)().objectives()


def test_losses_of_parts_add_up_to_the_loss_of_the_whole(objectives, tiny_model):
    model = load_model(tiny_model, "float32")
    whole, *parts = (collate(rows, pad_token_id=0) for rows in (ROWS, ROWS[:1], ROWS[1:]))
    assert objectives
    for objective in objectives:
        total = sum(objective.loss(model, part).item() for part in parts)
        assert objective.loss(model, whole).item() == pytest.approx(total, rel=1e-5)
        assert objective.count(whole) == sum(objective.count(part) for part in parts) > 0
        assert objective.loss(model, whole).requires_grad
