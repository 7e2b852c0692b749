"""A paged stepper over the tiny model, its steps one after another, and requests in changing company."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines._paged import PagedStepper
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.errors import LmrayError
from tests.unit.engines.conftest import NUM_NEW, STOP

Answers = dict[str, list[int]]
Asked = tuple[str | None, tuple[int, ...]]
"""An adapter, and a prompt."""


def make(model, folders: dict[str, Path] | None = None, *, tokenizer=None, **changes) -> PagedStepper:
    """With the adapters in `folders`; `changes` go to the engine's config."""
    config = Native(**{"max_batch_size": 4, "max_length": 80, **changes})
    stepper = config.make_stepper(model, stop_token_ids=STOP, tokenizer=tokenizer)
    assert isinstance(stepper, PagedStepper)
    for name, folder in (folders or {}).items():
        stepper.adapters.add(name, read_adapter_folder(folder, stepper.adapters.base))
    return stepper


def step(stepper: PagedStepper, answers: Answers) -> None:
    for request_id, outcome in stepper.step():
        if isinstance(outcome, LmrayError):
            raise outcome
        if outcome.token_id is not None:
            answers[request_id].append(outcome.token_id)


def run(stepper: PagedStepper, answers: Answers | None = None) -> Answers:
    """Steps until nothing is left to do; what each request was answered, on top of `answers`."""
    answers = defaultdict(list) if answers is None else answers
    while stepper.busy:
        step(stepper, answers)
    return answers


def in_company(
    stepper: PagedStepper, prompts: Sequence[tuple[int, ...]], source: random.Random, *, max_steps: int
) -> list[tuple[Asked, list[int]]]:
    """Greedy answers to every prompt with every adapter and without one, asked in any order, some steps after each
    other; some are cancelled, and left out."""
    wanted = [(place, adapter) for place in range(len(prompts)) for adapter in (None, "a", "b")]
    source.shuffle(wanted)
    answers: Answers = defaultdict(list)
    stayed: dict[str, Asked] = {}
    for place, adapter in wanted:
        name = f"{place} {adapter}"
        stepper.add(Request(name, prompts[place], Sampling(NUM_NEW), adapter))
        for _ in range(source.randrange(max_steps)):
            step(stepper, answers)
        if source.random() < 0.15:
            stepper.cancel(name)
        else:
            stayed[name] = (adapter, prompts[place])
    run(stepper, answers)
    return [(asked, answers[name]) for name, asked in stayed.items()]
