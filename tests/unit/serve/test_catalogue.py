"""The index of a store's adapters: who is in it, that it follows stages, and that looking is cheap."""

from __future__ import annotations

import asyncio
import shutil
import threading

import pytest
from pydantic import ValidationError

from lmray.artifacts.served import Canary, ServedAdapter
from lmray.serve import catalogue as module
from lmray.serve.catalogue import Catalogue
from tests.unit.serve.stores import BASE, FIT, SmallStore


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


def make(small: SmallStore, *served: tuple[str, str | None], **told) -> Catalogue:
    adapters = [ServedAdapter(artifact=artifact, stage=stage) for artifact, stage in served or [("*", "production")]]
    catalogue = Catalogue(small.store, adapters, FIT, **told)
    catalogue.refresh()
    return catalogue


def current(catalogue: Catalogue) -> dict[str, str]:
    return {name: catalogue.line(name).current.id for name in catalogue.names}


def test_adapters_in_the_stage_that_fit_are_served_and_others_say_why(small):
    fits = small.keep("fits", stage="production")
    small.keep("not-promoted")
    small.keep("other-base", base={**BASE, "digest": "e" * 64}, stage="production")
    small.keep("tiny", stage="production")
    catalogue = make(small, reserved="tiny")
    assert current(catalogue) == {"fits": fits.id}
    assert catalogue.line("not-promoted") is None and catalogue.line("unknown") is None
    assert list(catalogue.refused) == ["other-base"] and "was trained on" in catalogue.refused["other-base"]


def test_a_name_comes_before_a_pattern_and_patterns_leave_others_out(small):
    for name in ("team-a", "team-b", "guest"):
        small.keep(name, "old", stage="production")
    newest = small.keep("team-a", "new")
    catalogue = make(small, ("team-*", "production"), ("team-a", None))
    assert set(catalogue.names) == {"team-a", "team-b"}
    assert current(catalogue)["team-a"] == newest.id


def test_a_merged_one_is_beside_no_base_whatever_pattern_it_fits_and_has_its_stages_name(small):
    small.keep("fast", stage="staging")
    beside = small.keep("beside", stage="staging")
    merged = ServedAdapter(artifact="fast", stage="production", merged=True)
    newest = ServedAdapter(artifact="other", merged=True)
    catalogue = Catalogue(small.store, [ServedAdapter(artifact="*", stage="staging"), merged, newest], FIT)
    catalogue.refresh()
    assert current(catalogue) == {"beside": beside.id} and catalogue.refused == {}
    assert catalogue.aliases == {
        "beside@staging": ("beside", "staging"),
        "fast@production": ("fast", "production"),
    }


def test_the_stage_of_a_next_version_is_a_name_while_it_holds_one(small):
    first = small.keep("helper", "one", stage="production")
    served = ServedAdapter(artifact="helper", stage="production", canary=Canary(share=0.5))
    catalogue = Catalogue(small.store, [served], FIT)
    found = []
    for ref in (first.ref, small.keep("helper", "two").ref):
        catalogue.refresh()
        found.append(set(catalogue.aliases))
        small.artifacts.promote(ref, "staging")
    catalogue.refresh()
    assert found == [{"helper@production"}, {"helper@production", "helper@staging"}]
    assert set(catalogue.aliases) == {"helper@production", "helper@staging"}


def test_promotions_and_rollbacks_show_and_new_names_too(small):
    first = small.keep("helper", "one", stage="production")
    catalogue = make(small)
    second = small.keep("helper", "two", stage="production")
    other = small.keep("other", stage="production")
    assert current(catalogue) == {"helper": first.id}
    catalogue.refresh()
    assert current(catalogue) == {"helper": second.id, "other": other.id}
    small.artifacts.rollback("helper", "production")
    catalogue.refresh()
    assert current(catalogue)["helper"] == first.id


def test_without_a_stage_the_newest_version_is_served(small):
    small.keep("helper", "one")
    catalogue = make(small, ("helper", None))
    second = small.keep("helper", "two")
    catalogue.refresh()
    assert current(catalogue) == {"helper": second.id}


@pytest.mark.parametrize("content", ["{", '{"parents": [], "files": {"a.json": 3}}'])
def test_a_bad_version_leaves_the_one_before_it_and_the_other_adapters(small, content, caplog):
    first = small.keep("helper", "one", stage="production")
    other = small.keep("other", stage="production")
    catalogue = make(small)
    second = small.keep("helper", "two", stage="production")
    (small.store.root / f"artifacts/helper/versions/{second.id}.json").write_text(content)
    catalogue.refresh()
    assert current(catalogue) == {"helper": first.id, "other": other.id}
    assert "no record of a version" in catalogue.refused["helper"]
    assert f"`{first.ref}` stays what serves this name" in caplog.text


def test_a_record_that_makes_no_sense_is_refused(small):
    artifact = small.keep("helper", stage="production")
    record = small.store.root / f"artifacts/helper/versions/{artifact.id}.json"
    record.write_text(record.read_text().replace('"bytes"', '"weight"'))
    catalogue = make(small)
    assert catalogue.names == () and "its record cannot be read" in catalogue.refused["helper"]


def test_what_did_not_change_is_not_read_again(small, monkeypatch):
    for index in range(5):
        small.keep(f"a{index}", stage="production")
    catalogue = make(small)
    reads = []
    get = small.store.get
    monkeypatch.setattr(small.store, "get", lambda key: reads.append(key) or get(key))
    catalogue.refresh()
    assert reads == []
    small.artifacts.promote(small.keep("a3", "two").ref, "production")
    reads.clear()
    catalogue.refresh()
    assert reads and all("/a3/" in key for key in reads)


def test_a_record_that_cannot_be_read_holds_up_no_other_and_is_read_again(small, monkeypatch):
    first = small.keep("helper", "one", stage="production")
    catalogue = make(small)
    second, other = small.keep("helper", "two", stage="production"), small.keep("other", stage="production")
    third = small.keep("third", stage="production")

    def get(key: str, of=small.store.get):
        if "/helper/versions" in key or "/third/" in key:
            raise OSError(5, "Input/output error")
        return of(key)

    with monkeypatch.context() as patched:
        patched.setattr(small.store, "get", get)
        catalogue.refresh()
    assert current(catalogue) == {"helper": first.id, "other": other.id}
    assert "Input/output error" in catalogue.refused["third"]
    catalogue.refresh()
    assert current(catalogue) == {"helper": second.id, "other": other.id, "third": third.id}
    assert catalogue.refused == {}


def test_only_the_names_asked_for_are_looked_after(small):
    for name in ("one", "two"):
        small.keep(name, stage="production")
    assert make(small, only=lambda: ["two", "gone"]).names == ("two",)


def test_folders_whose_names_are_no_names_are_passed_over(small):
    small.keep("good", stage="production")
    for name in (".hidden", "a b", "x" * 65, "e\u0301"):
        shutil.copytree(small.store.root / "artifacts/good", small.store.root / "artifacts" / name)
    assert make(small).names == ("good",)


def test_a_look_is_taken_at_most_once_a_second_and_one_at_a_time(small):
    now = 0.0
    catalogue = make(small, clock=lambda: now)

    async def main():
        nonlocal now
        await catalogue.look()
        small.keep("helper", stage="production")
        now = 0.9
        await catalogue.look()
        assert catalogue.names == ()
        now = 1.0
        await asyncio.gather(*(catalogue.look() for _ in range(3)))
        assert catalogue.names == ("helper",)

    asyncio.run(main())


def test_a_store_that_does_not_answer_holds_nobody_up(small, monkeypatch, caplog):
    small.keep("helper", stage="production")
    catalogue = make(small)
    answers = threading.Event()

    def slow(prefix):
        answers.wait(10)
        raise OSError("stale file handle")

    monkeypatch.setattr(small.store, "folders", slow)
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)

    async def main():
        await catalogue.look()
        assert catalogue.names == ("helper",)
        answers.set()
        await asyncio.wait({catalogue._looking})
        assert catalogue.names == ("helper",)

    asyncio.run(main())
    assert "the store cannot be read, what was known of it holds: stale file handle" in caplog.text


def test_the_next_version_stands_beside_the_current_one(small):
    served = [ServedAdapter(artifact="*", stage="production", canary=Canary())]
    current = small.keep("helper", "one", stage="production")
    small.artifacts.promote(current.ref, "staging")
    catalogue = Catalogue(small.store, served, FIT)
    catalogue.refresh()
    assert catalogue.line("helper").canary is None, "the same version is no canary"
    coming = small.keep("helper", "two", stage="staging")
    catalogue.refresh()
    line = catalogue.line("helper")
    assert (line.current.id, line.canary.id, line.settings) == (current.id, coming.id, Canary())
    small.keep("helper", "three", base={**BASE, "digest": "e" * 64}, stage="staging")
    catalogue.refresh()
    line = catalogue.line("helper")
    assert line.current.id == current.id and line.canary is None and "was trained on" in line.refused


@pytest.mark.parametrize("artifact", ["a/b", "../a", ""])
def test_what_is_served_has_a_name_or_is_a_pattern(artifact):
    with pytest.raises(ValidationError, match="not a name"):
        ServedAdapter(artifact=artifact)
    assert ServedAdapter(artifact=f"{artifact}*").is_pattern
