"""The emulation behind the table of errors by operand."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import calibrate
from paro_jax import AttentionPlan, QuantSpec, TokenGrid, attention
from paro_jax.demo import head_errors, int4, run

GRID = TokenGrid((3, 8, 9), text=5)


def sample(rng, **louder) -> calibrate.Sample:
    """Normal q, k, v; of those named one value in a hundred is that many times larger."""
    qkv = {name: rng.normal(size=(2, GRID.tokens, 2, 16)).astype(np.float32) for name in "qkv"}
    for name, factor in louder.items():
        qkv[name][rng.random(qkv[name].shape) < 0.01] *= factor
    return calibrate.Sample(0, 0.0, **qkv)


@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("density", [1.0, 0.75])
def test_all_of_it_is_what_attention_computes(rng, width, density):
    given = sample(rng)
    plan = AttentionPlan.dense(GRID, heads=2, block=(128, 128))
    plan = plan if density == 1 else run.window_plan(plan, density)
    order = np.asarray(GRID.index(GRID.orders[0]))
    q, k, v = (jnp.asarray(np.swapaxes(x[0, order], 0, 1)) for x in (given.q, given.k, given.v))
    keep = jnp.repeat(plan.mask().keep, 128, axis=1)[:, : GRID.tokens]
    for numerics, quant in (
        (head_errors.Numerics(), QuantSpec()),
        (head_errors.variants(width)["all"], QuantSpec(width, width)),
        (head_errors.variants(width)["K by token"], QuantSpec(width, width, k_group="row")),
        (head_errors.variants(width)["V by block"], QuantSpec(width, width, v_group="block")),
        (replace(head_errors.variants(width)["all"], q_mean=True), QuantSpec(width, width, smooth_q=True)),
    ):
        found = np.swapaxes(head_errors.attend(q, k, v, keep, numerics), 0, 1)
        expected = attention(given.q[:1], given.k[:1], given.v[:1], plan=plan, quant=quant)[0][order]
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(given.v).max())


@pytest.mark.parametrize("name", ["K", "V"])
def test_an_operand_with_outliers_costs_most(rng, name):
    rows = head_errors.measure([sample(rng, **{name.lower(): 8.0})], GRID, densities=(1.0,), widths=("int4",))
    alone = {row["what"]: row["mean"] for row in rows if row["what"].endswith("alone")}
    assert max(alone, key=lambda what: alone[what]) == f"{name} alone"
    assert rows[4]["what"] == "all" and rows[4]["mean"] > max(alone.values()) and rows[4]["heads"] == 4
    assert rows[4]["above"] == 4 and rows[4]["worst_site"] == pytest.approx(rows[4]["together"])
    assert head_errors.table(rows).count("\n") == len(rows) + 1


def test_what_changes_no_exact_result_changes_none(rng):
    """Means of Q and V, balanced and rotated channels: without rounding the output is the same."""
    q, k, v = (jnp.asarray(rng.normal(size=(1, 200, 16)), jnp.float32) for _ in range(3))
    keep = jnp.ones((1, 200, 2), bool)
    plain = head_errors.attend(q, k, v, keep, head_errors.Numerics())
    for change in (dict(v_mean=True), dict(q_mean=True), dict(balance=True), dict(rotate=True), dict(p_keys=64)):
        found = head_errors.attend(q, k, v, keep, head_errors.Numerics(**change))
        np.testing.assert_allclose(found, plain, atol=1e-5)


def test_four_bits_want_smooth_operands_and_all_levels_for_p(rng):
    """A bias that all keys share is most of K's range until it is taken away; P has no sign to spend levels on."""
    given = sample(rng)
    biased = given._replace(q=given.q + 2.0, k=(given.k + 10.0 * rng.normal(size=16)).astype(np.float32))
    plan = AttentionPlan.dense(GRID, heads=2, block=(128, 128), order="HFW")
    rows = int4.measure([biased], {"model": plan}, 1)
    error = {row["what"]: row["mean"] for row in rows}
    assert list(error) == list(int4.VARIANTS) and all(row["heads"] == 4 and row["density"] == 1 for row in rows)
    assert error["Q K at 4 bits, K less its mean"] < error["Q K at 4 bits"] / 2
    assert error["Q K at 4 bits, K and Q less their means"] < error["Q K at 4 bits, K less its mean"]
    assert error["P V at 4 bits, P on [0, 15]"] < error["P V at 4 bits, P on [0, 7]"]
    assert error["int8 / int8"] < error["int4 / int4"] / 5
    assert int4.table(rows).count("\n") == len(rows) + 1
