"""Chooses one request's tokens from logits. V is the vocabulary, T tokens of the prompt.

Logits are first processed (repetition penalty, then frequency and presence penalties, then biases, then the grammar's
mask), then drawn from: temperature, `top_k`, `top_p`, `min_p`, in the order of `transformers`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch

from lmray.engines._grammar import Matching
from lmray.engines.base import Request, Sampling, TokenLogprob

CANDIDATES = 256
"""Nucleus sampling looks at this many most likely tokens, and sorts all only where a cut lies beyond them."""
_ROWS = 128
"""Prompt tokens whose logits are normalised together."""


class Chooser:
    """Chooses the tokens of one request, one after another; holds its random numbers and what it has said."""

    def __init__(self, request: Request):
        sampling = self._sampling = request.sampling
        # Python takes a seed without its sign
        self.random = random.Random(None if sampling.seed is None else sampling.seed % 2**64)
        self.matching: Matching | None = None
        """Where the answer stands in its grammar, for requests with one."""
        self._prompt_ids = request.prompt_ids
        self._prompt_logprobs: list[TokenLogprob | None] = [None]
        self._prompt = frozenset(request.prompt_ids) if sampling.repetition_penalty != 1.0 else frozenset()
        self._counts: Counter[int] = Counter()
        self._as_it_is = changes_nothing(sampling)

    def read(self, logits_TV: torch.Tensor, start: int = 0) -> None:
        """Notes the log probabilities that the logits after tokens `start` and following of the prompt give the tokens
        after them. A prompt that is read once more is noted anew."""
        assert self._sampling.prompt_logprobs is not None
        following = self._prompt_ids[start + 1 : start + 1 + len(logits_TV)]
        del self._prompt_logprobs[start + 1 :]
        self._prompt_logprobs += logprobs_of(logits_TV, following, self._sampling.prompt_logprobs)

    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Of each token of the prompt, given those before it, where asked for; None for the first."""
        return None if self._sampling.prompt_logprobs is None else tuple(self._prompt_logprobs)

    def choose(self, logits_V: torch.Tensor, greedy: int) -> tuple[int, TokenLogprob | None]:
        """The next token for `logits_V`, whose highest is at `greedy`, and its log probability where asked for.
        Raises DataError for a grammar that cannot be followed."""
        sampling, token = self._sampling, greedy
        if sampling.temperature > 0 or not self._as_it_is:
            processed_V = logits_V.float().cpu()
            if not self._as_it_is:
                allowed_V = self.matching.allowed() if self.matching is not None else None
                processed_V = process(processed_V, sampling, self._counts, prompt=self._prompt, allowed_V=allowed_V)
            warm = sampling.temperature > 0
            token = draw(processed_V, sampling, self.random.random()) if warm else int(processed_V.argmax())
        self._counts[token] += 1
        if self.matching is not None:
            self.matching.take(token)
        return token, None if sampling.logprobs is None else logprob_of(logits_V, token, sampling.logprobs)


def changes_nothing(sampling: Sampling) -> bool:
    """Whether `process` gives logits back as they are."""
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    return penalties == (1.0, 0.0, 0.0) and not sampling.logit_bias and sampling.grammar is None


def process(
    logits_V: torch.Tensor,
    sampling: Sampling,
    counts: Counter[int],
    *,
    prompt: frozenset[int] = frozenset(),
    allowed_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """`logits_V` as `sampling` wants them before a draw; `counts` says how often each token is in the answer.

    Repetition penalty (Keskar et al. 2019, equation 2) over prompt and answer; frequency and presence penalty over the
    answer, as OpenAI defines them.
    """
    logits_V = logits_V.clone()
    if sampling.repetition_penalty != 1.0 and (seen := sorted(prompt | counts.keys())):
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.frequency_penalty or sampling.presence_penalty) and counts:
        times = torch.tensor(list(counts.values()), dtype=logits_V.dtype)
        logits_V[list(counts)] -= sampling.frequency_penalty * times + sampling.presence_penalty
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        logits_V.index_add_(0, torch.tensor(tokens), torch.tensor(biases, dtype=logits_V.dtype))
    finite = torch.finfo(logits_V.dtype)
    logits_V.clamp_(finite.min, finite.max)  # a penalty can take a logit beyond its number format
    return logits_V if allowed_V is None else logits_V.masked_fill(~allowed_V, -torch.inf)


def draw(logits_V: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """The token at `uniform` (0 to 1) of the distribution that `sampling` cuts out of `logits_V`.

    Temperature first, then `top_k`, then `top_p`, then `min_p`, as `transformers` does; `temperature` must be above 0.
    """
    logits_V = logits_V.double().clamp(max=torch.finfo(torch.float32).max)  # infinities have no differences
    probabilities, ids = _candidates((logits_V - logits_V.max()) / sampling.temperature, sampling)
    cumulative = probabilities.cumsum(0)
    if sampling.top_p < 1.0:  # the smallest set of most likely tokens that holds top_p
        cumulative = cumulative[: int((cumulative < sampling.top_p).sum()) + 1]
    if sampling.min_p > 0.0:
        cumulative = cumulative[: max(1, int((probabilities >= sampling.min_p * probabilities[0]).sum()))]
    place = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    place = min(place, len(cumulative) - 1)
    return place if ids is None else int(ids[place])


def _candidates(scaled_V: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities to draw from and their tokens: the likeliest first, or all in the vocabulary's order."""
    num_kept = min(sampling.top_k or len(scaled_V), len(scaled_V))
    if num_kept < len(scaled_V):
        kept, ids = scaled_V.topk(num_kept)
        return kept.softmax(0), ids
    probabilities_V = scaled_V.softmax(0)
    if sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return probabilities_V, None
    probabilities, ids = probabilities_V.topk(min(CANDIDATES, len(scaled_V)))
    beyond_p = probabilities.sum() < sampling.top_p
    beyond_min_p = sampling.min_p == 0.0 or probabilities[-1] >= sampling.min_p * probabilities[0]
    return probabilities_V.sort(descending=True) if beyond_p and beyond_min_p else (probabilities, ids)


def logprob_of(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """The log probability of `token_id`, and the `num_top` likeliest tokens with theirs."""
    [told] = _logprobs(logits_V[None], [token_id], num_top)
    return told


def logprobs_of(logits_TV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """The same of each of `token_ids`, from the first rows of the logits."""
    told: list[TokenLogprob] = []
    for start in range(0, len(token_ids), _ROWS):
        rows = token_ids[start : start + _ROWS]
        told += _logprobs(logits_TV[start : start + len(rows)], rows, num_top)
    return told


def _logprobs(logits_TV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    logprobs_TV = logits_TV.float().log_softmax(-1)
    ids_T = torch.tensor(token_ids, device=logprobs_TV.device)
    own = logprobs_TV.gather(1, ids_T[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in logprobs_TV.topk(min(num_top, logprobs_TV.shape[1])))
    tops = [tuple(zip(*one, strict=True)) for one in zip(ids, values, strict=True)]
    return [TokenLogprob(*one) for one in zip(token_ids, own, tops, strict=True)]
