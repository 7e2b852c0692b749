"""The report: everything in one file, whatever state the run is in."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from lmray.artifacts.store import run_folder
from lmray.data.places import NO_ROW
from lmray.errors import ArtifactError, DivergenceError
from lmray.metrics.names import metric
from lmray.metrics.plots import plot_metric, series, tokens_at
from lmray.testing.jobs import run_here, tiny_job, tiny_rows, write_jsonl
from lmray.train import loop as loops
from lmray.train.prepare import prepare
from lmray.train.record import read_record
from lmray.train.report import _rows, before_and_after, write_report
from lmray.train.statistics import data_statistics, histogram, spans

pytestmark = pytest.mark.draws

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails where a tag is not closed, or closed twice; collects headings and addresses."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def parsed(path) -> tuple[str, Balanced]:
    text = path.read_text(encoding="utf-8")
    page = Balanced()
    page.feed(text)
    assert page.open == []
    return text, page


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


def test_a_report_holds_everything_and_asks_for_nothing(job, tmp_path):
    changes = {"evaluate": {"tasks": ["json_match", "loss"], "max_new_tokens": 4}, "train__eval_steps": 3}
    one = job(name="実験", **changes)
    result = run_here(one, tmp_path / "scratch")
    folder = run_folder(one)
    text, page = parsed(folder / "report.html")
    sections = ["Before and after", "Curves", "Time and memory", "Data", "Answers", "Metrics", "Plan", "Job"]
    assert page.headings == ["実験", *sections]
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 1 + 4 + 1, "loss; rate, norm, speed, memory; lengths"
    assert 'name="viewport"' in text and "青" in text
    assert all(name in text for name in result.metrics)
    assert {"run.prepare_seconds", "run.train_seconds", "run.evaluate_seconds"} <= result.metrics.keys()
    deltas = result.details["deltas"]["tuned"]
    assert deltas.keys() == {"eval.loss", "eval.perplexity", "eval.json_match"}
    assert deltas["eval.loss"]["num_examples"] == 8 and "95 % interval" in text
    assert deltas["eval.loss"]["delta"] == pytest.approx(result.metrics["eval.loss"] - result.metrics["base.loss"])
    (peak,) = result.details["peak_memory_bytes_by_worker"]
    assert peak == result.metrics["train.peak_memory_bytes"] > 100 * 2**20
    before = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == before, "the folder alone says as much as the run did"


def test_a_run_that_goes_on_has_a_report(job, tmp_path):
    one = job(name="halved")
    run_here(one, tmp_path / "scratch", stop_at=3)
    text, page = parsed(write_report(run_folder(one)))
    assert "not finished, step 3 of 6" in text and "Curves" in page.headings
    (run_folder(one) / "events.jsonl").unlink()
    assert "not finished, step 0 of 6" in parsed(write_report(run_folder(one)))[0]


def test_a_run_that_was_given_up_says_why(job, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "held_out_loss", lambda *a, **k: float("nan"))
    one = job(train__eval_steps=2)
    with pytest.raises(DivergenceError):
        run_here(one, tmp_path / "scratch")
    text, _ = parsed(run_folder(one) / "report.html")
    rows = json.loads((run_folder(one) / "diverged.json").read_text(encoding="utf-8"))["rows"]
    assert "Given up at step 2: the held-out loss is nan" in text and all(row in text for row in rows)


def test_what_stands_in_the_data_cannot_break_the_page(job, tmp_path, tiny_data):
    rows = [{**row, "prompt": "</pre><script>alert(1)</script>" + row["prompt"]} for row in tiny_rows()]
    write_jsonl(tiny_data, rows)
    one = job(evaluate={"tasks": ["json_match"], "max_new_tokens": 2}, train__max_steps=1)
    run_here(one, tmp_path / "scratch")
    assert "<script" not in parsed(run_folder(one) / "report.html")[0]


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="is no training run: No such file"):
        read_record(tmp_path / "nothing")
    (tmp_path / "plan.json").write_text('{"steps": 3}')
    with pytest.raises(ArtifactError, match="another form"):
        read_record(tmp_path)


def test_change_is_good_or_bad_by_the_metrics_direction():
    metrics = {"eval.loss": 1.0, "base.loss": 2.0, "eval.json_match": 0.1, "base.json_match": 0.4}
    rows = [line for line in "\n".join(before_and_after(metrics, {})).splitlines() if "<td" in line]
    assert "number good" in rows[0] and "number bad" in rows[1]
    assert metric("eval.loss").help in rows[0]


def test_a_change_that_may_be_chance_is_neither_good_nor_bad():
    metrics = {"eval.loss": 1.0, "base.loss": 2.0, "eval.json_match": 0.4, "base.json_match": 0.1}
    deltas = {
        "eval.loss": {"delta": -1.0, "low": -1.5, "high": -0.5, "num_examples": 9},
        "eval.json_match": {"delta": 0.3, "low": -0.1, "high": 0.7, "num_examples": 9},
    }
    loss, match = [line for line in "\n".join(before_and_after(metrics, deltas)).splitlines() if "<td" in line]
    assert "number good" in loss and "-1 [-1.5, -0.5]" in loss
    assert "number quiet" in match and "+0.3 [-0.1, +0.7]" in match


def test_data_is_counted_by_source(job, tiny_model, tmp_path):
    first, second = write_jsonl(tmp_path / "a.jsonl", tiny_rows(8)), write_jsonl(tmp_path / "b.jsonl", tiny_rows(4))
    one = job(data__train=[{"source": str(first)}, {"source": str(second), "weight": 2.0}], data__eval=None)
    run_here(one, tmp_path / "scratch", stop_at=1)
    train = read_record(run_folder(one)).data["train"]
    assert [facts["examples"] for facts in train["sources"].values()] == [8, 8]
    assert train["examples"] == 16 == sum(train["lengths"]["counts"])
    assert train["tokens"] == sum(facts["tokens"] for facts in train["sources"].values())
    assert 0 < train["supervised_tokens"] < train["tokens"]


def test_many_files_are_counted_by_folder(job, tmp_path):
    for index in range(14):
        (tmp_path / "parts").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "parts" / f"{index}.jsonl", tiny_rows(1))
    one = job(data__train=[{"source": str(tmp_path / "parts")}], data__eval=None)
    assert list(data_statistics(prepare(one))["train"]["sources"]) == [str(tmp_path / "parts")]


@pytest.mark.parametrize("lengths", [[5], [1, 2, 3], [1] * 3 + [100], list(range(1000))])
def test_a_histogram_counts_every_length_once(lengths):
    found = histogram(lengths)
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 and len(counts) <= 20
    slow = [sum(left <= length < right for length in lengths) for left, right in pairwise(edges)]
    assert counts == slow and sum(counts) == len(lengths)


def test_series_and_tokens_by_step():
    events = [{"step": 1, "train.tokens": 10}, {"step": 2, "train.tokens": 5, "eval.loss": 3.0}]
    assert series(events, "eval.loss") == ([2], [3.0])
    assert tokens_at(events, [2]) == [15]
    assert plot_metric(events, "train.grad_norm") is None
    png = plot_metric([{"step": 1, "train.grad_norm": 2.0}], "train.grad_norm")
    assert png and re.match(rb"\x89PNG", png)


@pytest.mark.parametrize(
    ("numbers", "text"), [([3, 1, 2, 7], "1-3, 7"), ([5], "5"), ([NO_ROW], ""), ([NO_ROW, 2], "2"), ([2, 2, 4], "2, 4")]
)
def test_rows_are_told_in_spans_and_a_file_that_is_one_row_by_its_name(numbers, text):
    assert spans(np.array(numbers)) == text
    (line,) = _rows("search", {"rows_in": {"a.jsonl": text}})
    assert line == f"set aside for the masks: {f'rows {text} of ' if text else ''}a.jsonl"


def test_many_files_and_rows_are_told_in_part():
    told = list(_rows("train", {"rows_in": {f"{name}.jsonl": "1-3" for name in range(15)}}))
    assert len(told) == 13 and told[-1] == "training: 3 more files (`data.json`)"
    (long,) = _rows("train", {"rows_in": {"a.jsonl": ", ".join(map(str, range(1, 999, 2)))}})
    assert len(long) < 500 and long.startswith("training: rows 1, 3, 5") and "… (all: `data.json`)" in long
