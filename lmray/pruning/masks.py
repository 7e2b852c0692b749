"""Which units are kept: masks over all layers, what they cost, and the nearest masks that can be exported.

Shapes: L decoder layers, U units of a kind in a layer. A mask is 1 where a unit is kept, 0 where it is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from lmray.errors import ConfigError
from lmray.pruning.structure import KINDS, Kind, Sizes

Masks = Mapping[Kind, torch.Tensor]
"""[L, U] of each kind."""
Shape = Literal["uniform", "padded", "hetero"]
"""`uniform`: every layer keeps as much. `padded`: any masks; what is smaller is filled up with zeros. `hetero`: any
masks; MLPs have widths of their own."""


def all_kept(sizes: Sizes) -> dict[Kind, torch.Tensor]:
    """Masks that keep everything."""
    return {kind: torch.ones(sizes.layers, sizes.units(kind)) for kind in KINDS}


def remaining(masks: Masks, sizes: Sizes) -> torch.Tensor:
    """The share of prunable weights that `masks` keep: a scalar."""
    kept = [(masks[kind] * _costs(sizes, kind, masks[kind])).sum() for kind in KINDS]
    return (kept[0] + kept[1]) / sizes.prunable


def budget_loss(masks: Masks, sizes: Sizes, target: float) -> torch.Tensor:
    """R = log(max(r, p) / min(r, p)) of what `masks` keep, r, and what they are to keep, p: a scalar, 0 where they do
    (arXiv 2412.14426; the form is that of DISP-LLM, arXiv 2410.11988)."""
    found = remaining(masks, sizes)
    return (torch.log(found.clamp(min=1e-10)) - torch.log(torch.tensor(target))).abs()


def project(
    scores: Masks,
    sizes: Sizes,
    target: float,
    *,
    shape: Shape,
    multiple_of: int,
    group_counts: Sequence[int] | None = None,
    worth: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
) -> dict[Kind, torch.Tensor]:
    """The masks that keep the units of the highest `scores`, at most `target` of all prunable weights and as much of
    it as `shape` allows. A layer whose scores are all -inf keeps nothing; every other one some of each kind.

    `multiple_of`: of the MLP's width, but for `padded`. `group_counts`: of `uniform`, how many key-value heads there
    may be, rising; none: any. `worth`: of a weight, of a unit with this score; of the generator's scores, which are
    logits, the chance to be kept. Raises ConfigError where the least there is in each layer is more than that.
    """
    kept_L = ~torch.isneginf(scores["groups"]).all(1)
    among: Masks = {kind: scores[kind][kept_L] for kind in KINDS}
    if shape == "uniform":
        worths: Masks = {kind: worth(among[kind].float()) for kind in KINDS}
        groups, channels = _uniform(worths, sizes, target, multiple_of, group_counts or range(1, sizes.groups + 1))
        counts = {"groups": [groups] * len(among["groups"]), "channels": [channels] * len(among["groups"])}
    else:
        counts = _by_layer(among, sizes, target, _step(sizes, multiple_of) if shape == "hetero" else 1)
    masks: dict[Kind, torch.Tensor] = {kind: torch.zeros_like(scores[kind], dtype=torch.float32) for kind in KINDS}
    for kind in KINDS:
        masks[kind][kept_L] = _highest(among[kind], counts[kind])
    return masks


def least(sizes: Sizes, multiple_of: int, groups: int = 1, *, layers: int | None = None) -> float:
    """The least share of prunable weights that `project` can keep, with so many key-value heads, in all or in so many
    layers."""
    narrowest = _cost(sizes, "groups", groups) + _cost(sizes, "channels", _step(sizes, multiple_of))
    return narrowest * (layers or sizes.layers) / sizes.prunable


@dataclass(frozen=True)
class Budget:
    """What is to be left of a model."""

    sizes: Sizes
    remaining: float
    """Share of the prunable weights."""
    shape: Shape
    group_counts: tuple[int, ...] = ()
    """How many key-value heads a `uniform` model may have, rising; empty: any."""
    multiple_of: int = 1
    """Of the MLP's width; of `padded`, as it is written. Of single units where they are wider."""
    layers: int | None = None
    """Decoder layers that stay; None: all."""

    @property
    def share_of_layers(self) -> float:
        """Share of the prunable weights that the layers have which stay."""
        return (self.layers or self.sizes.layers) / self.sizes.layers

    @property
    def least(self) -> float:
        """The smallest `remaining` there is."""
        multiple_of = 1 if self.shape == "padded" else self.multiple_of
        return least(self.sizes, multiple_of, self.fewest_groups, layers=self.layers)

    @property
    def fewest_groups(self) -> int:
        """Key-value heads that a layer keeps at least."""
        return self.group_counts[0] if self.group_counts else 1

    def cut(self, scores: Masks, share: float | None = None) -> dict[Kind, torch.Tensor]:
        """The masks that can be kept: of the highest `scores`, within the budget, or within a larger `share`."""
        return project(
            scores,
            self.sizes,
            self.remaining if share is None else share,
            shape=self.shape,
            multiple_of=self.multiple_of,
            group_counts=self.group_counts,
        )


def _uniform(
    worths: Masks, sizes: Sizes, target: float, multiple_of: int, group_counts: Sequence[int]
) -> tuple[int, int]:
    """Units of each kind in every layer that stays. Of the pairs that fit, the one that keeps what is worth most: every
    worth counts by the weights that its unit has."""
    layers = len(worths["groups"])
    room = _room(target, sizes) / layers
    best: tuple[float, tuple[int, int]] | None = None
    gains = {kind: _gains(worths[kind], sizes, kind) for kind in KINDS}
    totals = {kind: [0, *accumulate(sizes.costs(kind))] for kind in KINDS}
    step = _step(sizes, multiple_of)
    widths = sorted({*range(step, sizes.blocks + 1, step), sizes.blocks})  # all of it is no new width
    for groups in group_counts:
        left = room - totals["groups"][groups]
        blocks = [count for count in widths if totals["channels"][count] <= left]
        if not blocks:
            continue
        gain = float(gains["groups"][groups - 1] + gains["channels"][blocks[-1] - 1])
        if best is None or gain > best[0]:
            best = (gain, (groups, blocks[-1]))
    if best is None:
        fewest = group_counts[0]
        heads = "one key-value group" if fewest == 1 else f"{fewest} key-value groups"
        raise ConfigError(
            "method.remaining",
            f"{target:g} is less than {heads} and an MLP of {step * sizes.block} channels in every layer",
            allowed=f"{least(sizes, multiple_of, fewest, layers=layers):.3f} to 1",
        )
    return best[1]


def _gains(worths_LU: torch.Tensor, sizes: Sizes, kind: Kind) -> torch.Tensor:
    """[U]: what the 1, 2, ... highest units of every layer are worth together."""
    gains_LU = worths_LU * _costs(sizes, kind, worths_LU)
    return gains_LU.sort(dim=1, descending=True).values.sum(0).cumsum(0)


def _by_layer(scores: Masks, sizes: Sizes, target: float, step: int) -> dict[Kind, list[int]]:
    """Units of each kind in each layer: the fewest of each, then the highest scores of all layers for as long as they
    fit; blocks of the MLP `step` at a time, by their mean score, and what is left beyond a multiple of it together."""
    steps: dict[Kind, int] = {"groups": 1, "channels": step}
    layers = len(scores["groups"])
    counts: dict[Kind, list[int]] = {kind: [steps[kind]] * layers for kind in KINDS}
    room = _room(target, sizes) - sum(_cost(sizes, kind, steps[kind]) for kind in KINDS) * layers
    if room < 0:
        found = f"{target:g} is less than one unit of each kind in every layer"
        raise ConfigError(
            "method.remaining", found, allowed=f"{least(sizes, step * sizes.block, layers=layers):.3f} to 1"
        )
    ranked = []
    for kind, one in steps.items():
        for layer, row in enumerate(scores[kind].sort(dim=1, descending=True).values.tolist()):
            parts = (row[start : start + one] for start in range(one, len(row), one))
            ranked += [(sum(part) / len(part), kind, layer, len(part)) for part in parts]
    full: set[tuple[Kind, int]] = set()
    totals = {kind: [0, *accumulate(sizes.costs(kind))] for kind in KINDS}
    for _, kind, layer, more in sorted(ranked, key=lambda one: -one[0]):
        cost = totals[kind][counts[kind][layer] + more] - totals[kind][counts[kind][layer]]
        if (kind, layer) in full or cost > room:
            full.add((kind, layer))
            continue
        counts[kind][layer] += more
        room -= cost
    return counts


def _highest(scores_LU: torch.Tensor, counts: list[int]) -> torch.Tensor:
    masks = torch.zeros_like(scores_LU, dtype=torch.float32)
    for layer, count in enumerate(counts):
        masks[layer, scores_LU[layer].topk(count).indices] = 1.0
    return masks


def _step(sizes: Sizes, multiple_of: int) -> int:
    """Blocks that the MLP grows by, so that it is a multiple of `multiple_of` channels wide; all of them where it is
    narrower than that."""
    return min(max(multiple_of // sizes.block, 1), sizes.blocks)


def _room(target: float, sizes: Sizes) -> float:
    """Weights that may be kept; a share is no exact number."""
    return target * sizes.prunable * (1 + 1e-9)


def _cost(sizes: Sizes, kind: Kind, count: int) -> int:
    """Weights of `count` units of a layer; of MLP blocks the first ones, of which all but the last are alike."""
    return sum(sizes.costs(kind)[:count])


def _costs(sizes: Sizes, kind: Kind, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sizes.costs(kind), dtype=torch.float32, device=like.device)
