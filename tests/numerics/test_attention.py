"""Attention by example equals SDPA with the mask that `transformers` makes of restarting positions."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from lmray.data.batch import collate
from lmray.data.tokenise import Tokenised
from lmray.methods.sft import sft_loss
from lmray.models.attention import NAME, resolve_attention
from lmray.models.load import load_model


def rows():
    generator = torch.Generator().manual_seed(0)

    def example(length: int) -> Tokenised:
        ids = tuple(torch.randint(3, 250, (length,), generator=generator).tolist())
        return Tokenised(ids, ids)

    return [(example(9), example(4)), (example(7),), (example(3), example(8), example(2))]


def test_loss_and_gradients_equal_those_of_the_masked_rows(tiny_model):
    losses, gradients = [], []
    for attention in ("sdpa", NAME):
        model = load_model(tiny_model, "float32", attention=attention)
        batch = collate(rows(), pad_token_id=0, flat=attention == NAME)
        loss = sft_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-3, rtol=1e-4)


def test_without_bounds_it_is_plain_attention(tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    model = load_model(tiny_model, "float32", attention=NAME)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_it_is_chosen_where_it_is_exact_and_pays():
    assert resolve_attention("eager", "cpu", None, max_length=8)[0] == "eager"
    assert resolve_attention("auto", "cuda", MistralConfig(sliding_window=None), max_length=64)[0] == "sdpa"
    assert resolve_attention("auto", "cpu", MistralConfig(sliding_window=None), max_length=64)[0] == NAME
    assert resolve_attention("auto", "cpu", MistralConfig(sliding_window=32), max_length=64)[0] == "sdpa"
    assert resolve_attention("auto", "cpu", MistralConfig(sliding_window=64), max_length=64)[0] == NAME
