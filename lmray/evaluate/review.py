"""Blind human review: a sheet with two targets' answers side by side, and what becomes of the votes.

Which side is whose is drawn per question and kept in `review-key.json` in the run folder; the sheet does not hold it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lmray.artifacts.files import sha256_json, write_atomic, write_json
from lmray.errors import ArtifactError, DataError
from lmray.evaluate.answers import Answer, read_answers, sample_evenly
from lmray.evaluate.confidence import reference_label
from lmray.metrics.page import page

KEY = "review-key.json"
RESULT = "result.json"
CHOICES = ("left", "right", "tie", "bad")
"""`bad`: both are. Counts as a tie."""
_STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: .6rem 0 } fieldset { border: 0; padding: 0;
margin: 0 0 2.2rem } label { margin-right: 1.4rem } legend { font-weight: 600; color: var(--accent) }
.bar { position: sticky; bottom: 0; background: #fff; border-top: 1px solid var(--line); padding: .7rem 0 }
button { font: inherit; padding: .3rem 1rem }
"""


@dataclass(frozen=True)
class Key:
    """What the sheet does not say."""

    sheet: str
    """Identity of the sheet; its votes carry it."""
    targets: tuple[str, str]
    """The reference, and the one whose wins are counted."""
    answers: dict[str, str]
    """Digest of each target's answers as they were shown."""
    left: tuple[str, ...]
    """Label of the target on the left, by question."""


@dataclass(frozen=True)
class Review:
    """What the votes say of `target` against `against`."""

    target: str
    against: str
    wins: int
    losses: int
    ties: int
    both_bad: int
    win_rate: float
    """Ties half."""
    low: float
    high: float
    """95 % score interval (Wilson 1927, Probable Inference, the Law of Succession). A tie, half a win, varies less than
    it allows for: with ties it is rather too wide."""


def write_sheet(run: Path, out: Path, *, seed: int = 0, max_examples: int | None = None) -> int:
    """Writes the sheet of the run in folder `run` to `out` and its key into the folder; returns the number of
    questions. An earlier sheet's votes no longer count. Raises ArtifactError where there are not two targets' answers
    to the same questions."""
    given = _answers(run)
    one, other = _two(run, given)
    pairs = sample_evenly([*zip(given[one], given[other], strict=True)], max_examples)
    draw = random.Random(seed)
    left = tuple(draw.choice((one, other)) for _ in pairs)
    digests = {label: _digest(answers) for label, answers in given.items()}
    sheet = sha256_json([digests, left, seed])[:16]
    write_json(run / KEY, asdict(Key(sheet, (one, other), digests, left)))
    blocks = [
        _block(place, pair, swapped=label == other) for place, (pair, label) in enumerate(zip(pairs, left, strict=True))
    ]
    write_atomic(out, _page(sheet, blocks))
    return len(pairs)


def count_votes(run: Path, votes: Path) -> Review:
    """Reads `votes`, checks them against the key of the run in folder `run`, and adds `eval.human_win_rate` to the
    run's `result.json`, with the counts and the interval under `details.human_review`. Raises ArtifactError for a run
    without key or result, DataError for votes that are not of its sheet."""
    key = _read_key(run)
    result_path = run / RESULT
    if not result_path.is_file():
        raise ArtifactError(str(result_path), "is not there: the run is not done")
    changed = [label for label, answers in _answers(run).items() if key.answers.get(label) != _digest(answers)]
    if changed:
        hint = f"`lmray evaluate --review {run}` makes a new one"
        raise ArtifactError(str(run), f"the answers of `{changed[0]}` changed after the sheet was made", hint=hint)
    review = _counted(key, _read_votes(votes, key))
    result = json.loads(result_path.read_text(encoding="utf-8"))
    result["metrics"]["eval.human_win_rate"] = review.win_rate
    result.setdefault("details", {})["human_review"] = asdict(review)
    write_json(result_path, result)
    return review


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95 % score interval of a share `rate` seen in `count` trials."""
    z = 1.959963984540054
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _counted(key: Key, votes: Mapping[int, str]) -> Review:
    against, target = key.targets
    counts = Counter(
        choice if choice in ("tie", "bad") else ("win" if (choice == "left") == (key.left[place] == target) else "loss")
        for place, choice in votes.items()
    )
    rate = (counts["win"] + (counts["tie"] + counts["bad"]) / 2) / len(votes)
    low, high = wilson(rate, len(votes))
    return Review(target, against, counts["win"], counts["loss"], counts["tie"], counts["bad"], rate, low, high)


def _read_votes(path: Path, key: Key) -> dict[int, str]:
    """`{question: choice}`, questions counted from 0."""
    shape = '{"sheet": ..., "votes": [{"question": 1, "choice": "left"}, ...]}'
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sheet, listed = value["sheet"], [(vote["question"], vote["choice"]) for vote in value["votes"]]
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            str(path), "holds no votes", allowed=shape, hint="`Save votes` on the sheet writes it"
        ) from None
    if sheet != key.sheet:
        hint = "these are votes of another sheet, or of an earlier one of this run"
        raise DataError(str(path), f"is for sheet `{sheet}`", allowed=f"sheet `{key.sheet}`", hint=hint)
    found: dict[int, str] = {}
    for question, choice in listed:
        where = f"{path}: question {question}"
        if type(question) is not int or not 1 <= question <= len(key.left):
            raise DataError(where, "is not on the sheet", allowed=f"1 to {len(key.left)}")
        if choice not in CHOICES:
            raise DataError(where, f"choice `{choice}`", allowed=", ".join(CHOICES))
        if question - 1 in found:
            raise DataError(where, "is voted on twice", hint="a file holds one reviewer's votes")
        found[question - 1] = choice
    if not found:
        raise DataError(str(path), "holds not one vote")
    return found


def _read_key(run: Path) -> Key:
    try:
        fields: dict[str, Any] = json.loads((run / KEY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = f"`lmray evaluate --review {run}` makes a sheet"
        raise ArtifactError(str(run / KEY), "is not there: the run has no review sheet", hint=hint) from None
    return Key(fields["sheet"], tuple(fields["targets"]), fields["answers"], tuple(fields["left"]))


def _answers(run: Path) -> dict[str, list[Answer]]:
    """Each target's answers by label; those of targets without any are left out."""
    return {label: answers for label, answers in read_answers(run).items() if answers}


def _two(run: Path, given: Mapping[str, Sequence[Answer]]) -> tuple[str, str]:
    """The reference and the other target."""
    if len(given) != 2:
        found = f"answers of {len(given)} target(s): {', '.join(given)}" if given else "no answers"
        hint = "evaluate two targets with a task that generates answers"
        raise ArtifactError(str(run), found, allowed="two targets", hint=hint)
    one = reference_label([*given])
    (other,) = given.keys() - {one}
    asked = {label: [(answer.prompt, answer.expected) for answer in answers] for label, answers in given.items()}
    if asked[one] != asked[other]:
        raise ArtifactError(str(run), f"`{one}` and `{other}` answered different questions")
    return one, other


def _digest(answers: Sequence[Answer]) -> str:
    return hashlib.sha256(json.dumps([[one.prompt, one.answer] for one in answers]).encode()).hexdigest()


def _block(place: int, pair: tuple[Answer, Answer], *, swapped: bool) -> str:
    left, right = reversed(pair) if swapped else pair
    words = {"left": "left is better", "right": "right is better", "tie": "tie", "bad": "both bad"}
    radios = "".join(
        f'<label><input type="radio" name="{place + 1}" value="{choice}"> {words[choice]}</label>' for choice in CHOICES
    )
    expected = f'<details><summary class="quiet">expected answer</summary><pre>{escape(left.expected)}</pre></details>'
    return (
        f"<fieldset><legend>Question {place + 1}</legend><pre>{escape(left.prompt)}</pre>{expected}"
        f'<div class="pair"><div><span class="quiet">left</span><pre>{escape(left.answer)}</pre></div>'
        f'<div><span class="quiet">right</span><pre>{escape(right.answer)}</pre></div></div>{radios}</fieldset>'
    )


def _page(sheet: str, blocks: Sequence[str]) -> str:
    script = (files("lmray.evaluate") / "review.js").read_text(encoding="utf-8")
    body = [
        "<h1>Which answer is better?</h1>",
        f'<p class="quiet">{len(blocks)} questions, two models; which side is whose changes from question to question. '
        "Votes stay in this browser until they are saved.</p>",
        f'<form id="sheet" data-sheet="{escape(sheet)}">',
        *blocks,
        '<div class="bar"><button type="submit">Save votes</button> <span id="count" class="quiet"></span></div>',
        f"</form><script>\n{script}</script>",
    ]
    return page("Which answer is better?", body, style=_STYLE)
