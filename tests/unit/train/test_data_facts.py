from __future__ import annotations

import pytest

from lmray.data.table import IGNORED, Table, Tokenised
from lmray.data.tokenise import TokenisedData
from lmray.testing.jobs import tiny_job, write_jsonl
from lmray.train.data_facts import data_facts, data_warnings, preview, visible
from lmray.train.prepare import prepare


@pytest.fixture
def ready(tiny_model, tiny_data, tmp_path):
    return prepare(tiny_job(tiny_model, tiny_data, tmp_path / "store"))


def with_examples(ready, examples, **counts):
    return type(ready)(**{**vars(ready), "train": TokenisedData(Table.of(examples), **counts)})


def test_lengths_are_nearest_rank_percentiles(ready):
    many = [Tokenised(tuple(range(n)), (IGNORED,) * (n - 1) + (2,)) for n in range(2, 102)]
    facts = data_facts(with_examples(ready, many), max_length=256)
    names = ("tokens_median", "tokens_p90", "tokens_p95", "tokens_p99", "tokens_max")
    assert [facts[name] for name in names] == [51, 91, 96, 100, 101]
    assert facts["supervised_tokens"] == 100


def test_sound_data_warns_of_nothing(ready):
    facts = data_facts(ready, max_length=256)
    assert facts["stop"] == {"token": "<|im_end|>", "id": 2, "examples": facts["train_examples"], "share": 1.0}
    assert facts["bos"]["examples"] == facts["train_examples"] and facts["bos"]["doubled"] == 0
    assert data_warnings(facts) == []


def test_faults_that_a_healthy_loss_hides_are_warned_of(ready):
    doubled = Tokenised((1, 1, 5, 6), (IGNORED, IGNORED, 5, 6))
    unsupervised = Tokenised((1, *[7] * 500, 2), (IGNORED,) * 501 + (2,))
    facts = data_facts(with_examples(ready, [doubled, unsupervised], num_dropped=9), max_length=600)
    warnings = "\n".join(data_warnings(facts))
    assert "1 of 2 examples do not end with the stop token" in warnings
    assert "begin with two <|im_start|>" in warnings and "9 of" in warnings and "0.59% of the tokens" in warnings


def test_a_preview_is_short_and_shows_what_a_screen_would_hide(tiny_model, tmp_path):
    rows = [{"prompt": "赤\u3000い\t\x1b[31m" + "x" * 900, "completion": "はい"}] * 3
    data = write_jsonl(tmp_path / "r.jsonl", rows)
    job = tiny_job(tiny_model, data, tmp_path, data__max_length=1024, data__eval=None)
    (one,) = preview(prepare(job), 1, max_chars=100)
    asked, answered = one
    assert not asked.supervised and answered.supervised and answered.text == "はい<|im_end|>"
    assert "赤\\u3000い\\t\\x1b[31m" in asked.text and "characters …" in asked.text and len(asked.text) < 160
    assert len(preview(prepare(job), 2)) == 2


def test_visible_marks_line_breaks_and_keeps_text():
    assert visible("a b\n日本\u200b") == "a b↵\n日本\\u200b"
