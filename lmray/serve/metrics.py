"""What the gateway counts, as Prometheus reads it. Labels are names of models and of keys, never a key or a text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """One gateway's counts."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        of_key, of_model = ["model", "key"], ["model"]
        self.requests = Counter(
            "lmray_serve_requests",
            "Requests by the status of their answer; 499: the client left, 5xx also where an answer broke off.",
            ["path", "model", "key", "status"],
            registry=registry,
        )
        self.running = Gauge("lmray_serve_running_requests", "Requests being answered.", of_model, registry=registry)
        self.prompt_tokens = Counter(
            "lmray_serve_prompt_tokens", "Tokens of prompts, once a prompt.", of_key, registry=registry
        )
        self.answer_tokens = Counter("lmray_serve_generated_tokens", "Tokens of answers.", of_key, registry=registry)
        self.filtered = Counter(
            "lmray_serve_filtered", "Matches of filters in prompts and answers.", ["filter", "on"], registry=registry
        )
        self.first_token_s = Histogram(
            "lmray_serve_time_to_first_token_seconds",
            "From the whole request to an answer's first token.",
            of_model,
            registry=registry,
            buckets=FIRST_TOKEN_S,
        )
        self.queue_s = Histogram(
            "lmray_serve_queue_time_seconds",
            "Part of that before the engine began to read the prompt.",
            of_model,
            registry=registry,
            buckets=(0.001, *FIRST_TOKEN_S),
        )
        self.between_tokens_s = Histogram(
            "lmray_serve_inter_token_latency_seconds",
            "From a token of an answer to its next.",
            of_model,
            registry=registry,
            buckets=BETWEEN_TOKENS_S,
        )

    def page(self) -> bytes:
        """All counts in Prometheus' text format."""
        return generate_latest(self._registry)
