"""shard_map over batch and heads, and GSPMD, on four CPU devices in a process of their own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid, attention

assert jax.device_count() == 4
grid = TokenGrid((3, 4, 5), text=7)
rng = np.random.default_rng(0)
keep = rng.random((4, *grid.blocks((32, 32)))) < 0.6
order = rng.choice(grid.orders, 4).tolist()
q, k, v = (jnp.asarray(x) for x in rng.standard_normal((3, 2, grid.tokens, 4, 16), np.float32))
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
tokens, heads = P("data", None, "model", None), P("model")

for quant in (QuantSpec(), QuantSpec(qk="int8", pv="int8")):
    first = rng.integers(0, keep.shape[-1], (*keep.shape[:2], 1))
    plan = AttentionPlan.build(grid, order=order, mask=BlockMask(keep, (32, 32)), quant=quant, first=first)
    f = lambda q, k, v, plan: attention(q, k, v, plan=plan, return_residual=True)
    expected = f(q, k, v, plan)
    # A plan shards over heads as one prefix: every one of its arrays has the heads first.
    sharded = jax.jit(jax.shard_map(
        f, mesh=mesh, in_specs=(tokens, tokens, tokens, heads), out_specs=(tokens, P("data", None, "model"))
    )).lower(q, k, v, plan).compile()
    for a, b in zip(sharded(q, k, v, plan), expected):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert "all-" not in sharded.as_text()
    # And left to the compiler.
    placed = [jax.device_put(x, NamedSharding(mesh, tokens)) for x in (q, k, v)]
    automatic = jax.jit(f)(*placed, jax.device_put(plan, NamedSharding(mesh, heads)))
    for a, b in zip(automatic, expected):
        np.testing.assert_allclose(a, b, atol=1e-6)

plan = AttentionPlan.build(grid, order=order, mask=BlockMask(keep, (32, 32)))
loss = lambda q, k, v, plan: (attention(q, k, v, plan=plan) ** 2).sum()[None, None]
total = jax.shard_map(loss, mesh=mesh, in_specs=(tokens, tokens, tokens, heads), out_specs=P("data", "model"))
got = jax.jit(jax.grad(lambda *a: total(*a).sum(), argnums=(0, 1, 2)))(q, k, v, plan)
want = jax.jit(jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 1, 2)))(q, k, v, plan)
for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_shards_over_batch_and_heads_equal_the_whole():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-3000:]
