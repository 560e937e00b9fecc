"""A calibration that is stopped goes on where it was, to the same bits."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from samples import BLOCK, GRID, assert_same, make, samples

import calibrate
from calibrate import _checkpoint
from paro_jax import QuantSpec


class Stopping:
    """Samples that end with an error at the n-th of all that are asked for."""

    def __init__(self, given, at):
        self.given, self.at, self.asked = given, at, 0

    def __iter__(self):
        for one in self.given:
            if self.asked == self.at:
                raise ConnectionError("the power went")
            self.asked += 1
            yield one


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6])  # 4 samples, seen twice
@pytest.mark.parametrize("objective", ["mass", "paro"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, at, objective):
    path = tmp_path / "new" / "state.npz"
    options = {"objective": objective, "bucket_edges": (0, 0.5, 1)}
    whole, report = make(**options)
    with pytest.raises(ConnectionError):
        make(Stopping(samples(), at), checkpoint=path, **options)
    assert path.exists()
    plan, again = make(samples(), checkpoint=path, heldout=samples(), **options)
    assert_same(plan, whole)
    for row, other in zip(report.rows, again.rows, strict=True):
        assert {k: v for k, v in row.items() if "heldout" not in k} == {
            k: v for k, v in other.items() if "heldout" not in k
        }
    assert not path.exists()  # it has served
    assert os.listdir(path.parent) == []


def test_resumed_work_is_not_done_twice(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    with pytest.raises(ConnectionError):
        make(Stopping(samples(), 6), checkpoint=path)
    seen = []
    original = calibrate._make_plan._score.chosen_mass
    monkeypatch.setattr(
        calibrate._make_plan._score,
        "chosen_mass",
        lambda task, one, *rest: seen.append(one.number) or original(task, one, *rest),
    )
    make(checkpoint=path)
    assert seen == [2, 3]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """No exception, no cleanup: the process is gone, and what was saved last counts."""
    path = tmp_path / "state.npz"
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import samples as t
from test_calibrate_resume import Stopping
from calibrate import _checkpoint
_checkpoint._EVERY = 0
class Killing(Stopping):
    def __iter__(self):
        try:
            yield from super().__iter__()
        except ConnectionError:
            os._exit(9)
t.make(Killing(t.samples(), 6), checkpoint={str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert os.listdir(tmp_path) == ["state.npz"]
    assert_same(make(checkpoint=path)[0], make()[0])


def test_saving_is_throttled(tmp_path, monkeypatch):
    saves = []
    original = _checkpoint.Checkpoint._write
    monkeypatch.setattr(_checkpoint.Checkpoint, "_write", lambda self, *a: saves.append(1) or original(self, *a))
    make(samples(prompts=3), checkpoint=tmp_path / "a")
    assert len(saves) == 3  # the first sample, the end of each pass
    monkeypatch.setattr(_checkpoint, "_EVERY", 0)
    monkeypatch.setattr(_checkpoint.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    saves.clear()
    make(samples(prompts=3), checkpoint=tmp_path / "b")
    assert 3 <= len(saves) < 26


def test_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch):
    def full(self, path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint.Checkpoint, "_write", full)
    with pytest.warns(UserWarning, match=r"checkpoint .* could not be saved .*No space left.*goes on"):
        plan, _ = make(checkpoint=tmp_path / "state.npz")
    assert_same(plan, make()[0])


def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    with pytest.raises(ConnectionError):
        make(Stopping(samples(), 2), checkpoint=path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint.np, "savez", full)
    with pytest.warns(UserWarning), pytest.raises(ConnectionError):
        make(Stopping(samples(), 3), checkpoint=path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["state.npz"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"density": 0.7}, r"written by a run with densities = \[0\.6\], this one has \[0\.7\].*Delete it"),
        ({"objective": "paro"}, "with objective = \"'mass'\", this one has 'ParoMetric"),
        ({"rule": "head"}, "with rule = 'global', this one has 'head'"),
        ({"orders": ["FHW", "WFH"]}, "with orders = "),
        ({"bucket_edges": (0, 0.5, 1)}, "with bucket_edges = "),
        ({"block": (8, 8)}, "with block = "),
        ({"quant": QuantSpec(qk="int8")}, "with quant = "),
        (
            {"given": samples(prompts=2)[4:]},
            r"samples must be the same each time.* number 0, site 0, step 0\.1 \(bucket 0\)",
        ),
        ({"given": samples()[:1]}, "there were 2, now there are 1"),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path, change, named):
    path = tmp_path / "state.npz"
    with pytest.raises(ConnectionError):
        make(Stopping(samples(), 2), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=named):
        make(**{"checkpoint": path, **change})
    if "given" not in change:
        assert path.read_bytes() == before


DAMAGE = {
    "truncated": lambda b: b[:-40],
    "one bit": lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
    "another file": lambda b: b"junk",
    "empty": lambda b: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint(tmp_path, damage):
    path = tmp_path / "state.npz"
    with pytest.raises(ConnectionError):
        make(Stopping(samples(), 2), checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"checkpoint {path} is not a whole calibration checkpoint")):
        make(checkpoint=path)


def test_a_checkpoint_of_another_format(tmp_path):
    path = tmp_path / "state.npz"
    np.savez(path, header=np.array(json.dumps({"format": "paro_jax calibration checkpoint 9"})))
    with pytest.raises(ValueError, match="expected 'paro_jax calibration checkpoint 3', found '.* 9'"):
        make(checkpoint=path)


def test_a_finished_checkpoint_stays_when_asked_and_is_for_the_same_samples(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    again = {"densities": (0.6,), "block": BLOCK, "progress": False, "checkpoint": path}
    ((plan, _),) = calibrate.make_plans(samples(), GRID, keep_checkpoint=True, **again)
    before = path.read_bytes()
    other = samples()
    other[3] = other[3]._replace(k=other[2].k)
    for given, named in (
        (other, "number 3, site 1, step 0.6 .*is not what it was"),
        (samples()[:2], "there were 4, now there are 2"),
        (samples(prompts=2), "there were 4, now there are more"),
    ):
        with pytest.raises(ValueError, match=named):
            calibrate.make_plans(given, GRID, **again)
        assert path.read_bytes() == before

    def never(*args):
        raise AssertionError("it was computed already")

    monkeypatch.setattr(calibrate._score, "chosen_mass", never)
    assert_same(calibrate.make_plans(samples(), GRID, **again)[0][0], plan)
    assert not path.exists()
