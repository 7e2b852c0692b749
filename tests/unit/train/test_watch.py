"""What a run's numbers mean for it: fail, end early, or go on; the same after a resume."""

from __future__ import annotations

import json
import math

import pytest
from safetensors.torch import load_file

from lmray.artifacts import checkpoints
from lmray.artifacts.store import run_folder
from lmray.errors import ConfigError, DivergenceError
from lmray.evaluate.loss import held_out_loss
from lmray.job import TrainArgs
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train import loop as loops
from lmray.train.learner import Learner, StepReport
from lmray.train.plan import make_plan
from lmray.train.watch import DIVERGED_STEPS, MIN_WINDOW_STEPS, WINDOW_STEPS, Watch

REAL_STEP = Learner.step


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    return lambda **changes: tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)


def told(losses, args, watch=None) -> list[str | None]:
    watch = watch or Watch()
    return [watch.step({"train.loss": loss, "train.grad_norm": 1.0}, args) for loss in losses]


def test_a_loss_that_stays_out_of_line_is_a_divergence_and_a_single_one_is_not():
    args = TrainArgs(divergence_factor=3.0)
    calm = [2.0] * MIN_WINDOW_STEPS
    assert not any(told([*calm, *[6.1] * (DIVERGED_STEPS - 1), 2.0, *[6.1] * (DIVERGED_STEPS - 1)], args))
    found = told([*calm, *[6.1] * DIVERGED_STEPS], args)
    assert not any(found[:-1])
    assert found[-1] == "the loss is 6.1, and for 5 steps was above 6 (running median 2)"


def test_near_zero_multiples_mean_nothing():
    args = TrainArgs(divergence_factor=3.0)
    assert not any(told([0.01] * 20 + [0.9] * 20, args))
    assert told([0.01] * 20 + [1.1] * DIVERGED_STEPS, args)[-1]


def test_the_median_follows_a_loss_that_falls():
    losses = [10.0 * 0.9**step for step in range(60)]
    watch = Watch()
    assert not any(told(losses, TrainArgs(), watch))
    assert watch.losses == losses[-WINDOW_STEPS:]


def test_switched_off_only_what_is_not_finite_ends_a_run():
    args = TrainArgs(divergence_factor=None)
    assert not any(told([1.0] * 20 + [1e6] * 20, args))
    assert told([math.inf], args) == ["the loss is inf; the step was not applied"]
    norm = Watch().step({"train.loss": 1.0, "train.grad_norm": math.nan}, args)
    assert norm == "the gradient norm is nan; the step was not applied"


def test_the_state_of_a_watch_goes_through_json_exactly():
    args, losses = TrainArgs(), [2.0 + 0.1 * math.sin(step) for step in range(70)]
    whole, first = Watch(), Watch()
    told(losses, args, whole)
    told(losses[:33], args, first)
    first.held_out(33, 1.5, args)
    whole.held_out(33, 1.5, args)
    again = Watch(**json.loads(json.dumps(first.state())))
    told(losses[33:], args, again)
    assert again == whole


def test_patience_counts_evaluations_without_enough_improvement():
    args = TrainArgs(eval_steps=1, early_stopping_patience=2, early_stopping_threshold=0.1)
    watch, ends = Watch(), []
    for step, loss in enumerate([3.0, 2.5, 2.45, 2.44], start=1):
        assert watch.held_out(step, loss, args) is None
        ends.append(watch.ends(args))
    assert ends == [False, False, False, True]
    assert (watch.best_step, watch.best_loss) == (4, 2.44), "the best is the lowest, however little it is lower"
    assert watch.held_out(5, math.nan, args) == "the held-out loss is nan"


@pytest.mark.parametrize("name", ["early_stopping_patience", "load_best_model_at_end"])
def test_what_needs_held_out_losses_says_so(job, name):
    with pytest.raises(ConfigError, match=f"`{name}` needs held-out losses") as caught:
        job(**{f"train__{name}": True if name.startswith("load") else 3})
    assert "eval_steps: 50" in str(caught.value)


@pytest.fixture
def held_out(monkeypatch):
    """Puts chosen numbers in the place of the held-out losses, by the order they are taken in."""

    def put(losses):
        real, given = held_out_loss, iter(losses)
        monkeypatch.setattr(loops, "held_out_loss", lambda *a, **k: real(*a, **k) * 0 + next(given))

    return put


def test_a_run_ends_early_and_its_result_is_the_best_model(job, tmp_path, held_out):
    changes = {"train__max_steps": 12, "train__eval_steps": 2, "train__early_stopping_patience": 2}
    held_out([5.0, 4.0, 4.5, 4.2, 9.0, 9.0])
    one = job(**changes, train__load_best_model_at_end=True, evaluate={"tasks": ["loss"], "base": False})
    result = run_here(one, tmp_path / "scratch")
    assert [event["step"] for event in read_events(run_folder(one) / "events.jsonl")][-1] == 8
    assert result.metrics["eval.loss"] == 4.0
    assert (result.metrics["train.best_step"], result.metrics["train.steps"]) == (4, 8)
    assert [path.name for path in run_folder(one).glob("best-*")] == ["best-00000004"]
    short = job(name="short", train__max_steps=12, train__save_steps=4)
    run_here(short, tmp_path / "scratch", stop_at=4)  # the same first four steps
    kept = load_file(run_folder(one) / "adapter" / "adapter_model.safetensors")
    expected = load_file(run_folder(short) / "checkpoint-00000004" / "weights.safetensors")
    expected = {name.replace(".default.", "."): tensor for name, tensor in expected.items()}
    assert kept.keys() == expected.keys() and all((kept[name] == expected[name]).all() for name in kept)


def test_without_patience_or_best_the_result_is_the_last_model(job, tmp_path, held_out):
    held_out([5.0, 4.0, 9.0])
    one = job(train__eval_steps=2, evaluate={"tasks": ["loss"], "base": False})
    result = run_here(one, tmp_path / "scratch")
    assert result.metrics["eval.loss"] == 9.0 and result.metrics["train.best_step"] == 4
    assert not list(run_folder(one).glob("best-*"))


@pytest.mark.parametrize("stop_at", [3, 4, 5, 7])
def test_interrupted_or_not_a_run_ends_at_the_same_step_with_the_same_model(job, tmp_path, held_out, stop_at):
    losses = {2: 5.0, 4: 4.0, 6: 4.5, 8: 4.2}
    changes = {
        "train__max_steps": 12,
        "train__eval_steps": 2,
        "train__save_steps": 1000,
        "train__early_stopping_patience": 2,
        "train__load_best_model_at_end": True,
    }
    held_out(losses.values())
    whole, halved = job(name="whole", **changes), job(name="halved", **changes)
    run_here(whole, tmp_path / "scratch")
    held_out(losses.values())
    assert run_here(halved, tmp_path / "scratch", stop_at=stop_at).status == "stopped"
    assert run_here(halved, tmp_path / "scratch").status == "succeeded"
    assert curve(halved) == pytest.approx(curve(whole), abs=1e-6) and len(curve(whole)) == 8
    paths = [run_folder(one) / "adapter" / "adapter_model.safetensors" for one in (whole, halved)]
    first, second = map(load_file, paths)
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("beside", [True, False])
def test_a_kill_between_a_new_best_and_its_commit_keeps_the_older_best(job, tmp_path, held_out, monkeypatch, beside):
    class Killed(BaseException):
        pass

    one = job(train__eval_steps=2, train__load_best_model_at_end=True, train__save_steps=1000)
    one = one.changed({"resources.async_checkpoints": beside})
    commit = checkpoints.replace_folder

    def dying(source, target):
        if target.name == "checkpoint-00000004":
            assert (target.parent / "best-00000004").is_dir()
            raise Killed
        commit(source, target)

    held_out([5.0, 4.0, 3.5])
    monkeypatch.setattr(checkpoints, "replace_folder", dying)
    with pytest.raises(Killed):
        run_here(one, tmp_path / "scratch")
    monkeypatch.setattr(checkpoints, "replace_folder", commit)
    held_out([6.0, 7.0])  # on the second road step 4 is no better than step 2
    assert run_here(one, tmp_path / "scratch").metrics["train.best_step"] == 2
    assert [path.name for path in run_folder(one).glob("best-*")] == ["best-00000002"]


@pytest.fixture
def reported(monkeypatch):
    """Changes what the learner reports of chosen steps of this attempt."""

    def put(losses):
        count = iter(range(1, 10**6))

        def step(self, batches, **given):
            report = REAL_STEP(self, batches, **given)
            loss = losses.get(next(count), report.loss)
            return StepReport(loss, report.grad_norm, report.num_supervised, report.num_tokens)

        monkeypatch.setattr(Learner, "step", step)

    return put


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_rows(job, tmp_path, reported, tiny_data):
    reported({5: math.nan})
    one = job()
    with pytest.raises(DivergenceError, match="step 5: the loss is nan") as caught:
        run_here(one, tmp_path / "scratch")
    folder = run_folder(one)
    written = json.loads((folder / "diverged.json").read_text(encoding="utf-8"))
    assert written["step"] == 5 and len(written["rows"]) == 4 and written["metrics"]["train.loss"] == "nan"
    assert all(row.startswith(f"{tiny_data}:") for row in written["rows"])
    assert written["rows"][0] in str(caught.value) and "learning_rate" in str(caught.value)
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-00000002", "checkpoint-00000004"]
    assert [event["step"] for event in read_events(folder / "events.jsonl")] == [1, 2, 3, 4]
    assert caught.value.final and not (folder / "result.json").exists()


def test_a_gradient_that_is_not_finite_is_not_applied(job, tmp_path, monkeypatch):
    one = job(train__save_steps=1)
    before = {}

    def step(self, batches, **given):
        if not before and len(curve(one)) == 3:
            before.update({name: value.detach().clone() for name, value in self.model.named_parameters()})
            handle = next(p for p in self.model.parameters() if p.requires_grad).register_hook(lambda g: g * math.nan)
            report = REAL_STEP(self, batches, **given)
            handle.remove()
            assert all((before[name] == value).all() for name, value in self.model.named_parameters())
            return report
        return REAL_STEP(self, batches, **given)

    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(DivergenceError, match="step 4: the gradient norm is nan; the step was not applied"):
        run_here(one, tmp_path / "scratch")
    monkeypatch.setattr(Learner, "step", REAL_STEP)
    assert run_here(one, tmp_path / "scratch").status == "succeeded", "it goes on from step 3"
    assert not (run_folder(one) / "diverged.json").exists()


def test_a_divergence_fails_at_the_same_step_interrupted_or_not_and_is_never_saved(job, tmp_path, reported):
    high = dict.fromkeys(range(9, 20), 50.0)
    changes = {"train__max_steps": 20, "train__save_steps": 10}
    whole, halved = job(name="whole", **changes), job(name="halved", **changes)
    reported(high)
    with pytest.raises(DivergenceError, match=r"step 13: .*for 5 steps"):
        run_here(whole, tmp_path / "scratch")
    assert not list(run_folder(whole).glob("checkpoint-*")), "step 10 was out of line, so it was not saved"
    reported(high)
    assert run_here(halved, tmp_path / "scratch", stop_at=11).status == "stopped"
    reported({step - 11: loss for step, loss in high.items() if step > 11})
    with pytest.raises(DivergenceError, match=r"step 13: .*for 5 steps"):
        run_here(halved, tmp_path / "scratch")
    reported({})
    off = job(name="halved", **changes, train__divergence_factor=None)
    assert make_plan(off).run_key == make_plan(halved).run_key, "a run may go on with the watch switched off"
    assert run_here(off, tmp_path / "scratch").status == "succeeded"


def test_a_save_that_an_outlier_held_up_is_made_up_for(job, tmp_path, reported):
    reported({6: 500.0})
    one = job(train__max_steps=9, train__save_steps=6)
    assert run_here(one, tmp_path / "scratch", stop_at=8).status == "stopped"
    names = [path.name for path in sorted(run_folder(one).glob("checkpoint-*"))]
    assert names == ["checkpoint-00000007", "checkpoint-00000008"]


def test_a_held_out_loss_that_is_not_finite_ends_the_run(job, tmp_path, held_out):
    held_out([4.0, math.inf])
    one = job(train__eval_steps=2)
    with pytest.raises(DivergenceError, match="step 4: the held-out loss is inf"):
        run_here(one, tmp_path / "scratch")
    assert [path.name for path in run_folder(one).glob("checkpoint-*")] == ["checkpoint-00000002"]
