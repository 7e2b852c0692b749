"""Where nothing follows the head the loss is taken chunk by chunk; else from the architecture's own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lmray.adapters.lora import Lora
from lmray.models.head import plain_head
from lmray.models.supervised import IGNORED, supervised_logits, supervised_loss, supervised_losses
from lmray.ops.cross_entropy import cross_entropy_sum

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "phi, a head with a bias": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2)),
    "gpt neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2)),
    "gemma 2, no cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=None)),
}
MORE = {
    "gemma 2 caps": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=3.0)),
    "cohere scales": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "granite divides": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
    "falcon h1 multiplies": lambda: FalconH1ForCausalLM(FalconH1Config(**SHAPE, lm_head_multiplier=0.5)),
    "opt, another structure": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)
    ),
}
IDS = torch.arange(3, 15).reshape(2, 6)
INPUTS = {"input_ids": IDS}
LABELS = torch.where(torch.arange(6) > 2, IDS, IGNORED)


def made(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("make", [*PLAIN.values(), *MORE.values()], ids=[*PLAIN, *MORE])
def test_the_loss_is_that_of_the_models_own_logits(make):
    model = made(make)
    logits = model(**INPUTS).logits[:, :-1][LABELS[:, 1:] != IGNORED]
    targets = LABELS[:, 1:][LABELS[:, 1:] != IGNORED]
    want = cross_entropy_sum(logits, targets)
    gradients = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    got = supervised_loss(model, INPUTS, LABELS)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for one, other in zip(
        torch.autograd.grad(got, list(model.parameters()), allow_unused=True), gradients, strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    each = supervised_losses(model, INPUTS, LABELS)
    assert each.shape == (6,) and each.sum().item() == pytest.approx(want.item(), rel=1e-5)
    assert not each.requires_grad


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_a_head_with_nothing_after_it_is_known_even_without_weights(make):
    model = made(make)
    assert plain_head(model) is model.get_output_embeddings()
    with torch.device("meta"):
        assert plain_head(make()) is not None


@pytest.mark.parametrize("make", MORE.values(), ids=MORE)
def test_a_head_with_something_after_it_is_left_alone(make):
    assert plain_head(made(make)) is None


def test_asking_leaves_the_model_as_it_was():
    model = made(PLAIN["llama"])
    before, want = dict(model.named_modules()), model(**INPUTS).logits
    plain_head(model)
    supervised_loss(model, INPUTS, LABELS)
    assert dict(model.named_modules()) == before
    assert torch.equal(model(**INPUTS).logits, want)


def test_an_adapter_on_the_head_keeps_the_models_own_logits():
    inner, head = ("q_proj", "v_proj"), ("q_proj", "lm_head")
    model = made(PLAIN["llama"])
    assert plain_head(Lora(target_modules=inner).attach(model, seed=0)) is model.get_output_embeddings()
    adapted = Lora(target_modules=head).attach(made(PLAIN["llama"]), seed=0)
    assert plain_head(adapted) is None
    logits, targets = supervised_logits(adapted, INPUTS, LABELS)
    assert supervised_loss(adapted, INPUTS, LABELS).item() == pytest.approx(cross_entropy_sum(logits, targets).item())
