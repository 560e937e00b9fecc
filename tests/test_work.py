"""The order of work of a persistent launch, and what that order is worth by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import launch
from pallas_kernels.block_attention import _work


@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize(("batch", "together"), [(1, 1), (2, 3), (2, 100)])
def test_items_are_all_there_longest_first_within_what_l2_holds(lists, batch, together):
    count = jnp.asarray(np.random.default_rng(0).integers(0, 12, (5, 7)), jnp.int32)
    rows, items = map(np.asarray, _work.in_order(count, batch, lists, _work.TOGETHER // together))
    places = -(-7 // lists)
    assert sorted(items) == list(range(5 * batch * places))
    for one in rows:
        assert sorted(one) == list(range(7))
    head, _, place = np.unravel_index(items, (5, batch, places))
    cost = [
        max(int(count[h, r]) for r in rows[h, lists * t : lists * (t + 1)]) for h, t in zip(head, place, strict=True)
    ]
    group = items // places // together
    order = list(zip(group, -np.asarray(cost), strict=True))
    assert order == sorted(order)


def test_two_rows_that_share_a_program_are_neighbours_in_length():
    count = jnp.asarray([[5, 1, 9, 3, 9, 0]], jnp.int32)
    rows, _ = _work.in_order(count, 1, 2, 1)
    np.testing.assert_array_equal(np.asarray(count)[0, np.asarray(rows)[0]], [9, 9, 5, 3, 1, 0])


def test_each_vmapped_call_counts_for_itself():
    items = jnp.arange(5, dtype=jnp.int32)
    made = jax.jit(jax.vmap(lambda x: _work.counters(items, x)))
    counters = made(jnp.ones((3, 2, 2)).at[1].set(jnp.nan))
    assert counters.shape == (3, 2) and counters.dtype == jnp.int32 and not np.asarray(counters).any()


def test_the_counters_are_no_constant():
    """XLA shares constants, and this array is written to."""
    made = jax.jit(_work.counters).lower(jnp.arange(5, dtype=jnp.int32), jnp.ones((2, 2)))
    assert "compare" in made.compile().as_text()


def test_when_the_last_core_is_done():
    """Two cores, a step lost an item. Drawn: 5 and 2 on one, 3, 2 and 1 on the other. Dealt: 5, 2 and 1; 3 and 2."""
    items = np.asarray([5, 3, 2, 2, 1])
    assert launch.finish(items, 1.0, cores=2) == 9
    assert launch.dealt(items, 1.0, cores=2) == 11
