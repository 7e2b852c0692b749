"""The adapters on one model: loading, unloading, and a forward pass in which every row names its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lmray.engines._adapter_folder import WEIGHTS, AdapterFolder
from lmray.errors import ArtifactError

_BASE = "__base__"
"""PEFT's word for a row without adapter."""
_AS_THEY_ARE = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
"""How PEFT is to add layers: in the model's number format, without filling them first."""


class AdapterBank:
    """Owns the model while an engine runs. Weights are kept in the model's own number format.

    A model that comes with PEFT adapters attached offers them under PEFT's names (`default`); `restore` gives it back
    as it came.
    """

    def __init__(self, model: nn.Module):
        self.peft = model if isinstance(model, PeftModel) else None
        self.base: nn.Module = self.peft.get_base_model() if self.peft else model
        self._model = model
        self._names = {name: name for name in self.peft.peft_config} if self.peft else {}
        self._num_named = 0
        self._active: str | None = None
        self._undo = _state(model, self.peft)
        model.eval()
        self._activate(None)

    @property
    def handles(self) -> tuple[str, ...]:
        return tuple(self._names)

    def add(self, handle: str, found: AdapterFolder) -> None:
        """Loads a checked adapter. Raises ArtifactError where its weights are not those its config calls for."""
        self._num_named += 1
        name = f"adapter{self._num_named}"  # a handle may hold a dot, a module's name may not
        self._attach(name, found)
        try:
            self._fill(name, found)
        except BaseException:
            self._detach(name)
            raise
        self._names[handle] = name
        self._activate(None)

    def _fill(self, name: str, found: AdapterFolder) -> None:
        assert self.peft is not None
        state = get_peft_model_state_dict(self.peft, adapter_name=name, save_embedding_layers=False)
        expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
        given = {key: tuple(tensor.shape) for key, tensor in found.tensors.items()}
        if given != expected:
            key, shape = min(set(expected.items()) ^ set(given.items()))
            where, hint = str(found.path / WEIGHTS), "its two files belong to different adapters"
            raise ArtifactError(where, f"does not fit its config, first at `{key}` {list(shape)}", hint=hint)
        set_peft_model_state_dict(self.peft, found.tensors, adapter_name=name, low_cpu_mem_usage=True)
        self.peft.eval()

    def remove(self, handle: str) -> None:
        self._detach(self._names.pop(handle))

    def forward(self, adapters: Sequence[str | None], **inputs: Any) -> torch.Tensor:
        """Logits [N, T, V] of a batch whose row i uses `adapters[i]`."""
        distinct = set(adapters)
        if len(distinct) == 1:
            self._select(next(iter(distinct)))
            return self.base(**inputs).logits
        if self._active is None:  # rows choose for themselves below, once adapters are switched on
            self._select(next(adapter for adapter in adapters if adapter is not None))
        assert self.peft is not None
        names = [_BASE if adapter is None else self._names[adapter] for adapter in adapters]
        return self.peft(adapter_names=names, **inputs).logits

    def restore(self) -> None:
        """Undoes what was done to the model: wrapped layers, active adapter, trained weights, training mode."""
        if self.peft is not None and self.peft is not self._model:
            self.peft.unload()
        self._undo()

    def _attach(self, name: str, found: AdapterFolder) -> None:
        try:
            if self.peft is None:
                base: Any = self.base
                self.peft = get_peft_model(base, found.config, adapter_name=name, **_AS_THEY_ARE)  # type: ignore
            else:
                self.peft.add_adapter(name, found.config, **_AS_THEY_ARE)
        except ValueError as error:
            raise ArtifactError(str(found.path), f"cannot be attached: {error}") from None

    def _detach(self, name: str) -> None:
        assert self.peft is not None
        others = [other for other in self.peft.peft_config if other != name]
        if not others:
            self.peft.unload()
            self.peft, self._active = None, None
            return
        self.peft.set_adapter(others[0], inference_mode=True)
        self.peft.delete_adapter(name)
        self._activate(None)

    def _select(self, handle: str | None) -> None:
        """Makes `handle` the adapter of every row; None switches adapters off."""
        if handle != self._active:
            self._activate(handle)

    def _activate(self, handle: str | None) -> None:
        if self.peft is None:
            return
        tuner: Any = self.peft.base_model
        if handle is None:
            tuner.disable_adapter_layers()
        else:
            if self._active is None:
                tuner.enable_adapter_layers()
            tuner.set_adapter(self._names[handle], inference_mode=True)
        self._active = handle


def _state(model: nn.Module, peft: PeftModel | None) -> Callable[[], None]:
    """A call that brings `model` back to where it is now."""
    training = model.training
    active = list(peft.active_adapters) if peft else []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def undo() -> None:
        if peft is not None:
            tuner: Any = peft.base_model
            tuner.enable_adapter_layers()
            tuner.set_adapter(active)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)

    return undo
