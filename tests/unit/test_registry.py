"""A family is a folder; listing it imports nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lmray.errors import ConfigError
from lmray.registry import ADAPTERS, FAMILIES, METHODS, Family, class_name


def test_a_member_is_found_by_its_files_name():
    assert "lora" in ADAPTERS.names()
    assert ADAPTERS.load("lora").__name__ == "Lora"
    assert ADAPTERS.load("lora") is ADAPTERS.load("lora")


def test_base_and_private_modules_are_no_members(tmp_path, monkeypatch):
    folder = tmp_path / "family_for_this_test"
    folder.mkdir()
    for name in ("__init__", "base", "_private", "first", "second_one"):
        class_text = f"class {class_name(name)}: pass\n" if not name.startswith("_") else ""
        (folder / f"{name}.py").write_text(class_text, encoding="utf-8")
    (folder / "notes.txt").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    family = Family("family_for_this_test", "thing")
    assert family.names() == ("first", "second_one")
    assert family.load("second_one").__name__ == "SecondOne"


@pytest.mark.parametrize("name", ["lorra", "base", "", "../lora", "_private", "Lora"])
def test_an_unknown_member_names_those_there_are(name):
    with pytest.raises(ConfigError) as caught:
        ADAPTERS.load(name)
    assert f"unknown adapter `{name}`" in str(caught.value)
    assert "allowed: adalora, full, ia3, lisa, lora," in str(caught.value)


def test_a_close_name_is_hinted_at():
    with pytest.raises(ConfigError, match="did you mean `sft`"):
        METHODS.load("sftt")


def test_listing_all_families_imports_no_member():
    code = (
        "import sys; from lmray.registry import FAMILIES; [family.names() for family in FAMILIES.values()];"
        "print([name for name in ('torch', 'lmray.adapters.lora') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_words_and_packages_are_one_to_one():
    assert len({family.package for family in FAMILIES.values()}) == len(FAMILIES)
    assert len({family.word for family in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize(("member", "expected"), [("sft", "Sft"), ("json_match", "JsonMatch"), ("rouge_l", "RougeL")])
def test_class_names_are_camel_case(member, expected):
    assert class_name(member) == expected
