"""What a training job is made ready from: the right tokenizer, rules and rows, and what is refused before it starts."""

import shutil

import pytest
from transformers import AutoTokenizer

from lmray.data.base import Example
from lmray.data.examples import Examples
from lmray.errors import ArtifactError, ConfigError, DataError
from lmray.models.load import embedding_rows, load_tokenizer, stop_token_ids_in
from lmray.testing.jobs import tiny_job, write_jsonl
from lmray.train import prepare as module
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def change_tokenizer(folder, change):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def test_a_base_model_without_template_learns_plain_text(model, tiny_data, tmp_path, monkeypatch):
    without_template(model)
    texts = Examples((Example((), "file:1", text="色は匂へど"),), (Example((), "file:2", text="散りぬるを"),), ())
    monkeypatch.setattr(module, "read_examples", lambda spec: texts)
    ready = prepare(tiny_job(model, tiny_data, tmp_path / "store"))
    (tokens,) = ready.train.examples
    assert ready.tokenizer.decode(tokens.input_ids) == "色は匂へど<|im_end|>"
    assert len(ready.eval_rows) == 1


def test_conversations_need_a_template(model, tiny_data, tmp_path):
    without_template(model)
    with pytest.raises(ArtifactError, match="no chat template, as base models do") as caught:
        prepare(tiny_job(model, tiny_data, tmp_path / "store"))
    assert "plain text needs none" in str(caught.value)
    assert load_tokenizer(model, chat=False).chat_template is None


def test_tokens_that_the_model_has_no_row_for_are_refused(model, tmp_path):
    change_tokenizer(model, lambda tokenizer: tokenizer.add_tokens([f"<new{number}>" for number in range(9)]))
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "<new8>"}]
    )
    with pytest.raises(DataError, match="holds token id") as caught:
        prepare(tiny_job(model, data, tmp_path / "store", data__eval=None))
    assert caught.value.where == f"{data}:2" and caught.value.allowed is not None
    assert f"0 to {embedding_rows(model) - 1}" in caught.value.allowed


def test_a_model_whose_config_cannot_be_read_is_named(model):
    (model / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        embedding_rows(model)


def test_the_models_own_stop_tokens_end_answers(model, tiny_data, tmp_path):
    change_tokenizer(model, lambda tokenizer: setattr(tokenizer, "eos_token", "<|endoftext|>"))
    assert stop_token_ids_in(model) == (2,)
    ready = prepare(tiny_job(model, tiny_data, tmp_path / "store"))
    assert {int(one.labels[-1]) for one in ready.train.examples} == {2}
    (model / "generation_config.json").unlink()
    assert stop_token_ids_in(model) == ()
    with pytest.raises(DataError, match="without the stop token"):
        prepare(tiny_job(model, tiny_data, tmp_path / "store"))


def test_what_was_left_out_stands_in_the_plan(tiny_model, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "q" * 100, "completion": "b"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    cut = {"data__max_length": 80, "data__over_long": "truncate"}
    job = tiny_job(tiny_model, data, tmp_path / "store", data__eval=None, **cut)
    lines = "\n".join(make_plan(job).lines())
    assert f"1 without an answer token left out: {data}:2" in lines


def test_weights_that_were_saved_quantised_are_refused(quantised_model, tiny_data, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.source: .*saved \(gptq\)") as caught:
        make_plan(tiny_job(quantised_model, tiny_data, tmp_path / "store"))
    assert "the model that it was made from" in str(caught.value)
