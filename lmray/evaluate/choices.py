"""How likely a model finds each of several answers, without generating any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmray.data.base import Example
from lmray.data.tokenise import IGNORED, Tokenised, encode, prompt_ids
from lmray.evaluate.loss import example_losses
from lmray.models.load import pad_token_id

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def choice_log_likelihoods(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[Example, Sequence[str]]],
    *,
    shots: Sequence[Example] = (),
    batch_size: int = 16,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda num_done: None,
) -> list[list[float]]:
    """For each example the summed log-likelihood in nats of each of its choices (texts) as the start of the answer,
    given the prompt; the stop token after it does not count. `shots` are solved examples put before each question;
    `progress` is told how many choices are done."""
    shown = [message for shot in shots for message in shot.messages]
    rows = []
    for example, choices in asked:
        prompt = prompt_ids(tokenizer, [*shown, *example.prompt], example.tools)
        for choice in choices:
            ids = encode(tokenizer, choice)
            labels = [IGNORED] * len(prompt) + ids
            rows.append(Tokenised(np.asarray([*prompt, *ids]), np.asarray(labels)))
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))  # like lengths share batches
    found = example_losses(
        model,
        [(rows[index],) for index in order],
        batch_size=batch_size,
        pad_token_id=pad_token_id(tokenizer),
        device=device,
        progress=progress,
    )
    likelihoods = {index: -loss for index, (loss, _) in zip(order, found, strict=True)}
    values = iter(likelihoods[index] for index in range(len(rows)))
    return [[next(values) for _ in choices] for _, choices in asked]
