"""`comparison.html`: several targets side by side, with how sure their differences are and what they answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic
from lmray.context import Result
from lmray.evaluate.answers import Answer
from lmray.evaluate.page import INTERVALS, answer_block, delta_text, shade, shown_names, value_text
from lmray.metrics.names import metric
from lmray.metrics.page import Cell, heading, number, page, paragraph, table
from lmray.units import human_seconds

NUM_ANSWERS = 50
"""At most so many questions are shown, those first on which the targets' scores differ most."""


def write_comparison(path: Path, *, name: str, result: Result, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Writes the page of the evaluation `name`; `result.details` holds `targets`, `reference` and `deltas`."""
    quiet = f"{len(result.details['targets'])} target(s) in {human_seconds(result.seconds)}"
    body = [heading(name, 1), paragraph(quiet, "quiet"), *_table(result.details), *_answers(answers)]
    write_atomic(path, page(name, body))


def _table(details: Mapping[str, Any]) -> Iterator[str]:
    targets, reference, deltas = details["targets"], details["reference"], details["deltas"]
    labels = [reference, *(label for label in targets if label != reference)]
    yield heading("Metrics")
    yield table(
        (
            (
                Cell(name.partition(".")[2], title=metric(name).help),
                *(_cell(name, targets[label], deltas.get(label, {}).get(name)) for label in labels),
            )
            for name in shown_names(targets[reference])
        ),
        ("held out", *map(number, labels)),
    )
    if deltas:
        words = f"Small: difference to {reference}, with the {INTERVALS}. Coloured where zero is outside of it."
        yield paragraph(words, "quiet")
    if any(name.endswith("_stderr") for name in targets[reference]):
        yield paragraph("±: standard error, as the benchmark takes it.", "quiet")


def _cell(name: str, metrics: Mapping[str, float], delta: Mapping[str, float] | None) -> Cell:
    text = value_text(name, metrics)
    if delta is None:
        return number(text)
    return number(text, note=delta_text(delta), note_style=shade(name, low=delta["low"], high=delta["high"]))


def comparison_rows(details: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the same table as plain text: a metric a row, each other target with its difference to the
    reference and the 95 % interval of that."""
    targets, reference = details["targets"], details["reference"]
    head = ["", reference]
    rows = [[name, value_text(name, targets[reference])] for name in shown_names(targets[reference])]
    for label, found in details["deltas"].items():
        head += [label, "difference, 95 %"]
        for row in rows:
            delta = found.get(row[0])
            row += [value_text(row[0], targets[label]), delta_text(delta) if delta else ""]
    return head, rows


def _answers(answers: Mapping[str, Sequence[Answer]]) -> Iterator[str]:
    given = {label: one for label, one in answers.items() if one}
    if not given:
        return
    questions = [*zip(*given.values(), strict=True)]
    order = sorted(range(len(questions)), key=lambda index: (-_spread(questions[index]), index))[:NUM_ANSWERS]
    yield heading("Answers")
    yield paragraph(f"{len(order)} of {len(questions)}, the largest differences first.", "quiet")
    for index in order:
        yield answer_block(questions[index][0], zip(given, questions[index], strict=True))


def _spread(answers: Sequence[Answer]) -> float:
    """How far apart the mean scores of answers to one question are."""
    means = [sum(one.scores.values()) / max(len(one.scores), 1) for one in answers]
    return max(means) - min(means)
