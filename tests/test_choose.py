"""Who serves a request, and what a refusal says."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Problem, schedule

from pallas_kernels import Backend, NoBackend, Request, arrange, block_attention, choose, device_name, workloads
from pallas_kernels._choose import FEATURES
from pallas_kernels.bench import promises as kernel_bench
from pallas_kernels.block_attention import BACKENDS

REQUEST = workloads.WORKLOADS["tiny_video"]


def refuses(reason):
    return lambda request: reason


def test_the_first_that_can_serve_is_taken():
    backends = (
        Backend("card", refuses("no card here"), print),
        Backend("portable", refuses(None), print),
        Backend("other", refuses(None), print),
    )
    assert choose(REQUEST, backends).name == "portable"
    assert choose(REQUEST, backends, "other").name == "other"


def test_the_reference_serves_only_when_it_is_named():
    assert choose(REQUEST, BACKENDS).name == "xla"
    assert choose(REQUEST, BACKENDS, "reference").name == "reference"
    with pytest.raises(NoBackend, match="no backend is chosen by default.* Able: oracle"):
        choose(REQUEST, (Backend("oracle", refuses(None), print, default=False),))


def test_a_named_backend_that_cannot_serve_gives_its_reason_and_who_can():
    backends = (
        Backend("card", refuses("it needs sm_90, this is cpu"), print),
        Backend("portable", refuses(None), print),
    )
    with pytest.raises(NoBackend) as refusal:
        choose(REQUEST, backends, "card")
    message = str(refusal.value)
    assert "card: it needs sm_90, this is cpu" in message and "Able: portable" in message and str(REQUEST) in message


def test_none_named_and_none_able_gives_every_reason():
    backends = (Backend("one", refuses("too long"), print), Backend("two", refuses("too wide"), print))
    with pytest.raises(NoBackend, match=r"one: too long; two: too wide\..*No other backend can either"):
        choose(REQUEST, backends)
    assert issubclass(NoBackend, NotImplementedError)


def test_a_name_that_does_not_exist_is_the_callers_mistake():
    with pytest.raises(
        ValueError, match="implementation: expected None or one of 'hopper', 'ampere', 'xla', 'reference', got 'cuda'"
    ):
        choose(REQUEST, BACKENDS, "cuda")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": "float64"}, "dtype float64 is not served; it serves float32, bfloat16, float16"),
        ({"head_dim": 2048, "qk": "int8"}, "head_dim 2048 > 1040"),
        ({"block": (64, 2048), "pv": "int8"}, "block of 2048 key tokens > 1040"),
    ],
)
def test_what_neither_backend_serves(changed, reason):
    for backend in (b for b in BACKENDS if b.name not in ("hopper", "ampere")):
        assert reason in backend.why_not(replace(REQUEST, **changed))
        assert backend.why_not(REQUEST) is None


def test_float64_meets_the_same_refusal_through_the_ops():
    with jax.enable_x64(True):
        x = jnp.zeros((1, 4, 1, 32), jnp.float64)
        with pytest.raises(NoBackend, match="dtype float64 is not served"):
            arrange(x, None, role="q", width="bf16", group="row", block=64)
        q = jnp.swapaxes(x, 1, 2)
        count, index = schedule(np.ones((1, 1, 1), bool))
        with pytest.raises(NoBackend, match="dtype float64 is not served"):
            block_attention(q, q, q, count, index, block=(64, 64), scale=1.0)


def test_a_request_is_a_key_and_a_name():
    assert hash(REQUEST) == hash(replace(REQUEST))
    names = {str(REQUEST)}
    other = dict(op="arrange", batch=9, heads=9, q_tokens=9, kv_tokens=9, head_dim=9, dtype="float16", block=(9, 9),
                 qk="int8", pv="int8", p_scale="running", device="sm_90", role="q", layout="hopper",
                 features=("delta",))  # fmt: skip
    assert set(other) == {field.name for field in fields(Request)}
    for name, value in other.items():
        names.add(str(replace(REQUEST, **{name: value})))
    assert len(names) == len(other) + 1  # every field shows
    assert not any(" " in name for name in names)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("op", ["block_attention", "arrange"])
def test_a_backend_that_does_not_name_a_feature_refuses_it(op, feature):
    """What only an emulation does must not reach a kernel that would leave it out."""
    request = replace(workloads.WORKLOADS["cogvideox_5b"], op=op, qk="int8", pv="int8", role="q")
    devices = [replace(request, device=device) for device in ("sm_80", "sm_90")]
    for backend in workloads.backends(request):
        emulation = backend.name in ("xla", "reference")
        served = backend.name != "hopper" and (feature == "delta") == (op == "block_attention")
        reasons = [backend.why_not(replace(r, features=(feature,))) for r in devices]
        assert not any(reasons) if served else all(reasons) and FEATURES[feature] in "".join(map(str, reasons))
        fp4 = [backend.why_not(replace(r, qk="fp4")) for r in devices]
        assert not any(fp4) if emulation else all(fp4) and "'fp4' is not served" in "".join(map(str, fp4))


def test_the_device_is_named_as_requests_name_it():
    assert device_name() in ("cpu", "tpu") or device_name().startswith("sm_")


def test_the_support_table_says_what_why_not_says():
    rows = workloads.support_rows()
    for row in rows:
        request = replace(workloads.WORKLOADS["cogvideox_5b"], op=row.op, dtype=row.dtype, qk=row.qk, pv=row.pv,
                          device=row.device, role="k" if row.op == "arrange" else "")  # fmt: skip
        backend = next(b for b in workloads.backends(request) if b.name == row.backend)
        assert row.why_not == backend.why_not(request)
    table = workloads.support_table()
    for word in ("block_attention", "arrange", "xla", "reference", "int4 / int4", "sm_90", "only when named"):
        assert word in table
    assert "float64" not in table
    with pytest.raises(ValueError, match="name: expected one of cogvideox_5b, .*got 'sora'"):
        workloads.support_rows("sora")


@pytest.mark.parametrize("name", [name for name in workloads.WORKLOADS if name.startswith("tiny")])
def test_tiny_workloads_run(name):
    request = workloads.WORKLOADS[name]
    assert workloads.served_by(request) == "xla"
    problem = Problem(
        batch=request.batch, heads=request.heads, q_tokens=request.q_tokens, kv_tokens=request.kv_tokens,
        head_dim=request.head_dim, block=request.block, dtype=request.dtype,
    )  # fmt: skip
    np.testing.assert_allclose(problem.solve(None)[0], problem.exact()[0], atol=1e-5)


def test_the_bench_reports_each_figure_beside_its_target():
    said = []
    rows = kernel_bench.work_follows_density(said.append, rounds=1, tokens=256)
    rows += kernel_bench.dense_against_jax(said.append, rounds=1, tokens=128)
    rows += kernel_bench.peak_memory(said.append, tokens=256)
    assert len(rows) == 6 and said
    for row in rows:
        assert row["measured"] > 0 and row["met"] == (row["measured"] <= row["target"])
        assert {"name", "unit", "tokens", "heads", "head_dim", "dtype"} <= set(row)


def test_the_benchs_masks_are_what_they_are_called():
    keep = kernel_bench.tenfold(np.random.default_rng(0), (4, 128, 128), 0.5)
    kept = keep.sum(-1)
    assert keep.mean() == pytest.approx(0.5, abs=0.01) and kept.max() / kept.min() == pytest.approx(10, abs=0.7)
