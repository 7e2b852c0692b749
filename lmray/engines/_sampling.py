"""Draws one token from logits. V is the vocabulary."""

from __future__ import annotations

import torch

from lmray.engines.base import Sampling

CANDIDATES = 256
"""Nucleus sampling looks at this many most likely tokens, and sorts all only where they hold less than `top_p`."""


def draw(logits_V: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """The token at `uniform` (0 to 1) of the distribution that `sampling` cuts out of `logits_V`.

    Temperature first, then `top_k`, then `top_p`, as `transformers` does; `temperature` must be above 0.
    """
    scaled_V = logits_V.double() / sampling.temperature
    num_kept = min(sampling.top_k or len(scaled_V), len(scaled_V))
    if num_kept < len(scaled_V):
        kept, ids = scaled_V.topk(num_kept)
        probabilities = kept.softmax(0)
    elif sampling.top_p < 1.0:
        probabilities_V = scaled_V.softmax(0)
        probabilities, ids = probabilities_V.topk(min(CANDIDATES, len(scaled_V)))
        if probabilities.sum() < sampling.top_p:
            probabilities, ids = probabilities_V.sort(descending=True)
    else:
        probabilities, ids = scaled_V.softmax(0), None
    cumulative = probabilities.cumsum(0)
    if sampling.top_p < 1.0:  # the smallest set of most likely tokens that holds top_p
        cumulative = cumulative[: int((cumulative < sampling.top_p).sum()) + 1]
    place = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    place = min(place, len(cumulative) - 1)
    return place if ids is None else int(ids[place])
