"""The sum of what a backward pass keeps is held to what PyTorch itself says it saves."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch

from lmray.adapters.base import Adapter
from lmray.adapters.full import Full
from lmray.adapters.lora import Lora
from lmray.adapters.partial import Partial
from lmray.data.batch import collate, pack, unpacked
from lmray.data.tokenise import IGNORED, Tokenised
from lmray.methods.sft import sft_loss
from lmray.models.fused import Fused
from lmray.models.load import load_model
from lmray.models.precision import computing
from lmray.models.shape import read_shape
from lmray.pruning.gates import Gates
from lmray.pruning.structure import structure_of
from lmray.sharding.deepspeed import Deepspeed
from lmray.sharding.fsdp2 import Fsdp2
from lmray.testing.tiny import tiny_model_folder
from lmray.train.memory import Rows, bytes_per_row, kept_bytes, largest_micro_batch, memory_parts, worst_rows


def example(length: int, supervised: int = 4) -> Tokenised:
    ids = tuple(range(3, 3 + length))
    return Tokenised(ids, (IGNORED,) * (length - supervised) + ids[length - supervised :])


def saved_bytes(folder, adapter: Adapter, rows, dtype: str, *, fused: bool = False, searched: bool = False) -> int:
    """Bytes of every tensor autograd keeps of a forward pass, weights and their copies left out. `searched`: masks
    learn from it."""
    model = adapter.attach(load_model(folder, dtype).requires_grad_(False), seed=0).train()
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_copy = tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes
        if storage.data_ptr() not in weights and not is_copy:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its place is not used again
        return tensor

    batch = collate([tuple(chain.from_iterable(rows))] if fused else list(rows), pad_token_id=0)
    run = Fused(model).running(batch.position_ids_BT) if fused else computing(model)
    if searched:
        gates = Gates(model.eval(), structure_of(model, block=1))
        gates.masks = {kind: mask.clone().requires_grad_() for kind, mask in gates.masks.items()}
    # Now that they lie where they stay: where a fused one lay before, something else may.
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), run:
        sft_loss(model, batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "adapter",
    [
        Lora(r=4),
        Lora(r=4, target_modules=("q_proj", "v_proj")),
        Lora(r=4, target_modules=("down_proj",)),
        Full(),
        Partial(train_layers=("*.mlp",)),
    ],
    ids=repr,
)
def test_what_is_kept_of_a_layer_is_what_autograd_saves(tmp_path, dtype, packed, adapter):
    rows = pack([example(20), example(28)] * 2, max_length=48) if packed else unpacked([example(48)] * 2)
    sizes, sums = [], []
    for layers in (2, 6):  # the difference: what layers keep, without embedding and head
        folder = tiny_model_folder(tmp_path / str(layers), num_hidden_layers=layers)
        sizes.append(saved_bytes(folder, adapter, rows, dtype))
        shape = read_shape(folder, lambda model: adapter.attach(model, seed=0), dtype=dtype)
        sums.append(kept_bytes(shape, worst_rows(rows, 2), dtype))
    assert sums[1] - sums[0] == pytest.approx(sizes[1] - sizes[0], rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_search_keeps_of_a_layer_is_what_autograd_saves(tmp_path, dtype):
    rows, sizes, sums = unpacked([example(48)] * 2), [], []
    for layers in (2, 6):
        folder = tiny_model_folder(tmp_path / str(layers), num_hidden_layers=layers)
        sizes.append(saved_bytes(folder, Lora(r=4), rows, dtype, searched=True))
        shape = read_shape(folder, lambda model: Lora(r=4).attach(model, seed=0), dtype=dtype)
        sums.append(kept_bytes(shape, replace(worst_rows(rows, 2), searched=True), dtype))
    assert sums[1] - sums[0] == pytest.approx(sizes[1] - sizes[0], rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_of_a_fused_layer_is_what_autograd_saves(tmp_path, dtype):
    rows = pack([example(32)] * 4, max_length=64)  # of one round length: nothing is padded inside
    sizes, sums = [], []
    for layers in (2, 6):
        folder = tiny_model_folder(tmp_path / str(layers), num_hidden_layers=layers)
        sizes.append(saved_bytes(folder, Lora(r=4), rows, dtype, fused=True))
        shape = read_shape(folder, lambda model: Lora(r=4).attach(model, seed=0))
        sums.append(kept_bytes(shape, worst_rows(rows, 2, fused=True), dtype))
    assert sums[1] - sums[0] == pytest.approx(sizes[1] - sizes[0], rel=0.03)


def test_dropout_keeps_an_input_and_a_mask_of_every_adapted_layer(tiny_model):
    shapes = [read_shape(tiny_model, lambda model, p=p: Lora(lora_dropout=p).attach(model, seed=0)) for p in (0.0, 0.1)]
    plain, dropped = (kept_bytes(shape, Rows(1, 16, 4, False), "float32") for shape in shapes)
    assert dropped > plain


def test_the_largest_micro_batch_is_the_last_that_fits(tiny_model):
    shape = read_shape(tiny_model, lambda model: Lora().attach(model, seed=0))
    rows, settings = (
        Rows(1, 256, 40, True),
        {"device": "cpu", "process_bytes": 10**8, "optimizer_bytes": 8 * shape.trained},
    )
    parts = memory_parts(shape, rows, "bfloat16", **settings)
    assert parts["total"] == sum(size for part, size in parts.items() if part != "total")
    memory, one = 3 * 10**8, {"rows": 1, "row_bytes": bytes_per_row(shape, rows, "bfloat16", device="cpu")}
    most = largest_micro_batch(parts["total"], **one, memory_bytes=memory)
    fits = [
        memory_parts(shape, replace(rows, count=count), "bfloat16", **settings)["total"] <= 0.9 * memory
        for count in (most, most + 1)
    ]
    assert fits == [True, False]
    assert largest_micro_batch(parts["total"], **one, memory_bytes=10**8) == 0


def test_a_gpu_has_another_allocator_and_its_own_process(tiny_model):
    shape = read_shape(tiny_model, lambda model: Lora().attach(model, seed=0))
    rows = Rows(4, 256, 40, False)
    cpu, gpu = (
        memory_parts(shape, rows, "bfloat16", device=device, optimizer_bytes=0, process_bytes=10**8)
        for device in ("cpu", "cuda")
    )
    assert gpu["activations"] < cpu["activations"] and gpu["weights"] == cpu["weights"]
    assert cpu["process"] == 10**8 != gpu["process"]


def test_logits_of_a_plain_head_are_held_a_chunk_at_a_time(tiny_model):
    shape = read_shape(tiny_model, lambda model: Lora().attach(model, seed=0))
    assert (
        shape.plain_head
        and not read_shape(tiny_model, lambda m: Lora(target_modules=("lm_head",)).attach(m, seed=0)).plain_head
    )
    large = replace(shape, vocabulary=2**20)  # eight rows a chunk

    def logits(one, tokens, dtype="float32"):
        return memory_parts(one, Rows(1, 256, tokens, False), dtype, device="cpu", optimizer_bytes=0, process_bytes=0)[
            "logits"
        ]

    assert logits(large, 4) == 4 * (2**20 * 4 + 32 * 2 * 4)
    assert logits(large, 200) - logits(large, 100) == 100 * 32 * 2 * 4, "beyond a chunk: inputs and their gradient only"
    assert logits(large, 200, "bfloat16") == 8 * 2**20 * (4 + 2) + 200 * 32 * 2 * 2
    assert logits(replace(large, trained_head=1000), 4) == logits(large, 4) + 8000, (
        "the gradient, and what a chunk adds"
    )
    assert logits(replace(large, plain_head=False), 200) == 200 * 2**20 * 8


def test_a_row_takes_no_more_than_the_one_before(tiny_model):
    shape = replace(read_shape(tiny_model), vocabulary=2**20)
    few, many = (bytes_per_row(shape, Rows(count, 64, 4, False), "float32", device="cpu") for count in (1, 8))
    assert few - many == 4 * 2**20 * 4, "the logits of four tokens"


def test_who_steps_on_copies_of_the_weights_holds_them_and_buckets_too(tiny_model):
    shape = read_shape(tiny_model, lambda model: Full().attach(model, seed=0), dtype="bfloat16")
    settings = {"device": "cpu", "optimizer_bytes": 0, "process_bytes": 0, "workers": 2}
    one, two = (
        memory_parts(shape, Rows(1, 64, 4, False), "bfloat16", **settings, sharding=sharding)
        for sharding in (Fsdp2(), Deepspeed(stage=3))
    )
    assert not {"masters", "buffers"} & set(one)
    assert two["masters"] == two["weights"] == 2 * shape.trained
    assert two["buffers"] == 3 * 4 * shape.trained, "a bucket is no larger than the model"
    assert two["gathered"] == 2 * one["gathered"], "in float32"
