"""The rows of `lmray bench prune`: what models are tuned on, what their held-out loss is taken on, what they are asked.

The official splits: of PubMedQA 500 and 500 labelled questions, of E2E the development and the test set, which share no
meaning representation; of one representation in the test set its first text alone counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmray.artifacts.files import write_atomic

TRAIN, HELD_OUT, QUESTIONS = "train.jsonl", "held-out.jsonl", "questions.jsonl"
LABELS = ("yes", "no", "maybe")
Row = dict[str, str]
"""`prompt` and `completion`."""


@dataclass(frozen=True)
class Data:
    """How models are measured on one set of rows."""

    folder: str
    """Below the folder that `LMRAY_BENCH_DATA` names."""
    tasks: tuple[str, ...]
    scores: tuple[str, ...]
    """Metrics that the relative performance is made of, besides the perplexity; more is better."""
    max_new_tokens: int


DATA = {
    "pubmedqa": Data("pubmedqa", ("accuracy", "macro_f1"), ("eval.accuracy", "eval.macro_f1"), 6),
    "e2e": Data("e2e_nlg", ("rouge", "bleu"), ("eval.rougeL", "eval.bleu"), 64),
}


def write_data(name: str, source: Path, target: Path, *, limit: int | None) -> None:
    """Writes three files of rows to folder `target`; `limit`: at most so many held-out examples and questions."""
    parts = (_pubmedqa if name == "pubmedqa" else _e2e)(source)
    target.mkdir(parents=True)
    for file, rows in zip((TRAIN, HELD_OUT, QUESTIONS), parts, strict=True):
        kept = rows if file == TRAIN or limit is None else evenly(rows, limit)
        write_atomic(target / file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _pubmedqa(folder: Path) -> tuple[list[Row], ...]:
    train, test = (read_rows(folder / f"{split}.jsonl") for split in ("train", "test"))
    return [*_explained(train), *_decided(train)], _explained(test), _decided(test)


def _explained(rows: Iterable[dict[str, Any]]) -> list[Row]:
    return [{"prompt": f"{row['context']}\n\n{row['question']}", "completion": row["long_answer"]} for row in rows]


def _decided(rows: Iterable[dict[str, Any]]) -> list[Row]:
    asked = "Answer with yes, no or maybe."
    return [{"prompt": f"{row['context']}\n\n{row['question']} {asked}", "completion": row["decision"]} for row in rows]


def _e2e(folder: Path) -> tuple[list[Row], ...]:
    train, test = (read_rows(folder / f"{split}.jsonl") for split in ("dev", "test"))
    first = list({row["mr"]: row for row in reversed(test)}.values())[::-1]
    said = [[{"prompt": row["mr"], "completion": row["ref"]} for row in rows] for rows in (train, first)]
    return said[0], said[1], said[1]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `rows`, spread evenly over them."""
    return list(rows) if count >= len(rows) else [rows[index * len(rows) // count] for index in range(count)]


def majority(answers: Sequence[str]) -> tuple[float, float]:
    """Accuracy and macro-F1 of who always gives the commonest of `answers`."""
    counts = Counter(answers)
    hits = counts.most_common(1)[0][1]
    return hits / len(answers), 2 * hits / (hits + len(answers)) / len(counts)
