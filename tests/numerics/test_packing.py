"""Examples that share a row see nothing of each other, whatever computes the attention: packed = alone, by example."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmray.data.batch import collate, pack, unpacked
from lmray.data.table import Tokenised
from lmray.models.rope import RopeScaling

LENGTHS = (17, 9, 23, 5, 12)


def examples() -> list[Tokenised]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Tokenised(ids, ids) for ids in made]  # type: ignore[arg-type]


def logits_by_example(model, rows) -> dict[tuple[int, ...], torch.Tensor]:
    """Each example's logits, by its tokens."""
    batch = collate(rows, pad_token_id=0)
    with torch.no_grad():
        logits_BTV = model(**batch.inputs, use_cache=False).logits
    found = {}
    for number, row in enumerate(rows):
        start = 0
        for one in row:
            found[tuple(one.input_ids.tolist())] = logits_BTV[number, start : start + len(one)]
            start += len(one)
    return found


ATTENTIONS = ["eager", "sdpa", "sdpa linear", "sdpa yarn", "sdpa llama3"]


@pytest.fixture(params=[*ATTENTIONS, pytest.param("flex_attention", marks=pytest.mark.slow)])
def model(request, tiny_model):
    attention, _, rope_type = request.param.partition(" ")
    config = AutoConfig.from_pretrained(tiny_model)
    if rope_type:  # examples of one row reach beyond the eight original positions
        config.max_position_embeddings = 8
        RopeScaling.model_validate({"rope_type": rope_type, "factor": 4.0}).apply(config)
    return AutoModelForCausalLM.from_pretrained(tiny_model, config=config, attn_implementation=attention).eval()


@pytest.mark.parametrize("max_length", [66, 32], ids=["one row", "two rows and padding"])
def test_packed_logits_are_those_of_examples_alone(model, max_length):
    rows = pack(examples(), max_length=max_length)
    assert len(rows) < len(LENGTHS)
    packed = logits_by_example(model, rows)
    for row in unpacked(examples()):
        (alone,) = logits_by_example(model, [row]).items()
        torch.testing.assert_close(packed[alone[0]], alone[1], atol=1e-5, rtol=1e-5)


def test_a_mask_that_leaks_would_be_seen(model):
    """The same row with positions that go on is one long example; its logits differ."""
    (row,) = pack(examples(), max_length=66)
    batch = collate([row], pad_token_id=0)
    with torch.no_grad():
        apart = model(**batch.inputs, use_cache=False).logits
        leaking = model(input_ids=batch.input_ids_BT, use_cache=False).logits
    first = len(row[0])
    torch.testing.assert_close(leaking[:, :first], apart[:, :first], atol=1e-5, rtol=1e-5)
    assert (leaking[:, first:] - apart[:, first:]).abs().max() > 0.1
