"""What every mapping keeps to."""

from __future__ import annotations

import pytest

from lmray.data.base import Row
from lmray.errors import DataError
from lmray.registry import MAPPINGS


@pytest.fixture(params=MAPPINGS.names())
def mapping(request):
    return MAPPINGS.load(request.param)()


@pytest.mark.parametrize("value", [{}, {"messages": 3, "prompt": 3, "question": 3}])
def test_a_row_of_another_shape_is_named(mapping, value):
    with pytest.raises(DataError) as caught:
        mapping.example(Row("file.jsonl:7", value))
    assert caught.value.where.startswith("file.jsonl:7") and caught.value.exit_code == 2
