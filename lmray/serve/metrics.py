"""What the gateway counts, as Prometheus reads it. Labels are names of models and of keys, never a key or a text.

However many adapters and keys there are, the page stays bounded: the `MAX_MODELS` models asked most have labels of
their own and the `MAX_PAIRS` pairs of a model and a key used most theirs; what the rest do counts under `OTHER`. So a
sum over keys is right for every model that is named. A name that leaves the top loses its series, and `OTHER` does not
take them over: counters only grow, and a rate over all of them stays right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.registry import Collector

from lmray.metrics.names import SERVE
from lmray.serve.most_used import MostUsed

T = TypeVar("T", Counter, Gauge, Histogram)
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
MAX_MODELS, MAX_PAIRS = 50, 200
OTHER = "(other)"
"""No model and no key can have this name."""
Look = Callable[[], Awaitable[None]]


class Metrics:
    """One gateway's counts."""

    def __init__(self) -> None:
        disable_created_metrics()  # a series more for each, which tells when the process first met it
        self._registry = CollectorRegistry()
        of_model, of_key = ("model",), ("model", "key")
        self.requests = self._make(Counter, "lmray_serve_requests_total", ("path", *of_key, "status"))
        self.running = self._make(Gauge, "lmray_serve_running_requests", of_model)
        self.prompt_tokens = self._make(Counter, "lmray_serve_prompt_tokens_total", of_key)
        self.answer_tokens = self._make(Counter, "lmray_serve_generated_tokens_total", of_key)
        self.filtered = self._make(Counter, "lmray_serve_filtered_total", ("filter", "on", "kind", "action"))
        self.first_token_s = self._make(
            Histogram, "lmray_serve_time_to_first_token_seconds", of_model, buckets=FIRST_TOKEN_S
        )
        self.queue_s = self._make(
            Histogram, "lmray_serve_queue_time_seconds", of_model, buckets=(0.001, *FIRST_TOKEN_S)
        )
        self.between_tokens_s = self._make(
            Histogram, "lmray_serve_inter_token_latency_seconds", of_model, buckets=BETWEEN_TOKENS_S
        )
        by_key = (self.requests, self.prompt_tokens, self.answer_tokens)
        by_model = (*by_key, self.running, self.first_token_s, self.queue_s, self.between_tokens_s)
        self._models: MostUsed[str] = MostUsed(MAX_MODELS, lambda model: _drop(by_model, {"model": model}))
        self._pairs: MostUsed[tuple[str, str]] = MostUsed(
            MAX_PAIRS, lambda pair: _drop(by_key, {"model": pair[0], "key": pair[1]})
        )
        self._looks: list[Look] = []

    def use(self, model: str, key: str) -> None:
        """Counts a use of `model` with `key`, either maybe empty."""
        if model:
            self._models.use(model)
        if key:
            self._pairs.use((self._named(model), key))

    def labels(self, model: str, key: str) -> tuple[str, str]:
        """How a request that asked `model` with `key` is labelled now. Its next count may need others: what lost its
        place meanwhile has no series, and labels of it would make them anew for good."""
        model = self._named(model)
        return model, key if not key or (model, key) in self._pairs else OTHER

    def _named(self, model: str) -> str:
        return model if not model or model in self._models else OTHER

    def add(self, collector: Collector, look: Look | None = None) -> None:
        """Puts more on the page: what `collector` gives once `look`, which must not take long, is done."""
        self._registry.register(collector)
        if look is not None:
            self._looks.append(look)

    async def page(self) -> bytes:
        """All counts in Prometheus' text format, written by a thread: of thousands of series that takes a while."""
        await asyncio.gather(*(look() for look in self._looks))
        return await asyncio.to_thread(generate_latest, self._registry)

    def _make(self, kind: type[T], name: str, labels: Sequence[str], **told: Any) -> T:
        """A metric of the list."""
        return kind(name.removesuffix("_total"), SERVE[name].help, labels, registry=self._registry, **told)


def _drop(metrics: Sequence[Counter | Gauge | Histogram], labels: dict[str, str]) -> None:
    for metric in metrics:
        metric.remove_by_labels(labels)
