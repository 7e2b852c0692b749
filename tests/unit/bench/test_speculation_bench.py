"""What `lmray bench speculation` makes of an engine's answers, with a tiny model that drafts for itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmray.models.load import load_model
from lmray.testing.tiny import tiny_model_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import speculation

PROMPTS = [(5, 9, 200, 31), (17, 4), (9, 8, 7)]


def test_contenders_say_the_same_and_are_told_beside_none(tmp_path):
    folder = tiny_model_folder(tmp_path / "model")
    model = load_model(folder, "float32").requires_grad_(False)
    cores = speculation.contenders(model, (), 2, {"itself": str(folder)})
    salts = []

    def run(core, salt):
        salts.append(salt)
        return speculation.answer(core, PROMPTS, 2, 24, salt)

    lines = speculation.measured(
        cores, run, rounds=2, say=lambda name, runs, plain: speculation.line(name, 2, runs, plain, "1 M")
    )
    assert len(salts) == 3 * len(cores) and len(set(salts)) == 3, "a round before them is not counted"
    assert [line.split("|")[1].strip() for line in lines] == ["none", "prompt_lookup", "itself"]
    assert all(line.endswith("| 100% |") for line in lines)
    assert "1.00x" in lines[0] and "100% of" in lines[2], "what it proposes is what it would say"


def test_answers_that_differ_are_counted():
    plain, other = (speculation.Run(2, 1.0, answers, {}) for answers in ([[1], [2]], [[1], [3]]))
    assert speculation.line("x", 1, [other], [plain], "").endswith("| 50% |")


@pytest.mark.parametrize("text", ["folder", "=folder", "a=", "a=x,a=y"])
def test_drafts_without_names_of_their_own_are_refused(text):
    with pytest.raises(ValueError, match=r"folder|a="):
        speculation._named(text)
