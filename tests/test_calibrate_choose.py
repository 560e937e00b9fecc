"""Which order, which blocks: the decisions against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BLOCK, GRID, make, samples

import calibrate
from calibrate import _choose
from paro_jax import TokenGrid


@st.composite
def problems(draw):
    """share [lead, heads, nq, nk], rows that sum to 1 and many equal entries; always [nq, nk]; a density above floor"""
    nq, nk = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    lead, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    share = rng.integers(0, levels + 1, (lead, heads, nq, nk)).astype(np.float32) + 1e-3
    share[rng.random(share.shape) < draw(st.sampled_from([0, 0.3]))] = 0
    share = share / np.maximum(share.sum(-1, keepdims=True), 1e-3)
    text = draw(st.integers(0, 2))
    always = np.zeros((nq, nk), bool)
    if text:
        always[-text:], always[:, -text:] = True, True
    floor = _choose.floor_blocks(always) / always.size
    density = min(1.0, floor + draw(st.floats(0, 1)) * (1 - floor) + 1e-6)
    return share.astype(np.float32), always, density


def value_of(share, always):
    """The three tiers, written plainly: infinity, a row's heaviest block + 1, the share."""
    value = share.astype(np.float32).copy()
    for index in np.ndindex(share.shape[:-1]):
        row, forced = value[index], always[index[-1]]
        if not forced.all():
            best = max((j for j in range(len(row)) if not forced[j]), key=lambda j: (row[j], -j))
            row[best] = row[best] + 1 if forced.any() else np.inf
        row[forced] = np.inf
    return value


def kept_of(values, budget):
    """Largest set {v >= t} of at most `budget` values."""
    best = np.inf
    for t in np.unique(np.append(values, 0)):
        if np.count_nonzero(values >= t) <= budget:
            best = t
            break
    return values >= best


@settings(deadline=None, max_examples=150)
@given(problems())
def test_the_global_threshold_is_exact(problem):
    share, always, density = problem
    keep, threshold = _choose.mask(share, always, density)
    np.testing.assert_array_equal(keep, kept_of(value_of(share, always), _choose.budget_of(density, share.size)))
    assert keep.sum() <= density * share.size + 1e-6
    assert threshold.shape == () and threshold.dtype == np.float32
    # One block more, or the group of equal ones that comes next, would be above the density.
    skipped = value_of(share, always)[~keep]
    if skipped.size:
        assert keep.sum() + np.count_nonzero(skipped == skipped.max()) > int(density * share.size)


@settings(deadline=None, max_examples=100)
@given(problems())
def test_the_other_rules_and_what_is_always_kept(problem):
    share, always, density = problem
    nq, nk = always.shape
    value = value_of(share, always)
    by_head, thresholds = _choose.mask(share, always, density, "head")
    for index in np.ndindex(share.shape[:2]):
        np.testing.assert_array_equal(by_head[index], kept_of(value[index], _choose.budget_of(density, nq * nk)))
    assert thresholds.shape == share.shape[:2]
    by_row, thresholds = _choose.mask(share, always, density, "row")
    assert thresholds.shape == share.shape[:3]
    free = ~always.all(1)
    if free.any():
        row, left = divmod(_choose.budget_of(density, nq * nk) - nk * int((~free).sum()), int(free.sum()))
        for index in np.ndindex(share.shape[:2]):
            following = {i: sorted(value[index][i])[::-1][row] for i in np.flatnonzero(free) if row < nk}
            more = sorted(following, key=lambda i: -following[i])[:left]
            for i in np.flatnonzero(free):
                np.testing.assert_array_equal(by_row[index][i], kept_of(value[index][i], row + (i in more)))
    for rule in _choose.RULES:
        keep, _ = _choose.mask(share, always, density, rule, share**2)
        assert keep[..., always].all()
        assert keep.any(-1).all()
        assert keep.mean() <= density + 1e-6
    # A row that keeps nothing of text keeps its heaviest block.
    bare = np.flatnonzero(~always.any(1))
    heaviest = np.take_along_axis(_choose.mask(share, always, density)[0], share.argmax(-1)[..., None], -1)
    assert heaviest[..., bare, 0].all()


@settings(deadline=None, max_examples=50)
@given(problems(), st.floats(0, 1))
def test_more_density_only_adds_blocks(problem, part):
    share, always, density = problem
    less, _ = _choose.mask(share, always, density)
    more, _ = _choose.mask(share, always, density + part * (1 - density))
    assert (more | ~less).all()


def test_all_of_it_and_nothing_to_lose():
    share = np.zeros((1, 1, 3, 3), np.float32)
    share[..., 0] = 1
    always = np.zeros((3, 3), bool)
    assert _choose.mask(share, always, 1.0)[0].all()
    # Blocks without any mass come all or not at all.
    np.testing.assert_array_equal(_choose.mask(share, always, 0.9)[0][0, 0], share[0, 0] == 1)


def test_a_concentrated_head_leaves_its_budget_to_a_flat_one():
    sharp, flat = np.full((8, 8), 0.01), np.full((8, 8), 1 / 8)
    np.fill_diagonal(sharp, 0.93)
    share = np.stack([sharp, flat + np.random.default_rng(0).normal(scale=1e-3, size=flat.shape)]).astype(np.float32)
    keep, _ = _choose.mask(share[None], np.zeros((8, 8), bool), 0.5)
    np.testing.assert_array_equal(keep[0, 0], np.eye(8, dtype=bool))
    assert keep[0, 1].sum() == 64 - 8
    assert (_choose.mask(share[None], np.zeros((8, 8), bool), 0.5, "head")[0].sum((-2, -1)) <= 32).all()


def test_a_row_keeps_its_heaviest_grid_block_beside_text():
    """The text column holds nearly everything, and there is budget for one block more in each row."""
    grid = TokenGrid((3, 64), text=64)
    always = grid.always_keep((64, 64))
    share = np.array([[0.02, 0.04, 0.01, 0.93], [0.3, 0.2, 0.2, 0.3], [0, 0, 0, 1], [0.25] * 4], np.float32)[None, None]
    keep, threshold = _choose.mask(share, always, 10 / 16)
    np.testing.assert_array_equal(keep[0, 0], np.array([[0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], bool))
    assert 0.2 < threshold <= 1  # of what is left, 0.2 would be next
    keep, _ = _choose.mask(share, always, 8 / 16)  # too little for all: the heaviest first
    np.testing.assert_array_equal(keep[0, 0], np.array([[0, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]], bool))


BUDGETS = [(0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29), (1.0, 77284, 77284), (0.3, 77284, 23185)]
BUDGETS += [(1 / 3, 9, 3), (0.1, 9, 0)]


@pytest.mark.parametrize(("density", "blocks", "budget"), BUDGETS)
def test_a_budget_is_counted_in_fractions(density, blocks, budget):
    assert _choose.budget_of(density, blocks) == budget


@pytest.mark.parametrize(("grid", "block", "floor"), [
    (TokenGrid((13, 30, 45), text=226), (64, 64), 278**2 - 274**2),  # 17550 = 274.2 blocks, so text is in 4 of 278
    (TokenGrid((64, 64), text=512), (64, 64), 72**2 - 64**2),
    (TokenGrid((21, 45, 80)), (64, 64), 1182),
    (TokenGrid((21, 45, 80)), (128, 64), 591),
    (TokenGrid((3,)), (64, 64), 1),
])  # fmt: skip
def test_the_floor_of_real_models(grid, block, floor):
    assert _choose.floor_blocks(grid.always_keep(block)) == floor


def predicted(share, errors, keep):
    """Sum over rows of e_i(S), the squared error that keeping `keep` is predicted to leave."""
    lost = np.where(keep, 0, errors).sum(-1, dtype=np.float64)
    return (lost / np.where(keep, share, 0).sum(-1, dtype=np.float64) ** 2).sum()


def test_the_error_rule_leaves_the_least_predicted_error():
    """Against every other way to share the budget between rows, each of which keeps its first few."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        share = -np.sort(-(rng.random((1, 2, 2, 4)) ** 3), axis=-1)
        share = (share / share.sum(-1, keepdims=True)).astype(np.float32)
        errors = (share**2 * rng.uniform(0.1, 10, (1, 2, 2, 1))).astype(np.float32)
        keep, _ = _choose.mask(share, np.zeros((2, 4), bool), 0.6, "error", errors)
        counts = [c for c in itertools.product(range(1, 5), repeat=4) if sum(c) == keep.sum()]
        others = [(np.arange(4) < np.reshape(c, (1, 2, 2, 1))) for c in counts]
        assert keep.sum() == 9
        assert predicted(share, errors, keep) <= min(predicted(share, errors, other) for other in others) * (1 + 1e-6)


def test_the_error_rule_feeds_a_starved_row_and_spares_what_does_not_matter():
    """Head 0 says the same whatever it attends to; head 1 has a row whose every block is lighter than all others."""
    share = np.empty((1, 2, 4, 8), np.float32)
    share[:] = [0.2] * 4 + [0.05] * 4
    share[0, 1, 0] = 1 / 8
    errors = share**2
    errors[0, 0] = 0
    always = np.zeros((4, 8), bool)
    keep, _ = _choose.mask(share, always, 24 / 64, "error", errors)
    assert keep.sum(-1).tolist() == [[[1, 1, 1, 1], [8, 4, 4, 4]]]
    assert _choose.mask(share, always, 24 / 64)[0][0, 1, 0].sum() == 1


def test_retained_mass_is_the_best_a_budget_can_hold():
    rng = np.random.default_rng(0)
    grid = TokenGrid((5, 6, 7), text=20)
    always = grid.always_keep((32, 32))
    mass = rng.random((3, 2, *always.shape)).astype(np.float32)
    for density in (0.5, 0.7, 1.0):
        budget = _choose.budget_of(density, always.size)
        order = np.argsort(np.where(always, np.inf, mass).reshape(6, -1), axis=-1)[:, ::-1][:, :budget]
        expected = np.take_along_axis(mass.reshape(6, -1), order, -1).sum(-1) / mass.reshape(6, -1).sum(-1)
        np.testing.assert_allclose(_choose.retained(mass, always, density).ravel(), expected, rtol=1e-6)


def test_orders_within_a_millionth_are_equal():
    errors = np.array([[0.5 + 9e-7, 0.5 + 1.1e-6, 0.1], [0.5, 0.5, 0.1], [0.9, 0.5 - 1e-12, 0.2]])
    np.testing.assert_array_equal(_choose.orders(errors), [0, 1, 0])


def test_the_heaviest_kept_block_of_a_row():
    share = np.array([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]], np.float32)
    keep = np.array([[[1, 1, 1], [1, 0, 1], [1, 1, 0]]], bool)
    found = _choose.heaviest(share, keep)
    assert found.dtype == np.uint16 and found.tolist() == [[[0], [0], [0]]]  # skipped ones are lighter than any
    assert _choose.heaviest(share, keep[:, :, ::-1]).tolist() == [[[0], [0], [2]]]
    assert _choose.heaviest(np.stack([share, share]), np.ones((2, 1, 3, 3), bool)).tolist() == 2 * [[[[0], [1], [2]]]]


@pytest.mark.parametrize("rule", ["global", "row", "error"])
def test_a_plan_knows_the_heaviest_kept_block_of_each_row(rule):
    given = samples(prompts=2)
    plan, _ = make(given, bucket_edges=(0.0, 0.5, 1.0), orders=["HWF"], rule=rule)
    assert plan.first is not None and plan.first.shape == (2, 2, 2, 4, 1)
    for (bucket, site), step in zip(np.ndindex(2, 2), (0.1, 0.1, 0.6, 0.6), strict=True):
        alike = [x for x in given if (x.step, x.site) == (step, site)]
        mass = np.mean([calibrate.block_mass(x.q, x.k, GRID, "HWF", BLOCK) for x in alike], axis=0)
        expected = np.where(plan.mask().keep[bucket, site], mass, -1).argmax(-1)
        np.testing.assert_array_equal(plan.first[bucket, site, ..., 0], expected)
    assert make(given)[0].first.shape == (2, 2, 4, 1)


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="rule must be one of 'global', 'head', 'row', 'error'; got 'columns'"):
        _choose.mask(np.ones((1, 1, 2, 2), np.float32), np.zeros((2, 2), bool), 1.0, "columns")
