"""Masks on a model that is being trained: the two forms of a masked layer with LoRA.

While weights are tuned, y = (W x) * m + s B A x: what is removed now may still learn, and come back. While masks are
searched, and whenever the model is measured, y = (W x + s B A x) * m: what will be left (arXiv 2412.14426; the two are
equal once the rows of B of what is removed are zero, to which `shrink_removed` brings them).

Shapes: L layers, U units, O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch.distributed.tensor import DTensor, Replicate

from lmray.errors import ConfigError
from lmray.pruning.masks import Masks, all_kept
from lmray.pruning.structure import KINDS, Kind, Part, Structure, linear_in

HANDLE = "default"


class Gates:
    """Hooks on the gated layers of `model`, which has LoRA on every layer that a unit goes through."""

    def __init__(self, model: Any, structure: Structure):
        """Raises ConfigError where a layer that a unit goes through has no LoRA."""
        self.model, self.structure = model, structure
        self.layers = structure.layers(model)
        self.masks: Masks = all_kept(structure.sizes)
        self.final = False
        """Whether weights, too, are tuned as the model is measured: nothing that is removed comes back."""
        self.real_BT: torch.Tensor | None = None
        """Which tokens of what the model reads are not padding, where that is said."""
        self._on = True
        self._unit_of: dict[Kind, torch.Tensor] = {}
        for kind in KINDS:
            widths = torch.tensor(structure.sizes.widths(kind))
            self._unit_of[kind] = torch.repeat_interleave(torch.arange(len(widths)), widths)
        check_adapted(self.layers, structure)
        for number, layer in enumerate(self.layers):
            for kind in KINDS:
                for name in structure.layout[kind].gated:
                    self._hook(linear_in(layer, name), kind, number)

    def _hook(self, adapted: Any, kind: Kind, number: int) -> None:
        def tuned(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            tuning = adapted.training and not self.final
            return self._masked(output, kind, number) if self._on and tuning else None

        def all_of_it(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            whole = self.final or not module.training
            return self._masked(output, kind, number) if self._on and whole else None

        adapted.base_layer.register_forward_hook(tuned)
        adapted.register_forward_hook(all_of_it)

    def _masked(self, output: torch.Tensor, kind: Kind, number: int) -> torch.Tensor:
        mask_U = self.masks[kind][number].to(output.device)
        return output * mask_U[self._unit_of[kind].to(output.device)].to(output.dtype)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block nothing is masked."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    @contextmanager
    def reading(self, real_BT: torch.Tensor) -> Iterator[None]:
        """Within the block the model reads tokens of which `real_BT` are no padding."""
        self.real_BT = real_BT
        try:
            yield
        finally:
            self.real_BT = None

    @contextmanager
    def using(self, masks: Masks) -> Iterator[None]:
        """Within the block other masks, such as soft ones with gradient."""
        before, self.masks = self.masks, masks
        try:
            yield
        finally:
            self.masks = before


def check_adapted(layers: list[Any], structure: Structure) -> None:
    """Raises ConfigError where a layer that a unit goes through has no LoRA, or one that is no plain product."""
    for number, layer in enumerate(layers):
        for kind in KINDS:
            for part in structure.layout[kind].parts:
                linear = linear_in(layer, part.linear)
                if not isinstance(linear, LoraLayer) or linear.lora_variant:
                    found = f"layer {number}: `{part.linear}` has no plain LoRA, and units go through it"
                    hint = "`target_modules: all-linear` without `use_dora`"
                    raise ConfigError("adapter.target_modules", found, hint=hint)


@torch.no_grad()
def shrink_removed(gates: Gates, strength: float) -> float:
    """Brings the LoRA slices of removed units nearer to zero, exactly zero in the end; returns the sum of their norms
    before.

    The proximal step of the group lasso: w <- w * max(0, 1 - t / ||w||) for all slices of one unit together, t =
    `strength` times the share of all removed weights that are of this layer and kind. Infinite `strength` zeroes them.
    """
    removed = {kind: gates.masks[kind] < 0.5 for kind in KINDS}
    costs = {kind: torch.tensor(gates.structure.sizes.costs(kind)) for kind in KINDS}
    weights = {kind: (one * costs[kind].to(one.device)).sum(1) for kind, one in removed.items()}
    total = sum(int(one.sum()) for one in weights.values())
    norms = 0.0
    if total == 0:
        return norms
    for number, layer in enumerate(gates.layers):
        for kind in KINDS:
            mask_U = removed[kind][number]
            if not bool(mask_U.any()):
                continue
            slices = [_Slices(layer, part, gates.structure) for part in gates.structure.layout[kind].parts]
            norm_U = torch.stack([one.squared_norms() for one in slices]).sum(0).sqrt()
            norms += float(norm_U[mask_U.to(norm_U.device)].sum())
            threshold = strength * float(weights[kind][number]) / total
            kept_U = (1 - threshold / norm_U.clamp(min=1e-20)).clamp(min=0.0)
            kept_U = torch.where(mask_U.to(kept_U.device), kept_U, 1.0)
            for one in slices:
                one.scale(kept_U)
    return norms


class _Slices:
    """The LoRA weights of one layer that belong to its units: rows of B, or columns of A."""

    def __init__(self, layer: Any, part: Part, structure: Structure):
        linear = linear_in(layer, part.linear)
        self.by_row = part.side == "rows"
        self.weight: torch.Tensor = (linear.lora_B if self.by_row else linear.lora_A)[HANDLE].weight
        self.units = structure.sizes.units("channels" if part.per == "channel" else "groups")
        self.unit_of = structure.sizes.unit_of(part)

    def squared_norms(self) -> torch.Tensor:
        squares = self.weight.float().pow(2).sum(1 if self.by_row else 0)
        squares = squares.full_tensor() if isinstance(squares, DTensor) else squares
        unit_of = self.unit_of.to(squares.device)
        return torch.zeros(self.units, device=squares.device).index_add_(0, unit_of, squares)

    def scale(self, kept_U: torch.Tensor) -> None:
        factors = kept_U[self.unit_of.to(kept_U.device)].to(self.weight.dtype)
        factors = factors[:, None] if self.by_row else factors[None]
        if isinstance(self.weight, DTensor):
            self.weight.mul_(_replicated(factors, self.weight))
        else:
            self.weight.mul_(factors)


def _replicated(tensor: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def kept_units(masks: Masks) -> Mapping[Kind, list[list[int]]]:
    """By kind and layer, the units that are kept, in order."""
    return {kind: [row.nonzero().flatten().tolist() for row in masks[kind] > 0.5] for kind in KINDS}
