"""`comparison.html`: several targets side by side, with how sure their differences are and what they answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic
from lmray.context import Result
from lmray.evaluate.answers import Answer
from lmray.evaluate.page import page
from lmray.metrics.names import metric
from lmray.units import human_seconds

NUM_ANSWERS = 50
"""At most so many questions are shown, those first on which the targets' scores differ most."""


def write_comparison(path: Path, *, name: str, result: Result, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Writes the page of the evaluation `name`; `result.details` holds `targets`, `reference` and `deltas`."""
    quiet = f"{len(result.details['targets'])} target(s) in {human_seconds(result.seconds)}"
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="quiet">{escape(quiet)}</p>',
        *_table(result.details),
        *_answers(answers),
    ]
    write_atomic(path, page(name, body))


def _table(details: Mapping[str, Any]) -> list[str]:
    targets, reference = details["targets"], details["reference"]
    labels = [reference, *(label for label in targets if label != reference)]
    head = "".join(f"<th>{escape(label)}" for label in labels)
    rows = [f"<h2>Metrics</h2><table><tr><th>held out{head}</tr>"]
    for name in shown_names(targets[reference]):
        cells = "".join(_cell(name, targets[label], details["deltas"].get(label, {}).get(name)) for label in labels)
        rows.append(f'<tr><td title="{escape(metric(name).help)}">{escape(name.partition(".")[2])}{cells}</tr>')
    rows.append("</table>")
    if details["deltas"]:
        rows.append(
            f'<p class="quiet">Small: difference to {escape(reference)}, with the 95 % interval of a paired bootstrap '
            "over the examples. Coloured where zero is outside of it.</p>"
        )
    if any(name.endswith("_stderr") for name in targets[reference]):
        rows.append('<p class="quiet">±: standard error, as the benchmark takes it.</p>')
    return rows


def _cell(name: str, metrics: Mapping[str, float], delta: Mapping[str, float] | None) -> str:
    cell = f'<td class="number">{value_text(name, metrics)}'
    if delta is None:
        return cell
    shade = "quiet"
    if delta["low"] > 0.0 or delta["high"] < 0.0:
        shade = "good" if (delta["delta"] > 0) == (metric(name).better == "max") else "bad"
    return cell + f'<br><small class="{shade}">{delta_text(delta)}</small>'


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


def shown_names(metrics: Mapping[str, float]) -> list[str]:
    """Names that get a row: standard errors stand beside their metrics."""
    return [name for name in metrics if not name.endswith("_stderr")]


def value_text(name: str, metrics: Mapping[str, float]) -> str:
    """`0.75`, or `0.75 ± 0.02` where its standard error is known."""
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def delta_text(delta: Mapping[str, float]) -> str:
    """`+0.25 [+0.1, +0.4]`."""
    return f"{delta['delta']:+.3g} [{delta['low']:+.3g}, {delta['high']:+.3g}]"


def _answers(answers: Mapping[str, Sequence[Answer]]) -> list[str]:
    given = {label: one for label, one in answers.items() if one}
    if not given:
        return []
    questions = [*zip(*given.values(), strict=True)]
    order = sorted(range(len(questions)), key=lambda index: (-_spread(questions[index]), index))[:NUM_ANSWERS]
    rows = [f'<h2>Answers</h2><p class="quiet">{len(order)} of {len(questions)}, the largest differences first.</p>']
    for index in order:
        asked = questions[index][0]
        rows.append(
            f"<table><tr><th>asked<td><pre>{escape(asked.prompt)}</pre></tr>"
            f"<tr><th>expected<td><pre>{escape(asked.expected)}</pre></tr>"
        )
        for label, answer in zip(given, questions[index], strict=True):
            scores = ", ".join(f"{name} {value:.3g}" for name, value in answer.scores.items())
            said = f'<pre>{escape(answer.answer)}</pre><span class="quiet">{escape(scores)}</span>'
            rows.append(f"<tr><th>{escape(label)}<td>{said}</tr>")
        rows.append("</table><br>")
    return rows


def _spread(answers: Sequence[Answer]) -> float:
    """How far apart the mean scores of answers to one question are."""
    means = [sum(one.scores.values()) / max(len(one.scores), 1) for one in answers]
    return max(means) - min(means)
