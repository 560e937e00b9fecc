"""`paro bench`: what it times, that no contestant can end the run, and that its masks and figures are what they say."""

import json
import sys
import tempfile
import types
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arrange
from pallas_kernels.arrange.projection import Tiles
from pallas_kernels.bench import ceilings, peers, timing
from paro_jax.bench import cases, jobs, measure, report, run, targets
from paro_jax.bench.jobs import Job, Settings
from paro_jax.bench.worker import Worker

SETTINGS = Settings("cpu", "xla", "float32", (64, 64), tokens=400, heads=3, densities=(1.0, 0.3), quick=True, seconds=0)
CASE = cases.case("cogvideox_5b", dtype="float32", block=(64, 64), tokens=400, heads=3, densities=(1.0, 0.3))
ATTENTION = Job("attention", "cogvideox_5b", "xla", "int8", "int8", "calibrated", 0.3)


def fake_timer(call, runs):
    call()
    return [2.0] * runs


# --- timing ---------------------------------------------------------------------------------------------------------


def test_calls_read_other_memory_each_time_and_the_host_is_named():
    seen = []

    def function(x):
        seen.append(x.unsafe_buffer_pointer())
        return x + 1

    found, result = timing.measure(function, (jnp.arange(4.0),), seconds=0)
    assert found.timer == "host" and "CUPTI" in found.timer_note
    assert found.sets == 2 == len(set(seen))
    assert all(a != b for a, b in zip(seen[1:], seen[2:], strict=False))
    assert 0 < found.low_ms <= found.ms <= found.high_ms and found.wall_ms > 0 and found.runs >= 2
    np.testing.assert_array_equal(result, np.arange(4.0) + 1)


def test_cupti_through_mosaics_profiler_with_a_stand_in_for_its_extension(monkeypatch):
    """The profiler of the installed jax, whose extension alone needs a GPU: it must call ours as it is."""
    from jax.experimental.mosaic.gpu import profiler

    calls = []
    extension = types.SimpleNamespace(
        _cupti_init=calls.clear,
        _cupti_get_timings=lambda finalize: [
            (name, ms) for x in calls for name, ms in (("pad", 0.5), ("main", x - 0.5))
        ],
    )
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=extension))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = []

    def function(x):
        traced.append(isinstance(x, jax.core.Tracer))
        calls.append(len(calls) + 1)
        return x

    found, _ = timing.measure(function, (jnp.zeros(4),), seconds=0)
    assert found.timer == "cupti" and found.timer_note is None
    assert found.sets == 64 and not any(traced)
    assert found.runs == 5 and (found.low_ms, found.ms, found.high_ms) == (2, 3, 4)
    assert found.kernels == pytest.approx({"main": 2.5, "pad": 0.5}) and list(found.kernels) == ["main", "pad"]


def test_what_a_call_raises_is_raised_and_what_the_timer_raises_is_a_note(monkeypatch):
    def broken(call, runs):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(timing, "cupti", broken)
    found, _ = timing.measure(lambda x: x, (jnp.zeros(4),), seconds=0)
    assert found.timer == "host" and "INSUFFICIENT_PRIVILEGES" in found.timer_note

    def throws(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        timing.measure(throws, (jnp.zeros(4),), seconds=0)


def test_ceilings_count_operations_and_bytes():
    found, rate = ceilings.measure("float32", quick=True, timer=fake_timer)
    assert rate == pytest.approx(2 * 512**3 / 2e-3 / 1e12) and found.timer == "fake_timer"
    _, rate = ceilings.measure("copy", quick=True, timer=fake_timer)
    assert rate == pytest.approx(2 * 4 * (4 << 20) / 2e-3 / 1e9)
    rates = {"bfloat16": 800.0, "int8": 1600.0}
    assert ceilings.of_widths("bf16", "bf16", "bfloat16", rates) == 800
    assert ceilings.of_widths("int8", "bf16", "bfloat16", rates) == pytest.approx(2 / (1 / 800 + 1 / 1600))
    assert ceilings.of_widths("fp8", "fp8", "bfloat16", rates) == 1600
    assert ceilings.of_widths("int8", "int8", "bfloat16", {}) is None


# --- masks ----------------------------------------------------------------------------------------------------------


def test_every_workload_of_a_model_has_its_grid():
    for name, grid in cases.GRIDS.items():
        assert cases.case(name, dtype="bfloat16", block=(64, 64)).grid == grid
    small = cases.case("wan_14b_720p", dtype="float32", block=(64, 64), tokens=2000, heads=2)
    assert 1500 < small.grid.tokens < 2500 and (small.batch, small.heads, small.head_dim) == (1, 2, 128)
    with pytest.raises(ValueError, match="workload: expected one of cogvideox_5b, .*got 'sora'"):
        cases.case("sora", dtype="float32", block=(64, 64))


def test_calibrated_masks_differ_by_head_and_row_and_keep_their_density():
    case = replace(CASE, heads=7)
    plan = cases.plan(case, "calibrated", 0.3, "int8", "int8")
    keep = np.asarray(plan.mask().keep)
    assert abs(keep.mean() - 0.3) < 0.05 and keep.any(-1).all()  # seven heads of six kinds
    assert len({one.tobytes() for one in keep[:6]}) >= 3 and np.array_equal(keep[6], keep[0])  # six looks take turns
    rows = {row.tobytes() for one in keep for row in one}
    assert len(rows) > 6
    assert len(set(map(str, plan.order_list()))) > 1 and plan.k_mean is not None
    assert cases.plan(case, "calibrated", 0.3, "bf16", "bf16").k_mean is None
    others = [cases.plan(case, mask, 0.3, "int8", "int8") for mask in ("dense", "random")]  # for the same compiled call
    assert {jax.tree.structure(other) for other in others} == {jax.tree.structure(plan)}
    for other in others:
        np.testing.assert_array_equal(other.schedule()[1], other.mask().schedule()[1])
    with pytest.raises(ValueError, match="density: expected at least 0.*got 0.01"):
        cases.plan(case, "calibrated", 0.01, "int8", "int8")
    q, k, v = cases.tensors(replace(case, batch=2))
    assert q.shape == k.shape == v.shape == (2, case.grid.tokens, 7, 64)
    assert not np.array_equal(q[0, :, 0], q[1, :, 0]) and not np.array_equal(q[0, :, 0], q[0, :, 6])


def test_random_masks_are_exact_and_no_row_is_empty():
    keep = cases.random_mask((3, 20, 30), 0.2)
    assert keep.mean() == 0.2 and keep.any(-1).all() and keep.sum(-1).std() > 1
    assert cases.random_mask((2, 8, 8), 0.01).sum(-1).tolist() == [[1] * 8] * 2


def test_operations_count_the_kept_elements_of_partial_blocks_too():
    keep = cases.random_mask((CASE.heads, *CASE.grid.blocks((64, 64))), 0.4)
    every = np.kron(keep, np.ones((64, 64)))[:, : CASE.grid.tokens, : CASE.grid.tokens]
    assert CASE.operations(keep) == 4 * 64 * every.sum()
    assert CASE.operations() == CASE.operations(np.ones_like(keep))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_our_row_and_a_peers_row_of_the_same_tensors():
    ours = measure.measure(ATTENTION, SETTINGS, fake_timer)
    assert ours["status"] == "measured", ours
    assert ours["ms"] == 2.0 and ours["error"] < 0.05 and ours["kept_density"] <= 0.3
    assert ours["tops"] == pytest.approx(ours["operations"] / 2e-3 / 1e12)
    dense = measure.measure(Job("peer", "cogvideox_5b", "jax.nn"), SETTINGS, fake_timer)
    assert dense["status"] == "measured" and dense["error"] < 1e-5
    assert json.loads(json.dumps(dense))["tokens"] == ours["tokens"]


@pytest.mark.slow
def test_a_path_row_adds_up():
    turns = iter([30.0, 100.0, 5.0, 32.0, 44.0, 41.0, 140.0, 80.0])  # in, attention, out; in, attend, kernel; layers

    def timer(call, runs):
        call()
        return [next(turns)] * 3

    # The reference compiles fastest.
    settings = replace(SETTINGS, backend="reference")
    row = measure.measure(Job("path", "cogvideox_5b", "reference"), settings, timer)
    assert row["status"] == "measured", row
    assert row["overhead_ms"] == 5.0 and row["overhead_of_dense_attention"] == 0.05
    assert row["layer_speedup"] == 140 / 80 and row["ms"] == 80
    assert row["difference_from_dense"] < 1e-5  # every block is kept and nothing is rounded


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (ValueError("shapes do not fit"), "failed", "ValueError: shapes do not fit"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), "out of memory", "allocate"),
        (MemoryError(), "out of memory", "MemoryError"),
        (RuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS"), "failed", "ILLEGAL_ADDRESS"),
    ],
    ids=["throws", "XLA out of memory", "out of memory", "illegal address"],
)
def test_a_peer_that_throws_is_a_row(monkeypatch, raised, status, says):
    def prepare(problem):
        raise raised

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("rude", ("bf16", "bf16"), lambda problem: None, prepare),))
    row = measure.measure(Job("peer", "cogvideox_5b", "rude"), SETTINGS, fake_timer)
    assert row["status"] == status and says in row["reason"]
    assert row.get("poisoned", False) == ("CUDA_ERROR" in says or "ILLEGAL" in says)


def test_a_peer_that_lacks_a_package_of_its_own_is_missing(monkeypatch):
    def prepare(problem):
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]

        raise AssertionError

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("poor", ("bf16", "bf16"), lambda problem: None, prepare),))
    row = measure.measure(Job("peer", "cogvideox_5b", "poor"), SETTINGS, fake_timer)
    assert row["status"] == "missing" and "poor cannot be imported: No module named 'no_such_package'" in row["reason"]


@pytest.mark.parametrize("result", [jnp.zeros, lambda shape: jnp.full(shape, jnp.nan)], ids=["zeros", "NaN"])
def test_a_wrong_result_is_a_failure_however_fast(monkeypatch, result):
    def prepare(problem):
        return jax.jit(lambda q: result(q.shape)), (problem.q,), 1.0

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("quick", ("bf16", "bf16"), lambda problem: None, prepare),))
    row = measure.measure(Job("peer", "cogvideox_5b", "quick"), SETTINGS, fake_timer)
    assert row["status"] == "failed" and row["reason"].startswith("wrong result") and row["ms"] == 2.0


def test_what_cannot_be_had_here_says_why():
    for name, says in (("cudnn bf16", "needs an NVIDIA GPU"), ("cudnn fp8", "needs an H100"), ("tokamax", "tokamax")):
        row = measure.measure(Job("peer", "cogvideox_5b", name), SETTINGS, fake_timer)
        assert row["status"] == "missing" and says in row["reason"]
    row = measure.measure(replace(ATTENTION, density=0.01), SETTINGS, fake_timer)
    assert row["status"] == "missing" and "always kept" in row["reason"]
    row = measure.measure(replace(ATTENTION, contestant="hopper"), replace(SETTINGS, backend="hopper"), fake_timer)
    assert row["status"] == "missing" and "is not sm_90" in row["reason"] and run.status([row]) == 1


def test_one_kernel_from_projection_to_blocks_is_a_row_that_says_why_it_is_missing():
    job = Job("projection", "cogvideox_5b", "fused", "int8", "int8", role="k")
    row = measure.measure(job, SETTINGS, fake_timer)
    assert row["status"] == "missing" and row["role"] == "k" and run.status([row]) == 0
    assert "the fused kernel does not serve this: device cpu is not sm_90" in row["reason"]
    every = jobs.jobs(replace(SETTINGS, device="sm_90"), workloads=("flux_1024",), kinds=("projection",))
    assert {job.role for job in every if job.kind == "projection"} == {"q", "k"}


@pytest.mark.parametrize("wrong", [1.0, 3.0], ids=["right", "wrong"])
def test_its_row_is_of_the_fastest_tiles_and_of_the_same_numbers(monkeypatch, wrong):
    """With a stand-in for the kernel, of which one tile fails and one is faster than the other."""
    few = [Tiles(128, stages, 1, turns=True) for stages in (2, 3, 4)]
    turns = iter([6.0, 3.0, 2.0, 2.5])  # apart, two tiles, with preparation

    def stand_in(x, weights, bias, norm, rope, mean, *, role, width, layout, tiles):
        if tiles == few[0]:
            raise ValueError("no")
        (kernel, slots), case = weights, dict(group="row", block=64, norm=norm, rope=rope, mean=mean)
        y = jnp.einsum("bnc,chd->bnhd", x, kernel)
        values, scales, mean = arrange(y, slots, role=role, width=width, **case, implementation="reference")
        return values, wrong * scales, mean

    monkeypatch.setattr(measure.projection, "why_not", lambda request, channels: None)
    monkeypatch.setattr(measure.projection, "candidates", lambda request: few)
    monkeypatch.setattr(measure.projection, "prepared", lambda kernel, slots, width: (kernel, slots))
    monkeypatch.setattr(measure.projection, "run", stand_in)

    def timer(call, runs):
        call()
        return [next(turns)] * 3

    row = measure.measure(Job("projection", "cogvideox_5b", "fused", "int8", "int8", role="q"), SETTINGS, timer)
    assert row["status"] == ("measured" if wrong == 1 else "failed"), row
    assert row["ms"] == 2.0 and row["apart_ms"] == 6.0 and row["speedup"] == 3.0 and row["whole_ms"] == 2.5
    assert row["tiles"]["stages"] == 4 and row["tiles_ms"][str(few[0])] == "ValueError: no"
    assert row["error"] < 0.01 if wrong == 1 else "wrong result" in row["reason"]
    assert json.loads(json.dumps(row))["role"] == "q"


# --- the run --------------------------------------------------------------------------------------------------------


def test_jobs_come_by_importance_and_none_is_dropped():
    settings = replace(SETTINGS, device="sm_90", backend="hopper", dtype="bfloat16", densities=cases.DENSITIES)
    every = jobs.jobs(settings)
    assert len(set(map(str, every))) == len(every)
    named = [str(job) for job in every]
    assert every[0].kind == "ceiling" and named[-1] == "ceiling again"
    assert named.index("flux_2048 peer cudnn fp8, dense") < named.index("wan_14b_720p peer cudnn bf16, dense")
    # With all up to the last that a target asks for, no target is without a row; with one less, some are.
    done = [{**job.facts, "status": "measured", "ms": 1.0, "kept_density": job.density, "kept_blocks": job.tokens,
             "overhead_ms": 0.0, "overhead_of_dense_attention": 0.0} for job in every]  # fmt: skip
    last = max(i for i, job in enumerate(every) if job.kind == "scaling")
    assert last < 48
    assert all(target["met"] is not None for target in targets.targets(done[: last + 1], "hopper"))
    first = min(i for i, job in enumerate(every) if job.kind == "scaling")
    lacking = [target["name"] for target in targets.targets(done[: first - 1], "hopper") if target["met"] is None]
    assert len(lacking) == 2 and "FlexAttention" in lacking[0] and "kept blocks" in lacking[1]
    for peer in ("cudnn bf16", "cudnn fp8", "attention_mgpu", "tokamax", "torch sdpa"):
        assert sum(job.contestant == peer for job in every) == len(cases.GRIDS)
    ours = {(job.name, job.qk, job.pv, job.mask, job.density) for job in every if job.kind == "attention"}
    assert len(ours) == len(cases.GRIDS) * len(jobs.WIDTHS) * (1 + 2 * 4)
    flex = {(job.name, job.mask, job.density) for job in every if job.contestant == "torch flex"}
    assert flex == {(name, mask, density) for name, _, _, mask, density in ours}
    assert Settings.of_json(json.loads(json.dumps(asdict(settings)))) == settings


def test_a_budget_names_the_rows_it_does_not_reach():
    now = [0.0]
    asked = []

    def ask(job, limit):
        asked.append((job.name, limit))
        now[0] += 40
        return {**job.facts, "status": "timed out" if job.name == "c" else "measured", "reason": "slow"}

    some = [Job("peer", name) for name in "abcde"] + [Job("ceiling", "again")]
    rows = run.run(some, ask, limit=60, budget=100, clock=lambda: now[0])
    assert [row["status"] for row in rows] == [
        "measured",
        "measured",
        "not reached",
        "not reached",
        "not reached",
        "measured",
    ]
    assert asked == [("a", 60), ("b", 60), ("c", 20), ("again", 10)]  # what is left, and a moment for the last
    assert "100 s" in rows[3]["reason"] and run.status(rows) == 0


def test_a_slow_row_fails_and_the_run_goes_on_and_the_status_tells():
    said, kept = [], []

    def ask(job, limit):
        return {**job.facts, "status": job.name, "reason": "because"}

    some = [Job("peer", name) for name in ("timed out", "out of memory", "failed", "missing", "measured")]
    rows = run.run(some, ask, limit=5, note=said.append, keep=lambda rows: kept.append(len(rows)))
    assert [row["status"] for row in rows] == ["failed", "out of memory", "failed", "missing", "measured"]
    assert kept == [1, 2, 3, 4, 5] and sum("because" in line for line in said) == 3
    assert run.status(rows) == 1 and run.status(rows[3:]) == 0
    (_, skipped) = run.run([some[0], replace(some[0], mask="random", density=0.5)], ask, limit=5)
    assert skipped["status"] == "failed" and skipped["reason"].startswith("not tried: timed out peer")
    again = run.run(some, lambda job, limit: {**job.facts, "status": "measured"}, limit=5, known=rows)
    assert [row["status"] for row in again] == ["measured"] * 3 + ["missing", "measured"]
    assert "reason" in again[3] and again[4]["reason"] == "because"  # those were taken over


SCRIPT = """
import json, os, sys, tempfile, time
print("chatter of a library", file=sys.stderr)
def say(**x): print(json.dumps(x), flush=True)
say(device="toy")
for line in sys.stdin:
    job = json.loads(line)["job"]
    if job["name"] == "crash": print("Fatal: the end", file=sys.stderr, flush=True); os.abort()
    if job["name"] == "hang": tempfile.mkdtemp(prefix=f"paro-bench-{os.getpid()}-"), time.sleep(60)
    say(**job, status="measured", pid=os.getpid(), poisoned=job["name"] == "poison")
"""


def test_a_process_that_crashes_hangs_or_spoils_its_device_costs_one_row(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    worker = Worker([sys.executable, "-c", SCRIPT])
    try:
        assert worker.machine() == {"device": "toy"}
        ask = {name: worker.ask(Job("peer", name), SETTINGS, 0.5 if name == "hang" else 30) for name in
               ("one", "two", "crash", "three", "hang", "four", "poison", "five")}  # fmt: skip
    finally:
        worker.close()
    assert ask["crash"]["status"] == "failed"
    assert "SIGABRT" in ask["crash"]["reason"] and "Fatal: the end" in ask["crash"]["reason"]
    assert ask["hang"]["status"] == "timed out" and "0.5 s" in ask["hang"]["reason"]
    assert not list(tmp_path.iterdir())  # what a peer's tensors were written to goes with the process
    pids = [ask[name]["pid"] for name in ("one", "two", "three", "four", "poison", "five")]
    assert pids[0] == pids[1] and pids[3] == pids[4] and len(set(pids)) == 4
    assert Worker([sys.executable, "-c", "raise SystemExit('no driver')"]).machine()["problem"].endswith("no driver")


# --- the report -----------------------------------------------------------------------------------------------------


def row(kind, name, contestant, ms, **facts):
    facts = {"qk": "bf16", "pv": "bf16", "mask": "dense", "density": 1.0, "kept_density": 1.0, **facts}
    return {"kind": kind, "name": name, "contestant": contestant, "ms": ms, "status": "measured", **facts}


def test_targets_are_met_missed_or_not_measured_and_why():
    eight = {"qk": "int8", "pv": "int8"}
    fifth = {**eight, "mask": "calibrated", "density": 0.2, "kept_density": 0.2}
    spent = {"overhead_ms": 0.25, "overhead_of_dense_attention": 0.02}
    rows = [
        row("peer", "cogvideox_5b", "cudnn bf16", 12.0),
        row("attention", "cogvideox_5b", "hopper", 5.0, **eight),
        row("attention", "cogvideox_5b", "hopper", 1.0, **fifth),
        row("attention", "cogvideox_5b", "hopper", 9.0, mask="random", density=0.2, kept_density=0.2, **eight),
        row("path", "cogvideox_5b", "hopper", 9.0, **eight, **spent),
        row("peer", "cogvideox_5b", "torch flex", 6.0),
        row("peer", "cogvideox_5b", "torch flex", 1.0, mask="calibrated", density=0.2),
        row("attention", "flux_2048", "hopper", 5.0, **eight),
        {**Job("peer", "flux_2048", "cudnn fp8").facts, "status": "out of memory", "reason": "all of it"},
        {**Job("peer", "flux_2048", "cudnn bf16").facts, "status": "measured", "ms": 5.0},
        *(row("scaling", "scaling", "hopper", 2.0 * n, kept_blocks=n) for n in (100, 400, 1600)),
    ]
    found = {target["name"]: target for target in targets.targets(rows, "hopper")}
    told = {name: [target[key] for key in ("measured", "kernel_alone", "met")] for name, target in found.items()}
    assert told["dense int8/int8, D 64: speed over cuDNN bf16"] == [12 / 5.25, 12 / 5, True]
    assert told["20 % int8/int8, D 64: speed over cuDNN bf16"] == [12 / 1.25, 12, True]
    above = told["int8/int8, D 64: time over dense, less density, worst"]
    assert above == [pytest.approx(1.25 / 5.25 - 0.2), pytest.approx(0), False]  # met by the kernel alone only
    assert told["int8/int8, D 64: speed over FlexAttention, same mask, worst"] == [1 / 1.25, 1.0, False]
    assert told["permute + quantise + mask over dense attention, D 64"] == [0.02, None, False]
    assert told["slope of log time over log kept blocks, from 1"] == [pytest.approx(0, abs=1e-9), None, True]
    why = {name: target["reason"] for name, target in found.items() if target["met"] is None}
    assert set(why) == set(found) - {name for name, (_, _, met) in told.items() if met is not None}
    memory = why["dense int8/int8, D 128: speed over cuDNN fp8"]
    assert memory == "not measured: flux_2048 peer cudnn fp8, dense: out of memory: all of it"
    assert why["20 % int8/int8, D 128: speed over cuDNN bf16"] == "not measured: no row: flux_2048 attention hopper"
    assert why["dense bf16, D 64: speed over cuDNN bf16"] == "not measured: no row: cogvideox_5b attention hopper"
    rows[-1] |= {"status": "failed", "reason": "hot", "job": "the last"}
    assert targets.targets(rows, "hopper")[-1]["reason"] == "not measured: the last: failed: hot"
    assert {target["met"] for target in targets.targets([], "hopper")} == {None}
    flex = next(i for i, row in enumerate(rows) if row["contestant"] == "torch flex" and row["density"] == 0.2)
    for ms, told in ((4.0, (4 / 5.25, False, "no; and not measured: ")), (6.0, (None, None, "not measured: "))):
        some = [row for i, row in enumerate(rows) if i != flex]
        some[flex - 1] = row("peer", "cogvideox_5b", "torch flex", ms)
        (target,) = [t for t in targets.targets(some, "hopper") if "D 64: speed over FlexAttention" in t["name"]]
        reason = told[2] + "no row: cogvideox_5b peer torch flex"
        assert (target["measured"], target["met"], target["reason"]) == (*told[:2], reason)


def test_rows_get_their_percent_and_speedup():
    rows = [
        {"kind": "ceiling", "name": "int8", "of": "int8", "rate": 1000.0, "status": "measured"},
        {"kind": "ceiling", "name": "bfloat16", "of": "bfloat16", "rate": 500.0, "status": "measured"},
        {"kind": "ceiling", "name": "again", "of": "bfloat16", "rate": 450.0, "status": "measured"},
        row("peer", "flux_1024", "cudnn bf16", 6.0, tops=100.0, dtype="bfloat16"),
        row("attention", "flux_1024", "hopper", 2.0, tops=600.0, qk="int8", pv="int8", dtype="bfloat16"),
        {"kind": "peer", "name": "flux_1024", "contestant": "tokamax", "status": "missing", "reason": "not here"},
    ]
    done = report.finished(rows)
    assert [r.get("percent_of_ceiling") for r in done[3:]] == [20.0, 60.0, None]
    assert [r.get("speedup") for r in done[3:]] == [1.0, 3.0, None] and report.drift(rows) == 0.9
