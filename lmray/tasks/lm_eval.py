"""Benchmarks of the lm-evaluation-harness (EleutherAI), on the loaded model with its adapter.

Gao et al., A framework for few-shot language model evaluation. The harness asks its own questions in its own words and
scores the answers; the job's data plays no part. Optional: needs the package `lm_eval`.
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field

from lmray.errors import ConfigError, DataError, did_you_mean
from lmray.models.precision import computing
from lmray.tasks.base import Task

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

WHERE = "task `lm_eval`"
NUM_RESAMPLES = 1000
"""Of the harness' bootstrap, for standard errors of metrics that are no means."""
SEED = 1234
"""The harness' own, of which solved examples are drawn and answers sampled."""

Names = Annotated[
    tuple[str, ...], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


class LmEval(Task):
    """`eval.lm_eval.BENCHMARK.METRIC` with its standard error, `..._stderr`: benchmarks of the lm-evaluation-harness.

    A metric that the harness takes in several ways ends in the way's name: `gsm8k.exact_match.strict-match`.
    """

    tasks: Names
    """Names of benchmarks, groups or tags of the harness, or patterns: `[arc_easy, "mmlu_*"]`."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples before each question. Empty: the benchmark's own number; one that fixes it at 0 keeps that."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Questions of each benchmark, its first. Empty: all."""
    apply_chat_template: bool = False
    """Ask in the model's chat template instead of plain text."""
    include_path: str | None = None
    """Folder with benchmarks of one's own, in the harness' YAML; Python code that they name is run."""

    needs = "model"

    def check(self) -> None:
        """Also loads the benchmarks' data, which comes from the Hugging Face Hub where the benchmark does not say else:
        what is missing is missed before a model is trained."""
        if find_spec("lm_eval") is None:
            hint = "pip install 'lmray[lm-eval]', here and on the workers, or leave it out of `evaluate.tasks`"
            raise ConfigError(WHERE, "needs the package `lm_eval`", hint=hint)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(WHERE, f"`include_path` is `{self.include_path}`", allowed="a folder")
        known = _known(self.include_path, self.tasks)
        for name in self.tasks:
            if not known.match_tasks([name]):
                hint = did_you_mean(name, known.all_tasks) or "`lm-eval ls tasks` lists them"
                raise ConfigError(WHERE, f"unknown benchmark `{name}`", hint=hint)
        for name, benchmark in self._load()["tasks"].items():
            if getattr(benchmark, "UNSAFE_CODE", False):
                found = f"`{name}` runs code that the model writes, on this machine"
                raise ConfigError(WHERE, found, hint="leave it out of `tasks`")

    def run(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> dict[str, float]:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        benchmarks = self._load()
        for benchmark in benchmarks["tasks"].values():
            own = benchmark.get_config("num_fewshot")
            if own != 0:
                benchmark.set_config("num_fewshot", (own or 0) if self.num_fewshot is None else self.num_fewshot)
            benchmark.set_fewshot_seed(seed=SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        with _quiet(), computing(model), torch.random.fork_rng():
            torch.manual_seed(SEED)
            found: Any = evaluator.evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),  # type: ignore[arg-type]
                benchmarks,
                limit=self.limit,
                bootstrap_iters=NUM_RESAMPLES,
                log_samples=False,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.apply_chat_template,
            )
        return metrics_of({**found["results"], **found.get("groups", {})})

    def _load(self) -> Any:
        known = _known(self.include_path, self.tasks)
        try:
            with _quiet():
                return known.load(known.match_tasks(list(self.tasks)))
        except Exception as error:  # of the harness, of `datasets`, of a benchmark's own code
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            hint = "its data comes from the Hugging Face Hub, where its YAML names no local files"
            raise DataError(f"{WHERE}: {', '.join(self.tasks)}", f"cannot be loaded: {reason}", hint=hint) from error


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness' `{benchmark: {"acc,none": ..., "acc_stderr,none": ...}}` as `lm_eval.BENCHMARK.METRIC[.FILTER]` and
    the same with `_stderr`; what is no number (a standard error of one question) is left out."""
    found: dict[str, float] = {}
    for benchmark, values in results.items():
        for key, value in values.items():
            metric, sign, way = key.partition(",")
            if sign and isinstance(value, int | float) and value == value:
                bare, error = metric.removesuffix("_stderr"), "_stderr" if metric.endswith("_stderr") else ""
                name = ".".join(["lm_eval", benchmark, bare, *([] if way == "none" else [way])])
                found[name + error] = float(value)
    return found


def _known(include_path: str | None, tasks: tuple[str, ...]) -> TaskManager:
    """The benchmarks there are. Those of the harness, thousands of files, are read where not all of `tasks` are among
    those of one's own."""
    if include_path is not None:
        own = _index(include_path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return _index(include_path, include_defaults=True)


@cache
def _index(include_path: str | None, *, include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=include_path, include_defaults=include_defaults)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' log and bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
