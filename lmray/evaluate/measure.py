"""All of a job's tasks on one loaded model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmray.artifacts.files import write_atomic
from lmray.data.base import Example
from lmray.data.batch import Packed
from lmray.evaluate.answers import Answer, answer_examples, mean_scores, sample_evenly
from lmray.evaluate.loss import held_out_loss
from lmray.job import EvaluateArgs
from lmray.models.load import pad_token_id

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut:
    """What to measure on."""

    examples: Sequence[Example]
    rows: Sequence[Packed]
    """The same examples, tokenised, for the loss."""


@dataclass(frozen=True)
class Measured:
    """One target's metrics (`eval.*`, or `base.*`) and its answers."""

    metrics: dict[str, float]
    answers: tuple[Answer, ...]

    def save_answers(self, path: Path) -> None:
        """One JSON line an answer."""
        write_atomic(path, "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in self.answers))


def measure(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    args: EvaluateArgs,
    *,
    adapter: str | None,
    prefix: str = "eval",
    loss: float | None = None,
    shots: Sequence[Example] = (),
    device: str = "cpu",
    threads: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Runs every task of `args`. `adapter` None measures the base model even where an adapter is attached.

    `loss` is the held-out loss where it is known already. It is taken without shots: it asks how likely the right
    answers are, not what is copied from solved examples.
    """
    metrics: dict[str, float] = {}
    if any(task.name == "loss" for task in args.tasks) and held_out.rows:
        if loss is None:
            with _with_adapter(model, adapter):
                loss = held_out_loss(
                    model, held_out.rows, batch_size=8, pad_token_id=pad_token_id(tokenizer), device=device
                )
        metrics |= {f"{prefix}.loss": loss, f"{prefix}.perplexity": math.exp(loss)}
    answers: list[Answer] = []
    if any(task.generates for task in args.tasks) and held_out.examples:
        chosen = sample_evenly(held_out.examples, args.max_examples)
        answers = answer_examples(
            model, tokenizer, chosen, args, adapter=adapter, shots=shots, threads=threads, progress=progress
        )
        metrics |= mean_scores(answers, prefix)
    return Measured(metrics, tuple(answers))


def _with_adapter(model: torch.nn.Module, adapter: str | None) -> AbstractContextManager[object]:
    """Inside, an attached adapter is off where `adapter` is None."""
    if adapter is None and hasattr(model, "disable_adapter"):
        return model.disable_adapter()  # type: ignore[operator]
    return nullcontext()
