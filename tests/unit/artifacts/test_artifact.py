"""An artifact's life: keep, find, verify, check out, promote, roll back."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from lmray.artifacts.artifact import Artifact, ArtifactRef, Artifacts
from lmray.artifacts.file_store import FileStore
from lmray.errors import ArtifactError
from lmray.testing.kills import Killed, file_operations

BASE = {"source": "tiny", "revision": None, "digest": "d" * 64}


@pytest.fixture
def artifacts(tmp_path, monkeypatch) -> Artifacts:
    monkeypatch.setenv("LMRAY_CACHE", str(tmp_path / "cache"))
    return Artifacts(FileStore(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return fill(tmp_path / "adapter", b"weights")


def fill(folder: Path, content: bytes) -> Path:
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def keep(artifacts: Artifacts, folder: Path, content: bytes = b"weights", name: str = "calls", **facts) -> Artifact:
    return artifacts.keep(name, fill(folder, content), base=BASE, **facts)


def stored(artifacts: Artifacts, artifact: Artifact, path: str = "adapter_model.safetensors") -> Path:
    return artifacts.store.root / "objects" / artifact.files[path]["sha256"]


def test_a_kept_artifact_says_what_it_is(artifacts, folder):
    kept = keep(artifacts, folder, parents=("other@123456789abc",), run_key="k", metrics={"eval.loss": 0.5})
    found = artifacts.find("calls")
    assert found == kept
    assert (found.kind, found.base, found.parents, found.run_key) == ("adapter", BASE, ("other@123456789abc",), "k")
    assert found.metrics == {"eval.loss": 0.5}
    assert sorted(found.files) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer/chat_template.jinja"]
    assert found.num_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert found.ref == f"calls@{found.id[:12]}"


def test_keeping_the_same_twice_gives_one_version(artifacts, folder):
    first = keep(artifacts, folder, metrics={"eval.loss": 0.5})
    assert keep(artifacts, folder, metrics={"eval.loss": 0.6}) == first
    assert artifacts.versions("calls") == [first]
    assert keep(artifacts, folder, b"others") != first
    assert len(artifacts.versions("calls")) == 2


def test_keeping_the_same_at_once_from_many_threads_gives_one_version(artifacts, folder):
    fill(folder, b"weights")
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda _: artifacts.keep("calls", folder, base=BASE), range(16)))
    assert len({artifact.id for artifact in kept}) == 1
    assert len(artifacts.versions("calls")) == 1
    artifacts.verify(kept[0])


def test_equal_files_of_two_artifacts_are_stored_once(artifacts, folder):
    one, two = keep(artifacts, folder, name="one"), keep(artifacts, folder, name="two")
    assert one.id == two.id
    assert len(list((artifacts.store.root / "objects").iterdir())) == 3
    assert artifacts.names() == ["one", "two"]


@pytest.mark.parametrize("name", ["weights.bin", "model.pt", "data.pkl", "code.py", "noending"])
def test_files_that_may_hold_code_are_not_kept(artifacts, folder, name):
    (folder / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match="cannot be kept") as caught:
        artifacts.keep("calls", folder, base=BASE)
    assert ".safetensors" in str(caught.value)
    assert artifacts.names() == []


def test_a_whole_model_is_kept_and_a_record_without_a_kind_is_an_adapters(artifacts, folder, tmp_path):
    whole = tmp_path / "model"
    whole.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json", "merges.txt"):
        (whole / name).write_text("{}", encoding="utf-8")
    kept = artifacts.keep("whole", whole, base=BASE, kind="model")
    assert artifacts.find("whole").kind == "model"
    artifacts.verify(kept)
    assert sorted(path.name for path in artifacts.checkout(kept).iterdir()) == sorted(kept.files)
    adapter = keep(artifacts, folder)
    record = artifacts.store.root / "artifacts" / "calls" / "versions" / f"{adapter.id}.json"
    fields = json.loads(record.read_text(encoding="utf-8"))
    del fields["kind"]
    record.write_text(json.dumps(fields), encoding="utf-8")
    assert artifacts.find("calls") == adapter


@pytest.mark.parametrize(
    ("kind", "found"),
    [("modle", "did you mean `model`"), ("model", r"is no model: it has no config.json"), ("report", "unknown")],
)
def test_what_is_no_artifact_of_its_kind_is_refused(artifacts, folder, kind, found):
    with pytest.raises(ArtifactError, match=found):
        artifacts.keep("calls", folder, base=BASE, kind=kind)
    assert artifacts.names() == []


def test_a_version_is_found_by_stage_by_version_and_as_the_newest(artifacts, folder):
    first, second = keep(artifacts, folder), keep(artifacts, folder, b"others")
    artifacts.promote(first.ref, "production")
    assert artifacts.find("calls") == second
    assert artifacts.find("calls@production") == first
    assert artifacts.find(f"calls@{first.id[:8]}") == first
    assert artifacts.find(ArtifactRef("calls", second.id)) == second


def test_an_unknown_artifact_lists_the_names_there_are(artifacts, folder):
    with pytest.raises(ArtifactError, match="nothing is kept yet"):
        artifacts.find("calls")
    keep(artifacts, folder)
    with pytest.raises(ArtifactError, match="allowed: calls\n  hint: did you mean `calls`"):
        artifacts.find("cals")


def test_an_unknown_stage_or_version_lists_those_there_are(artifacts, folder):
    kept = keep(artifacts, folder)
    with pytest.raises(ArtifactError, match="hint: lmray artifacts promote calls production"):
        artifacts.find("calls@production")
    with pytest.raises(ArtifactError, match="hint: did you mean `production`"):
        artifacts.find("calls@prodction")
    with pytest.raises(ArtifactError, match=f"no version or stage `00000000`\n  allowed: {kept.id[:12]}"):
        artifacts.find("calls@00000000")


def test_a_word_that_is_no_stage_never_selects_a_version_by_its_first_letters(artifacts, folder):
    for content in range(40):
        keep(artifacts, folder, bytes([content]))
    for letter in "abcdef":
        with pytest.raises(ArtifactError, match="no version or stage"):
            artifacts.find(f"calls@{letter}")


@pytest.mark.parametrize(
    "text", ["", "a/b", "../x", "@production", "x@", "x@UPPER", "x@12", "x@a b", "x@../y", "x@y@z"]
)
def test_text_that_is_no_reference_is_refused(text):
    with pytest.raises(ArtifactError, match=r"is no artifact reference|neither a stage nor a version"):
        ArtifactRef.parse(text)


def test_references_round_trip_in_any_script():
    for text in ("関数", "calls@production", "a.b-c@0123abcd"):
        assert str(ArtifactRef.parse(text)) == text


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_corrupt_object_is_found_named_and_mended_by_keeping_it_again(artifacts, folder, change):
    kept = keep(artifacts, folder)
    path = stored(artifacts, kept)
    if change == "flip":
        path.write_bytes(b"wEights")
    elif change == "cut":
        path.write_bytes(b"weigh")
    else:
        path.unlink()
    for use in (artifacts.verify, artifacts.checkout):
        with pytest.raises(ArtifactError, match=r"calls@\w{12}: adapter_model.safetensors: is missing or corrupt"):
            use(kept)
    keep(artifacts, folder)
    artifacts.verify(kept)


def test_a_checkout_is_the_folder_that_was_kept(artifacts, folder):
    kept = keep(artifacts, folder)
    out = artifacts.checkout(kept)
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == {path: (folder / path).read_bytes() for path in kept.files}
    assert artifacts.checkout(kept) == out


def test_replicas_that_check_out_at_once_never_see_half_a_folder(artifacts, folder):
    kept = keep(artifacts, folder)

    def one(_):
        out = artifacts.checkout(kept)
        return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())

    with ThreadPoolExecutor(8) as pool:
        assert set(map(tuple, pool.map(one, range(16)))) == {tuple(sorted(kept.files))}
    left = [path.name for path in artifacts.checkout(kept).parent.iterdir() if not path.name.endswith(".lock")]
    assert left == [kept.id]


def test_a_promotion_is_logged_with_what_it_replaced(artifacts, folder):
    first, second = keep(artifacts, folder), keep(artifacts, folder, b"others")
    artifacts.promote(first.ref, "production")
    artifacts.promote("calls", "production")
    artifacts.promote("calls@production", "staging")
    assert artifacts.stages("calls") == {"production": second.id, "staging": second.id}
    log = [(entry["action"], entry["stage"], entry["version"], entry["previous"]) for entry in artifacts.log("calls")]
    assert log == [
        ("promote", "production", first.id, None),
        ("promote", "production", second.id, first.id),
        ("promote", "staging", second.id, None),
    ]
    assert all(entry["by"] and entry["time"] for entry in artifacts.log("calls"))


def test_an_unknown_stage_is_refused(artifacts, folder):
    keep(artifacts, folder)
    with pytest.raises(ArtifactError, match="did you mean `production`"):
        artifacts.promote("calls", "producton")
    assert artifacts.stages("calls") == {}


def test_rollback_points_the_stage_at_what_it_held_before(artifacts, folder):
    first, second = keep(artifacts, folder), keep(artifacts, folder, b"others")
    artifacts.promote(first.ref, "production")
    artifacts.promote(second.ref, "staging")
    artifacts.promote(second.ref, "production")
    assert artifacts.rollback("calls", "production") == first
    assert artifacts.find("calls@production") == first
    assert artifacts.find("calls@staging") == second
    assert [entry["action"] for entry in artifacts.log("calls")][-1] == "rollback"


def test_rollback_without_an_earlier_version_is_refused(artifacts, folder):
    kept = keep(artifacts, folder)
    with pytest.raises(ArtifactError, match="no earlier version"):
        artifacts.rollback("calls", "production")
    artifacts.promote(kept.ref, "production")
    with pytest.raises(ArtifactError, match="hint: lmray artifacts show calls"):
        artifacts.rollback("calls", "production")


def test_promotions_at_once_are_all_logged_and_leave_one_of_them(artifacts, folder):
    kept = [keep(artifacts, folder, bytes([content])) for content in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda artifact: artifacts.promote(artifact.ref, "production"), kept))
    assert artifacts.stages("calls")["production"] in [artifact.id for artifact in kept]
    assert sorted(entry["version"] for entry in artifacts.log("calls")) == sorted(artifact.id for artifact in kept)


def life(store: FileStore, folder: Path) -> None:
    """Two versions, of which the second is promoted after the first and taken back; done again it changes nothing."""
    artifacts = Artifacts(store)
    first, second = keep(artifacts, folder), keep(artifacts, folder, b"others")
    if artifacts.log("calls")[1:]:
        return
    for artifact in (first, second):
        artifacts.promote(artifact.ref, "production")


def test_a_kill_at_any_file_operation_loses_no_change_of_a_stage_and_no_entry_of_the_log(tmp_path):
    folder = tmp_path / "adapter"
    whole = FileStore(tmp_path / "whole")
    operations = file_operations(whole.root, lambda: life(whole, folder))
    files = sorted(path.relative_to(whole.root) for path in whole.root.rglob("*"))
    assert len(operations) > 30, "few operations were heard: the test says little"
    for kill, what in enumerate(operations, 1):
        store = FileStore(tmp_path / f"kill{kill}")
        with pytest.raises(Killed):
            file_operations(store.root, lambda store=store: life(store, folder), kill_at=kill)
        artifacts = Artifacts(store)
        log = artifacts.log("calls")
        assert artifacts.stages("calls") == ({"production": log[-1]["version"]} if log else {}), what
        life(store, folder)
        first, second = artifacts.versions("calls")
        changes = [(entry["version"], entry["previous"]) for entry in artifacts.log("calls")]
        assert changes == [(first.id, None), (second.id, first.id)], what
        assert sorted(path.relative_to(store.root) for path in store.root.rglob("*")) == files, what
        assert artifacts.rollback("calls", "production") == first, what


def test_promoting_what_a_stage_holds_is_no_change(artifacts, folder):
    first, second = keep(artifacts, folder), keep(artifacts, folder, b"others")
    for artifact in (first, second, second):
        artifacts.promote(artifact.ref, "production")
    assert len(artifacts.log("calls")) == 2
    assert artifacts.rollback("calls", "production") == first


def test_a_rollback_goes_by_what_another_process_wrote_meanwhile(artifacts, folder, monkeypatch):
    kept = [keep(artifacts, folder, bytes([content])) for content in range(3)]
    for artifact in kept[:2]:
        artifacts.promote(artifact.ref, "production")
    swap, other = artifacts.store.compare_and_swap, Artifacts(FileStore(artifacts.store.root))

    def late(*arguments):
        monkeypatch.setattr(artifacts.store, "compare_and_swap", swap)
        other.promote(kept[2].ref, "production")
        return swap(*arguments)

    monkeypatch.setattr(artifacts.store, "compare_and_swap", late)
    assert artifacts.rollback("calls", "production") == kept[1], "and not the first, as it was before the other wrote"
    assert [entry["version"] for entry in artifacts.log("calls")] == [kept[place].id for place in (0, 1, 2, 1)]


PROMOTE = """
import sys
from pathlib import Path
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.file_store import FileStore
artifacts = Artifacts(FileStore(Path(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    artifacts.promote(sys.argv[2 + number % 2], sys.argv[4])
"""


def test_two_processes_that_promote_at_once_lose_nothing(artifacts, folder):
    first, second = keep(artifacts, folder), keep(artifacts, folder, b"others")
    promoters = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, str(artifacts.store.root), first.ref, second.ref, stage],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for stage in ("staging", "production")
    ]
    for promoter in promoters:
        assert promoter.stdout is not None and promoter.stdout.readline() == "ready\n"
    for promoter in promoters:
        promoter.communicate("go\n")
        assert promoter.returncode == 0
    for stage in ("staging", "production"):
        entries = [entry for entry in artifacts.log("calls") if entry["stage"] == stage]
        versions = [first.id, second.id] * 5
        assert [(entry["previous"], entry["version"]) for entry in entries] == [*pairwise([None, *versions])]
    assert artifacts.stages("calls") == {"staging": second.id, "production": second.id}


def old_layout(artifacts: Artifacts, stages: dict[str, str], log: list[tuple[str, str, str | None]]) -> None:
    """The files of a store in which stages and log were apart."""
    store = artifacts.store
    store.put("artifacts/calls/stages.json", json.dumps(stages).encode())
    for number, (stage, version, previous) in enumerate(log):
        entry = {"action": "promote", "stage": stage, "version": version, "previous": previous, "time": 1.0, "by": "me"}
        store.put(f"artifacts/calls/log/{number:08d}.json", json.dumps(entry).encode())


def test_a_store_of_the_old_layout_is_read_and_goes_on_in_the_new_one(artifacts, folder):
    first, second = keep(artifacts, folder), keep(artifacts, folder, b"others")
    old_layout(artifacts, {"production": first.id}, [("production", first.id, None)])
    assert artifacts.find("calls@production") == first and len(artifacts.log("calls")) == 1
    artifacts.promote(second.ref, "production")
    assert [entry["version"] for entry in artifacts.log("calls")] == [first.id, second.id]
    assert artifacts.rollback("calls", "production") == first
    assert artifacts.stages("calls") == {"production": first.id}


def test_an_entry_that_the_old_layout_lost_is_told_and_a_rollback_does_not_go_one_too_far(artifacts, folder):
    kept = [keep(artifacts, folder, bytes([content])) for content in range(3)]
    one, two, three = (artifact.id for artifact in kept)
    old_layout(artifacts, {"production": three}, [("production", one, None), ("production", two, one)])
    last = artifacts.log("calls")[-1]
    assert (last["action"], last["version"], last["previous"]) == ("not logged", three, two)
    assert artifacts.rollback("calls", "production") == kept[1]


def test_a_spoilt_record_and_a_spoilt_list_of_stages_are_named(artifacts, folder):
    kept = keep(artifacts, folder)
    artifacts.promote("calls", "production")
    root = artifacts.store.root / "artifacts" / "calls"
    for path, found in (
        (root / "stages.json", "no list of changes"),
        (root / "versions" / f"{kept.id}.json", "record"),
    ):
        content = path.read_bytes()
        path.write_bytes(content[:-9])
        with pytest.raises(ArtifactError, match=found) as caught:
            artifacts.find("calls@production")
        assert caught.value.where == str(path) and "restore it" in str(caught.value.hint)
        path.write_bytes(content)
    assert artifacts.find("calls@production") == kept


def test_a_record_is_plain_json(artifacts, folder):
    kept = keep(artifacts, folder, name="関数")
    path = artifacts.store.root / "artifacts" / "関数" / "versions" / f"{kept.id}.json"
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == "関数"
