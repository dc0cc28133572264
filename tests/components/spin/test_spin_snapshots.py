"""Snapshots of a run under way: whole, without what is not needed, and taken up by an empty disk."""

import functools
import shutil

import pytest

from components.common.storage import mirror
from components.spin import snapshots
from components.spin.files import SAVED, RunFiles, mark_checkpoint, write_json


@pytest.fixture
def files(tmp_path) -> RunFiles:
    """A run in its second iteration: the first one is complete, responses are there, two checkpoints, one of them half."""
    files = RunFiles(tmp_path / "out")
    for index in (0, 1):
        files.iteration(index).mkdir(parents=True)
        files.generated(index).write_text("a response\n")
    for path in (files.run, files.clock):
        write_json(path, {})
    files.model(0).mkdir()
    (files.model(0) / "model.safetensors").write_bytes(b"weights")
    files.finish_iteration(0, {"steps": 1})
    for step in (2, 4, 6):
        checkpoint = files.checkpoints(1) / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(bytes(step))
        if step != 6:
            mark_checkpoint(checkpoint)
    return files


def names(directory) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_a_snapshot_holds_what_the_run_needs_to_go_on(files):
    snapshots.save(files, all_models=False)
    snapshot = files.snapshots / "checkpoint-1"
    first = {f"iteration-0/{name}" for name in ("generated.jsonl", "result.json", "model/model.safetensors")}
    second = {f"iteration-1/checkpoints/checkpoint-4/{name}" for name in ("model.safetensors", "complete.json")}
    told = {"run.json", "clock.json", SAVED}
    assert names(snapshot) == {*told, *first, "iteration-1/generated.jsonl", *second}
    assert mirror.newest(files.snapshots, SAVED) == snapshot
    weights = "iteration-0/model/model.safetensors"
    assert (files.root / weights).samefile(snapshot / weights)  # it costs no space


def test_responses_that_come_later_do_not_change_it(files):
    snapshots.save(files, all_models=False)
    with files.generated(1).open("a") as file:
        file.write("another\n")
    assert (files.snapshots / "checkpoint-1" / "iteration-1" / "generated.jsonl").read_text() == "a response\n"


def test_only_the_newest_complete_iterations_model_unless_all_are_to_stay(files):
    shutil.copytree(files.model(0), files.model(1))
    files.finish_iteration(1, {"steps": 2})
    for all_models, expected in ((False, {1}), (True, {0, 1})):
        snapshots.save(files, all_models)
        newest = mirror.newest(files.snapshots, SAVED)
        assert {index for index in (0, 1) if (newest / f"iteration-{index}" / "model").exists()} == expected


def test_two_stay(files):
    for _ in range(4):
        snapshots.save(files, all_models=False)
    assert {path.name for path in files.snapshots.iterdir()} == {"checkpoint-3", "checkpoint-4"}


def test_an_empty_disk_takes_it_up_and_a_newer_run_does_not(files, tmp_path):
    snapshots.save(files, all_models=False)
    (files.snapshots / "checkpoint-1" / mirror.LOG).mkdir()  # as it comes from a bucket
    before = names(files.root)
    snapshots.adopt(files)  # the run is as new
    assert names(files.root) == before
    other = RunFiles(tmp_path / "other")
    shutil.copytree(files.snapshots, other.snapshots)
    snapshots.adopt(other)
    assert names(other.root) == names(files.snapshots / "checkpoint-1")
    assert not (other.root / mirror.LOG).exists()
    snapshots.save(other, all_models=False)  # this pod goes further; the first one comes back with its old disk
    shutil.copytree(other.snapshots / "checkpoint-2", files.snapshots / "checkpoint-2")
    other.generated(1).write_text("further\n")
    snapshots.adopt(files)
    assert not (files.checkpoints(1) / "checkpoint-2").exists()
    assert snapshots._number(files.root) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_record_counts_as_none(content, files):
    files.saved.write_text(content)
    snapshots.save(files, all_models=False)
    assert mirror.newest(files.snapshots, SAVED).name == "checkpoint-1"


class KilledError(Exception):
    """The pod is gone."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", [6, 10])  # in iteration 0 while it trains, in iteration 1 while it generates
def test_a_run_goes_on_from_its_snapshot_to_the_same_weights(moment, build, tmp_path):
    def save(run) -> None:
        snapshots.save(run.inputs.files, all_models=False)
        if snapshots._number(run.inputs.files.root) == moment:
            raise KilledError

    whole, run = build(tmp_path / "whole", held_out=4), build(tmp_path / "cut", held_out=4)
    whole.run()
    write_json(run.inputs.files.run, {})
    run.save = functools.partial(save, run)
    with pytest.raises(KilledError):
        run.run()
    files = RunFiles(tmp_path / "other-disk")
    shutil.copytree(run.inputs.files.snapshots, files.snapshots)
    snapshots.adopt(files)
    again = build(files.output, held_out=4)
    again.save = functools.partial(snapshots.save, files, all_models=False)
    again.run()
    trained = [done.inputs.files.model(1) / "model.safetensors" for done in (whole, again)]
    assert trained[0].read_bytes() == trained[1].read_bytes()
