"""The report of a run that pruned."""

from __future__ import annotations

import json

import pytest

from lmray.artifacts.store import run_folder
from lmray.testing.jobs import run_here, tiny_job, write_jsonl
from lmray.testing.pruned import made_up_events, made_up_masks
from lmray.train.report import write_report

pytestmark = pytest.mark.draws


@pytest.fixture
def folder(tiny_model, tiny_data, tmp_path):
    """Of a run named 枝刈り, which pruned nothing."""
    job = tiny_job(tiny_model, tiny_data, tmp_path / "store", name="枝刈り", train__max_steps=2)
    run_here(job, tmp_path / "scratch")
    return run_folder(job)


def text_of(folder) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_a_run_that_pruned_shows_what_every_layer_kept(folder):
    plain = text_of(folder)
    assert "<h2>Pruning</h2>" not in plain
    masks = made_up_masks(layers=6, steps=40, every=4, frozen=24)
    again = {**masks[-1], "channels": [64, 128, 64, 64, 64, 64]}  # a step that a resumed run did once more
    write_jsonl(folder / "masks.jsonl", [*masks, again])
    write_jsonl(folder / "events.jsonl", made_up_events(steps=40, frozen=24))
    text = text_of(folder)
    assert "<h2>Pruning</h2>" in text and text.count("data:image/png;base64") == plain.count("data:image/png") - 4 + 2
    for shown in ("final from step 24", "64 to 128", f"{masks[-1]['remaining']:.1%}", "What every layer kept"):
        assert shown in text
    assert 'src="http' not in text


def test_masks_that_are_still_searched_are_told_so(folder):
    write_jsonl(folder / "masks.jsonl", made_up_masks(layers=2, steps=8, every=4, frozen=24))
    assert "still searched" in text_of(folder)


def test_curves_alone_are_shown_before_the_first_evaluation(folder):
    write_jsonl(folder / "events.jsonl", made_up_events(steps=3, frozen=24))
    text = text_of(folder)
    assert "<h2>Pruning</h2>" in text and "What every layer kept" not in text
    assert json.dumps("枝刈り", ensure_ascii=False).strip('"') in text
