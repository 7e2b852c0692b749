"""What the pages of evaluations and of training runs share: differences with their intervals, and answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from lmray.evaluate.answers import Answer
from lmray.metrics.names import metric
from lmray.metrics.page import verbatim

INTERVALS = "95 % interval of a paired bootstrap over the examples"


def delta_text(delta: Mapping[str, float]) -> str:
    """`+0.25 [+0.1, +0.4]`; `delta` holds the fields of `lmray.evaluate.confidence.Delta`."""
    return f"{delta['delta']:+.3g} [{delta['low']:+.3g}, {delta['high']:+.3g}]"


def shown_names(metrics: Mapping[str, float]) -> list[str]:
    """Names that get a row: standard errors stand beside their metrics."""
    return [name for name in metrics if not name.endswith("_stderr")]


def value_text(name: str, metrics: Mapping[str, float]) -> str:
    """`0.75`, or `0.75 ± 0.02` where its standard error is known."""
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def shade(name: str, *, low: float, high: float) -> str:
    """The page's class for a change of metric `name` between `low` and `high`: `good` or `bad` where all of that is."""
    better = metric(name).better
    if not better or low <= 0.0 <= high:
        return "quiet"
    return "good" if (low > 0.0) == (better == "max") else "bad"


def answer_block(asked: Answer, given: Iterable[tuple[str, Answer]]) -> str:
    """A question, what was expected, and what each label said to it; green where every score is whole, red where none
    is anything."""
    lines = [("asked", "", asked.prompt), ("expected", "", asked.expected)]
    for label, one in given:
        scores = ", ".join(f"{name} {value:.3g}" for name, value in one.scores.items())
        found = {*one.scores.values()}
        style = "good" if found == {1.0} else "bad" if found == {0.0} else ""
        lines.append((f"{label}: {scores}" if scores else label, style, one.answer))
    body = "".join(f'<dt class="{style}">{escape(words)}</dt><dd>{verbatim(text)}</dd>' for words, style, text in lines)
    return f'<dl class="answer">{body}</dl>'
