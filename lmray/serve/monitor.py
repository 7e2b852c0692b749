"""What is measured and watched about an endpoint besides what its gateway counts: its replicas, and its answers."""

from __future__ import annotations

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from lmray.artifacts.store import Store
from lmray.serve.drift import Drift
from lmray.serve.evaluated import Evaluated
from lmray.serve.fleet import Fleet, Replicas
from lmray.serve.metrics import Metrics
from lmray.serve.plan import ServePlan
from lmray.serve.replica_metrics import ReplicaMetrics
from lmray.serve.sampled import SampledReplicas, Scoring
from lmray.serve.samples import KeptAnswers, Scorer


class Monitoring:
    """Of one endpoint, in its gateway."""

    def __init__(self, replicas: Replicas, plan: ServePlan, tokenizer: PreTrainedTokenizerBase, store: Store):
        """`replicas`: of the base model."""
        settings = plan.monitor
        self._fraction = settings.sample_fraction
        self._evaluated = Evaluated([one.at(plan.store) for one in settings.evaluations])
        self.drift: Drift | None = None
        """Nothing where no answer is sampled."""
        self.scoring: Scoring | None = None
        """The same."""
        if settings.sample_fraction:
            kept = None
            if settings.retention:
                kept = KeptAnswers(store, plan.endpoint, settings.retention, plan.filters)
            self.drift = Drift(store, plan.endpoint, settings)
            self.scoring = Scoring(self.drift, Scorer(replicas, tokenizer, settings), kept=kept)
        self.replicas = self._watched(replicas, name=f"{plan.model_name}@{plan.digest[:12]}")
        """What the gateway asks instead."""

    def merged(self, replicas: Replicas) -> Replicas:
        """What the gateway asks instead of the `replicas` of a merged model."""
        return self._watched(replicas, name=None)

    def _watched(self, replicas: Replicas, *, name: str | None) -> Replicas:
        if self.scoring is None:
            return replicas
        return SampledReplicas(replicas, self.scoring, name=name, fraction=self._fraction)

    def add_to(self, app: FastAPI, fleet: Fleet) -> None:
        """Puts it on the metrics page of `app`, one of `make_app`."""
        metrics: Metrics = app.state.metrics
        numbers = ReplicaMetrics(fleet.stats)
        metrics.add(numbers, numbers.look)
        metrics.add(self._evaluated, self._evaluated.look)
        if self.drift is not None:
            metrics.add(self.drift)
