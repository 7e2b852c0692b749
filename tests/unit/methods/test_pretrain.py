"""Continual pre-training: what it learns of a corpus, of conversations mixed in, and how a run goes on."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lmray.artifacts.store import run_folder
from lmray.data.batch import collate
from lmray.methods.pretrain import Pretrain
from lmray.models.load import load_model
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare

IROHA = "色は匂へど散りぬるを我が世誰ぞ常ならむ有為の奥山今日越えて浅き夢見じ酔ひもせず。"


@pytest.fixture
def corpus(tmp_path):
    """A folder of documents in two scripts."""
    folder = tmp_path / "文書"
    folder.mkdir()
    for number in range(8):
        text = (f"Chapter {number}. " + "A plain sentence. " * number) if number % 2 else IROHA * (number + 1)
        (folder / f"{number}{'.md' if number % 4 else '.txt'}").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def job(tiny_model, corpus, tmp_path):
    def make(*sources, **changes):
        train = [{"source": str(corpus)}, *sources]
        fields = {
            "data__train": train,
            "data__eval": {"split": 0.25, "by": None},
            "data__max_length": 64,
            "method": "pretrain",
        }
        return tiny_job(tiny_model, corpus, tmp_path / "store", **{**fields, **changes})

    return make


def text_of(ready) -> str:
    """The rows' tokens one behind the other, each once."""
    rows = [[token for one in row for token in one.input_ids.tolist()] for row in ready.rows]
    return ready.tokenizer.decode([*rows[0], *(token for row in rows[1:] for token in row[1:])])


@pytest.mark.parametrize("attention", [True, False])
def test_rows_are_the_corpus_with_a_token_between_documents(job, attention):
    method = {"name": "pretrain", "cross_document_attention": attention}
    ready = prepare(job(method=method))
    assert text_of(ready) == "".join(f"{example.text}<|im_end|>" for example in ready.examples.train)
    lengths = [sum(map(len, row)) for row in ready.rows]
    assert set(lengths[:-1]) == {64} and len(ready.rows) == math.ceil((sum(map(len, ready.train.examples)) - 1) / 63)
    assert any(len(row) > 1 for row in ready.rows) is not attention
    assert all(one.num_supervised == len(one) - 1 for row in ready.rows for one in row)


def test_documents_are_held_out_whole(job):
    ready = prepare(job())
    assert len(ready.examples.eval) == 2 and len(ready.examples.train) == 6
    held_out = {example.where for example in ready.examples.eval}
    assert {one.where for one in ready.eval.examples} == held_out
    assert not held_out & {one.where for one in ready.train.examples}


def test_the_loss_is_the_plain_one_of_a_row(job, tiny_model):
    ready = prepare(job())
    batch = collate(ready.rows[:1], pad_token_id=0)
    model = load_model(tiny_model, "float32")
    (objective,) = Pretrain().objectives()
    with torch.no_grad():
        plain = model(input_ids=batch.input_ids_BT, labels=batch.input_ids_BT).loss
        ours = objective.loss(model, batch) / objective.count(batch)
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_with_a_text_column_are_documents(job, tmp_path, kind):
    rows = [{"id": number, "text": IROHA} for number in range(4)]
    path = tmp_path / f"docs.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    ready = prepare(job(data__train=[{"source": str(path)}]))
    assert text_of(ready) == f"{IROHA}<|im_end|>" * 3


def mixed(chat, **fields):
    return {"source": str(chat), **fields}


def test_conversations_are_mixed_in_at_their_weight_and_learned_by_their_answers(job, tmp_path):
    chat = write_jsonl(tmp_path / "chat.jsonl", tiny_rows(40))
    ready = prepare(job(mixed(chat, weight=0.5), data__eval=None))
    texts = [one for one in ready.examples.train if one.text is not None]
    assert (len(texts), len(ready.examples.train)) == (8, 8 + 20)
    rendered = text_of(ready)
    assert rendered.count("<|im_start|>assistant\n") == 20 and IROHA in rendered
    learned = ready.tokenizer.decode(
        [t for row in ready.rows for one in row for t in one.labels[1:].tolist() if t >= 0]
    )
    assert "<|im_start|>" not in learned and IROHA in learned
    assert learned.count("<|im_end|>") == 8 + 20, "one a document, one an answer"


@pytest.mark.parametrize("weight", [0.1, 0.5, 2.0])
def test_the_plan_says_what_share_of_the_tokens_each_source_gives(job, corpus, tmp_path, weight):
    chat = write_jsonl(tmp_path / "chat.jsonl", tiny_rows(40))
    one = job(mixed(chat, weight=weight), mixed(corpus), data__eval=None)
    plan, ready = make_plan(one), prepare(one)
    texts = sum(len(tokens) for tokens in ready.train.examples if ".jsonl" not in tokens.where)
    chats = sum(len(tokens) for tokens in ready.train.examples if ".jsonl" in tokens.where)
    assert plan.data["mixture"] == {str(corpus): texts, str(chat): chats}
    every = sum(len(tokens) for tokens in prepare(job(mixed(chat), data__eval=None)).train.examples) - texts / 2
    assert chats / every == pytest.approx(weight, rel=0.1)
    (line,) = [line for line in plan.lines() if line.startswith("mixture")]
    assert f"{chat} {chats / (chats + texts):.1%} of the tokens" in line
    assert plan.data["rows"] == math.ceil((texts + chats - 1) / 63) - left_out(ready)


def left_out(ready) -> int:
    """Rows that lie within a prompt."""
    return math.ceil((sum(map(len, ready.train.examples)) - 1) / 63) - len(ready.rows)


def test_conversations_are_learned_whole_where_the_source_says_so(job, tmp_path):
    chat = write_jsonl(tmp_path / "chat.jsonl", tiny_rows(6))
    ready = prepare(job(mixed(chat, assistant_only_loss=False), data__eval=None))
    assert all((one.labels == one.input_ids).all() for one in ready.train.examples)
    answers = prepare(job(mixed(chat), data__eval=None))
    assert answers.digest != ready.digest
    assert not all((one.labels == one.input_ids).all() for one in answers.train.examples)
    assert text_of(answers) == text_of(ready)


def test_the_plan_says_sensible_things(job):
    plan = make_plan(job())
    lines = "\n".join(plan.lines())
    assert f"rows       {plan.data['rows']} of 64 tokens" in lines and "seeing the ones before it" in lines
    assert plan.data["train_tokens"] <= plan.data["rows"] * 64
    assert plan.warnings == () and "100% of the examples" in lines and "0 over 64 tokens dropped" in lines
    apart = make_plan(job(method={"name": "pretrain", "cross_document_attention": False}))
    assert "seeing only itself" in "\n".join(apart.lines()) and apart.run_key != plan.run_key
    assert "rows  " not in "\n".join(make_plan(job(method="sft")).lines())


def test_a_run_that_was_stopped_mid_epoch_goes_on_at_its_place_in_the_corpus(job, tmp_path):
    changes = {"train__max_steps": None, "train__num_train_epochs": 1.5, "train__save_steps": 1}
    straight, broken = job(name="straight", **changes), job(name="broken", **changes)
    whole = run_here(straight, tmp_path / "scratch")
    assert run_here(broken, tmp_path / "scratch", stop_at=2).status == "stopped"
    assert 0 < len(curve(broken)) < len(curve(straight))
    assert run_here(broken, tmp_path / "scratch").metrics["eval.loss"] == whole.metrics["eval.loss"]
    assert curve(broken) == curve(straight)


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_it_learns_and_says_how_much_better_than_before(job, tmp_path, kernels):
    one = job(model__kernels=kernels, evaluate__tasks=["loss"], train__max_steps=12, train__learning_rate=0.02)
    metrics = run_here(one, tmp_path / "scratch").metrics
    assert metrics["eval.loss"] < metrics["base.loss"]
    for prefix in ("base", "eval"):
        assert metrics[f"{prefix}.perplexity"] == pytest.approx(math.exp(metrics[f"{prefix}.loss"]))
    assert (run_folder(one) / "report.html").is_file()


def test_fused_and_plain_steps_give_one_curve(job, tmp_path):
    for attention in (True, False):
        method = {"name": "pretrain", "cross_document_attention": attention}
        one, two = (
            job(name=f"{kernels}-{attention}", model__kernels=kernels, method=method) for kernels in ("plain", "fused")
        )
        for each in (one, two):
            run_here(each, tmp_path / "scratch")
        assert curve(two) == pytest.approx(curve(one), abs=1e-4)
