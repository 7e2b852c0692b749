"""What the pages for people say exists: commands with their options, make targets, job files, paths."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer

import lmray
from lmray.cli.app import app
from lmray.errors import LmrayError
from lmray.train.plan import PLACEMENT
from tests.architecture.source import ROOT, files, name_of

PAGES = [path for path in files() if path.suffix == ".md" and path.name != "CHANGELOG.md" and "bench" not in path.parts]
FOLDERS = ("cluster", "lmray", "jobs", "configs", "tests", "dashboards")
TARGETS = {"help", "venv", "demo", "test", "test-full", "lint", "bench", "dashboards"}
SHELL = ("", "sh", "bash", "shell", "console")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPERATORS = ("&&", "||", "|", ";", "&", "(", ")", ">", ">>", "<", "2>", "then", "do")


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in one of `languages`."""
    return [body for language, body in FENCE.findall(text) if language in languages]


def spans(text: str) -> list[str]:
    """Inline code outside of fenced blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands(text: str) -> Iterator[list[str]]:
    """Every command of a page as words, from shell blocks and inline code; prompts and variables left out."""
    lines = [line for block in blocks(text, *SHELL) for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + [span for span in spans(text) if re.match(r"(\.venv/bin/)?(lmray|make|python|bash) ", span)]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # output that a block shows
        command: list[str] = []
        for word in [*words, ";"]:
            if word in OPERATORS:
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\$$|[A-Z_]+=", word):
                command.append(word.removeprefix(".venv/bin/"))


def check_lmray(words: list[str]) -> None:
    """`lmray ...` names commands and options that there are, and job files that decode with its overrides."""
    command: Any = typer.main.get_command(app)
    rest = [word.strip("[]") for word in words[1:]]
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        names = rest.pop(0).split("|")
        unknown = [name for name in names if name not in command.commands]
        assert not unknown, f"no command {unknown[0]}; there are: {', '.join(command.commands)}"
        command = command.commands[names[0]]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in options | {"--help"}, f"no option {word}"
    check_config(rest)


def check_config(words: list[str]) -> None:
    """A job file among `words` decodes with the overrides after it."""
    configs = [word for word in words if word.startswith("configs/")]
    if len(configs) == 1 and "..." not in words:
        overrides = [word for word in words if re.match(r"[a-z_]+[\w.]*=", word)]
        lmray.load(ROOT / configs[0], *overrides)


def check_make(words: list[str]) -> None:
    for target in words[1:]:
        assert target.startswith("-") or "=" in target or target in make_targets(), f"no make target {target}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_exists(page):
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            if words[0] == "lmray":
                check_lmray(words)
            elif words[0] == "make":
                check_make(words)
            elif words[0] in ("python", "bash"):
                scripts = [word for word in words[1:] if word.endswith(".py") or word.startswith(".ci/")]
                assert all((ROOT / script).is_file() for script in scripts), "no such script"
                check_config(words)
        except (AssertionError, LmrayError) as error:
            pytest.fail(f"{name_of(page)}: `{' '.join(words)}`: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_run_that_a_page_changes_has_a_name_of_its_own(page):
    """Who types a page's commands one after the other is not told that a run of this name is there with other
    content."""
    for words in commands(page.read_text(encoding="utf-8")):
        changed = {word.partition("=")[0] for word in words if re.match(r"[a-z_]+[\w.]*=", word)}
        runs = words[:2] in (["lmray", "run"], ["python", "jobs/run.py"])
        if runs and any(key.partition(".")[0] not in PLACEMENT for key in changed):
            assert "name" in changed, f"{name_of(page)}: `{' '.join(words)}`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_of_a_page_exists(page):
    text = page.read_text(encoding="utf-8")
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    tops = {path.relative_to(ROOT).parts[0] for path in files()}
    named = [span for span in spans(text) if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", span)]
    named = [span for span in named if span.split("/")[0] in tops | set(FOLDERS) and "/" in span]
    named = [span for span in named if not re.search(r"\b[A-Z]{3,}\b", span)]  # `configs/KIND/demo.yaml`
    missing = [one for one in [*filter(None, links), *named] if not exists(page.parent, one)]
    assert not missing, f"{name_of(page)}: not there: {missing}"


def exists(folder: Path, path: str) -> bool:
    """`path`, from the root or from the page's folder, is a file of the repository or a folder with some; `*` fits."""
    known = {name for file in files() for name in (file, *file.parents)}
    patterns = [os.path.normpath(base / path) for base in (ROOT, folder)]
    return any(fnmatch(str(name), pattern) for name in known for pattern in patterns)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_a_page_parses_and_uses_public_names(page):
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lmray":
                assert node.attr in lmray.__all__, f"{name_of(page)}: lmray.{node.attr} is not public"


def test_every_make_target_explains_itself_and_is_of_the_design():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert make_targets() <= TARGETS
    explained = set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
    assert explained == make_targets()
    assert {"venv", "demo", "test", "test-full", "lint"} <= make_targets()


def test_ci_calls_the_test_command_of_the_readme():
    called = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1].removeprefix("exec ")
    assert called == "make test"
    assert ["make", "test"] in list(commands((ROOT / "README.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if (ROOT / folder).is_dir()])
def test_every_folder_has_a_readme_of_a_page(folder):
    page = ROOT / folder / "README.md"
    assert page.is_file()
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_files_that_every_repository_has_are_there():
    for name in ("README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        assert (ROOT / name).is_file(), name


def test_the_rule_sees_a_command_that_is_not_there():
    page = "```sh\n$ RAY_ADDRESS=x lmray frobnicate && make nothing  # comment\n```\nor `lmray run CONFIG --jsn`"
    found = list(commands(page))
    assert found == [["lmray", "frobnicate"], ["make", "nothing"], ["lmray", "run", "CONFIG", "--jsn"]]
    for check, words in zip((check_lmray, check_make, check_lmray), found, strict=True):
        with pytest.raises(AssertionError):
            check(words)
