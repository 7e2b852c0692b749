"""Same job, same curve: the equivalence matrix in one process, float32, tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.data.batch import collate
from lmray.data.sampler import Sampler
from lmray.methods.sft import sft_loss
from lmray.models.export import export
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train.prepare import prepare


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        changes = {"name": f"run-{len(list(tmp_path.glob('store-*')))}", **changes}
        storage = tmp_path / f"store-{changes['name']}"
        storage.mkdir(exist_ok=True)
        return tiny_job(tiny_model, tiny_data, storage, **changes)

    return make


def trained(job, tmp_path) -> dict[str, torch.Tensor]:
    run_here(job, tmp_path / "scratch")
    return load_file(run_folder(job) / "adapter" / "adapter_model.safetensors")


def test_how_a_step_is_cut_into_micro_batches_does_not_change_the_curve(job, tmp_path):
    curves, adapters = [], []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        one = job(train__per_device_train_batch_size=size, train__gradient_accumulation_steps=steps, name=f"cut-{size}")
        adapters.append(trained(one, tmp_path))
        curves.append(curve(one))
    assert len(curves[0]) == 6
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], abs=1e-5)
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[2][name], tensor, atol=1e-4, rtol=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.1, "the curve must move, else equality says nothing"


def test_packed_rows_give_the_loss_and_gradient_of_single_ones(job):
    losses, gradients = [], []
    for packing in (False, True):
        prepared = prepare(job(data__packing=packing))
        assert any(len(row) > 1 for row in prepared.rows) == packing
        model = AutoModelForCausalLM.from_pretrained(prepared.model.folder)
        loss = sft_loss(model, collate(prepared.rows, pad_token_id=0))
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(job, tmp_path):
    straight, broken = job(name="straight", adapter__lora_dropout=0.1), job(name="broken", adapter__lora_dropout=0.1)
    expected = trained(straight, tmp_path)
    stopped = run_here(broken, tmp_path / "scratch", stop_at=3)
    assert stopped.status == "stopped" and len(curve(broken)) == 3
    assert run_here(broken, tmp_path / "scratch").status == "succeeded"
    assert curve(broken) == curve(straight)
    resumed = load_file(run_folder(broken) / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_steps_that_were_never_committed_are_done_again(job, tmp_path):
    straight, broken = job(name="straight"), job(name="broken")
    trained(straight, tmp_path)
    run_here(broken, tmp_path / "scratch", stop_at=5)
    for checkpoint in sorted(run_folder(broken).glob("checkpoint-*"))[1:]:  # as if killed before the last commit
        (checkpoint / "manifest.json").unlink()
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight)


def test_first_loss_is_that_of_plain_transformers_and_peft(job, tmp_path):
    one = job(train__max_steps=1)
    run_here(one, tmp_path / "scratch")
    prepared = prepare(one)
    rows = Sampler(len(prepared.rows), one.train.seed).rows(0, 4)
    examples = [prepared.examples.train[row] for row in rows]

    tokenizer = AutoTokenizer.from_pretrained(prepared.model.folder)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(prepared.model.folder), LoraConfig(r=4, target_modules="all-linear")
    )
    encoded = [tokenizer.apply_chat_template(list(example.messages), return_dict=True) for example in examples]
    width = max(len(one["input_ids"]) for one in encoded)
    ids = torch.zeros(4, width, dtype=torch.long)
    labels = torch.full((4, width), -100)
    mask = torch.zeros(4, width, dtype=torch.long)
    for row, (example, one_encoded) in enumerate(zip(examples, encoded, strict=True)):
        tokens = one_encoded["input_ids"]
        answer = tokenizer(example.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        end = len(tokens) - 1  # the newline after the stop token
        assert tokens[end - len(answer) : end] == answer
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    plain = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    assert curve(one)[0] == pytest.approx(plain, abs=1e-5)


def test_a_merged_export_gives_the_attached_adapters_logits(job, tmp_path):
    one = job(output={"artifact": "kept"})
    result = run_here(one, tmp_path / "scratch")
    artifacts = Artifacts(open_store(one.storage))
    artifact = artifacts.find(result.artifact)
    folder = artifacts.checkout(artifact)
    base = AutoModelForCausalLM.from_pretrained(one.model.source)
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    untouched = base(ids).logits
    attached = PeftModel.from_pretrained(base, str(folder))(ids).logits
    assert (attached - untouched).abs().max() > 0.1, "the adapter must show, else equality says nothing"
    export(artifacts, artifact, tmp_path / "merged", "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, attached, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    export(artifacts, artifact, tmp_path / "peft", "peft")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(one.model.source), str(tmp_path / "peft"))
    torch.testing.assert_close(again(ids).logits, attached, atol=1e-6, rtol=1e-6)


def test_the_kept_adapter_is_what_the_run_measured(job, tmp_path):
    """Held-out loss of the kept folder, loaded by plain peft, equals the last `eval.loss` of the curve."""
    one = job(evaluate={"tasks": ["loss"]})
    result = run_here(one, tmp_path / "scratch")
    prepared = prepare(one)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(one.model.source), str(Path(result.details["adapter"]))
    )
    batch = collate(prepared.eval_rows, pad_token_id=0)
    with torch.no_grad():
        loss = sft_loss(model, batch).item() / batch.num_supervised
    assert result.metrics["eval.loss"] == pytest.approx(loss, abs=1e-5)
    assert curve(one, "eval.loss")[-1] == pytest.approx(loss, abs=1e-5)
    assert result.metrics["base.loss"] > result.metrics["eval.loss"]
