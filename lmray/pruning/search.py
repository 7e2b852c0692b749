"""Where masks come from: a decider says before every step what it is taken with, until what it says is final.

`Search` trains the pruning-decision generator beside the weights (Lu et al., "All-in-One Tuning and Structural Pruning
for Domain-Specific LLMs", arXiv 2412.14426). Each step it draws soft masks, takes the loss on rows that no weight is
trained on, and moves the generator by its gradient. Runs on every rank; what is drawn is rank 0's.

Shapes: L layers, U units. Masks are [L, U] of each kind.
Differs from the paper in: the budget is met in every step, by the level from which on units are kept, in place of a
penalty that a short search does not live to see met; it falls to what is asked little by little. The generator starts
from what units bring into the residual stream, not from chance. Whole layers can go first, those of least block
influence. Where layers are to stay alike, they are in every mask. Weights are tuned under the decisions without noise;
without any, masks are deterministic soft gates (arXiv 2603.08065).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lmray.errors import DivergenceError
from lmray.pruning.depth import adding_influence, most_influential
from lmray.pruning.gates import Gates
from lmray.pruning.generator import WIDTH, Generator, draw, harden, soften
from lmray.pruning.importance.wanda_sp import Squares, adding_inputs, no_inputs, scores_of
from lmray.pruning.masks import Budget, Masks, all_kept
from lmray.pruning.structure import KINDS, Kind


class Ranks(Protocol):
    """See `Ranks` in `lmray.methods.base`."""

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor: ...


Measure = Callable[[Sequence[torch.Tensor]], tuple[float, list[torch.Tensor]]]
"""See `Gradients` in `lmray.methods.base`."""
Slopes = dict[Kind, torch.Tensor]
"""[L, U] of each kind: of a loss, by masks."""

ARRIVAL = 1 / 3
"""Share of the search's steps over which the budget falls to what is asked, where it is not tightened in stages."""
MAX_GRAD_NORM = 1.0
OF_ALL = 0.1
"""Share of the learning rate by which the generator's encoder moves: with it the scores of all units of a layer do."""
REACH = 3.0
"""How far a score can move in a search, in standard deviations of those that it starts from."""
MARGIN = 3.0
"""What scores are above the level, at least, where nothing is removed."""
MEASURED = 0.1
"""Share of the search's steps, the first, in which everything is kept and units are weighed by what they bring into the
residual stream, from which the generator starts. The others move it."""
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
    learning_rate: float | None
    """None: `default_rate`."""
    noisy: bool
    proximal: float
    stages: int
    seed: int


class Search(Decider):
    """Masks by a generator that learns."""

    def __init__(self, budget: Budget, args: SearchArgs, ranks: Ranks):
        self.budget, self.args, self.ranks = budget, args, ranks
        self.search_steps = args.steps
        self.generator = Generator(budget.sizes, seed=args.seed)
        self.weighing = math.ceil(MEASURED * args.steps)
        self.moves = args.steps - self.weighing
        """Steps that move the generator; of a search of one step, none."""
        self.learning_rate = args.learning_rate or default_rate(max(1, self.moves))
        rest = [one for name, one in self.generator.named_parameters() if not name.startswith("heads.")]
        groups = [{"params": self.generator.heads.parameters(), "share": 1.0}, {"params": rest, "share": OF_ALL}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        self.inputs: Squares = {}
        """What units are weighed by, of all search rows so far; empty once they are."""
        self.influence = torch.zeros(budget.sizes.layers, dtype=torch.float64)
        """[L]: what layers are weighed by, alike, where some are to go."""
        self.dropped = torch.zeros(budget.sizes.layers, dtype=torch.bool)
        """[L]: layers that are removed whole."""

    def decide(self, step: int, gates: Gates, measure: Measure) -> Decision:
        if step <= self.weighing:
            return self._weighed(step, gates, measure)
        if step == self.weighing + 1:
            self.generator.say(standardised(scores_of(gates.model, gates.structure, self.inputs)))
            self.inputs = {}
        if (staying := self._staying(step)) != int((~self.dropped).sum()):
            self.dropped = self.ranks.of_first(self._least_influential(staying))
        if step > self.args.steps:
            return Decision(self._final())
        target = self._target(step)
        soft = soften(draw(self._above(target), self._noise(step)))
        loss, slopes = self._slopes(step, soft, gates, measure)
        self._learn(step, torch.stack([(soft[kind] * slopes[kind]).sum() for kind in KINDS]).sum())
        with torch.no_grad():
            scores = self._above(target)
        return Decision(scores, harden(soften(scores)), {"prune.search_loss": loss})

    def _weighed(self, step: int, gates: Gates, measure: Measure) -> Decision:
        """A step in which everything is kept."""
        everything = all_kept(self.budget.sizes)
        inputs, influence = no_inputs(gates.structure), torch.zeros_like(self.influence)
        model, real = gates.model, lambda: gates.real_BT
        with ExitStack() as watching:
            watching.enter_context(adding_inputs(model, gates.structure, inputs, real))
            if self.budget.share_of_layers < 1:
                watching.enter_context(adding_influence(model, influence, real))
            loss, _ = self._slopes(step, everything, gates, measure)
        self.influence = self.influence + self.ranks.sum_tensor(influence)
        before = self.inputs or no_inputs(gates.structure)
        self.inputs = {kind: before[kind] + self.ranks.sum_tensor(inputs[kind]) for kind in KINDS}
        return Decision(everything, everything, {"prune.search_loss": loss})

    def _slopes(
        self, step: int, masks: Masks, gates: Gates, measure: Measure
    ) -> tuple[float, dict[Kind, torch.Tensor]]:
        """The search loss under `masks`, and its slopes by them."""
        leaves: dict[Kind, torch.Tensor] = {kind: masks[kind].detach().clone().requires_grad_() for kind in KINDS}
        with gates.using(leaves):
            loss, slopes = measure([leaves[kind] for kind in KINDS])
        if not math.isfinite(loss) or not all(bool(slope.isfinite().all()) for slope in slopes):  # alike on all ranks
            which = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
            raise DivergenceError(f"search step {step}", f"the search {which}; the generator was not moved")
        return loss, {kind: slope.cpu() for kind, slope in zip(KINDS, slopes, strict=True)}

    def proximal(self, step: int) -> float:
        grown = math.expm1(min(1.0, step / self.args.steps)) / math.expm1(1.0)
        return self.args.proximal * grown

    def state(self) -> dict[str, torch.Tensor]:
        found = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        found |= {f"inputs.{kind}": one for kind, one in self.inputs.items()}
        return found | {"influence": self.influence, "dropped": self.dropped}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.inputs = {kind: state[f"inputs.{kind}"].clone() for kind in KINDS if f"inputs.{kind}" in state}
        self.influence, self.dropped = state["influence"].clone(), state["dropped"].clone()
        weights = {name.removeprefix("generator."): one for name, one in state.items() if name.startswith("generator.")}
        self.generator.load_state_dict(weights)
        found: dict[int, dict[str, Any]] = {}
        for name, tensor in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                found.setdefault(int(index), {})[key] = tensor.clone()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": found})

    def _learn(self, step: int, loss: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.learning_rate * (1 - step / (self.args.steps + 1))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()

    def _above(self, target: float) -> dict[Kind, torch.Tensor]:
        """Scores above the level from which units are kept where `target` of the weights are: rank 0's, with the
        gradient of this rank's generator, which is the same but for rounding."""
        scores = self.generator()
        agreed = self._agreed(scores)
        levels = levels_of(agreed, self.budget, target)
        return {kind: one + (agreed[kind] - one.detach()) - levels[kind] for kind, one in scores.items()}

    @torch.no_grad()
    def _final(self) -> dict[Kind, torch.Tensor]:
        """Scores above one level for all layers and kinds, so that they can be compared: what `levels_of` cuts by."""
        agreed = self._agreed(self.generator())
        level = level_of(agreed, self.budget, self.budget.remaining)
        return {kind: one - level for kind, one in agreed.items()}

    def _agreed(self, scores: Masks) -> dict[Kind, torch.Tensor]:
        """Rank 0's `scores`; of dropped layers -inf."""
        agreed: Masks = {kind: self.ranks.of_first(one.detach()) for kind, one in scores.items()}
        return {kind: one.masked_fill(self.dropped[:, None], -math.inf) for kind, one in agreed.items()}

    def _least_influential(self, staying: int) -> torch.Tensor:
        dropped = torch.ones(self.budget.sizes.layers, dtype=torch.bool)
        dropped[most_influential(self.influence.tolist(), staying)] = False
        return dropped

    def _staying(self, step: int) -> int:
        """Layers that are there in `step`. In stages they go before anything else does."""
        layers = self.budget.sizes.layers
        asked = self.budget.layers or layers
        if self.args.stages == 1 or step > self.args.steps:
            return asked
        target = self._target(step)
        if target <= self.budget.remaining:
            return asked
        staying = max(asked, math.ceil(layers * target - 1e-9))
        while staying > asked and replace(self.budget, layers=staying).least > target:
            staying -= 1  # fewer of which each keeps enough
        return staying

    def _noise(self, step: int) -> torch.Generator | None:
        if not self.args.noisy:
            return None
        digest = hashlib.sha256(f"{self.args.seed} {step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4]))

    def _target(self, step: int) -> float:
        """What is to remain after `step`. At once: layers that go are gone from the first move on."""
        asked, stages, move = self.budget.remaining, self.args.stages, step - self.weighing
        if stages == 1:
            whole = self.budget.share_of_layers
            fallen = min(1.0, move / (ARRIVAL * self.moves))
            return asked if fallen == 1.0 else whole - fallen * (whole - asked)
        stage = math.ceil(move * stages / self.moves)
        return asked if stage >= stages else asked ** (stage / stages)


def standardised(scores: Masks) -> dict[Kind, torch.Tensor]:
    """The same order over all units, and a standard normal distribution."""
    flat = torch.cat([scores[kind].flatten() for kind in KINDS])
    ranks = flat.argsort(stable=True).argsort(stable=True)
    normal = torch.special.ndtri((ranks.double() + 0.5) / len(ranks)).float()
    parts = normal.split([scores[kind].numel() for kind in KINDS])
    return {kind: part.view_as(scores[kind]) for kind, part in zip(KINDS, parts, strict=True)}


def level_of(scores: Masks, budget: Budget, target: float) -> torch.Tensor:
    """From where on units are kept where `target` of the prunable weights are, in layers of different widths."""
    flat = torch.cat([scores[kind].flatten() for kind in KINDS])
    costs = [torch.tensor(budget.sizes.costs(kind), dtype=torch.float64).expand_as(scores[kind]) for kind in KINDS]
    there = ~flat.isneginf()  # what is of a dropped layer is not
    falling, order = flat[there].sort(descending=True, stable=True)
    spent = torch.cat([one.flatten() for one in costs])[there][order].cumsum(0)
    return _between(falling, int((spent <= target * budget.sizes.prunable).sum()))


def levels_of(scores: Masks, budget: Budget, target: float) -> dict[Kind, torch.Tensor]:
    """[L, 1] of each kind: from where on units are kept where `target` of the prunable weights are. One for all layers
    and kinds; where layers are to stay alike, that of each."""
    level = level_of(scores, budget, target)
    if budget.shape != "uniform":
        return {kind: level.expand(budget.sizes.layers, 1) for kind in KINDS}
    masks = budget.cut({kind: scores[kind] - level for kind in KINDS}, target)
    counts = {kind: int(masks[kind].sum(1).max()) for kind in KINDS}
    rows = {kind: scores[kind].sort(dim=1, descending=True).values for kind in KINDS}
    return {kind: torch.stack([_between(row, counts[kind]) for row in rows[kind]])[:, None] for kind in KINDS}


def _between(falling: torch.Tensor, kept: int) -> torch.Tensor:
    """Halfway between the last of the `kept` highest and the next; well below all where all are kept, and above all
    that are -inf."""
    if falling[0].isneginf():
        return torch.zeros(())
    if kept >= len(falling):
        return falling[-1] - MARGIN
    return falling[max(kept - 1, 0) : kept + 1].mean()


def default_rate(steps: int) -> float:
    """The learning rate at which a score can move by REACH in a search of so many steps: Adam moves each of its
    weights by the rate at most, which falls to zero, and what they are multiplied with is normalised."""
    return REACH / (0.8 * WIDTH * steps / 2)  # 0.8: of a standard normal, the mean magnitude


def stages_to(remaining: float) -> int:
    """The fewest stages of which none removes more than a third of what the one before it left."""
    return max(1, math.ceil(math.log(remaining) / math.log(STAGE) - 1e-9))
