"""The adapters of `Decoder`: read from PEFT's folders or modules into stacks beside the frozen weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from lmray.engines._adapter_folder import WEIGHTS, AdapterFolder
from lmray.engines._decoder import Decoder, Linears
from lmray.engines._slot_space import SlotSpace
from lmray.errors import ArtifactError
from lmray.ops.low_rank import num_slots

PREFIX = "base_model.model."


class _Factors(NamedTuple):
    """One layer's adapter: A [r, inputs], B [outputs, r], and what their product is multiplied by."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float


class LoraBank:
    """Adapters by handle, side by side; those that PEFT attached to the model come with it, under PEFT's names."""

    def __init__(self, model: nn.Module, decoder: Decoder):
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._places = {name: (one, part) for one in decoder.linears() for part, name in enumerate(one.names)}
        self._space = SlotSpace()
        self._dtype = decoder.dtype
        self._num_loaded = 0
        self._roots: dict[str, bytes] = {}
        for handle in model.peft_config if isinstance(model, PeftModel) else ():
            self._put(handle, dict(self._attached(handle)))

    @property
    def handles(self) -> tuple[str, ...]:
        return self._space.handles

    def slots(self, handle: str | None) -> range | None:
        """Where an adapter is in the stacks; None for the base model."""
        return None if handle is None else self._space[handle]

    def root(self, handle: str | None) -> bytes:
        """What keys and values depend on besides their tokens: another for every loading of an adapter."""
        return b"" if handle is None else self._roots[handle]

    @property
    def reaches_head(self) -> bool:
        """Whether an adapter changes the output head."""
        return bool(self._places["lm_head"][0].adapters)

    def add(self, handle: str, found: AdapterFolder) -> None:
        """Loads a checked adapter. Raises ArtifactError where its weights are not those its config calls for, or too
        large for the model's number format."""
        factors = _read(found, self.base, self._places)
        for name, one in factors.items():
            if not torch.isfinite((one.b_OR.float() * one.scale).to(self._dtype)).all():
                what = f"`{name}` times its scale {one.scale:g} is too large for {self._dtype}"
                raise ArtifactError(str(found.path / WEIGHTS), what, hint="train it again")
        self._put(handle, factors)

    def remove(self, handle: str) -> None:
        slots = self._space.free(handle)
        del self._roots[handle]
        for linears in {id(one): one for one, _ in self._places.values()}.values():
            linears.drop(handle, slots)

    def restore(self) -> None:
        """Nothing: the model's modules are not touched."""

    def _put(self, handle: str, factors: Mapping[str, _Factors]) -> None:
        slots = self._space.take(handle, num_slots(max(len(one.a_RI) for one in factors.values())))
        self._num_loaded += 1
        self._roots[handle] = str(self._num_loaded).encode()
        try:
            for name, (a_RI, b_OR, scale) in factors.items():
                linears, part = self._places[name]
                linears.put(handle, part, slots, (a_RI, b_OR.float() * scale))
        except BaseException:
            self.remove(handle)
            raise

    def _attached(self, handle: str) -> Iterator[tuple[str, _Factors]]:
        for name, module in self.base.named_modules():
            if isinstance(module, LoraLayer) and handle in module.lora_A:
                sides: Any = module.lora_A, module.lora_B
                a_RI, b_OR = (side[handle].weight.detach() for side in sides)
                yield name, _Factors(a_RI, b_OR, module.scaling[handle])


def _read(found: AdapterFolder, base: Any, places: Mapping[str, tuple[Linears, int]]) -> dict[str, _Factors]:
    """The adapter's layers by module, after a check that its two files belong together."""
    wanted = _wanted(found.config, base, places)
    if not wanted:
        asked = found.config.target_modules
        raise ArtifactError(str(found.path), f"cannot be attached: Target modules {asked} are not in the model")
    expected = {}
    for name, (rank, _) in wanted.items():
        linears, part = places[name]
        expected[f"{PREFIX}{name}.lora_A.weight"] = (rank, linears.num_inputs)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (linears.sizes[part], rank)
    given = {key: tuple(tensor.shape) for key, tensor in found.tensors.items()}
    if given != expected:
        key, shape = min(set(expected.items()) ^ set(given.items()))
        where, hint = str(found.path / WEIGHTS), "its two files belong to different adapters"
        raise ArtifactError(where, f"does not fit its config, first at `{key}` {list(shape)}", hint=hint)
    found_in = found.tensors
    return {
        name: _Factors(found_in[f"{PREFIX}{name}.lora_A.weight"], found_in[f"{PREFIX}{name}.lora_B.weight"], scale)
        for name, (_, scale) in wanted.items()
    }


def _wanted(config: LoraConfig, base: Any, places: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Rank and scale of each layer that `config` asks for, as PEFT reads it."""
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type, set())
    config = _maybe_include_all_linear_layers(config, base)  # type: ignore[assignment]
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    found = {}
    for name in places:
        if not check_target_module_exists(config, name):
            continue
        rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
        found[name] = (rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))
    return found
