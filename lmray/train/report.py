"""`loss.png` and `report.html`: one self-contained page a run, for people; written again from the run folder alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic
from lmray.context import Result
from lmray.evaluate.answers import Answer
from lmray.evaluate.page import INTERVALS, answer_block, delta_text, shade, shown_names, value_text
from lmray.metrics.events import read_events
from lmray.metrics.names import metric
from lmray.metrics.page import Cell, cards, heading, number, page, paragraph, picture, split, table, verbatim
from lmray.metrics.plots import SMALL, plot_lengths, plot_losses, plot_metric
from lmray.metrics.pruning_plots import freeze_step, plot_kept, plot_search
from lmray.train.out_of_memory import shortage_text
from lmray.train.record import DATA, Record, read_record
from lmray.train.statistics import MAX_FILES
from lmray.units import human_bytes, human_count, human_seconds

MAX_ANSWERS = 8
MAX_ROWS = 400
"""Characters of the numbers of rows that are shown of a part."""
PARTS = {"train": "training", "search": "set aside for the masks", "eval": "held out"}
MASKS = "masks.jsonl"
"""In the folder of a run that prunes: what its masks kept, a line an evaluation."""
TIMES = {
    "run.prepare_seconds": "preparing",
    "run.train_seconds": "training",
    "run.evaluate_seconds": "evaluating",
}


def write_report(folder: Path, result: Result | None = None) -> Path:
    """Writes both files into the run folder, whether the run has ended or not; returns the page. `result` is that of a
    run that is about to write it. Raises ArtifactError where there is no run."""
    run = read_record(folder)
    run = replace(run, result=result) if result else run
    losses = folder / "loss.png"
    plot_losses(run.events, losses, title=run.name, base_loss=run.metrics.get("base.loss"))
    body = [
        heading(run.name, 1),
        paragraph(_ending(run), "quiet"),
        *_attempts(run),
        *_alarm(run.diverged),
        *_shortages(run),
        *_head(run),
        *before_and_after(run.metrics, run.deltas),
        heading("Curves"),
        picture(losses.read_bytes(), "Loss over steps"),
        '<div class="grid">',
        *(picture(png, SMALL[name]) for name in SMALL if (png := plot_metric(run.events, name))),
        "</div>",
        *_pruning(run),
        *_resources(run),
        *_data(run.data),
        *answers_section(run.answers),
        heading("Metrics"),
        metrics_table(run.metrics),
        heading("Plan"),
        verbatim("\n".join(run.plan.lines())),
        heading("Job"),
        verbatim(run.job),
    ]
    path = folder / "report.html"
    write_atomic(path, page(run.name, body))
    return path


def _ending(run: Record) -> str:
    if run.result is None:
        return run.status
    kept = f"; kept as {run.result.artifact}" if run.result.artifact else ""
    return f"{run.status} in {human_seconds(run.result.seconds)}{kept}"


def _attempts(run: Record) -> Iterator[str]:
    """Where the run was interrupted, and what that cost."""
    if len(run.attempts) < 2:
        return
    starts = (f"after step {one.after_step}" if one.after_step else "from the start" for one in run.attempts)
    places = (f"{start} (workers: {one.world_size})" for start, one in zip(starts, run.attempts, strict=True))
    again = sum(event.get("replayed", False) for event in run.events)
    text = f"{len(run.attempts)} attempts: {', '.join(places)}. Steps that were done again: {again}"
    yield paragraph(text, "quiet")


def _alarm(diverged: Mapping[str, Any] | None) -> Iterator[str]:
    if diverged is not None:
        yield '<div class="alarm">'
        yield paragraph(f"Given up at step {diverged['step']}: {diverged['found']}", "bad")
        yield paragraph("The step was taken over these rows:")
        yield verbatim("\n".join(diverged["rows"]))
        yield "</div>"


def _shortages(run: Record) -> Iterator[str]:
    """Where it ran out of memory, and how it came to its end nevertheless."""
    for one in run.memory["history"] if run.memory else ():
        yield paragraph(f"Out of memory {shortage_text(one)}: {one['found']}", "bad")
    if run.memory and run.result:
        rows = run.result.details["micro_batch"]
        yield paragraph(
            f"It ended with {rows} row(s) a forward pass, and {run.plan.rows_per_step} rows a step as ever."
        )


def _head(run: Record) -> Iterator[str]:
    """The numbers that are asked for first."""
    metrics = run.metrics
    facts = [("steps", f"{run.step} of {run.plan.steps}")]
    for name, words in (("eval.loss", "held-out loss"), ("train.loss", "last training loss")):
        if name in metrics:
            facts.append((words, f"{metrics[name]:.4g}"))
    if "train.tokens_per_s" in metrics:
        facts.append(("tokens/s, median" if run.result else "tokens/s", f"{metrics['train.tokens_per_s']:,.0f}"))
    if "train.peak_memory_bytes" in metrics:
        facts.append(("peak memory of a worker", human_bytes(metrics["train.peak_memory_bytes"])))
    yield cards(facts)


def before_and_after(metrics: Mapping[str, float], deltas: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Untouched model beside tuned; `deltas` are the differences with their intervals, by metric, where known."""
    pairs = [name for name in shown_names(metrics) if name.startswith("eval.") and f"base.{name[5:]}" in metrics]
    if not pairs:
        return
    yield heading("Before and after")
    yield table(
        (_change(name, metrics, deltas.get(name)) for name in pairs),
        ("held out", number("untouched"), number("tuned"), number("change")),
    )
    if deltas:
        yield paragraph(f"In brackets: {INTERVALS}. Coloured where zero is outside of it.", "quiet")


def _change(name: str, metrics: Mapping[str, float], delta: Mapping[str, float] | None) -> tuple[Cell, ...]:
    untouched = f"base.{name[5:]}"
    gain = metrics[name] - metrics[untouched]
    low, high = (delta["low"], delta["high"]) if delta else (gain, gain)
    change = number(delta_text(delta) if delta else f"{gain:+.4g}", shade(name, low=low, high=high))
    texts = (number(value_text(one, metrics)) for one in (untouched, name))
    return Cell(name[5:], title=metric(name).help), *texts, change


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Every metric with what it means."""
    return table((name, number(shown(name, metrics[name])), Cell(metric(name).help, "quiet")) for name in metrics)


def shown(name: str, value: float) -> str:
    """A metric's value as people read it."""
    unit = metric(name).unit
    if unit == "bytes":
        return human_bytes(value)
    if unit == "s":
        return human_seconds(value)
    if unit == "parameters":
        return human_count(value)
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return digits if unit == "fraction" else f"{digits} {unit}".rstrip()


def _pruning(run: Record) -> Iterator[str]:
    """What was kept of every layer, and how near that came to the budget."""
    by_step = {one["step"]: one for one in read_events(run.folder / MASKS)}  # a step that was done again is told again
    masks = [by_step[step] for step in sorted(by_step)]
    frozen = freeze_step(masks)
    curves = plot_search(run.events, frozen)
    if not masks and curves is None:
        return
    yield heading("Pruning")
    if masks:
        last = masks[-1]
        kept = [number for number, pair in enumerate(zip(last["groups"], last["channels"], strict=True)) if any(pair)]
        facts = [
            ("layers kept", f"{len(kept)} of {len(last['groups'])}"),
            ("of prunable weights kept", f"{last['remaining']:.1%}"),
            ("key-value groups a layer", _span([last["groups"][layer] for layer in kept])),
            ("MLP channels a layer", _span([last["channels"][layer] for layer in kept])),
            ("masks", "still searched" if frozen is None else f"final from step {frozen}"),
        ]
        yield cards(facts)
        yield picture(plot_kept(masks, title=run.name), "What every layer kept over steps")
    if curves is not None:
        yield picture(curves, "Weights kept, distance to the budget and norms of what is removed over steps")


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _resources(run: Record) -> Iterator[str]:
    metrics, details = run.metrics, run.result.details if run.result else {}
    times = [(words, metrics[name], human_seconds(metrics[name])) for name, words in TIMES.items() if name in metrics]
    rows = [
        (f"worker {rank}, peak memory", number(human_bytes(peak)))
        for rank, peak in enumerate(details.get("peak_memory_bytes_by_worker", ()))
    ]
    if "train.peak_gpu_memory_bytes" in metrics:
        rows.append(("worker 0, peak GPU memory", number(human_bytes(metrics["train.peak_gpu_memory_bytes"]))))
    if rows:
        rows.append(("planned for a worker, without the process itself", number(_planned(run))))
    if times or rows:
        yield heading("Time and memory")
    if times:
        yield split(times)
    if rows:
        yield table(rows)


def _planned(run: Record) -> str:
    return human_bytes(run.plan.memory_bytes["total"])


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    """Counts by source, and how long the examples are."""
    if not data:
        return
    yield heading("Data")
    rows = []
    for part, facts in data.items():
        words = PARTS[part]
        several = len(facts["sources"]) > 1
        rows.append(_counts(words if several else f"{words}: {next(iter(facts['sources']))}", facts))
        rows += [_counts(f"\u2003{name}", counts) for name, counts in facts["sources"].items() if several]
    yield table(rows, ("", number("examples"), number("tokens"), number("mean length"), number("supervised")))
    yield from (paragraph(line, "quiet") for part, facts in data.items() for line in _rows(part, facts))
    lengths = data["train"]["lengths"]
    yield f'<div class="grid">{picture(plot_lengths(lengths["edges"], lengths["counts"]), "Lengths in tokens")}</div>'


def _rows(part: str, facts: Mapping[str, Any]) -> Iterator[str]:
    """Which rows of which file, of the first files, where several parts were made of them."""
    rows_in = facts.get("rows_in", {})
    for name, rows in islice(rows_in.items(), MAX_FILES):
        shown = rows if len(rows) <= MAX_ROWS else f"{rows[:MAX_ROWS].rpartition(', ')[0]}, … (all: `{DATA}`)"
        yield f"{PARTS[part]}: " + (f"rows {shown} of {name}" if rows else name)
    if len(rows_in) > MAX_FILES:
        yield f"{PARTS[part]}: {len(rows_in) - MAX_FILES} more files (`{DATA}`)"


def _counts(label: str, facts: Mapping[str, int]) -> tuple[str | Cell, ...]:
    examples, tokens = facts["examples"], facts["tokens"]
    share = facts["supervised_tokens"] / tokens
    return label, *map(number, (f"{examples:,}", human_count(tokens), f"{tokens / examples:.0f}", f"{share:.0%}"))


def answers_section(answers: Mapping[str, Sequence[Answer]], count: int = MAX_ANSWERS) -> Iterator[str]:
    """The first `count` questions with what each target said."""
    targets = [label for label, given in answers.items() if given]
    if not targets:
        return
    yield heading("Answers")
    for index, asked in enumerate(answers[targets[0]][:count]):
        said = ((label, answers[label][index]) for label in targets if index < len(answers[label]))
        yield answer_block(asked, said)
