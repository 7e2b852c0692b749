"""Rows of `lmray bench prune`: kept one by one, gone on from, and made into a table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic
from lmray.evaluate.confidence import Delta, deltas
from lmray.tasks.base import Scored
from lmray.tasks.loss import Loss

FULL = ("base", "dense")
"""Methods that remove nothing."""
TWO_STAGE = ("magnitude", "wanda_sp", "taylor", "depth", "optipfair")
METHODS = (*FULL, "atp", *TWO_STAGE)
SPEEDS = ("prefill_1", "prefill_8", "decode_1", "decode_8")
"""Measured rates: of what, and of how many rows."""


@dataclass(frozen=True)
class Cell:
    """One model: how it was made."""

    method: str
    """One of METHODS; `atp` may have fields of the method behind it, like `atp:distill=1`."""
    remaining: float
    """Share of prunable weights asked for; 1.0 for `base` and `dense`."""
    seed: int
    """0 for `base`, which is not trained."""


def cells(methods: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """What is to be measured, in the order in which it is: what all are compared with first."""
    found = [Cell("base", 1.0, 0)] if "base" in methods else []
    for seed in seeds:
        found += [Cell("dense", 1.0, seed)] if "dense" in methods else []
        found += [Cell(one, budget, seed) for budget in budgets for one in methods if one not in FULL]
    return found


class Rows:
    """What was measured of each cell, in two parts, `quality` and `speed`. With a file, each is appended to it at once
    and never made again; a line that a kill left half written is dropped."""

    def __init__(self, path: Path | None, key: dict[str, Any]):
        """`key` (JSON types): the settings that measurements belong to."""
        self.path, self.key = path, key
        self.made: dict[tuple[Cell, str], dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path and path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if path and whole != text:
            write_atomic(path, whole)
        for line in whole.split("\n")[:-1]:
            row = json.loads(line)
            if row["key"] == key:
                self.made[Cell(**row["cell"]), row["part"]] = row["found"]

    def once(self, cell: Cell, part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives (JSON types), or gave before."""
        if (cell, part) not in self.made:
            found = make()
            if self.path:
                row = {"key": self.key, "cell": vars(cell), "part": part, "found": found}
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            self.made[cell, part] = found
        return self.made[cell, part]

    def of(self, method: str, remaining: float, part: str) -> list[dict[str, Any]]:
        """What there is, by seed."""
        chosen = [
            cell for cell, its in self.made if its == part and (cell.method, cell.remaining) == (method, remaining)
        ]
        return [self.made[cell, part] for cell in sorted(chosen, key=lambda cell: cell.seed)]


def loss_difference(one: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> Delta:
    """Held-out loss of `other` less that of `one`, nats a token, with its 95 % interval, paired over examples. Each
    holds a list for every seed, of the summed loss and the tokens of each example; seeds are averaged first, example by
    example."""
    if len({tuple(tokens for _, tokens in losses) for losses in (*one, *other)}) > 1:
        raise ValueError("losses of different tokens cannot be compared")
    means = [_over_seeds(seeds) for seeds in (one, other)]
    task = Loss()
    found = deltas({"first": [(task, means[0])], "second": [(task, means[1])]})
    return found["second"]["eval.loss"]


def _over_seeds(seeds: Sequence[Sequence[Any]]) -> tuple[Scored, ...]:
    by_example = zip(*seeds, strict=True)
    means = ((statistics.fmean(loss for loss, _ in one), one[0][1]) for one in by_example)
    return tuple(Scored("", "", {}, statistics=mean) for mean in means)


def relative(found: dict[str, float], dense: dict[str, float], scores: Sequence[str]) -> float:
    """Mean over `scores` and the perplexity of how near `found` comes to `dense`: 1 is as good."""
    ratios = [found[name] / dense[name] for name in scores if dense[name]]
    return statistics.fmean([*ratios, math.exp(dense["eval.loss"] - found["eval.loss"])])


def mean_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of what several seeds measured."""
    return {name: statistics.fmean(row["metrics"][name] for row in rows) for name in rows[0]["metrics"]}


def table(rows: Rows, budgets: Sequence[float], scores: Sequence[str]) -> str:
    """`columns` in Markdown."""
    head, *lines = columns(rows, budgets, scores)
    return "".join("| " + " | ".join(one) + " |\n" for one in (head, ["---"] * len(head), *lines))


def columns(rows: Rows, budgets: Sequence[float], scores: Sequence[str]) -> list[list[str]]:
    """The head, and a line a method and budget: means over the seeds there are. Losses are compared with the best
    two-stage method of the same budget, speeds with the dense model beside which they were measured."""
    names = [name.partition(".")[2] for name in scores]
    head = ["method", "asked", "prunable", "parameters", "loss", "difference to the best two-stage (95 %)", *names]
    head += ["relative to dense", "prefill 1", "prefill 8", "decode 1", "decode 8", "decode of bytes", "memory", "file"]
    head += ["training memory", "LoRA tokens", "seeds"]
    lines = [head]
    dense = rows.of("dense", 1.0, "quality")
    for budget in (1.0, *budgets):
        here = [cell.method for cell, part in rows.made if part == "quality" and cell.remaining == budget]
        at = [*dict.fromkeys(sorted(here, key=lambda one: METHODS.index(one.partition(":")[0])))]
        rivals = [one for one in at if one in TWO_STAGE]
        best = min(rivals, key=lambda one: mean_metrics(rows.of(one, budget, "quality"))["eval.loss"], default=None)
        for method in at:
            found = rows.of(method, budget, "quality")
            against = rows.of(best, budget, "quality") if best and method != best else None
            cells_ = [method, f"{budget:g}", *_sizes(found[0]), *_quality(found, against, dense, scores)]
            speed = rows.of(method, budget, "speed")
            cells_ += [*_speed(speed), _of_bytes(speed, found[0], dense)]
            cells_ += [
                f"{speed[0]['peak_bytes'] / 2**20:.0f} MiB" if speed else "",
                f"{found[0]['bytes'] / 1e6:.0f} MB",
            ]
            lines.append([*cells_, *_training(found[0]), str(len(found))])
    return lines


def points(rows: Rows) -> list[dict[str, Any]]:
    """A row a model for `lmray.metrics.pruning_plots.pareto`: how good it is, how large, and how fast."""
    found = []
    for (cell, part), quality in rows.made.items():
        if part != "quality":
            continue
        point = {"method": cell.method, "remaining": quality["prunable_share"], "loss": quality["metrics"]["eval.loss"]}
        if (speed := rows.made.get((cell, "speed"))) is not None:
            for name in SPEEDS:
                point[f"{name}_tokens_per_s"] = statistics.median(pair["own"][name] for pair in speed["pairs"])
        found.append(point)
    return found


def _sizes(found: dict[str, Any]) -> list[str]:
    return [f"{found['prunable_share']:.3f}", f"{found['parameters'] / 1e6:.1f} M"]


def _training(found: dict[str, Any]) -> list[str]:
    if "train_tokens" not in found:  # `base` is not trained
        return ["", ""]
    return [f"{found['train_peak_bytes'] / 2**20:.0f} MiB", f"{found['train_tokens']:,}"]


def _quality(
    found: Sequence[dict[str, Any]],
    against: Sequence[dict[str, Any]] | None,
    dense: Sequence[dict[str, Any]],
    scores: Sequence[str],
) -> list[str]:
    means = mean_metrics(found)
    difference = ""
    if against:
        delta = loss_difference(*([one["losses"] for one in side] for side in (against, found)))
        difference = f"{delta.delta:+.4f} ({delta.low:+.4f} to {delta.high:+.4f})"
    near = f"{relative(means, mean_metrics(dense), scores):.1%}" if dense else ""
    return [f"{means['eval.loss']:.4f}", difference, *(f"{means[name]:.4f}" for name in scores), near]


def _speed(found: Sequence[dict[str, Any]]) -> list[str]:
    """Medians of tokens a CPU second, with the median of the pairs' ratios to dense."""
    if not found:
        return [""] * len(SPEEDS)
    own = {name: statistics.median(pair["own"][name] for pair in found[0]["pairs"]) for name in SPEEDS}
    return [f"{own[name]:.0f} ({_gain(found[0], name):.2f}x)" for name in SPEEDS]


def _gain(speed: dict[str, Any], name: str) -> float:
    return statistics.median(pair["own"][name] / pair["dense"][name] for pair in speed["pairs"])


def _of_bytes(speed: Sequence[dict[str, Any]], found: dict[str, Any], dense: Sequence[dict[str, Any]]) -> str:
    """How many times faster a row is decoded, as a share of how many times fewer bytes its weights are."""
    if not speed or not dense:
        return ""
    return f"{_gain(speed[0], 'decode_1') / (dense[0]['bytes'] / found['bytes']):.0%}"
