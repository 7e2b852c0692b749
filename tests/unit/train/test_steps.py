"""What training steps do besides forward and backward: layers that run again, compiled layers, noise, attention."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lmray.adapters.lora import Lora
from lmray.data.batch import collate
from lmray.data.tokenise import Tokenised
from lmray.errors import ConfigError
from lmray.job import TrainArgs
from lmray.methods.sft import sft_loss
from lmray.models import layers
from lmray.models.load import load_model
from lmray.models.noise import noisy_embeddings
from lmray.models.shape import read_shape
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.tiny import tiny_model_folder
from lmray.train.memory import Rows, kept_bytes
from lmray.train.plan import make_plan
from lmray.train.plan_steps import attention_asked, check_layers
from lmray.train.step import layers_and_noise


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


@pytest.fixture
def losses(job, tmp_path):
    """The curve of a job that is run here."""

    def of(name, **changes):
        one = job(name=name, **changes)
        run_here(one, tmp_path / "scratch")
        return curve(one)

    return of


def example(length: int) -> Tokenised:
    ids = tuple(range(3, 3 + length))
    return Tokenised(ids, (-100, *ids[1:]))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__kernels": "plain", "adapter__lora_dropout": 0.1},
        {"model__kernels": "fused"},
        {"model__dtype": "bfloat16", "model__kernels": "plain"},
        {"model__dtype": "bfloat16", "model__kernels": "fused"},
    ],
    ids=["plain, dropout", "fused", "plain, bfloat16", "fused, bfloat16"],
)
def test_layers_that_run_again_give_the_same_curve(losses, changes):
    kept, again = (losses(str(on), train__gradient_checkpointing=on, **changes) for on in (False, True))
    assert again == kept and len(kept) == 6 and kept[-1] < kept[0]


def kept_outside(folder, *, again: bool) -> int:
    """Bytes that autograd keeps of a forward pass; what layers keep once they run again is none of them."""
    model = Lora(r=4).attach(load_model(folder, "float32").requires_grad_(False), seed=0).train()
    layers_and_noise(TrainArgs(gradient_checkpointing=again), model, None)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.setdefault(id(one), one), lambda one: one):
        sft_loss(model, collate([(example(40),)], pad_token_id=0)).backward()
    return sum(one.nbytes for one in kept.values())


def test_layers_that_run_again_keep_their_inputs_only(tmp_path):
    few, many = (tiny_model_folder(tmp_path / str(count), num_hidden_layers=count) for count in (2, 6))
    assert kept_outside(many, again=False) > kept_outside(few, again=False)
    inputs = 40 * 32 * 4
    assert kept_outside(many, again=True) - kept_outside(few, again=True) == 4 * inputs
    shape = read_shape(many, lambda model: Lora(r=4).attach(model, seed=0))
    rows = Rows(2, 40, 4, False)
    kept, again = (kept_bytes(shape, replace(rows, again=on), "float32") for on in (False, True))
    assert again == kept // 6 + 6 * 2 * inputs


def test_eager_attention_keeps_its_weights(tiny_model):
    shape = read_shape(tiny_model)
    sdpa, eager = (kept_bytes(shape, Rows(1, 40, 4, False, eager=on), "float32") for on in (False, True))
    assert eager - sdpa == 2 * 40 * 4 * 40 * 4


def test_noise_is_as_large_as_the_examples_own_length_says(tiny_model):
    model = load_model(tiny_model, "float32").train()
    embedding, width = model.get_input_embeddings(), 32
    batch = collate([(example(9), example(25)), (example(4),)], pad_token_id=0, padded=lambda longest: 40)
    assert batch.example_lengths.tolist() == [[9] * 9 + [25] * 25 + [1] * 6, [4] * 4 + [1] * 36]
    plain = embedding(batch.input_ids_BT)
    with noisy_embeddings(model, 5.0, batch.example_lengths):
        noise = embedding(batch.input_ids_BT) - plain
        model.eval()
        assert torch.equal(embedding(batch.input_ids_BT), plain), "what is measured gets none"
    for length, part in ((9, noise[0, :9]), (25, noise[0, 9:34]), (4, noise[1, :4])):
        bound = 5.0 / math.sqrt(length * width)
        assert 0.9 * bound < part.abs().max() <= bound * (1 + 1e-5)
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert torch.equal(embedding(batch.input_ids_BT), plain), "outside there is none"


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_noise_is_of_training_only_and_the_same_after_a_resume(job, tmp_path, kernels):
    def made(name, alpha=5.0, rate=0.01):
        return job(
            name=name,
            model__kernels=kernels,
            train__neftune_noise_alpha=alpha,
            train__learning_rate=rate,
            train__eval_steps=6,
        )

    straight, broken = made("straight"), made("broken")
    still, quiet = made("still", rate=1e-12), made("quiet", alpha=None, rate=1e-12)
    for one in (straight, still, quiet):
        run_here(one, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight)
    assert curve(still)[0] != pytest.approx(curve(quiet)[0], abs=1e-3)
    assert curve(still, "eval.loss") == pytest.approx(curve(quiet, "eval.loss"), abs=1e-6)


@pytest.fixture
def _quickly_compiled(monkeypatch):
    """Traced and taken apart as always, but run by PyTorch's own kernels: those take no minute to make."""
    monkeypatch.setattr(layers, "BACKEND", "aot_eager")


@pytest.mark.usefixtures("_quickly_compiled")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "run again"])
def test_compiled_layers_give_the_same_curve(job, losses, tmp_path, again):
    settings = {"model__kernels": "plain", "train__gradient_checkpointing": again}
    plain = losses("plain", **settings)
    one = job(
        name="compiled", train__torch_compile=True, evaluate={"tasks": ["exact_match"], "max_new_tokens": 2}, **settings
    )
    run_here(one, tmp_path / "scratch", stop_at=3)
    result = run_here(one, tmp_path / "scratch")
    assert curve(one) == pytest.approx(plain, abs=1e-4)
    seconds = curve(one, "train.compile_seconds")
    assert len(seconds) == 2 and result.metrics["train.compile_seconds"] == pytest.approx(sum(seconds))


@pytest.mark.slow
def test_compiled_kernels_give_the_same_curve(losses):
    plain = losses("plain", model__kernels="plain")
    assert losses("compiled", train__torch_compile=True) == pytest.approx(plain, abs=1e-4)


@pytest.mark.usefixtures("_quickly_compiled")
def test_outside_of_steps_layers_are_not_compiled(tiny_model):
    model = load_model(tiny_model, "float32")
    compiled = layers.Compiled(model)
    found = layers.decoder_layers(model)
    with compiled.running():
        assert len(found) == 2 and all(layer._compiled_call_impl is not None for layer in found)
    assert all(layer._compiled_call_impl is None for layer in found)


def test_an_attention_by_name_gives_the_same_curve_and_is_in_the_plan(job, losses):
    expected = losses("auto", model__kernels="plain")
    assert losses("eager", model__attn_implementation="eager") == pytest.approx(expected, abs=1e-5)
    plan = make_plan(job(model__attn_implementation="eager"))
    assert (plan.attention, plan.kernels) == ("eager", "plain") and "`eager`" in plan.reasons["kernels"]
    text = "\n".join(make_plan(job()).lines())
    assert "attention  sdpa: what `transformers` takes" in text and "loss       chunk by chunk" in text


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_cannot_train_here_is_refused(job, name):
    with pytest.raises(ConfigError, match=rf"`{name}` cannot train on a CPU.+\n.*eager, sdpa"):
        make_plan(job(model__attn_implementation=name))
    assert attention_asked(name, "cuda") == name


def test_an_attention_that_is_not_installed_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="`flash_attention_2` cannot be used"):
        read_shape(tiny_model, attn_implementation="flash_attention_2")


def test_what_does_not_go_with_fused_kernels_is_refused(job):
    for change in ({"train__torch_compile": True}, {"model__attn_implementation": "sdpa"}):
        assert make_plan(job(**change)).kernels == "plain"
        with pytest.raises(ConfigError, match="`fused` does not fit"):
            make_plan(job(model__kernels="fused", **change))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "torch_compile"])
def test_a_model_without_layers_of_transformers_is_refused(tiny_model, name):
    shape = replace(read_shape(tiny_model), layers_again=0)
    with pytest.raises(ConfigError, match=f"`{name}` needs decoder layers"):
        check_layers(TrainArgs(**{name: True}), shape)
