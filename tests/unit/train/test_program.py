import json
import shutil
import weakref

import pytest

from lmray.artifacts import checkpoints
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.errors import ArtifactError, CapacityError, CheckpointError, ConfigError, DataError
from lmray.evaluate import measure as measuring
from lmray.metrics.events import read_events
from lmray.models.load import load_model
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.tiny import tiny_model_folder
from lmray.train import program
from lmray.train.plan import make_plan


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


@pytest.mark.draws
def test_a_run_leaves_its_folder_and_its_artifact(job, tmp_path):
    one = job(name="実験", output={"artifact": "関数"}, evaluate={"tasks": ["json_match", "loss"], "max_new_tokens": 8})
    result = run_here(one, tmp_path / "scratch")
    folder = run_folder(one)
    names = {path.name for path in folder.iterdir()}
    assert {"job.yaml", "plan.json", "events.jsonl", "report.html", "loss.png", "result.json", "adapter"} <= names
    assert {"answers-base.jsonl", "answers-tuned.jsonl"} <= names
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "実験" in report and "data:image/png;base64," in report and 'src="http' not in report
    artifact = Artifacts(open_store(one.storage)).find("関数")
    assert artifact.ref == result.artifact and artifact.metrics["eval.loss"] == result.metrics["eval.loss"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
        artifact.files
    )
    events = read_events(folder / "events.jsonl")
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert result.metrics["base.json_match"] == 0.0
    assert len((folder / "answers-tuned.jsonl").read_text(encoding="utf-8").splitlines()) == result_examples(one)


def result_examples(job) -> int:
    return make_plan(job).data["eval_examples"]


def test_a_finished_run_is_not_run_again(job, tmp_path):
    first = run_here(job(), tmp_path / "scratch")
    events = (run_folder(job()) / "events.jsonl").read_bytes()
    again = run_here(job(), tmp_path / "scratch")
    assert (first.status, again.status) == ("succeeded", "already-done")
    assert again.metrics == first.metrics
    assert (run_folder(job()) / "events.jsonl").read_bytes() == events


def test_the_same_name_with_other_content_is_refused_naming_the_fields(job, tmp_path, tiny_data):
    run_here(job(), tmp_path / "scratch")
    with pytest.raises(ConfigError, match=r"adapter\.r: 4 -> 8") as caught:
        run_here(job(adapter__r=8), tmp_path / "scratch")
    assert "another `name`" in str(caught.value)
    write_jsonl(tiny_data, tiny_rows(30))
    with pytest.raises(ConfigError, match="data digest"):
        run_here(job(), tmp_path / "scratch")


def test_placement_is_not_part_of_a_runs_identity(job, tmp_path):
    placed = {"cpus_per_worker": 3, "async_checkpoints": True}
    keys = {make_plan(one).run_key for one in (job(), job(resources=placed), job(name="other"))}
    assert len(keys) == 1
    assert make_plan(job(train__seed=1)).run_key not in keys


def test_the_plan_counts_what_is_trained(job):
    plan = make_plan(job())
    run_text = "\n".join(plan.lines())
    assert plan.steps == 6 and plan.rows_per_step == 4 and plan.dtype == "float32"
    # four attention and three MLP matrices, two layers, rank 4: r * (in + out) each
    expected = 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    assert plan.model["trainable_parameters"] == expected
    assert json.loads(json.dumps(plan.to_json()))["run_key"] == plan.run_key
    assert "single" in run_text and "held out" in run_text
    head = plan.head()
    assert len(head) == 4 and head[0] in run_text and head[-1].startswith("memory ")


@pytest.mark.parametrize(("damage", "beside"), [("lost", False), ("cut off", False), ("cut off", True)])
def test_a_manifest_that_is_not_there_or_cut_off_costs_the_steps_since_the_one_before(
    job, tmp_path, capfd, damage, beside
):
    straight, broken = job(name="straight"), job(name="broken", resources={"async_checkpoints": beside})
    run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    manifest = run_folder(broken) / "checkpoint-00000003" / "manifest.json"
    manifest.unlink() if damage == "lost" else manifest.write_bytes(manifest.read_bytes()[:40])
    assert run_here(broken, tmp_path / "scratch").status == "succeeded"
    found = f"{manifest.parent}: has no manifest" if damage == "lost" else f"{manifest}: no readable manifest"
    said = capfd.readouterr().err
    assert found in said and "checkpoint-00000003 is set aside, going on from checkpoint-00000002" in said
    assert curve(broken) == curve(straight)


def spoil(checkpoint):
    path = checkpoint / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    return path


@pytest.mark.parametrize("beside", [False, True])
def test_a_corrupted_checkpoint_costs_only_the_steps_since_the_one_before(job, tmp_path, capfd, beside):
    straight, broken = job(name="straight"), job(name="broken", resources={"async_checkpoints": beside})
    run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    path = spoil(run_folder(broken) / "checkpoint-00000003")
    assert run_here(broken, tmp_path / "scratch").status == "succeeded"
    warning = f"warning: {path}: is missing or not what its manifest says; checkpoint-00000003 is set aside, going on"
    assert f"{warning} from checkpoint-00000002" in capfd.readouterr().err
    assert curve(broken) == curve(straight)
    assert not list(run_folder(broken).glob("rejected-*")), "kept only until the run is past it"


def test_a_run_without_a_good_checkpoint_fails_and_touches_none(job, tmp_path):
    run_here(job(), tmp_path / "scratch", stop_at=3)
    there = sorted(run_folder(job()).glob("checkpoint-*"))
    path = [spoil(checkpoint) for checkpoint in there][-1]
    with pytest.raises(CheckpointError, match="no checkpoint of this run is good") as caught:
        run_here(job(), tmp_path / "scratch")
    assert caught.value.where == str(path) and "start over" in str(caught.value)
    assert len(there) == 2 and sorted(run_folder(job()).glob("checkpoint-*")) == there


def test_a_checkpoint_of_another_run_is_refused(job, tmp_path):
    run_here(job(), tmp_path / "scratch", stop_at=3)
    (run_folder(job()) / "plan.json").unlink()
    with pytest.raises(CheckpointError, match="another run"):
        run_here(job(train__seed=5), tmp_path / "scratch")


@pytest.mark.parametrize("content", ['{"run_key": "a', "[]", "{}"])
def test_a_spoilt_plan_is_named_and_without_it_the_job_as_it_was_goes_on(job, tmp_path, content):
    straight, broken = job(name="straight"), job(name="broken")
    run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    plan = run_folder(broken) / "plan.json"
    plan.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match="is spoilt") as caught:
        run_here(broken, tmp_path / "scratch")
    assert caught.value.where == str(plan) and "goes on from its last checkpoint" in str(caught.value.hint)
    plan.unlink()
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight)


def test_a_spoilt_result_is_named_and_without_it_the_run_ends_again(job, tmp_path):
    first = run_here(job(evaluate={"tasks": ["loss"]}), tmp_path / "scratch")
    result = run_folder(job()) / "result.json"
    result.write_text(result.read_text(encoding="utf-8")[:20], encoding="utf-8")
    with pytest.raises(ArtifactError, match="is spoilt") as caught:
        run_here(job(evaluate={"tasks": ["loss"]}), tmp_path / "scratch")
    assert caught.value.where == str(result) and caught.value.exit_code == 2
    result.unlink()
    again = run_here(job(evaluate={"tasks": ["loss"]}), tmp_path / "scratch")
    assert again.status == "succeeded" and again.metrics["eval.loss"] == first.metrics["eval.loss"]


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.glob("checkpoint-*/*")}


@pytest.mark.parametrize("other", ["model", "adapter"])
def test_a_checkpoint_of_another_model_or_adapter_is_refused_and_none_is_lost(job, tiny_model, tmp_path, other):
    """Also where its manifest says that it is this run's."""
    changes: dict = {"adapter__r": 8}
    if other == "model":
        changes = {"model__source": str(tiny_model_folder(tmp_path / "wide", hidden_size=64))}
    stranger, one = job(name="stranger", **changes), job()
    for run in (stranger, one):
        run_here(run, tmp_path / "scratch", stop_at=3)
    theirs, mine = (run_folder(run) / "checkpoint-00000003" for run in (stranger, one))
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    before = contents(run_folder(one))
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        run_here(one, tmp_path / "scratch")
    assert contents(run_folder(one)) == before and caught.value.exit_code == 1
    manifest = json.loads((mine / "manifest.json").read_text(encoding="utf-8"))
    (mine / "manifest.json").write_text(json.dumps(manifest | {"run_key": make_plan(one).run_key}), encoding="utf-8")
    before = contents(run_folder(one))
    with pytest.raises(CheckpointError, match=r"checkpoint-00000003.*does not fit the job's adapter, first at .*lora_"):
        run_here(one, tmp_path / "scratch")
    assert contents(run_folder(one)) == before


def test_a_checkpoint_whose_adapter_does_not_fit_is_refused(job, tiny_model, tmp_path):
    one, other = job(), job(adapter__r=2)
    model = one.adapter.attach(load_model(tiny_model, "float32"), seed=0)
    other.adapter.save(other.adapter.attach(load_model(tiny_model, "float32"), seed=0), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not fit the job's adapter"):
        one.adapter.load(model, tmp_path / "adapter")


def test_unknown_target_modules_are_found_before_anything_is_written(job, tmp_path):
    with pytest.raises(ConfigError, match="nope"):
        run_here(job(adapter__target_modules=["nope"]), tmp_path / "scratch")
    assert not (run_folder(job()) / "plan.json").exists()


def test_more_workers_than_the_strategy_can_use(job):
    with pytest.raises(CapacityError, match="one worker"):
        make_plan(job(resources={"workers": 2}))


def test_nothing_supervised_is_an_error_before_anything_is_written(job, tmp_path):
    with pytest.raises(DataError, match="no supervised token"):
        run_here(job(data__max_length=8), tmp_path / "scratch")
    assert not (run_folder(job()) / "plan.json").exists()


def test_asked_to_stop_after_the_last_step_it_measures_another_time(job, tmp_path):
    assert run_here(job(), tmp_path / "scratch", stop_at=7).status == "stopped"
    assert [path.name for path in checkpoints.committed(run_folder(job()))][-1] == "checkpoint-00000006"
    assert not (run_folder(job()) / "result.json").exists()
    result = run_here(job(), tmp_path / "scratch")
    assert result.status == "succeeded" and "eval.loss" in result.metrics and len(curve(job())) == 6


def test_asked_to_stop_while_it_measures_it_keeps_what_was_measured(job, tmp_path, monkeypatch):
    losses, example_losses = [], measuring.example_losses
    monkeypatch.setattr(measuring, "example_losses", lambda *a, **k: losses.append(1) or example_losses(*a, **k))
    one = job(evaluate={"tasks": ["loss", "json_match"], "max_new_tokens": 4})
    assert run_here(one, tmp_path / "scratch", stop_at=9).status == "stopped"  # 6 steps, the base's losses, its answers
    assert (run_folder(one) / "measured-base.json").is_file() and len(losses) == 1
    result = run_here(one, tmp_path / "scratch")
    assert result.status == "succeeded" and len(losses) == 2, "the base's losses are not measured again"
    assert not [*run_folder(one).glob("measured-*")]
    same = run_here(one.model_copy(update={"name": "same"}), tmp_path / "scratch")
    assert same.details["deltas"] == result.details["deltas"]


def test_epochs_and_evaluation_steps(job, tmp_path):
    one = job(train__max_steps=None, train__num_train_epochs=1.5, train__eval_steps=2)
    plan = make_plan(one)
    rows = plan.data["rows"]
    assert plan.samples == round(1.5 * rows) and plan.steps == -(-plan.samples // 4)
    run_here(one, tmp_path / "scratch")
    events = read_events(run_folder(one) / "events.jsonl")
    assert events[-1]["train.epoch"] == pytest.approx(1.5, abs=0.05)
    assert [event["step"] for event in events if "eval.loss" in event] == [*range(2, plan.steps, 2), plan.steps]


@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_a_kill_around_a_commit_leaves_no_gap_in_the_events(job, tmp_path, monkeypatch, call, before, beside):
    class Killed(BaseException):
        pass

    calls, commit = iter(range(1, 100)), checkpoints.replace_folder

    def dying(source, target):
        dies = next(calls) == call
        if dies and before:
            raise Killed
        commit(source, target)
        if dies:
            raise Killed

    one = job(train__max_steps=6, train__save_steps=1, resources={"async_checkpoints": beside})
    monkeypatch.setattr(checkpoints, "replace_folder", dying)
    with pytest.raises(Killed):
        run_here(one, tmp_path / "scratch")
    assert run_here(one, tmp_path / "scratch").status == "succeeded"
    assert [event["step"] for event in read_events(run_folder(one) / "events.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("adapter", [{"name": "full"}, {"name": "lora", "init_lora_weights": "pissa"}])
def test_what_was_trained_has_left_memory_before_its_base_is_loaded_to_be_measured(job, tmp_path, monkeypatch, adapter):
    trained, ran, load = [], program._ran, program.base_model

    def runs(loop):
        trained.append(weakref.ref(loop.learner.model))
        return ran(loop)

    def loads(*args):
        assert [one() for one in trained] == [None]
        return load(*args)

    monkeypatch.setattr(program, "_ran", runs)
    monkeypatch.setattr(program, "base_model", loads)
    one = job(adapter=adapter, evaluate={"tasks": ["loss"]})
    result = run_here(one, tmp_path / "scratch")
    assert trained and result.metrics["eval.loss"] == pytest.approx(curve(one, "eval.loss")[-1], abs=1e-6)
    assert result.metrics["base.loss"] > result.metrics["eval.loss"]
    assert next((run_folder(one) / one.adapter.kept).glob("*model.safetensors")).is_file()
