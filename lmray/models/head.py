"""Whether a model's logits are what its linear head returns, with nothing after it.

Gemma 2 caps its logits, Cohere, Granite and Falcon-H1 scale them: there the head's own output is not enough. Which
architectures do is not listed here: the model's own forward is run around a stand-in for its decoder and one for its
head, and what comes out must be the very tensor that the head's stand-in returned.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from transformers.modeling_outputs import MoeModelOutputWithPast

_KNOWN: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def plain_head(model: Any) -> torch.nn.Linear | None:
    """The output head of causal language model `model`, where its logits are `head(hidden)` and the head is a linear
    layer without anything attached to it; else None. Computes nothing of the model, so that one without weights will
    do as well."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base not in _KNOWN:
        _KNOWN[base] = _ends_with(base, head)
    return head if _KNOWN[base] else None


class _Returns(torch.nn.Module):
    """Stands in for a module: whatever it is called with, it returns `value`."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.value


def _ends_with(base: Any, head: torch.nn.Linear) -> bool:
    """Whether `base` returns the output of `head` untouched. A model that is not built of a decoder and a head side by
    side, or whose forward asks more of them than a stand-in has, is taken to do something else."""
    names = {id(child): name for name, child in base.named_children()}
    decoder_name, head_name = names.get(id(base.get_decoder())), names.get(id(head))
    if decoder_name is None or head_name is None:
        return False
    device = head.weight.device
    hidden_12D = torch.zeros(1, 2, head.in_features, dtype=head.weight.dtype, device=device)
    returned = torch.zeros(1, 2, 1, device=device)
    output: Any = MoeModelOutputWithPast(last_hidden_state=hidden_12D)
    output.cross_attentions = None  # with it, the fields of all decoders' outputs are there
    stand_ins = {decoder_name: _Returns(output), head_name: _Returns(returned)}
    replaced = {name: base._modules[name] for name in stand_ins}
    base._modules.update(stand_ins)
    try:
        ids_12 = torch.zeros(1, 2, dtype=torch.long, device=device)
        logits = type(base).forward(base, input_ids=ids_12, use_cache=False).logits
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        base._modules.update(replaced)
    return logits is returned and returned._version == 0
