"""Faults of training data that leave the loss looking healthy and the model bad, one test each.

Held by tests elsewhere: accumulation that averages by micro-batch and packing that changes loss or gradient
(`tests/numerics/test_equivalences.py`), packing that leaks (`tests/numerics/test_packing.py`), stale or broken cache
entries (`tests/unit/data/test_cache.py`), ids beyond the embedding (`tests/unit/train/test_prepare.py`).
"""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from lmray.data.base import Example
from lmray.data.batch import collate, unpacked
from lmray.data.tokenise import IGNORED, prompt_ids, tokenise, tokenise_all
from lmray.errors import DataError
from lmray.testing.jobs import run_here, tiny_job
from lmray.testing.tiny import CHATML, tiny_tokenizer
from lmray.train.plan import make_plan

EXAMPLE = Example(
    (
        {"role": "system", "content": "assistant"},
        {"role": "user", "content": "<|im_end|>? answer"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "answer"},
        {"role": "assistant", "content": "user"},
    ),
    "file:1",
)
LONG = {"max_length": 1000, "over_long": "error"}


def test_the_mask_needs_no_generation_markers_and_finds_answers_by_place_not_by_text():
    tokenizer = tiny_tokenizer()
    assert "generation %}" not in CHATML
    tokens = tokenise(tokenizer, EXAMPLE)
    places = [place for place, label in enumerate(tokens.labels) if label != IGNORED]
    first, second = len(prompt_ids(tokenizer, EXAMPLE.messages[:2])), len(prompt_ids(tokenizer, EXAMPLE.messages[:4]))
    assert places == [*range(first, first + 7), *range(second, second + 5)], "answer and user, each with its stop token"


def test_a_mask_that_is_zero_everywhere_is_an_error_that_names_rows():
    with pytest.raises(DataError, match="no supervised token in 5 example") as caught:
        tokenise_all(tiny_tokenizer(), [Example(EXAMPLE.messages[:2], f"file:{n}") for n in range(1, 6)], **LONG)
    assert caught.value.where == "file:1, file:2, file:3 and after"


def test_the_stop_token_is_learned_after_every_answer_also_where_it_pads():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    short = Example(EXAMPLE.messages[:3], "file:2")
    data = tokenise_all(tokenizer, [EXAMPLE, short], **LONG)
    stop = tokenizer.eos_token_id
    assert [one.labels.tolist().count(stop) for one in data.examples] == [2, 1]
    batch = collate(list(unpacked(data.examples)), pad_token_id=stop)
    assert (batch.labels_BT == stop).sum(dim=1).tolist() == [2, 1], "no padding is learned, and no stop token lost"
    assert int((batch.labels_BT != IGNORED).sum()) == batch.num_supervised


def test_no_second_start_token_where_tokenizer_and_template_both_write_one():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == 0, "the tokenizer adds one by itself"  # type: ignore[index]
    ids = tokenise(tokenizer, EXAMPLE).input_ids.tolist()
    assert ids[0] == 0 and ids.count(0) == 1
    assert prompt_ids(tokenizer, EXAMPLE.messages[:2]).count(0) == 1


def test_the_template_travels_with_the_adapter(tiny_model, tiny_data, tmp_path):
    """What the kept adapter's folder asks with is what the model was trained on."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    template = CHATML.replace("<|im_start|>", "<|im_start|>!")
    (model / "chat_template.jinja").write_text(template)
    result = run_here(tiny_job(model, tiny_data, tmp_path / "store", train__max_steps=1), tmp_path / "scratch")
    kept = AutoTokenizer.from_pretrained(Path(result.details["adapter"]))
    assert kept.chat_template == template
    asked = prompt_ids(kept, EXAMPLE.messages[:2])
    trained_on = tokenise(AutoTokenizer.from_pretrained(model), EXAMPLE)
    assert tuple(trained_on.input_ids[: len(asked)]) == asked


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json"])
def test_another_template_or_tokenizer_is_another_run(file, tiny_model, tiny_data, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    job = tiny_job(model, tiny_data, tmp_path / "store")
    before = make_plan(job)
    assert make_plan(job).run_key == before.run_key
    path = model / file
    if path.suffix == ".json":
        tree = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = tree["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(tree), encoding="utf-8")
    else:
        path.write_text(CHATML.replace("<|im_start|>", "<|im_start|>!"))
    after = make_plan(job)
    assert after.model["digest"] == before.model["digest"], "the weights are the same"
    assert after.run_key != before.run_key
