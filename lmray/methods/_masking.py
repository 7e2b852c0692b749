"""The companion of methods that prune: masks on the model, the phase it is in, and what is cut out in the end.

While masks are searched, what is removed may still learn and come back; its LoRA slices are brought nearer to zero by a
proximal step. Once the decision is final, the budget is met exactly, as far as the shape allows, the slices of what is
removed are zero and stay zero, and tuning goes on. Runs on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from lmray.artifacts.files import sha256_json
from lmray.data.batch import Batch
from lmray.methods._distill import distilled
from lmray.methods.base import Companion, Gradients, Objective, Ranks
from lmray.models.precision import round_weights
from lmray.pruning.gates import Gates, kept_units, shrink_removed
from lmray.pruning.masks import Budget, Masks, budget_loss, remaining
from lmray.pruning.record import Counts, Kept, record_of
from lmray.pruning.search import Decider
from lmray.pruning.shrink import num_parameters, shrunk
from lmray.pruning.structure import KINDS, Structure

RECORDED = {
    "remaining": "prune.remaining",
    "budget_loss": "prune.budget_loss",
    "removed_norm": "prune.removed_norm",
}
"""What the log of masks tells again of a step's metrics: what is kept, R and G of the paper."""


class Masking(Companion):
    """Masks on the placed model of `ranks`."""

    LOG: ClassVar[str] = "masks.jsonl"

    def __init__(self, ranks: Ranks, structure: Structure, budget: Budget, decider: Decider, *, distill: float):
        self.ranks, self.structure, self.budget, self.decider, self.distill = ranks, structure, budget, decider, distill
        self.gates = Gates(ranks.model, structure)
        self.search_steps = decider.search_steps
        self.settled = False
        self._metrics: dict[str, float] = {}

    def objective(self, objective: Objective) -> Objective:
        inner = distilled(self.gates, self.distill) if self.distill else objective.loss

        def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            with self.gates.reading(batch.real):
                return inner(model, batch)

        return replace(objective, loss=loss)

    def before_step(self, step: int, gradients: Gradients) -> None:
        if self.settled:
            return
        decision = self.decider.decide(step, self.gates, gradients)
        self.gates.masks = self._agreed(decision.masks or self.budget.cut(decision.scores))
        if decision.masks is None:
            self.settled = self.gates.final = True
            shrink_removed(self.gates, float("inf"))
        left = budget_loss(self.gates.masks, self.budget.sizes, self.budget.remaining)
        share = float(remaining(self.gates.masks, self.budget.sizes))
        self._metrics = {"prune.remaining": share, "prune.budget_loss": float(left), **(decision.metrics or {})}

    def after_step(self, step: int, learning_rate: float) -> None:
        strength = float("inf") if self.settled else self.decider.proximal(step) * learning_rate
        norm = shrink_removed(self.gates, strength)  # what moved a zero was the optimizer's momentum, not a gradient
        self._metrics["prune.removed_norm"] = 0.0 if self.settled else norm

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def record(self) -> dict[str, Any]:
        widths = torch.tensor(self.budget.sizes.widths("channels"), dtype=torch.float32)
        metrics = {"prune.removed_norm": 0.0, **self._metrics}  # of which a run that goes on knows none yet
        return {
            **{name: round(metrics[metric], 6) for name, metric in RECORDED.items()},
            "masks": digest_of(self.gates.masks),
            "groups": self.gates.masks["groups"].sum(1).int().tolist(),
            "channels": (self.gates.masks["channels"] @ widths).int().tolist(),
            "phase": "frozen" if self.settled else "search",
        }

    def state(self) -> dict[str, torch.Tensor]:
        masks = {f"masks.{kind}": self.gates.masks[kind] for kind in KINDS}
        own = {} if self.settled else {f"decider.{name}": one for name, one in self.decider.state().items()}
        return {**masks, **own, "settled": torch.tensor(self.settled)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.gates.masks = {kind: state[f"masks.{kind}"] for kind in KINDS}
        self.settled = self.gates.final = bool(state["settled"])
        if not self.settled:
            prefix = "decider."
            own = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
            self.decider.load(own)
            return
        left = budget_loss(self.gates.masks, self.budget.sizes, self.budget.remaining)
        share = float(remaining(self.gates.masks, self.budget.sizes))
        self._metrics = {"prune.remaining": share, "prune.budget_loss": float(left)}

    def kept(self) -> Smaller:
        return Smaller(self.structure, self.budget, kept_units(self.gates.masks))

    def _agreed(self, masks: Masks) -> Masks:
        """Rank 0's, on every rank."""
        return {kind: self.ranks.of_first(masks[kind].detach()) for kind in KINDS}


@dataclass
class Smaller:
    """What is left of a model once its adapter is merged."""

    structure: Structure
    budget: Budget
    units: Kept
    num_whole: int = 0
    """Weights of the model before it was cut, once it is."""

    def model(self, adapted: Any, dtype: torch.dtype) -> Any:
        """Merged and cut in float32, and rounded once."""
        held = adapted.get_base_model().dtype
        whole = adapted.float().merge_and_unload(safe_merge=True)
        self.num_whole = num_parameters(whole)
        budget = self.budget
        cut = shrunk(whole, self.structure, self.units, budget.shape, multiple_of=budget.multiple_of)
        return round_weights(round_weights(cut, dtype), held)

    def record(self, folder: Path, model: Any, parent: Mapping[str, Any]) -> None:
        """`pruning.json`: which units were kept, of which model, what was asked and what it came to."""
        counts = Counts(before=self.num_whole, after=num_parameters(model))
        asked, shape = self.budget.remaining, self.budget.shape
        record_of(self.structure.sizes, self.units, shape=shape, asked=asked, parent=parent, parameters=counts).save(
            folder
        )


def digest_of(masks: Masks) -> str:
    """Of which units are kept: alike for the same, on every machine."""
    return sha256_json({kind: (masks[kind] > 0.5).int().tolist() for kind in KINDS})[:16]
