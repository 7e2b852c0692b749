"""Errors say where, what, what is allowed and a hint, and survive the way through another process."""

from __future__ import annotations

import copy
import pickle

import pytest

from lmray import errors
from lmray.errors import ArtifactError, ConfigError, LmrayError, Problem, did_you_mean

CLASSES = [errors.ConfigError, errors.DataError, errors.ArtifactError, errors.CapacityError]
CLASSES += [errors.CheckpointError, errors.RemoteError, errors.DivergenceError, errors.OutOfMemoryError]
CLASSES += [errors.HangError, errors.LmrayError]


def test_a_message_has_only_the_lines_it_needs():
    assert str(LmrayError("here", "is wrong")) == "here: is wrong"
    full = LmrayError("here", "is wrong", allowed="that", hint="do it")
    assert str(full) == "here: is wrong\n  allowed: that\n  hint: do it"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_survives_copying(cls, through):
    error = cls("here", "is wrong: 日本語", allowed="that", hint="do it")
    error.extra = {"rank": 3}
    again = through(error)
    assert type(again) is cls
    assert str(again) == str(error)
    assert again.args == error.args
    assert (again.where, again.found, again.allowed, again.hint) == ("here", "is wrong: 日本語", "that", "do it")
    assert again.extra == {"rank": 3}


def test_a_config_error_carries_every_problem_through_pickle():
    problems = [Problem("a.yaml:1: x", "unknown key", "y", "did you mean `y`?"), Problem("a.yaml:2: z", "is missing")]
    again = pickle.loads(pickle.dumps(ConfigError.of(problems)))
    assert again.problems == tuple(problems)
    assert str(again) == ("a.yaml:1: x: unknown key\n  allowed: y\n  hint: did you mean `y`?\na.yaml:2: z: is missing")


def test_exit_codes_tell_wrong_input_from_a_failed_job():
    assert {cls.__name__: cls.exit_code for cls in CLASSES} == {
        "ConfigError": 2,
        "DataError": 2,
        "ArtifactError": 2,
        "CapacityError": 2,
        "CheckpointError": 1,
        "RemoteError": 1,
        "DivergenceError": 1,
        "OutOfMemoryError": 1,
        "HangError": 1,
        "LmrayError": 1,
    }


def test_every_error_is_of_one_tree():
    assert all(issubclass(cls, LmrayError) for cls in CLASSES)
    with pytest.raises(LmrayError):
        raise ArtifactError("artifact `x`", "unknown")


def test_a_hint_names_the_closest_word_or_nothing():
    assert did_you_mean("lorra", ["lora", "full"]) == "did you mean `lora`?"
    assert did_you_mean("zzz", ["lora", "full"]) is None
    assert did_you_mean("lora", []) is None


def test_what_would_fail_again_is_final():
    final = {cls.__name__ for cls in CLASSES if cls.final}
    assert final == {
        *("ConfigError", "DataError", "ArtifactError", "CapacityError", "DivergenceError", "OutOfMemoryError")
    }
    assert errors.DivergenceError.exit_code == errors.OutOfMemoryError.exit_code == 1
