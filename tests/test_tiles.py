"""Tiles by measurement: what `paro bench --tune` writes, the chooser reads."""

import json
import sys
from dataclasses import asdict, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from problems import schedule

from pallas_kernels import Request, _tiles, block_attention
from pallas_kernels.block_attention import BACKENDS, hopper, xla
from paro_jax import __main__ as command
from paro_jax.bench import report
from paro_jax.bench.jobs import Job, Settings
from paro_jax.bench.measure import requested, sized

XLA = next(b for b in BACKENDS if b.name == "xla")
HOPPER = next(b for b in BACKENDS if b.name == "hopper")
REQUEST = Request("block_attention", 1, 2, 500, 500, 32, "float32", (64, 64))


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """(package's, user's), both empty."""
    package, user = tmp_path / "package", tmp_path / "home"
    monkeypatch.setattr(_tiles, "PACKAGE", package)
    monkeypatch.setattr(_tiles, "user_folder", lambda: user)
    monkeypatch.setattr(_tiles, "device_slug", lambda: "toy_gpu")
    return package, user


def table(request, backend, times, **more):
    """Rows as `--tune` makes them: {tiles: ms or None}."""
    rows = [
        {**Job("tune", "w", backend.name, request.qk, request.pv, tiles=asdict(tiles)).facts,
         **({"status": "measured", "ms": ms} if ms else {"status": "failed", "reason": "hung"})}
        for tiles, ms in times.items()
    ]  # fmt: skip
    return report.tile_rows(
        rows, lambda row: {**_tiles.key(request, backend.name), "q_tokens": request.q_tokens} | more
    )


def test_the_fastest_of_a_table_is_chosen_and_a_failed_one_never(folders):
    every = xla.candidates(REQUEST)
    assert len(every) > 3 and _tiles.measured(REQUEST, XLA) is None
    file = _tiles.write(table(REQUEST, XLA, {every[0]: 3.0, every[1]: 1.0, every[2]: None}), {"device": "toy"})
    assert file.parent == folders[0] and file.stem == _tiles.device_slug()
    written = json.loads(file.read_text())
    assert [entry.get("reason") for entry in written["rows"][0]["candidates"]] == [None, None, "hung"]
    assert _tiles.measured(REQUEST, XLA) == every[1]
    for other in ({"q_tokens": 5000}, {"qk": "int8"}, {"dtype": "bfloat16"}, {"block": (128, 64)}, {"head_dim": 64}):
        assert _tiles.measured(replace(REQUEST, **other), XLA) is None, other
    assert _tiles.measured(replace(REQUEST, device="sm_90"), HOPPER) is None  # another backend's row


def test_a_call_whose_tiles_were_not_all_reached_keeps_its_older_row(folders):
    a, b, *_ = xla.candidates(REQUEST)
    rows = [
        {**Job("tune", "w", "xla", tiles=asdict(tiles)).facts, "status": status, "reason": "late", "ms": 1.0}
        for tiles, status in ((a, "measured"), (b, "not reached"))
    ]
    assert report.tile_rows(rows, lambda row: _tiles.key(REQUEST, "xla")) == []
    assert len(report.tile_rows(rows[:1], lambda row: _tiles.key(REQUEST, "xla"))) == 1


def test_the_nearest_length_speaks_and_new_rows_replace_their_own_only(folders):
    request = Request("block_attention", 1, 2, 4096, 4096, 128, "bfloat16", (128, 128), "int8", "int8", device="sm_90")
    a, b, *_ = hopper.candidates(request)
    longer = replace(request, q_tokens=32768, kv_tokens=32768)
    _tiles.write(table(request, HOPPER, {a: 1.0, b: 2.0}) + table(longer, HOPPER, {a: 2.0, b: 1.0}), {})
    assert [_tiles.measured(replace(request, q_tokens=n), HOPPER) for n in (2000, 6000, 20000, 60000)] == [a, a, b, b]
    assert _tiles.measured(replace(request, q_tokens=500), HOPPER) is None
    _tiles.write(table(request, HOPPER, {a: 2.0, b: 1.0}), {})
    assert _tiles.measured(request, HOPPER) == b == _tiles.measured(longer, HOPPER)


def test_a_folder_that_cannot_be_written_gives_way_to_the_users_own(folders, monkeypatch):
    package, user = folders
    a, b, *_ = xla.candidates(REQUEST)
    _tiles.write(table(REQUEST, XLA, {a: 1.0}), {})
    assert _tiles.measured(REQUEST, XLA) == a and str(package) in _tiles.source()
    for file in package.iterdir():
        file.unlink()
    package.rmdir()
    package.write_text("a file where the folder would be")
    assert "none measured" in _tiles.source()
    assert _tiles.write(table(REQUEST, XLA, {b: 1.0}), {}).parent == user
    assert _tiles.measured(REQUEST, XLA) == b and str(user) in _tiles.source()
    monkeypatch.setattr(_tiles, "device_slug", lambda: "cpu")
    assert _tiles.write(table(REQUEST, XLA, {a: 1.0}), {}).parent == user  # nobody else's CPU
    assert _tiles.measured(REQUEST, XLA) == a
    user_file = user / "cpu.json"
    with pytest.warns(UserWarning, match="not a table of tiles"):
        user_file.write_text('{"schema": 99, "rows": []}')
        assert _tiles.measured(REQUEST, XLA) is None


def test_block_attention_runs_with_the_tiles_of_the_table_and_every_tile_gives_the_same(folders, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 500, 32)), jnp.float32) for _ in "qkv")
    count, index = schedule(rng.random((2, 8, 8)) < 0.5)
    ran = []

    def spy(*arrays, tiles=None, **options):
        ran.append(tiles)
        return XLA.run(*arrays, tiles=tiles, **options)

    module = sys.modules["pallas_kernels.block_attention"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "BACKENDS", (replace(XLA, run=spy),))
    call = partial(block_attention, q, k, v, count, index, block=(64, 64), scale=0.2)
    expected, every = call(), xla.candidates(REQUEST)
    np.testing.assert_allclose(call(tiles=every[1]), expected, atol=2e-6)
    _tiles.write(table(REQUEST, XLA, {every[0]: 2.0, every[-1]: 1.0}), {})
    np.testing.assert_allclose(call(), expected, atol=2e-6)
    assert ran == [None, every[1], every[-1]]


def test_tiles_that_are_no_candidate_are_a_mistake():
    x = jnp.ones((1, 1, 64, 32))
    call = partial(block_attention, x, x, x, *schedule(np.ones((1, 1, 1), bool)), block=(64, 64), scale=1.0)
    (only,) = xla.candidates(replace(REQUEST, heads=1, q_tokens=64, kv_tokens=64))
    for wrong in (replace(only, step=only.step + 1), asdict(only), 3):
        with pytest.raises(ValueError, match=r"tiles: expected None or one of Tiles\(.*backend 'xla'.*got"):
            call(tiles=wrong)
    with pytest.raises(ValueError, match="tiles: expected None for backend 'reference'"):
        call(tiles=only, implementation="reference")


def test_the_command_writes_the_table(folders, monkeypatch, capsys, tmp_path):
    """With a stand-in for the process that measures: the second candidate is the fastest, the third fails."""
    asked = []

    class Toy:
        def machine(self):
            return {"device": "cpu", "backends_see": "cpu"}

        def ask(self, job, settings, limit):
            asked.append(job)
            if len(asked) == 3:
                return {**job.facts, "status": "failed", "reason": "hung"}
            return {**job.facts, "status": "measured", "ms": 1.0 if len(asked) == 2 else 2.0, "timer": "host"}

        def close(self):
            pass

    monkeypatch.setattr("paro_jax.bench.worker.Worker", Toy)
    argv = ["bench", "--tune", "--workloads", "flux_1024", "--widths", "int8/int8", "--out", str(tmp_path / "out")]
    assert command.main(argv) == 1  # a row failed
    out, _ = capsys.readouterr()
    (file,) = folders[0].iterdir()
    assert str(file) in out and "hung" in file.read_text()
    settings = Settings("cpu", "xla", "float32", (64, 64), 2048, 2)
    request = requested(sized(asked[0], settings), asked[0], settings)
    assert [job.tiles for job in asked] == [asdict(tiles) for tiles in xla.candidates(request)]
    assert _tiles.measured(request, XLA) == xla.candidates(request)[1]
