"""The fused functions against naive float64, and fused training steps against plain `transformers` and `peft`."""

from __future__ import annotations

import math
from functools import partial
from itertools import chain

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lmray.adapters.lora import Lora
from lmray.data.batch import Packed, collate
from lmray.data.tokenise import Tokenised
from lmray.errors import ConfigError
from lmray.methods.sft import Sft, sft_loss
from lmray.models.fused import Fused, unfit
from lmray.models.rope import RopeScaling
from lmray.models.rope_by_example import follow_examples
from lmray.ops.lora_linear import lora_linear, make_group
from lmray.ops.packed_attention import Heads, make_blocks, packed_attention
from lmray.ops.rms_norm import rms_norm
from lmray.ops.swiglu import swiglu
from lmray.optim.adamw_torch import AdamwTorch
from lmray.sharding.single import Single
from lmray.testing.jobs import tiny_job
from lmray.train.learner import Learner
from lmray.train.plan import make_plan

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
both_types = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def check(ours, naive, inputs, dtype):
    """Value and gradients of `ours` on `inputs` of `dtype` are those of `naive` on the same values in float64."""
    low = [one.to(dtype).requires_grad_() for one in inputs]
    exact = [one.detach().double().requires_grad_() for one in low]
    got, want = ours(*low), naive(*exact)
    weight = torch.randn_like(want)
    (got.double() * weight).sum().backward()
    (want * weight).sum().backward()
    for one, other in [(got, want), *((a.grad, b.grad) for a, b in zip(low, exact, strict=True))]:
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


@both_types
def test_rms_norm(dtype):
    weight = torch.randn(24).to(dtype)

    def naive(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    check(lambda x: rms_norm(x, weight, 1e-5), naive, [torch.randn(7, 24) * 3], dtype)


@both_types
def test_swiglu(dtype):
    def naive(both):
        gate, up = both.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    check(swiglu, naive, [torch.randn(5, 32)], dtype)


@both_types
def test_lora_linear(dtype):
    weights = [torch.randn(6, 16).to(dtype), torch.randn(10, 16).to(dtype)]
    biases, scales = [torch.randn(6).to(dtype), None], [2.0, 0.5]
    factors = [torch.randn(4, 16), torch.randn(6, 4), torch.randn(3, 16), torch.randn(10, 3)]
    group = make_group(weights, biases, [4, 3], scales)

    def naive(x, a1, b1, a2, b2):
        first = x @ weights[0].double().T + biases[0].double() + 2.0 * x @ a1.T @ b1.T
        return torch.cat([first, x @ weights[1].double().T + 0.5 * x @ a2.T @ b2.T], dim=-1)

    check(lambda x, *given: lora_linear(x, group, given), naive, [torch.randn(9, 16), *factors], dtype)


@both_types
@pytest.mark.parametrize("lengths", [[7], [1, 1], [5, 9, 2, 9], [300, 4]], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["one to one", "grouped"])
def test_packed_attention(dtype, lengths, heads):
    num_heads, num_kv_heads = heads
    width, tokens = 8, sum(lengths)
    places = torch.cat([torch.arange(length) for length in lengths]).double()
    angles = places[:, None] * (1e-2 ** (torch.arange(width // 2).double() / width * 2))[None]
    cos, sin = (torch.cat([one, one], dim=-1) for one in (angles.cos(), angles.sin()))

    def turned(x, cos, sin):
        one, two = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-two, one], dim=-1) * sin[:, None]

    def naive(qkv):
        q, k, v = qkv.unflatten(-1, (-1, width)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        low_cos, low_sin = cos.to(dtype).double(), sin.to(dtype).double()
        q, k = turned(q, low_cos, low_sin), turned(k, low_cos, low_sin)
        parts = []
        for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            k1, v1 = (one.repeat_interleave(num_heads // num_kv_heads, dim=1) for one in (k1, v1))
            scores = torch.einsum("qhd,khd->hqk", q1, k1) / math.sqrt(width)
            unseen = torch.ones(len(q1), len(q1), dtype=torch.bool).triu(1)
            parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -math.inf).softmax(-1), v1))
        return torch.cat(parts).flatten(1)

    def ours(qkv):
        angles = cos.to(dtype), sin.to(dtype)
        return packed_attention(qkv, angles, make_blocks(lengths), Heads(num_heads, num_kv_heads, 1 / math.sqrt(width)))

    check(ours, naive, [torch.randn(tokens, (num_heads + 2 * num_kv_heads) * width)], dtype)


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0},
}


def scaled(rope_type: str) -> LlamaForCausalLM:
    """Eight original positions, so that examples go beyond them; yarn also scales cosine and sine."""
    config = LlamaConfig(**SHAPE, max_position_embeddings=8)
    RopeScaling(**ROPE[rope_type]).apply(config)
    model = LlamaForCausalLM(config)
    follow_examples(model)
    assert model.model.rotary_emb.attention_scaling == (pytest.approx(1.1386, abs=1e-4) if rope_type == "yarn" else 1.0)
    return model


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    **{f"llama, {name} positions": partial(scaled, name) for name in ROPE},
}


def adapted(make, **lora):
    """The model with adapters that change something, equal for equal arguments."""
    torch.manual_seed(1)
    model = make()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    model.requires_grad_(False)
    model = Lora(**{"r": 4, **lora}).attach(model, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows() -> list[Packed]:
    """Examples of 1 to 30 tokens, two of them in one row."""
    made = [torch.randint(64, (length,)).tolist() for length in (30, 7, 2, 18)]
    one, two, three, four = (Tokenised(tuple(ids), (-100, *ids[1:])) for ids in made)
    return [(one,), (two, three), (four,)]


def learner(model, *, fused: bool) -> Learner:
    groups, make_optimizer = Lora().parameter_groups(model), AdamwTorch().make_optimizer
    placed = Single().place(model, lambda _: make_optimizer(groups, learning_rate=1e-2, weight_decay=0.0), "cpu")
    (objective,) = Sft().objectives()
    return Learner(placed, objective, max_grad_norm=1.0, fused=Fused(placed.model) if fused else None)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_fused_steps_are_the_plain_ones(make):
    plain, fused = learner(adapted(make), fused=False), learner(adapted(make), fused=True)
    assert unfit(plain.model) is None
    for _ in range(3):
        micro = [rows()[:2], rows()[2:]]
        one, two = (
            learner.step([collate(learner.joined(part), pad_token_id=0) for part in micro], learning_rate=1e-2)
            for learner in (plain, fused)
        )
        assert two.loss == pytest.approx(one.loss, abs=1e-5)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (two.num_tokens, two.num_supervised) == (one.num_tokens, one.num_supervised)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_gradient_is_the_plain_one(make):
    plain, fused, given = adapted(make), adapted(make), rows()
    sft_loss(plain, collate(given, pad_token_id=0)).backward()
    batch = collate([tuple(chain.from_iterable(given))], pad_token_id=0)
    with Fused(fused).running(batch.position_ids_BT):
        sft_loss(fused, batch).backward()
    want, got = ([one.grad for one in model.parameters() if one.grad is not None] for model in (plain, fused))
    largest = max(float(grad.abs().max()) for grad in want)
    assert len(want) == 2 * 2 * 7
    assert all((one - other).abs().max() <= 1e-5 * largest for one, other in zip(want, got, strict=True))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_outside_a_step_the_model_is_the_plain_one(make):
    model, untouched = adapted(make), adapted(make)
    names = dict(model.named_modules())
    made = learner(model, fused=True)
    made.step([collate(made.joined(rows()), pad_token_id=0)], learning_rate=0.0)
    ids = torch.randint(64, (2, 11))
    assert dict(model.named_modules()) == names
    assert torch.equal(model(ids).logits, untouched(ids).logits)
    assert torch.equal(model.merge_and_unload()(ids).logits, untouched.merge_and_unload()(ids).logits)


@pytest.mark.parametrize(
    ("make", "lora", "reason"),
    [
        (MODELS["llama"], {"lora_dropout": 0.1}, "dropout"),
        (MODELS["llama"], {"target_modules": ("q_proj", "v_proj")}, "some of the linear layers"),
        (MODELS["llama"], {"target_modules": ("lm_head",)}, "outside attention and MLP"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu")), {}, "activation"),
        (lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)), {}, "sliding-window"),
    ],
)
def test_what_does_not_fit_is_told(make, lora, reason):
    model = make()
    model.requires_grad_(False)
    assert reason in (unfit(Lora(**lora).attach(model, seed=0)) or "")


def test_the_plan_says_which_kernels_and_refuses_those_that_do_not_fit(tiny_model, tiny_data, tmp_path):
    def plan(**changes):
        return make_plan(tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes))

    assert (plan().kernels, plan(model__kernels="plain").kernels) == ("fused", "plain")
    without = plan(adapter__lora_dropout=0.1)
    assert without.kernels == "plain" and "dropout" in "\n".join(without.lines())
    with pytest.raises(ConfigError, match=r"model\.kernels: `fused` does not fit: LoRA dropout"):
        plan(adapter__lora_dropout=0.1, model__kernels="fused")
