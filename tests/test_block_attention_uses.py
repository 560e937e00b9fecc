"""block_attention in use: gradients, transformations, work and memory, and a caller's mistakes."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import MASKS, Problem, assert_close, schedule

from pallas_kernels import arrange, block_attention
from pallas_kernels.block_attention import BACKENDS, xla
from pallas_kernels.workloads import WORKLOADS

IMPLEMENTATIONS = [b.name for b in BACKENDS if b.why_not(WORKLOADS["tiny_video"]) is None]


# ---- gradient -------------------------------------------------------------------------------------------------------


def dense_oracle(q, k, v, elements, scale):
    """Masked softmax attention in plain jnp, for autodiff: (o, lse), lse 0 for an empty row."""
    s = jnp.where(elements, scale * jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest"), -jnp.inf)
    some = elements.any(axis=-1)
    s = jnp.where(some[..., None], s, 0.0)
    p = jnp.where(some[..., None], jax.nn.softmax(s, axis=-1), 0.0)
    lse = jnp.where(some, jax.nn.logsumexp(s, axis=-1), 0.0)
    return jnp.einsum("bhqk,bhkd->bhqd", p, v, precision="highest"), lse


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(batch=2, mask="empty rows"),
        Problem(q_tokens=130, kv_tokens=200, mask="runs of 2", block=(64, 128), permuted=False),
        Problem(q_tokens=450, kv_tokens=450, mask="ragged"),
    ],
    ids=lambda p: f"{p.q_tokens}x{p.kv_tokens} {p.mask}",
)
def test_gradient_is_that_of_masked_dense_attention(problem, implementation):
    rng = np.random.default_rng(0)
    w_o = jnp.asarray(rng.normal(size=(problem.batch, problem.q_tokens, problem.heads, problem.head_dim)), jnp.float32)
    w_lse = jnp.asarray(rng.normal(size=w_o.shape[:-1]), jnp.float32)
    kernel = np.s_[:, problem.slots, np.arange(problem.heads)[:, None]] if problem.slots is not None else None

    def by_blocks(q, k, v):
        o, lse = problem.solve(implementation, q=q, k=k, v=v)
        return (o * w_o).sum() + jnp.where(lse == -jnp.inf, 0.0, lse * w_lse).sum()

    def by_elements(q, k, v):
        o, lse = dense_oracle(q, k, v, problem.elements, problem.scale)
        weight_o = jnp.swapaxes(w_o, 1, 2) if kernel is None else w_o[kernel]
        weight_lse = jnp.swapaxes(w_lse, 1, 2) if kernel is None else w_lse[kernel]
        return (o * weight_o).sum() + (lse * weight_lse).sum()

    found = jax.grad(by_blocks, (0, 1, 2))(*problem.qkv)
    expected = jax.grad(by_elements, (0, 1, 2))(*problem.qkv)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 2e-5 * max(1.0, float(jnp.abs(b).max())))


def test_gradient_ignores_nan_in_skipped_blocks():
    problem = Problem(q_tokens=330, kv_tokens=330, mask="ones")
    keep = problem.keep.copy()
    keep[:, :, 2] = False
    count, index = schedule(keep)
    poison = (np.arange(330) // 64 == 2)[None, None, :, None]
    q, k, v = problem.qkv

    def loss(q, k, v):
        return problem.solve("xla", q=q, k=k, v=v, count=count, index=index)[0].sum()

    clean = jax.grad(loss, (0, 1, 2))(q, k, v)
    dirty = jax.grad(loss, (0, 1, 2))(q, jnp.where(poison, jnp.nan, k), jnp.where(poison, jnp.nan, v))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantised_widths_refuse_a_gradient(implementation):
    problem = Problem(qk="int8", pv="bf16")

    def through_arrange(q):
        values, scales, _ = arrange(
            q, None, role="q", width="int8", group="row", block=64, implementation=implementation
        )
        return problem.solve(implementation, q=values, q_scale=scales)[0].sum()

    def through_v(v):
        return problem.solve(implementation, v=v)[0].sum()

    for function, argument in ((through_arrange, jnp.swapaxes(problem.qkv[0], 1, 2)), (through_v, problem.qkv[2])):
        assert np.isfinite(function(argument))
        with pytest.raises(ValueError, match=r"gradient: expected unquantised widths.*QuantSpec\(\)"):
            jax.grad(function)(argument)
        jax.grad(lambda x, f=function: f(jax.lax.stop_gradient(x)))(argument)  # what was cut off is not refused


# ---- transformations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [("bf16", "bf16"), ("int8", "int8")])
def test_two_runs_give_equal_bits(widths):
    problem = Problem(q_tokens=450, kv_tokens=450, mask="ragged", qk=widths[0], pv=widths[1])
    other = replace(problem, mask="runs of 3")
    first = problem.solve("xla")
    other.solve("xla")  # something else in between
    for a, b in zip(first, problem.solve("xla"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_new_mask_or_order_compiles_nothing():
    problem = Problem(mask="ones")
    traces = []

    @jax.jit
    def call(count, index, slots):
        traces.append(1)
        return problem.solve(None, count=count, index=index, slots=slots)

    for mask in MASKS:
        for seed in (0, 1):
            changed = replace(problem, mask=mask, seed=seed)
            o, lse = call(*schedule(changed.keep), changed.slots)
            expected = problem.solve("reference", **dict(zip(("count", "index"), schedule(changed.keep), strict=True)),
                                     slots=changed.slots)  # fmt: skip
            assert_close(o, expected[0], 1e-5)
            assert_close(lse, expected[1], 1e-5)
    assert len(traces) == 1 and call._cache_size() == 1
    xla.run.clear_cache()
    for mask in MASKS:  # nor without jit around it
        changed = replace(problem, mask=mask)
        problem.solve("xla", slots=changed.slots, **dict(zip(("count", "index"), schedule(changed.keep), strict=True)))
    assert xla.run._cache_size() == 1


def test_traced_values_out_of_range_are_clamped():
    problem = Problem(mask="random", permuted=False)
    wild = jax.jit(lambda count, index: problem.solve("xla", count=count, index=index))
    o, _ = wild(jnp.full((2, 4), 10_000, jnp.int32), jnp.full((2, 4, 4), 10_000, jnp.int32))
    last = np.zeros_like(problem.keep)
    last[..., -1] = True
    assert_close(o, problem.solve("xla", **dict(zip(("count", "index"), schedule(last), strict=True)))[0], 1e-5)
    o, lse = wild(jnp.full((2, 4), -5, jnp.int32), jnp.full((2, 4, 4), -5, jnp.int32))
    assert (np.asarray(o) == 0).all() and np.isneginf(np.asarray(lse)).all()


def stacked(kinds):
    masks = [Problem(mask=kind) for kind in kinds]
    count, index = (jnp.stack(x) for x in zip(*(schedule(m.keep) for m in masks), strict=True))
    return masks, count, index


def test_vmap_over_masks_and_inputs():
    masks, count, index = stacked(["random", "runs of 1", "empty rows"])
    q = jnp.stack([masks[0].qkv[0] * (1 + i) for i in range(3)])
    o, lse = jax.vmap(lambda c, i, q: masks[0].solve(None, count=c, index=i, q=q))(count, index, q)
    gradient = jax.vmap(jax.grad(lambda q, c, i: masks[0].solve(None, count=c, index=i, q=q)[0].sum()))(q, count, index)
    for i in range(3):
        one = masks[0].solve("xla", count=count[i], index=index[i], q=q[i])
        assert_close(o[i], one[0], 1e-5)
        assert_close(lse[i], one[1], 1e-5)
        one = jax.grad(lambda q, i=i: masks[0].solve(None, count=count[i], index=index[i], q=q)[0].sum())(q[i])
        assert_close(gradient[i], one, 1e-5)


def test_scan_over_masks_and_checkpoint():
    masks, count, index = stacked(["random", "runs of 1", "empty rows"])
    problem, traces = replace(masks[0], permuted=False), []

    def layer(q, schedule_of_layer):
        traces.append(1)
        o, _ = problem.solve(None, count=schedule_of_layer[0], index=schedule_of_layer[1], q=q)
        return q + jnp.swapaxes(o, 1, 2), None

    def loss(step):
        return lambda q: (jax.lax.scan(step, q, (count, index))[0] ** 2).sum()

    def unrolled(q):
        for i in range(3):
            q, _ = layer(q, (count[i], index[i]))
        return (q**2).sum()

    q = problem.qkv[0]
    found = jax.jit(jax.value_and_grad(loss(jax.checkpoint(layer))))(q)
    assert len(traces) <= 2  # a scan traces its body, not each layer
    expected = jax.value_and_grad(unrolled)(q)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_close(found[1], expected[1], 1e-4 * float(jnp.abs(expected[1]).max()))


def test_export_round_trip():
    problem = Problem(mask="random")
    count, index = schedule(problem.keep)

    def call(q, count, index):
        return problem.solve(None, q=q, count=count, index=index)

    exported = jax.export.export(jax.jit(call))(problem.qkv[0], count, index)
    if importlib.util.find_spec("flatbuffers"):  # jax needs it to write an export to bytes
        exported = jax.export.deserialize(exported.serialize())
    for a, b in zip(exported.call(problem.qkv[0], count, index), problem.solve("xla"), strict=True):
        assert_close(a, b, 1e-5)


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from problems import Problem, schedule
problem = Problem(batch=2, heads=4, mask="ragged")
mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
count, index = schedule(problem.keep)
token, head = P("batch", "heads"), P("heads")

def call(q, k, v, count, index, slots):
    return problem.solve(None, q=q, k=k, v=v, count=count, index=index, slots=slots)

def loss(*arrays):
    o, lse = sharded(*arrays)
    return (o ** 2).sum() + lse.sum()

def loss_alone(*arrays):
    o, lse = call(*arrays)
    return (o ** 2).sum() + lse.sum()

in_specs = (token, token, token, head, head, head)
sharded = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P("batch", None, "heads"))
arrays = (*problem.qkv, count, index, problem.slots)
for a, b in zip(jax.jit(sharded)(*arrays), call(*arrays)):
    np.testing.assert_allclose(a, b, atol=1e-5)
for a, b in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays), jax.grad(loss_alone, (0, 1, 2))(*arrays)):
    np.testing.assert_allclose(a, b, atol=1e-4)
print("equal on", len(jax.devices()))
"""


def test_shard_map_over_batch_and_heads():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run([sys.executable, "-c", _SHARDED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal on 4", done.stderr[-2000:]


# ---- work and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("kind", ["random", "tenfold"])
def test_steps_follow_the_kept_blocks_in_total(kind, density):
    """What the loops visit, padding included, is within 8 % of what is kept, also when rows differ tenfold."""
    from pallas_kernels.bench.promises import tenfold

    rng, shape = np.random.default_rng(0), (4, 128, 128)
    keep = rng.random(shape) < density if kind == "random" else tenfold(rng, shape, density)
    sizes = xla.tiles(4 * 128, 128, 64, 64)
    teams = xla._teams(*schedule(keep), 1, sizes)
    counts = np.asarray(teams.count)
    visited = (-(-counts.max(axis=1) // sizes.step) * sizes.step * counts.shape[1]).sum()
    assert counts.sum() == keep.sum()
    assert keep.sum() <= visited <= 1.08 * keep.sum() + 2 * counts.size


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_tokens(gradient):
    """CogVideoX's 17776 tokens, 4 heads, D 64: one score matrix would be 1.3 GB a head. Compiled, not run."""
    tokens = WORKLOADS["cogvideox_5b"].q_tokens
    x = jax.ShapeDtypeStruct((1, 4, tokens, 64), jnp.float32)
    blocks = -(-tokens // 64)
    count = jax.ShapeDtypeStruct((4, blocks), jnp.int32)
    index = jax.ShapeDtypeStruct((4, blocks, blocks), jnp.int32)

    def call(q, k, v, count, index):
        return block_attention(q, k, v, count, index, block=(64, 64), scale=0.125)

    def train(*arrays):
        return jax.grad(lambda q, k, v: call(q, k, v, *arrays[3:]).sum(), (0, 1, 2))(*arrays[:3])

    compiled = jax.jit(train if gradient else call).lower(x, x, x, count, index).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (400e6 if gradient else 200e6)


# ---- a caller's mistakes --------------------------------------------------------------------------------------------

_FINE = Problem(mask="random", permuted=False)


def _changed(**changed):
    return lambda: _FINE.solve("xla", **changed)


def _q(shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


_INT8 = Problem(qk="int8", pv="int8", mask="random", permuted=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_changed(q=_q((2, 200, 32))), r"q: expected shape \[batch, heads, .* = \[any.*got shape \[2, 200, 32\]"),
        (_changed(k=_q((1, 3, 200, 32))), r"k: expected shape .* = \[1, 2, any, 32\], got shape \[1, 3, 200, 32\]"),
        (_changed(k=_q((1, 2, 200, 64))), r"k: expected shape .* = \[1, 2, any, 32\], got shape \[1, 2, 200, 64\]"),
        (_changed(v=_q((1, 2, 199, 32))), r"v: expected shape .* = \[1, 2, 200, 32\], got shape \[1, 2, 199, 32\]"),
        (_changed(q=_q((1, 2, 0, 32))), r"q, k: expected at least one .* token"),
        (_changed(q=_q((1, 2, 200, 32), jnp.int8)), r"q: expected float32, .* at width 'bf16', got int8"),
        (_changed(v=_q((1, 2, 200, 32), jnp.bfloat16)), r"q and k and v: expected one dtype .*, bfloat16"),
        (_changed(qk="int8"), r"q: expected int8 at width 'int8', got float32.*arrange"),
        (_changed(qk="int3"), r"qk: expected one of 'bf16', 'fp8', 'int8', 'int4', 'fp4', got 'int3'"),
        (_changed(p_scale="row"), r"p_scale: expected 'block' or 'running', got 'row'"),
        (_changed(scale=float("nan")), r"scale: expected a finite number, got nan"),
        (_changed(scale=float("inf")), r"scale: expected a finite number, got inf"),
        (_changed(scale="0.1x"), r"scale: expected a finite number, got '0.1x'"),
        (_changed(block=(64, 0)), r"block: expected two positive integers .*got \(64, 0\)"),
        (_changed(block=64), r"block: expected two positive integers .*got 64"),
        (_changed(count=_q((2, 3), jnp.int32)), r"count: expected shape .* = \[2, 4\], got shape \[2, 3\]"),
        (_changed(count=_q((2, 4))), r"count: expected dtype int32, got dtype float32"),
        (_changed(count=jnp.full((2, 4), 5, jnp.int32)), r"count: expected 0 to 4 kept key blocks, got 5 to 5"),
        (_changed(index=_q((2, 4, 3), jnp.int32)), r"index: expected shape .* = \[2, 4, 4\], got shape \[2, 4, 3\]"),
        (
            _changed(count=jnp.full((2, 4), 2, jnp.int32), index=jnp.full((2, 4, 4), 4, jnp.int32)),
            r"index: expected kept key blocks 0 to 3 .*got 4 to 4",
        ),
        (
            _changed(count=jnp.full((2, 4), 2, jnp.int32), index=jnp.ones((2, 4, 4), jnp.int32)),
            r"index: expected each kept key block once, got a row with a repeat\. BlockMask\.schedule\(\) makes it",
        ),
        (_changed(slots=_q((2, 199), jnp.int32)), r"slots: expected shape .* = \[2, 200\], got shape \[2, 199\]"),
        (_changed(slots=_q((2, 200), jnp.int32)), r"slots: expected a permutation of 0..199 in every head, got"),
        (_changed(q_scale=_q((1, 2, 4))), r"q_scale: expected None at qk='bf16', got an array of shape \[1, 2, 4\]"),
        (lambda: _INT8.solve("xla", k_scale=None), r"k_scale: expected scales at qk='int8', got None"),
        (lambda: _INT8.solve(v_scale=_q((1, 2, 2, 32))), r"v_scale: .*\[1, 2, 4, 32\], got shape \[1, 2, 2, 32\]"),
        (lambda: _INT8.solve(q_scale=_q((1, 2, 4), jnp.bfloat16)), r"q_scale: expected dtype float32, .*bfloat16"),
        (lambda: _FINE.solve("hoper"), r"implementation: .*one of 'hopper', 'ampere', 'xla', 'reference', got 'hoper'"),
        (lambda: jax.jit(lambda s: _FINE.solve(scale=s))(0.1), r"scale: expected a plain number .*got a traced value"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_argument_the_expected_and_the_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()
