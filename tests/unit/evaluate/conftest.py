from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmray.config import Document, decode
from lmray.data.base import Example
from lmray.job import EvaluateArgs
from lmray.models.load import load_model, load_tokenizer


@pytest.fixture
def loaded(tiny_model):
    """The tiny model and its tokenizer."""
    return SimpleNamespace(model=load_model(tiny_model, "float32"), tokenizer=load_tokenizer(tiny_model))


@pytest.fixture
def args():
    """`evaluate:` of a job with the tasks and fields given."""

    def make(*tasks, **fields) -> EvaluateArgs:
        return decode(EvaluateArgs, Document("test", {"tasks": list(tasks), "max_new_tokens": 4, **fields}))

    return make


@pytest.fixture
def examples():
    """Questions with choices, of different lengths, in two scripts."""
    pairs = [("red", "blue"), ("赤", "青い"), ("one", "twenty-two"), ("yes", "no")]
    return [
        Example(
            (
                {"role": "user", "content": f"say {pair[row % 2]} " * (row + 1)},
                {"role": "assistant", "content": pair[0]},
            ),
            f"f.jsonl:{row}",
            {"choices": list(pair)},
        )
        for row, pair in enumerate(pairs)
    ]
