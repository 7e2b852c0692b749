"""One model of `lmray bench prune`, a step a process. Run as `python prune_cell.py STEP FILE.json`; the last line that
it prints is JSON.

`cut`: the model smaller, before it is tuned. `tune`: LoRA by an ordinary training job, merged. `measure`: what the
merged model is worth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from environments import peer_packages  # noqa: E402
from prune_data import DATA, HELD_OUT, QUESTIONS, TRAIN, evenly  # noqa: E402

from lmray.artifacts.files import build_once  # noqa: E402
from lmray.artifacts.store import run_folder  # noqa: E402
from lmray.config import Document, decode  # noqa: E402
from lmray.config.reader import parse_value  # noqa: E402
from lmray.context import LocalContext  # noqa: E402
from lmray.data.batch import pack  # noqa: E402
from lmray.data.cache import tokenise_cached  # noqa: E402
from lmray.data.examples import read_examples  # noqa: E402
from lmray.data.rules import Rules  # noqa: E402
from lmray.data.spec import DataSpec  # noqa: E402
from lmray.data.tokenise import TokenisedData  # noqa: E402
from lmray.evaluate.measure import HeldOut, measure  # noqa: E402
from lmray.job import EvaluateArgs, TrainJob  # noqa: E402
from lmray.metrics.events import read_events  # noqa: E402
from lmray.models.layers import decoder_layers  # noqa: E402
from lmray.models.load import load_empty_model, load_model, load_tokenizer  # noqa: E402
from lmray.models.merge import write_merged  # noqa: E402
from lmray.pruning.structure import structure_of  # noqa: E402
from lmray.pruning.two_stage import write_pruned  # noqa: E402
from lmray.train.program import train  # noqa: E402

Settings = dict[str, Any]


def cut(settings: Settings) -> None:
    """The smaller model in folder `cut`, calibrated on a slice of the training rows."""
    model, target = Path(settings["model"]), Path(settings["cut"])
    _, tokens = _read(settings, TRAIN, model)
    chosen = evenly(tokens.examples, settings["calibration_rows"])
    if settings["method"] == "optipfair":
        build_once(
            target, lambda folder: _optipfair(settings, model, folder, [one.input_ids.tolist() for one in chosen])
        )
        return
    rows = [(as_row(one.input_ids), as_row(one.labels)) for one in chosen]
    way, remaining, multiple_of = settings["method"], settings["remaining"], settings["multiple_of"]
    build_once(
        target,
        lambda folder: write_pruned(model, folder, way, rows, remaining=remaining, multiple_of=multiple_of),
    )


def as_row(ids: Any) -> torch.Tensor:
    """[1, T] int64."""
    return torch.tensor(ids.tolist())[None]


def _optipfair(settings: Settings, model: Path, target: Path, rows: list[list[int]]) -> None:
    """It removes MLP channels alone, so that these are the whole budget."""
    sizes = structure_of(load_empty_model(model), block=1).sizes
    groups, channels = (sum(sizes.costs(kind)) for kind in ("groups", "channels"))
    room = (settings["remaining"] * (groups + channels) - groups) / channels * sizes.channels
    width = int(room // settings["multiple_of"] * settings["multiple_of"])
    if width < 1:
        raise SystemExit(f"optipfair prunes MLPs alone, which cannot leave {settings['remaining']} of this model")
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        facts = {"model": str(model), "target": str(target), "width": width, "rows": rows}
        json.dump(facts | {"threads": settings["threads"]}, file)
        file.flush()
        path = [str(peer_packages("optipfair")), *sys.path]
        command = [sys.executable, str(HERE / "optipfair_cut.py"), file.name]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": ":".join(path)}, check=True, stdout=sys.stderr)


def tune(settings: Settings) -> Settings:
    """LoRA on what is there; the merged model in folder `tuned`."""
    job = decode(TrainJob, Document("bench", job_tree(settings)))
    folder, target = run_folder(job), Path(settings["tuned"])
    with tempfile.TemporaryDirectory() as scratch:
        result = train(job, LocalContext(folder, scratch=Path(scratch), threads=settings["threads"]))
    if result.status not in ("succeeded", "already-done"):
        raise SystemExit(f"training ended as {result.status}")
    source, adapter = Path(settings["cut"] or settings["model"]), folder / "adapter"
    if job.kept == "model":  # it is cut already
        source, adapter = folder / "model", None
    dtype = str(load_empty_model(Path(settings["model"])).dtype).removeprefix("torch.")  # of all ways alike
    build_once(target, lambda into: write_merged(source, adapter, into, dtype=dtype))
    events = read_events(folder / "events.jsonl")
    return {
        "train_tokens": sum(event.get("train.tokens", 0) for event in events),
        "train_loss": result.metrics["train.loss"],
        "train_peak_bytes": result.metrics["train.peak_memory_bytes"],
        "train_seconds": result.metrics["run.train_seconds"],
    }


def job_tree(settings: Settings) -> dict[str, Any]:
    """The training job of a cell: the same rows in the same order whatever the method."""
    per_device = min(settings["batch_size"], settings["per_device_batch_size"])
    return {
        "kind": "train",
        "name": settings["name"],
        "storage": str(Path(settings["work"]) / "store"),
        "model": {"source": settings["cut"] or settings["model"], "dtype": settings["dtype"]},
        "data": {
            "train": [{"source": str(Path(settings["data_folder"]) / TRAIN)}],
            "max_length": settings["max_length"],
        },
        "method": method_tree(settings),
        "adapter": {
            "name": "lora",
            "r": settings["r"],
            "lora_alpha": 2 * settings["r"],
            "target_modules": "all-linear",
        },
        "sharding": "single",
        "train": {
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": settings["batch_size"] // per_device,
            "learning_rate": settings["learning_rate"],
            "max_steps": settings["steps"],
            "seed": settings["seed"],
        },
        "resources": {"cpus_per_worker": settings["threads"]},
    }


def method_tree(settings: Settings) -> dict[str, Any]:
    """`atp:distill=1:gate=gumbel` is ATP with these fields; all that is cut first or not at all is tuned."""
    name, *fields = settings["method"].split(":")
    if name != "atp":
        return {"name": "sft"}
    given = {
        key: parse_value(value, settings["method"]) for key, _, value in (field.partition("=") for field in fields)
    }
    return {"name": name, "remaining": settings["remaining"], "multiple_of": settings["multiple_of"], **given}


def score(settings: Settings) -> Settings:
    """Held-out loss of every example, task scores, sizes."""
    torch.set_num_threads(settings["threads"])
    folder, data = Path(settings["tuned"] or settings["model"]), DATA[settings["data"]]
    model, tokenizer = load_model(folder, settings["dtype"]), load_tokenizer(folder)
    explained, tokens = _read(settings, HELD_OUT, folder)
    held_out = HeldOut(explained, pack(tokens.examples, max_length=settings["max_length"]))
    loss = measure(model, tokenizer, held_out, _asked(["loss"], data.max_new_tokens), adapter=None)
    questions, _ = _read(settings, QUESTIONS, folder)
    asked = _asked(data.tasks, data.max_new_tokens)
    answered = measure(model, tokenizer, HeldOut(questions, ()), asked, adapter=None, threads=settings["threads"])
    ((_, losses),) = loss.evidence
    return {
        "metrics": loss.metrics | answered.metrics,
        "losses": [one.statistics for one in losses],
        "scores": {task.name: [one.scores for one in scored] for task, scored in answered.evidence},
        "parameters": model.num_parameters(),
        "prunable_share": prunable(model) / prunable(load_empty_model(Path(settings["model"]))),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def prunable(model: Any) -> int:
    """Weights of all products in decoder layers."""
    modules = (module for layer in decoder_layers(model) for module in layer.modules())
    return sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))


def _read(settings: Settings, file: str, model: Path) -> tuple[Any, TokenisedData]:
    """Examples of `file`, and as the model in folder `model` reads them."""
    sources = [{"source": str(Path(settings["data_folder"]) / file)}]
    spec = decode(DataSpec, Document("bench", {"train": sources, "max_length": settings["max_length"]}))
    examples = read_examples(spec).train
    return examples, tokenise_cached(load_tokenizer(model), examples, Rules.of(spec, model))


def _asked(tasks: Any, max_new_tokens: int) -> EvaluateArgs:
    return decode(EvaluateArgs, Document("bench", {"tasks": list(tasks), "max_new_tokens": max_new_tokens}))


STEPS = {"cut": cut, "tune": tune, "measure": score}


def main() -> None:
    settings = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    print("\n" + json.dumps(STEPS[sys.argv[1]](settings)))


if __name__ == "__main__":
    main()
