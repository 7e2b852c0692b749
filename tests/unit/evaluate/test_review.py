"""Blind review: what the sheet shows and hides, and what votes count as."""

from __future__ import annotations

import json
import re

import pytest

from lmray.errors import ArtifactError, DataError
from lmray.evaluate.review import KEY, count_votes, wilson, write_sheet

QUESTIONS = 12


@pytest.fixture
def run(tmp_path):
    """A finished run with two targets' answers."""
    folder = tmp_path / "run"
    folder.mkdir()
    for label in ("base", "tuned"):
        write_answers(folder, label)
    result = {"status": "succeeded", "metrics": {"eval.f1": 0.5}, "details": {"reference": "base"}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def write_answers(folder, label, *, count=QUESTIONS, prompt="質問 <script>alert(1)</script>"):
    said = {"base": "first", "tuned": "second"}.get(label, "third")
    lines = [
        {"prompt": f"{prompt} {n}", "expected": f"</pre>{n}", "answer": f"{said}-{n} & <b>", "scores": {"f1": 0.5}}
        for n in range(count)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"answers-{label}.jsonl").write_text(text, encoding="utf-8")


def key_of(run):
    return json.loads((run / KEY).read_text(encoding="utf-8"))


def vote(run, path, choose, **changes):
    """Votes by `choose(question, label on the left)`; None: left out."""
    key = key_of(run)
    chosen = [(number, choose(number, label)) for number, label in enumerate(key["left"], start=1)]
    votes = [{"question": number, "choice": choice} for number, choice in chosen if choice]
    path.write_text(json.dumps({"sheet": key["sheet"], "votes": votes} | changes), encoding="utf-8")
    return path


def test_the_sheet_shows_all_answers_escaped_and_nothing_that_tells_whose(run, tmp_path):
    assert write_sheet(run, tmp_path / "sheet.html", seed=3) == QUESTIONS
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<fieldset>") == QUESTIONS and page.count('type="radio"') == 4 * QUESTIONS
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page and "質問" in page
    assert "&lt;/pre&gt;0" in page and "first-0 &amp; &lt;b&gt;" in page
    assert "base" not in page and "tuned" not in page
    assert "http" not in page and "src=" not in page


def test_sides_follow_the_key_and_the_seed(run, tmp_path):
    lefts = []
    for seed in (0, 0, 1):
        write_sheet(run, tmp_path / "sheet.html", seed=seed)
        page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
        shown = re.findall(r"left</span><pre>(first|second)-", page)
        assert [{"first": "base", "second": "tuned"}[one] for one in shown] == key_of(run)["left"]
        lefts.append(tuple(shown))
    assert lefts[0] == lefts[1] != lefts[2]
    assert set(lefts[0]) == {"first", "second"}


def test_at_most_so_many_questions(run, tmp_path):
    assert write_sheet(run, tmp_path / "sheet.html", max_examples=5) == 5
    assert len(key_of(run)["left"]) == 5


def test_votes_become_a_win_rate_with_ties_half(run, tmp_path):
    write_sheet(run, tmp_path / "sheet.html", seed=5)

    def choose(number, left):
        if number <= 6:
            return "left" if left == "tuned" else "right"
        return {7: "tie", 8: "bad", 9: "left" if left == "base" else "right"}.get(number)

    review = count_votes(run, vote(run, tmp_path / "votes.json", choose))
    assert (review.target, review.against) == ("tuned", "base")
    assert (review.wins, review.losses, review.ties, review.both_bad) == (6, 1, 1, 1)
    assert review.win_rate == pytest.approx(7 / 9)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["metrics"] == {"eval.f1": 0.5, "eval.human_win_rate": pytest.approx(7 / 9)}
    assert result["details"]["reference"] == "base"
    assert result["details"]["human_review"]["low"] == pytest.approx(wilson(7 / 9, 9)[0])


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (7, 10), (10, 10), (60, 80)])
def test_the_interval_holds_the_shares_that_a_score_test_keeps(wins, count):
    """Its ends solve |p - wins/count| = z sqrt(p (1 - p) / count): found here by bisection."""
    rate, found = wins / count, wilson(wins / count, count)
    z = 1.959963984540054

    def kept(share):
        return abs(share - rate) <= z * (share * (1 - share) / count) ** 0.5 + 1e-15

    for inside, outside, end in ((rate, 0.0, found[0]), (rate, 1.0, found[1])):
        if kept(outside):
            assert end == pytest.approx(outside, abs=1e-9)
            continue
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if kept(middle) else (inside, middle)
        assert end == pytest.approx(inside, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"sheet": "0123456789abcdef"}, "is for sheet `0123456789abcdef`"),
        ({"votes": []}, "holds not one vote"),
        (
            {"votes": [{"question": 1, "choice": "left"}, {"question": 1, "choice": "tie"}]},
            "question 1: is voted on twice",
        ),
        ({"votes": [{"question": 13, "choice": "left"}]}, "question 13: is not on the sheet"),
        ({"votes": [{"question": 0, "choice": "left"}]}, "question 0: is not on the sheet"),
        ({"votes": [{"question": "1", "choice": "left"}]}, "question 1: is not on the sheet"),
        ({"votes": [{"question": 1, "choice": "tuned"}]}, "choice `tuned`"),
        ({"votes": [{"question": 1}]}, "holds no votes"),
        ({"votes": 3}, "holds no votes"),
    ],
)
def test_votes_that_are_not_of_the_sheet_are_refused(run, tmp_path, changes, found):
    write_sheet(run, tmp_path / "sheet.html")
    before = (run / "result.json").read_bytes()
    with pytest.raises(DataError, match=found):
        count_votes(run, vote(run, tmp_path / "votes.json", lambda *_: "left", **changes))
    assert (run / "result.json").read_bytes() == before


def test_a_file_of_votes_that_is_missing_or_no_json(run, tmp_path):
    write_sheet(run, tmp_path / "sheet.html")
    with pytest.raises(DataError, match="cannot be read"):
        count_votes(run, tmp_path / "votes.json")
    (tmp_path / "votes.json").write_text("left", encoding="utf-8")
    with pytest.raises(DataError, match="holds no votes"):
        count_votes(run, tmp_path / "votes.json")


def test_answers_that_changed_after_the_sheet_was_made(run, tmp_path):
    write_sheet(run, tmp_path / "sheet.html")
    votes = vote(run, tmp_path / "votes.json", lambda *_: "left")
    write_answers(run, "tuned", prompt="other")
    write_answers(run, "base", prompt="other")
    with pytest.raises(ArtifactError, match="changed after the sheet was made"):
        count_votes(run, votes)


def test_an_earlier_sheets_votes_no_longer_count(run, tmp_path):
    write_sheet(run, tmp_path / "sheet.html", seed=0)
    votes = vote(run, tmp_path / "votes.json", lambda *_: "left")
    write_sheet(run, tmp_path / "sheet.html", seed=1)
    with pytest.raises(DataError, match="is for sheet"):
        count_votes(run, votes)


def test_a_run_without_a_sheet_or_without_a_result(run, tmp_path):
    with pytest.raises(ArtifactError, match="has no review sheet"):
        count_votes(run, tmp_path / "votes.json")
    write_sheet(run, tmp_path / "sheet.html")
    (run / "result.json").unlink()
    with pytest.raises(ArtifactError, match="the run is not done"):
        count_votes(run, vote(run, tmp_path / "votes.json", lambda *_: "left"))


def test_a_sheet_needs_two_targets_and_the_same_questions(run, tmp_path):
    write_answers(run, "tuned", count=3)
    with pytest.raises(ArtifactError, match="answered different questions"):
        write_sheet(run, tmp_path / "sheet.html")
    write_answers(run, "third")
    with pytest.raises(ArtifactError, match=r"answers of 3 target\(s\): base, third, tuned"):
        write_sheet(run, tmp_path / "sheet.html")
    for path in run.glob("answers-*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="no answers"):
        write_sheet(run, tmp_path / "sheet.html")
