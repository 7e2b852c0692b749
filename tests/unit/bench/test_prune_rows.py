"""What `lmray bench prune` makes of its measurements: kept rows, intervals, the table; and its data."""

from __future__ import annotations

import json
import math
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from prune import write_report
from prune_data import evenly, majority, read_rows, write_data
from prune_rows import Cell, Rows, cells, loss_difference, points, relative, table

KEY = {"data": "pubmedqa", "steps": 4}
SCORES = ("eval.accuracy", "eval.macro_f1")


def found(loss: float, *, examples: int = 20, accuracy: float = 0.5, share: float = 1.0):
    metrics = {"eval.loss": loss, "eval.accuracy": accuracy, "eval.macro_f1": accuracy / 2}
    losses = [[loss * (5 + index % 3), 5 + index % 3] for index in range(examples)]
    sizes = {"parameters": int(1e8 * share), "prunable_share": share, "bytes": int(2e8 * share)}
    return {"metrics": metrics, "losses": losses, **sizes}


def test_a_row_is_made_once_and_read_again(tmp_path):
    path, cell = tmp_path / "rows.jsonl", Cell("taylor", 0.6, 1)
    made = Rows(path, KEY).once(cell, "quality", lambda: found(2.0))
    again = Rows(path, KEY).once(cell, "quality", lambda: pytest.fail("made a second time"))
    assert again == made and len(path.read_text(encoding="utf-8").splitlines()) == 1
    for key, part in (({**KEY, "steps": 5}, "quality"), (KEY, "speed")):
        assert Rows(path, key).once(cell, part, lambda: {"new": 1}) == {"new": 1}


def test_a_half_written_row_is_dropped_and_made_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path, KEY)
    rows.once(Cell("dense", 1.0, 0), "quality", lambda: found(2.0))
    rows.once(Cell("dense", 1.0, 1), "quality", lambda: found(3.0))
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-30], encoding="utf-8")
    again = Rows(path, KEY)
    assert [cell.seed for cell, _ in again.made] == [0]
    again.once(Cell("dense", 1.0, 1), "quality", lambda: found(3.0))
    assert path.read_text(encoding="utf-8") == text


def test_cells_begin_with_what_others_are_compared_with_and_the_untuned_model_has_no_seeds():
    found = cells(["taylor", "dense", "base", "depth"], [0.8, 0.6], [3, 4])
    assert found[0] == Cell("base", 1.0, 0) and found[1] == Cell("dense", 1.0, 3)
    assert found[2:6] == [Cell(method, share, 3) for share in (0.8, 0.6) for method in ("taylor", "depth")]
    assert len(found) == len(set(found)) == 1 + 2 * (1 + 4)


def test_the_difference_of_losses_is_paired_over_examples():
    """Examples differ a hundred times more than the two models: only pairs can tell them apart."""
    draw = random.Random(0)
    one = [[draw.uniform(1, 9) * tokens, tokens] for tokens in draw.choices(range(5, 50), k=200)]
    noise = [draw.gauss(0.02, 0.02) for _ in one]
    other = [[loss + extra * tokens, tokens] for (loss, tokens), extra in zip(one, noise, strict=True)]
    delta = loss_difference([one], [other])
    tokens = sum(count for _, count in one)
    assert delta.delta == pytest.approx(sum(b[0] - a[0] for a, b in zip(one, other, strict=True)) / tokens)
    assert 0 < delta.low < delta.delta < delta.high < 0.03 and delta.num_examples == 200
    back = loss_difference([other], [one])
    assert back.delta == pytest.approx(-delta.delta) and back.high < 0


def test_seeds_are_averaged_example_by_example():
    one = [[[1.0, 2], [6.0, 3]], [[3.0, 2], [8.0, 3]]]
    delta = loss_difference(one, [[[4.0, 2], [7.0, 3]]])
    assert delta.delta == pytest.approx(((4 + 7) - (2 + 7)) / 5)


def test_losses_of_other_tokens_are_not_compared():
    for one, other in (([[[1.0, 2]], [[1.0, 3]]], [[[1.0, 2]]]), ([[[1.0, 2]]], [[[1.0, 3]]])):
        with pytest.raises(ValueError, match="different tokens"):
            loss_difference(one, other)


def test_relative_performance_is_one_for_the_dense_model_and_inverts_the_perplexity():
    dense = {"eval.loss": 2.0, "eval.accuracy": 0.6, "eval.macro_f1": 0.4}
    assert relative(dense, dense, SCORES) == pytest.approx(1.0)
    worse = {"eval.loss": 2.0 + math.log(2), "eval.accuracy": 0.3, "eval.macro_f1": 0.4}
    assert relative(worse, dense, SCORES) == pytest.approx((0.5 + 1.0 + 0.5) / 3)


def test_the_table_compares_with_the_best_two_stage_method_and_shows_speeds_beside_dense():
    rows = Rows(None, KEY)
    rows.once(Cell("base", 1.0, 0), "quality", lambda: found(4.0))
    for seed, loss in ((0, 1.9), (1, 2.1)):
        tuned = {"train_tokens": 6768, "train_peak_bytes": 3 * 2**20}
        rows.once(Cell("dense", 1.0, seed), "quality", lambda loss=loss, tuned=tuned: found(loss) | tuned)
        rows.once(Cell("taylor", 0.6, seed), "quality", lambda loss=loss: found(loss + 1, share=0.6))
        rows.once(Cell("depth", 0.6, seed), "quality", lambda loss=loss: found(loss + 2, share=0.6))
    pair = {"own": dict.fromkeys(("prefill_1", "prefill_8", "decode_1", "decode_8"), 30.0)}
    pair["dense"] = dict.fromkeys(pair["own"], 20.0)
    rows.once(Cell("taylor", 0.6, 0), "speed", lambda: {"pairs": [pair], "peak_bytes": 2**20})
    lines = table(rows, [0.6], SCORES).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    of = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:]}
    assert list(of) == ["base", "dense", "taylor", "depth"]
    assert of["dense"][4] == "2.0000" and of["taylor"][4] == "3.0000" and of["dense"][-1].strip(" |") == "2"
    assert of["dense"][-3:-1] == ["3 MiB", "6,768"] and of["base"][-3:-1] == ["", ""]
    assert of["taylor"][5] == "" and of["depth"][5].startswith("+1.0000 (")
    assert of["dense"][8] == "100.0%" and "30 (1.50x)" in of["taylor"] and "1 MiB" in of["taylor"]
    assert of["taylor"][13] == "90%", "1.5 times as fast with 1.67 times fewer bytes"
    assert "0.600" in of["depth"] and "60.0 M" in of["depth"] and "120 MB" in of["depth"]


def test_pubmedqa_is_asked_for_explanations_and_decisions_of_its_own_split(tmp_path):
    source = tmp_path / "pubmedqa"
    source.mkdir()
    for split, count in (("train", 3), ("test", 8)):
        rows = [
            {"question": f"{split} {index}?", "context": "文", "long_answer": f"long {index}", "decision": "yes"}
            for index in range(count)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (source / f"{split}.jsonl").write_text(text, encoding="utf-8")
    write_data("pubmedqa", source, tmp_path / "made", limit=4)
    train, held_out, questions = (
        read_rows(tmp_path / "made" / f"{name}.jsonl") for name in ("train", "held-out", "questions")
    )
    assert len(train) == 6 and [row["completion"] for row in held_out] == ["long 0", "long 2", "long 4", "long 6"]
    assert {row["completion"] for row in questions} == {"yes"} and len(questions) == 4
    assert all("test" in row["prompt"] and "文" in row["prompt"] for row in held_out + questions)
    assert all("train" in row["prompt"] for row in train)


def test_e2e_counts_a_meaning_once(tmp_path):
    source = tmp_path / "e2e"
    source.mkdir()
    (source / "dev.jsonl").write_text('{"mr": "a", "ref": "A"}\n{"mr": "a", "ref": "AA"}\n', encoding="utf-8")
    (source / "test.jsonl").write_text('{"mr": "b", "ref": "B"}\n{"mr": "b", "ref": "BB"}\n{"mr": "c", "ref": "C"}\n')
    write_data("e2e", source, tmp_path / "made", limit=None)
    assert len(read_rows(tmp_path / "made" / "train.jsonl")) == 2
    assert [row["completion"] for row in read_rows(tmp_path / "made" / "questions.jsonl")] == ["B", "C"]


def test_the_majority_is_right_as_often_as_it_is_there():
    accuracy, macro_f1 = majority(["yes"] * 6 + ["no"] * 3 + ["maybe"])
    assert accuracy == 0.6 and macro_f1 == pytest.approx((2 * 0.6 / 1.6) / 3)
    assert evenly(range(10), 3) == [0, 3, 6] and evenly([1, 2], 5) == [1, 2]


def test_a_picture_has_a_point_a_model_and_its_speed_where_that_was_measured():
    rows = Rows(None, KEY)
    rows.once(Cell("dense", 1.0, 0), "quality", lambda: found(2.0))
    rows.once(Cell("atp", 0.6, 0), "quality", lambda: found(2.5, share=0.59))
    rates = {"prefill_1": 10.0, "decode_1": 3.0, "prefill_8": 11.0, "decode_8": 20.0}
    pairs = [{"own": {name: rate * place for name, rate in rates.items()}} for place in (1, 2, 9)]
    rows.once(Cell("atp", 0.6, 0), "speed", lambda: {"pairs": pairs})
    measured = {f"{name}_tokens_per_s": 2 * rate for name, rate in rates.items()}
    assert points(rows) == [
        {"method": "dense", "remaining": 1.0, "loss": 2.0},
        {"method": "atp", "remaining": 0.59, "loss": 2.5, **measured},
    ]


def test_a_page_with_table_and_picture_is_left_beside_the_rows(tmp_path):
    rows = Rows(None, KEY)
    asked = Namespace(report=None, rows=tmp_path / "行.jsonl", plot=None, remaining=[0.6], model="m", data="pubmedqa")
    write_report(asked, rows, "lmray bench prune")
    assert list(tmp_path.iterdir()) == [], "nothing was measured"
    rows.once(Cell("dense", 1.0, 0), "quality", lambda: found(2.0))
    rows.once(Cell("atp", 0.6, 0), "quality", lambda: found(2.5, share=0.59))
    write_report(asked, rows, "lmray bench prune <here>")
    text = (tmp_path / "行.html").read_text(encoding="utf-8")
    assert "lmray bench prune &lt;here&gt;" in text and "data:image/png" in text and "<td>2.5000</td>" in text
    write_report(Namespace(**vars(asked) | {"rows": None}), rows, "")
    assert len(list(tmp_path.iterdir())) == 1
