"""`loss.png` and `report.html`: one self-contained page a run, for people."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import yaml

from lmray.artifacts.files import write_atomic
from lmray.config import dump
from lmray.context import Result
from lmray.evaluate.answers import Answer
from lmray.job import TrainJob
from lmray.metrics.events import read_events
from lmray.metrics.names import metric
from lmray.metrics.plots import plot_losses
from lmray.train.plan import Plan
from lmray.units import human_bytes, human_count, human_seconds

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2530 }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem; color: #1f4e8c }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; border-bottom: 1px solid #dde3ea; text-align: left;
vertical-align: top } td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f7fa; padding: .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
img { max-width: 100% } .good { color: #2a7a2a } .bad { color: #b03a2e } .quiet { color: #66707c }
"""


def write_report(
    folder: Path, *, job: TrainJob, plan: Plan, result: Result, answers: Mapping[str, Sequence[Answer]]
) -> None:
    """Writes both files into the run folder."""
    events = read_events(folder / "events.jsonl")
    picture = folder / "loss.png"
    plot_losses(events, picture, title=job.name, base_loss=result.metrics.get("base.loss"))
    encoded = base64.b64encode(picture.read_bytes()).decode()
    ended = escape(f"{result.status} in {human_seconds(result.seconds)}; kept as {result.artifact}")
    body = [
        f"<h1>{escape(job.name)}</h1>",
        f'<p class="quiet">{ended}</p>',
        metrics_table(result.metrics),
        f'<h2>Loss</h2><img alt="Loss over steps" src="data:image/png;base64,{encoded}">',
        f"<h2>Plan</h2><pre>{escape(chr(10).join(plan.lines()))}</pre>",
        *answers_section(answers),
        f"<h2>Job</h2><pre>{escape(yaml.safe_dump(dump(job), sort_keys=False, allow_unicode=True))}</pre>",
    ]
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(job.name)}</title><style>{_STYLE}</style>'
    )
    write_atomic(folder / "report.html", head + "\n".join(body) + "</html>\n")


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Untouched model beside tuned, then everything else."""
    pairs = [name for name in metrics if name.startswith("eval.") and f"base.{name[5:]}" in metrics]
    rows = ["<h2>Before and after</h2><table><tr><th>held out<th>untouched<th>tuned<th>change</tr>"] if pairs else []
    for name in pairs:
        before, after = metrics[f"base.{name[5:]}"], metrics[name]
        better = after > before if metric(name).better == "max" else after < before
        change = f'<td class="number {"good" if better else "bad"}">{after - before:+.4g}'
        rows.append(
            f'<tr><td title="{escape(metric(name).help)}">{name[5:]}<td class="number">{before:.4g}'
            f'<td class="number">{after:.4g}{change}</tr>'
        )
    rows += ["</table>"] if pairs else []
    others = [name for name in metrics if name not in pairs and not name.startswith("base.")]
    rows.append("<h2>Metrics</h2><table>")
    for name in others:
        facts = metric(name)
        shown = f'<td class="number">{_shown(metrics[name], facts.unit)}<td class="quiet">{escape(facts.help)}'
        rows.append(f"<tr><td>{name}{shown}</tr>")
    return "\n".join([*rows, "</table>"])


def _shown(value: float, unit: str) -> str:
    """A value as people read it."""
    if unit == "bytes":
        return human_bytes(value)
    if unit == "s":
        return human_seconds(value)
    return human_count(value) if unit == "parameters" else f"{value:,.4g} {unit}".rstrip()


def answers_section(answers: Mapping[str, Sequence[Answer]], count: int = 8) -> list[str]:
    """The first `count` questions with what each target said."""
    targets = [label for label, given in answers.items() if given]
    if not targets:
        return []
    rows = ["<h2>Answers</h2>"]
    for index, asked in enumerate(answers[targets[0]][:count]):
        rows.append(
            f"<table><tr><th>asked<td>{escape(asked.prompt)}</tr><tr><th>expected<td><pre>{escape(asked.expected)}</pre></tr>"
        )
        for label in targets:
            given = answers[label][index]
            right = all(score == 1.0 for score in given.scores.values())
            shade = "good" if right else "bad"
            rows.append(f'<tr><th class="{shade}">{escape(label)}<td><pre>{escape(given.answer)}</pre></tr>')
        rows.append("</table><br>")
    return rows
