from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PretrainedConfig

from lmray.models.sizes import eighths, row_sizes


@given(st.integers(1, 100_000))
def test_rows_have_few_sizes_and_are_a_quarter_longer_at_most(length):
    size = eighths(length)
    assert length <= size <= 1.25 * length and eighths(size) == size
    assert len({eighths(other) for other in range(1, 1025)}) <= 8 * 10


@pytest.mark.parametrize(
    ("positions", "virtual", "length", "size"),
    [(1000, 0, 900, 1000), (1000, 8, 900, 992), (1000, 8, 992, 992), (1000, 0, 300, 320)],
)
def test_rows_are_not_padded_beyond_the_positions_there_are(positions, virtual, length, size):
    model = SimpleNamespace(
        config=PretrainedConfig(max_position_embeddings=positions),
        active_peft_config=SimpleNamespace(num_virtual_tokens=virtual),
    )
    assert row_sizes(model, "cpu")(length) == size  # type: ignore[arg-type]
    assert row_sizes(model, "cuda:0")(length) == length  # type: ignore[arg-type]
