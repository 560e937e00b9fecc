"""Where plans are saved: links, "~", the spelling of a suffix, several writers at once."""

import os
import threading
from pathlib import Path

import pytest

from paro_jax import AttentionPlan, PlanError, TokenGrid, _plan_file, load_plan, plan_info, save_plan

NAMES = ["plan.safetensors", "plan"]  # one file, and a directory written by orbax


def plan(heads=2) -> AttentionPlan:
    return AttentionPlan.dense(TokenGrid((2, 3)), heads=heads, block=(4, 4))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_link_stays_a_link(tmp_path, name):
    there = tmp_path / "there"
    there.mkdir()
    save_plan(plan(1), there / name)
    link = tmp_path / ("latest" + Path(name).suffix)
    link.symlink_to(there / name)
    save_plan(plan(2), link)
    assert link.is_symlink() and load_plan(link).heads == load_plan(there / name).heads == 2
    assert left_in(tmp_path) == {"there", link.name} and left_in(there) == {name}


def test_a_link_without_a_suffix_to_a_file(tmp_path):
    save_plan(plan(1), tmp_path / "p.safetensors")
    (tmp_path / "latest").symlink_to("p.safetensors")
    save_plan(plan(2), tmp_path / "latest")
    assert load_plan(tmp_path / "p.safetensors").heads == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_home_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_plan(plan(), f"~/{name}")
    assert left_in(tmp_path) == {name}
    assert load_plan(f"~/{name}").heads == plan_info(Path("~") / name)["heads"] == 2


def test_the_suffix_in_any_case(tmp_path):
    save_plan(plan(), tmp_path / "p.SAFETENSORS")
    assert (tmp_path / "p.SAFETENSORS").is_file() and load_plan(tmp_path / "p.SAFETENSORS").heads == 2


@pytest.mark.parametrize("path", [None, "", 3, b"p", "a\0b"], ids=repr)
def test_what_is_no_path(says, path):
    for call in (load_plan, plan_info, _plan_file.probe, lambda path: save_plan(plan(), path)):
        with says("path must be the path of a plan", repr(path), error=PlanError):
            call(path)


def test_a_home_folder_that_is_not_there(says):
    with says("path", "home folder", error=PlanError):
        load_plan("~no_such_user_here/p")


def test_a_file_more_is_noticed(tmp_path, says):
    save_plan(plan(), tmp_path / "plan")
    (tmp_path / "plan" / "arrays" / "sub").mkdir()
    (tmp_path / "plan" / "arrays" / "sub" / "more").write_text("")
    with says(str(tmp_path / "plan"), "arrays/sub/more", "Move", error=PlanError):
        load_plan(tmp_path / "plan")


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    save_plan(plan(), tmp_path / "p.safetensors")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "p.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


# --- several writers ------------------------------------------------------------------------------------------------


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "plan.json").write_text(text)
    return path


@pytest.mark.parametrize("when", ["before the old one is moved away", "after it", "when there was none"])
def test_another_writer_between_two_renames(tmp_path, monkeypatch, when):
    path, real = tmp_path / "plan", os.replace
    if when != "when there was none":
        folder(path, "old")
    mine, pending = folder(tmp_path / "mine", "mine"), [folder(tmp_path / "other", "other")]

    def replace(source, target):
        if pending and (when.startswith("before") or Path(target) == path):
            other = pending.pop()
            if path.exists():
                real(path, tmp_path / "moved")
            real(other, path)
        real(source, target)

    monkeypatch.setattr(_plan_file.os, "replace", replace)
    _plan_file._swap_in(mine, path)
    assert not pending and (path / "plan.json").read_text() == "mine"
    assert left_in(tmp_path) - {"moved"} == {"plan"}


def test_many_writers_leave_one_plan_and_no_debris(tmp_path):
    path, failed = tmp_path / "plan", []

    def write(writer):
        for turn in range(50):
            try:
                _plan_file._swap_in(folder(tmp_path / f"new{writer}-{turn}", str(writer)), path)
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and left_in(tmp_path) == {"plan"}
    assert (path / "plan.json").read_text() in "0123"


# --- before the work ------------------------------------------------------------------------------------------------


def test_probe_accepts_what_can_be_written(tmp_path):
    for name in NAMES:
        _plan_file.probe(tmp_path / "new" / name)
        assert left_in(tmp_path / "new") == set()
    for name in NAMES:
        save_plan(plan(), tmp_path / "new" / name)
        _plan_file.probe(tmp_path / "new" / name)
    assert left_in(tmp_path / "new") == set(NAMES)


def test_probe_refuses_what_is_no_plan_and_what_cannot_be_written(tmp_path, says):
    (tmp_path / "weights.safetensors").write_bytes(b"precious")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary").write_text("dear diary")
    for name, words in {
        "weights.safetensors": "another kind of file",
        "notes": "something else",
        "notes/diary/p.safetensors": "can be written",
    }.items():
        with says(name.partition("/")[0], words, error=PlanError):
            _plan_file.probe(tmp_path / name)
    assert left_in(tmp_path) == {"weights.safetensors", "notes"} and left_in(tmp_path / "notes") == {"diary"}
