"""What is measured and watched about an endpoint besides what its gateway counts: its replicas, and its answers."""

from __future__ import annotations

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from lmray.artifacts.store import Store
from lmray.serve.drift import Drift
from lmray.serve.fleet import Fleet, Replicas
from lmray.serve.metrics import Metrics
from lmray.serve.prepare import ServePlan
from lmray.serve.replica_metrics import ReplicaMetrics
from lmray.serve.samples import KeptAnswers, SampledReplicas, Scorer


class Monitoring:
    """Of one endpoint, in its gateway."""

    def __init__(self, replicas: Replicas, plan: ServePlan, tokenizer: PreTrainedTokenizerBase, store: Store):
        settings = plan.monitor
        self.drift: Drift | None = None
        """Nothing where no answer is sampled."""
        self.replicas = replicas
        """What the gateway asks instead."""
        if settings.sample_fraction:
            self.drift, kept = Drift(store, plan.endpoint, settings), None
            if settings.retention:
                kept = KeptAnswers(store, plan.endpoint, settings.retention, plan.filters)
            self.replicas = SampledReplicas(
                replicas,
                self.drift,
                Scorer(replicas, tokenizer, settings),
                base=f"{plan.model_name}@{plan.digest[:12]}",
                fraction=settings.sample_fraction,
                kept=kept,
            )

    def add_to(self, app: FastAPI, fleet: Fleet) -> None:
        """Puts it on the metrics page of `app`, one of `make_app`."""
        metrics: Metrics = app.state.metrics
        numbers = ReplicaMetrics(fleet.stats)
        metrics.add(numbers, numbers.look)
        if self.drift is not None:
            metrics.add(self.drift)
