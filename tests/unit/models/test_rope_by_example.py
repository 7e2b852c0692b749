"""`dynamic` positions follow each example's own length: as plain `transformers` computes it alone, however batched."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lmray.data.batch import collate, pack, unpacked
from lmray.data.table import Tokenised
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.errors import ConfigError
from lmray.evaluate.loss import example_losses
from lmray.methods.sft import sft_loss
from lmray.models.deferred import Deferred
from lmray.models.load import load_model, make_model
from lmray.models.rope import RopeScaling, num_positions
from lmray.models.rope_by_example import example_lengths, follow_examples
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.tiny import tiny_config, tiny_model_folder
from lmray.train.plan import make_plan

ORIGINAL, SCALING = 16, RopeScaling(rope_type="dynamic", factor=4.0)
LENGTHS = (60, 5, 23, 16, 17, 40, 9, 33)
"""Below, at and beyond the original positions."""


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("short") / "model", max_position_embeddings=ORIGINAL)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """The same, with the scaling in its own config, for plain `transformers`."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = tmp_path_factory.mktemp("dynamic") / "model"
    return tiny_model_folder(folder, max_position_embeddings=ORIGINAL, rope_parameters=rope)


def plain(folder) -> Any:
    """New each time: `transformers` remembers the longest sequence it has seen."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def examples() -> list[Tokenised]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Tokenised(tuple(row), (-100, *row[1:])) for row in rows]


def ids_of(one: Tokenised) -> torch.Tensor:
    return torch.tensor([[int(token) for token in one.input_ids]])


def test_lengths_are_read_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [7, 8, 9, 0, 1, 2], [1, 1, 1, 0, 1, 2]])
    assert example_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2], [10, 10, 10, 3, 3, 3], [2, 2, 2, 3, 3, 3]]
    assert example_lengths(torch.tensor([[4], [9]])).tolist() == [[5], [10]], "a step of generation"


@torch.no_grad()
def test_alone_it_is_plain_transformers_in_whatever_order(short, plain_folder):
    model = load_model(short, "float32", rope_scaling=SCALING)
    assert model.config.rope_parameters == plain(plain_folder).config.rope_parameters
    for one in examples():
        expected = plain(plain_folder)(ids_of(one), use_cache=False).logits
        assert torch.equal(model(ids_of(one), use_cache=False).logits, expected)


@torch.no_grad()
def test_plain_transformers_hangs_on_what_it_saw_before(plain_folder):
    """Else there were nothing to mend."""
    first, _, third, *_ = examples()
    model = plain(plain_folder)
    model(ids_of(first), use_cache=False)
    after = model(ids_of(third), use_cache=False).logits
    assert (after - plain(plain_folder)(ids_of(third), use_cache=False).logits).abs().max() > 0.1


def test_its_frequencies_are_those_of_the_paper(short):
    """Appendix B.2: the base grows by (factor L / original - (factor - 1)) ^ (d / (d - 2))."""
    rotary = load_model(short, "float32", rope_scaling=SCALING).model.rotary_emb
    width, length = 8, 40
    base = 10000.0 * (4.0 * length / ORIGINAL - 3.0) ** (width / (width - 2))
    angles = torch.arange(length)[:, None].double() * base ** (-torch.arange(0, width, 2).double() / width)
    positions = torch.cat([torch.arange(length), torch.arange(3)])[None]
    cos, sin = rotary(torch.zeros(1), positions)
    torch.testing.assert_close(cos[0, :length, : width // 2].double(), angles.cos(), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(sin[0, :length, width // 2 :].double(), angles.sin(), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padded_losses_are_those_of_examples_alone(short, plain_folder, attention):
    model = load_model(short, "float32", rope_scaling=SCALING, attn_implementation=attention)
    given = examples()
    alone = {}
    for one in given:
        with torch.no_grad():
            logits_TV = plain(plain_folder)(ids_of(one), use_cache=False).logits[0, :-1]
        alone[tuple(one.input_ids)] = float(torch.nn.functional.cross_entropy(logits_TV, ids_of(one)[0, 1:]))
    for rows, size in ((pack(given, max_length=64), 1), (pack(given, max_length=64), 4), (unpacked(given), 8)):
        found = example_losses(model, rows, batch_size=size, pad_token_id=0, device="cpu")
        order = list(chain.from_iterable(rows))
        for one, (loss, count) in zip(order, found, strict=True):
            assert loss / count == pytest.approx(alone[tuple(one.input_ids)], abs=1e-4)


def test_gradients_are_those_of_examples_alone(short):
    given = examples()

    def gradients(rows, **how) -> list[torch.Tensor]:
        model = load_model(short, "float32", rope_scaling=SCALING)
        for row in rows:
            sft_loss(model, collate(row, pad_token_id=0, **how)).backward()
        return [one.grad for one in model.parameters() if one.grad is not None]

    alone = gradients([[row] for row in unpacked(given)])
    packed = gradients([pack(given, max_length=64)[:]])
    padded = gradients([unpacked(given)[:]], padding_apart=True)
    joined = gradients([unpacked(given)[:]])
    largest = max(float(one.abs().max()) for one in alone)

    def gap(other: list[torch.Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(alone, other, strict=True)) / largest

    assert len(alone) > 10 and gap(packed) < 1e-4 and gap(padded) < 1e-4
    assert gap(joined) > 1e-2, "padding that counts on would be taken for a part of its example"


def test_a_weight_read_later_sees_the_same_positions(short):
    deferred = Deferred(short, "float32", rope_scaling=SCALING)
    deferred.fill(deferred.model, "cpu")
    ids, model = ids_of(examples()[0]), load_model(short, "float32", rope_scaling=SCALING)
    assert torch.equal(deferred.model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_a_run_is_the_same_whatever_its_micro_batches(short, tmp_path, kernels):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{n} 色は匂へど{"散りぬるを" * (n % 4)}"}}\n' for n in range(16)), "utf-8")

    def job(name: str, batch: int, steps: int, **changes):
        usual = {"name": name, "data__max_length": 64, "data__eval": {"split": 0.25, "by": None}}
        usual |= {"model__rope_scaling": SCALING.model_dump(exclude_none=True), "model__kernels": kernels}
        usual |= {"train__per_device_train_batch_size": batch, "train__gradient_accumulation_steps": steps}
        return tiny_job(short, rows, tmp_path / "store", **usual | {"train__max_steps": 3} | changes)

    one, other = job("one", 4, 1), job("other", 1, 4)
    for run in (one, other):
        run_here(run, tmp_path / "scratch")
    assert curve(one) == pytest.approx(curve(other), abs=1e-4)
    assert "positions  rope_type: dynamic, factor: 4.0" in make_plan(one).lines()
    with pytest.raises(ConfigError, match="65 tokens are more than the model has positions for") as caught:
        make_plan(job("long", 1, 1, data__max_length=65))
    assert "`model.rope_scaling.factor: 5`" in str(caught.value.hint)
    virtual = {"adapter": {"name": "prompt_tuning"}, "model__kernels": "plain", "data__packing": False}
    with pytest.raises(ConfigError, match="`dynamic` positions of `prompt_tuning` would follow the padded row"):
        make_plan(job("virtual", 1, 1, **virtual))


def test_the_engine_generates_as_transformers_does_alone(short, plain_folder):
    """Prompts below, at and beyond the original length together; answers grow over it."""
    prompts = [tuple(one.input_ids) for one in examples() if len(one.input_ids) < 48]
    expected = []
    for prompt in prompts:
        told = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected.append(plain(plain_folder).generate(torch.tensor([prompt]), **told)[0, len(prompt) :].tolist())

    async def ask() -> list[list[int]]:
        model = load_model(short, "float32", rope_scaling=SCALING)
        engine = Native(max_batch_size=4, max_length=64).start(model, stop_token_ids=(), threads=1)

        async def answer(place: int) -> list[int]:
            request = Request(str(place), prompts[place], Sampling(14))
            return [event.token_id async for event in engine.submit(request) if event.token_id is not None]

        try:
            return await asyncio.gather(*map(answer, range(len(prompts))))
        finally:
            await engine.close()

    assert asyncio.run(ask()) == expected


def test_the_engine_ends_where_the_factor_does(short):
    model = load_model(short, "float32", rope_scaling=SCALING)
    with pytest.raises(ConfigError, match="65 tokens are more than"):
        Native(max_length=65).make_stepper(model, stop_token_ids=())


def test_a_model_that_is_dynamic_already_is_followed_too(plain_folder):
    model = load_model(plain_folder, "float32")
    assert num_positions(model.config) == 4 * ORIGINAL
    names = [type(module).__name__ for module in model.modules()]
    follow_examples(model)
    assert [type(module).__name__ for module in model.modules()] == names, "done twice, it is done once"
    other = load_model(plain_folder, "float32", rope_scaling=None)
    one = examples()[0]
    assert torch.equal(other(ids_of(one)).logits, model(ids_of(one)).logits)


def test_code_that_scales_in_its_own_way_is_refused():
    config = tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})

    class Own(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig):
            super().__init__(config)
            del self.model.rotary_emb.rope_type

    with pytest.raises(ConfigError, match="the code of `Own` computes `dynamic` positions in its own way") as caught:
        follow_examples(Own(config))
    assert caught.value.where == "model.rope_scaling" and "yarn" in str(caught.value.hint)
    assert type(make_model(config, "float32").model.rotary_emb).__mro__[1].__name__ == "_ByExample"
