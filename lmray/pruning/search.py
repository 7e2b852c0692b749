"""Where masks come from: a decider says before every step what it is taken with, until what it says is final.

`Search` trains the pruning-decision generator beside the weights (Lu et al., "All-in-One Tuning and Structural Pruning
for Domain-Specific LLMs", arXiv 2412.14426). Each step it draws soft masks, takes the loss on rows that no weight is
trained on, and moves the generator by the gradient of L + alpha * R. Runs on every rank; what is drawn is rank 0's.

Shapes: L layers, U units. Masks are [L, U] of each kind.
Differs from the paper in: where layers are to stay alike, weights are tuned under masks that are alike already; the
noise is a function of seed and step; without it masks are deterministic soft gates (arXiv 2603.08065).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmray.errors import DivergenceError
from lmray.pruning.gates import Gates
from lmray.pruning.generator import Generator, draw, harden, soften
from lmray.pruning.masks import Budget, Masks, budget_loss, remaining
from lmray.pruning.structure import KINDS, Kind

Measure = Callable[[Sequence[torch.Tensor]], tuple[float, list[torch.Tensor]]]
"""See `Gradients` in `lmray.methods.base`."""
Agree = Callable[[torch.Tensor], torch.Tensor]
"""Rank 0's value, on every rank."""

SETTLED = 0.005
"""R below which the budget counts as met."""
PATIENCE = 0.1
"""The search ends early once the budget was met for this share of its steps in a row."""
MAX_GRAD_NORM = 1.0
STAGE = 2 / 3
"""What a stage of a budget that is tightened in steps leaves of the one before it, at least."""


@dataclass(frozen=True)
class Decision:
    """What a step is taken with."""

    scores: Masks
    """Of two units the one with the higher score is worth more."""
    masks: Masks | None = None
    """None: the decision is final, and the budget is cut by the scores."""
    metrics: Mapping[str, float] | None = None


class Decider(ABC):
    """Where masks come from."""

    search_steps: int = 0
    """Steps, from the first, that may take gradients."""

    @abstractmethod
    def decide(self, step: int, gates: Gates, measure: Measure) -> Decision:
        """Before optimizer step `step` (1, 2, ...), until a decision is final."""
        raise NotImplementedError

    def proximal(self, step: int) -> float:
        """What, times the learning rate, LoRA slices of removed units are shrunk by after `step`."""
        return 0.0

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, while nothing is final."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `state` gave."""
        assert not state


@dataclass(frozen=True)
class SearchArgs:
    """How masks are searched."""

    steps: int
    alpha: float
    learning_rate: float
    noisy: bool
    proximal: float
    stages: int
    seed: int


class Search(Decider):
    """Masks by a generator that learns."""

    def __init__(self, budget: Budget, args: SearchArgs, agree: Agree):
        self.budget, self.args, self.agree = budget, args, agree
        self.search_steps = args.steps
        self.generator = Generator(budget.sizes, seed=args.seed)
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=args.learning_rate)
        self.met = 0
        """Steps in a row, up to the last, that met the budget."""

    def decide(self, step: int, gates: Gates, measure: Measure) -> Decision:
        if step > self.args.steps or self.met >= max(1, math.ceil(PATIENCE * self.args.steps)):
            with torch.no_grad():
                return Decision(self._drawn(None))
        sizes, target = self.budget.sizes, self._target(step)
        noise = self._noise(step)
        soft = soften(self._drawn(noise))
        leaves: dict[Kind, torch.Tensor] = {kind: soft[kind].detach().requires_grad_() for kind in KINDS}
        with gates.using(leaves):
            loss, slopes = measure([leaves[kind] for kind in KINDS])
        if not math.isfinite(loss) or not all(bool(slope.isfinite().all()) for slope in slopes):  # alike on all ranks
            which = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
            raise DivergenceError(f"search step {step}", f"the search {which}; the generator was not moved")
        self._learn(
            self.args.alpha * budget_loss(harden(soft), sizes, target)
            + sum((soft[kind] * slope.cpu()).sum() for kind, slope in zip(KINDS, slopes, strict=True))
        )
        with torch.no_grad():
            drawn = self._drawn(noise)
            hard = harden(soften(drawn))
            found = torch.stack([budget_loss(hard, sizes, target), remaining(hard, sizes)])
            short, share = self.agree(found).tolist()  # else ranks could end the search at different steps
        last_stage = target == self.budget.remaining
        self.met = self.met + 1 if last_stage and short < SETTLED else 0
        masks = self.budget.cut(drawn, max(share, target)) if self.budget.shape == "uniform" else hard
        return Decision(drawn, masks, {"prune.search_loss": loss, "prune.budget_loss": short})

    def proximal(self, step: int) -> float:
        grown = math.expm1(min(1.0, step / self.args.steps)) / math.expm1(1.0)
        return self.args.proximal * grown

    def state(self) -> dict[str, torch.Tensor]:
        found = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return found | {"met": torch.tensor(self.met)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.met = int(state["met"])
        weights = {name.removeprefix("generator."): one for name, one in state.items() if name.startswith("generator.")}
        self.generator.load_state_dict(weights)
        found: dict[int, dict[str, Any]] = {}
        for name, tensor in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                found.setdefault(int(index), {})[key] = tensor.clone()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": found})

    def _learn(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()

    def _drawn(self, noise: torch.Generator | None) -> dict[Kind, torch.Tensor]:
        """What rank 0 draws, with the gradient of this rank's generator, which is the same but for rounding."""
        drawn = draw(self.generator(), noise)
        return {kind: one + (self.agree(one.detach()) - one.detach()) for kind, one in drawn.items()}

    def _noise(self, step: int) -> torch.Generator | None:
        if not self.args.noisy:
            return None
        digest = hashlib.sha256(f"{self.args.seed} {step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4]))

    def _target(self, step: int) -> float:
        """The budget of the stage that `step` is in."""
        stage = math.ceil(step * self.args.stages / self.args.steps)
        if stage >= self.args.stages:
            return self.budget.remaining
        return self.budget.remaining ** (stage / self.args.stages)


def stages_to(remaining: float) -> int:
    """The fewest stages of which none removes more than a third of what the one before it left."""
    return max(1, math.ceil(math.log(remaining) / math.log(STAGE) - 1e-9))
