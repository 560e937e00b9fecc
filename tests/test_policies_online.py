"""Policies that look at q and k, against their definitions re-derived one block at a time in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paro_jax
from paro_jax import AttentionPlan, BlockMask, TokenGrid, policies
from paro_jax.policies import _parts

GRID = TokenGrid((4, 4, 6), text=5)  # 101 tokens: partial blocks in queries and keys
BLOCK = (16, 8)
BATCH, HEADS, DIM = 2, 2, 8
PLAN = AttentionPlan.dense(GRID, heads=HEADS, order=["FHW", "WHF"], block=BLOCK)


def tokens(seed: int, count: int = 2, scale: float = 1.5) -> list[np.ndarray]:
    """Arrays [B, N, heads, D] of tokens that resemble their neighbours, as tokens of a video do."""
    x = np.random.default_rng(seed).standard_normal((count, BATCH, GRID.tokens + 6, HEADS, DIM))
    smooth = np.mean([x[:, :, i : i + GRID.tokens] for i in range(7)], axis=0) * 7**0.5
    return list((scale * smooth).astype(np.float32))


def heads_of(plan, *arrays):
    """(b, h, and each array [N, D] in the order of head h, float64)."""
    for b, h in itertools.product(range(BATCH), range(plan.heads)):
        slots = plan.grid.index(plan.order_list()[h])
        yield b, h, *(x[b, slots, h].astype(np.float64) for x in arrays)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def blocks(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def heaviest(weights, limit, include_crossing):
    """Positions kept, by the sentence of the definition."""
    kept, total = [], 0.0
    for place in np.argsort(-weights, kind="stable"):
        crosses = total + weights[place] > limit
        if crosses and not include_crossing:
            break
        kept.append(place)
        total += weights[place]
        if total >= limit:
            break
    return kept or [int(np.argmax(weights))]


def with_text(keep):
    return keep | GRID.always_keep(BLOCK)


# --- SpargeAttn -----------------------------------------------------------------------------------------------------


def sparge_oracle(q, k, simthr, topk=None, cdfthr=None, sink=False):
    k = k - k.mean(0)
    similarity = {}
    for name, x, size in (("q", q, BLOCK[0]), ("k", k, BLOCK[1])):
        directions = [b / np.linalg.norm(b, axis=1, keepdims=True) for b in blocks(x, size)]
        similarity[name] = [np.mean([a @ c for a in d for c in d]) > simthr for d in directions]
    means_q, means_k = ([b.mean(0) for b in blocks(x, size)] for x, size in ((q, BLOCK[0]), (k, BLOCK[1])))
    keep = np.zeros((len(means_q), len(means_k)), bool)
    alike = np.flatnonzero(similarity["k"])
    for i, mean in enumerate(means_q):
        if len(alike):
            weights = np.zeros(len(means_k))
            weights[alike] = softmax(np.array([mean @ means_k[j] for j in alike]) / DIM**0.5)
            if topk is not None:
                keep[i, np.argsort(-weights, kind="stable")[: max(1, int(topk * len(weights)))]] = True
            else:
                keep[i, heaviest(weights, cdfthr, include_crossing=False)] = True
        keep[i, ~np.array(similarity["k"])] = True
        if not similarity["q"][i]:
            keep[i] = True
    keep[:, 0] |= sink
    return with_text(keep)


@pytest.mark.parametrize(
    "knobs",
    [
        dict(topk=0.3, simthr=-0.1),
        dict(cdfthr=0.8, simthr=0.15, sink=True),
        dict(cdfthr=0.5, simthr=0.25),
        dict(cdfthr=0.7, simthr=1.0),
    ],
    ids=str,
)
def test_sparge_is_its_definition_in_the_order_of_each_head(knobs):
    q, k = tokens(1)
    mask = policies.sparge(q, k, plan=PLAN, **knobs)
    assert mask.keep.shape == (BATCH, HEADS, *GRID.blocks(BLOCK)) and mask.block == BLOCK
    for b, h, q1, k1 in heads_of(PLAN, q, k):
        np.testing.assert_array_equal(mask.keep[b, h], sparge_oracle(q1, k1, **knobs), err_msg=f"{b}, {h}")
    dissimilar = knobs["simthr"] == 1.0  # no cosine is above 1: nothing can be judged, nothing is skipped
    assert mask.keep.all() == dissimilar


def test_sparge_knobs_may_differ_by_head_and_be_traced():
    q, k = tokens(2)
    both = jax.jit(lambda q, k, knobs: policies.sparge(q, k, plan=PLAN, cdfthr=knobs[0], simthr=knobs[1]))
    mask = both(q, k, (np.array([0.4, 0.9], np.float32), np.array([-1.0, 0.2], np.float32)))
    for h, (cdfthr, simthr) in enumerate(((0.4, -1.0), (0.9, 0.2))):
        alone = policies.sparge(q, k, plan=PLAN, cdfthr=cdfthr, simthr=simthr)
        np.testing.assert_array_equal(mask.keep[:, h], alone.keep[:, h])


def test_sparge_judges_the_last_block_by_its_real_tokens():
    """Five equal tokens in a block of 16: padding must not make them look different, nor pull their mean to zero."""
    grid = TokenGrid((37,))
    plan = AttentionPlan.dense(grid, heads=1, block=(16, 16))
    k = np.random.default_rng(0).standard_normal((1, 37, 1, 4)).astype(np.float32)
    q = np.full_like(k, 1.0)
    k[:, 32:] = 1.0
    mask = policies.sparge(q, k, plan=plan, topk=0.0, simthr=0.9, smooth_k=False)
    np.testing.assert_array_equal(mask.keep[0, 0], np.ones((3, 3), bool))  # the first two key blocks cannot be judged
    k[:, :32] = -1.0
    mask = policies.sparge(q, k, plan=plan, topk=0.0, simthr=0.9, smooth_k=False)
    np.testing.assert_array_equal(mask.keep[0, 0], np.array([[0, 0, 1]] * 3, bool))


def test_sparge_judges_keys_less_their_mean():
    """What all keys share makes a block that points both ways look alike; smoothing takes it away."""
    plan = AttentionPlan.dense(TokenGrid((32,)), heads=1, block=(16, 16))
    q, k = np.zeros((2, 1, 32, 1, 4), np.float32)
    q[..., 1] = 1.0
    k[..., 2] = 5.0
    k[0, :16, 0, 0] = np.tile([1.0, -1.0], 8)
    k[0, 16:, 0, 1] = 1.0  # what the queries look for
    for smooth_k, kept in ((True, [[1, 1], [1, 1]]), (False, [[0, 1], [0, 1]])):
        mask = policies.sparge(q, k, plan=plan, topk=0.0, simthr=0.5, smooth_k=smooth_k)
        np.testing.assert_array_equal(mask.keep[0, 0], np.array(kept, bool))


def test_sparge_retains_more_on_tokens_in_the_right_order():
    """Attention along the width: on PARO-ordered tokens block means tell more at equal density."""
    grid = TokenGrid((4, 8, 8))
    column = np.arange(grid.tokens) % 8
    q = np.eye(8, dtype=np.float32)[column][None, :, None] * 4
    kept = {}
    for order in ("FHW", "WFH"):
        plan = AttentionPlan.dense(grid, heads=1, order=order, block=(32, 32))
        keep = np.asarray(policies.sparge(q, q, plan=plan, topk=0.125).keep)[0, 0]
        slots = grid.index(order)
        p = np.exp(q[0, slots, 0] @ q[0, slots, 0].T / 8**0.5)
        p /= p.sum(1, keepdims=True)
        kept[order] = p.reshape(8, 32, 8, 32).sum((1, 3))[keep].sum() / grid.tokens
        assert keep.mean() == 0.125
    assert kept["WFH"] > 0.9 > 0.3 > kept["FHW"]


@pytest.mark.parametrize("pv_skip", [0.0, 1.5, 50.0])
def test_pv_skip_is_its_definition(pv_skip):
    q, k = tokens(3, scale=2.5)
    mask = policies.sparge(q, k, plan=PLAN, topk=0.6)
    less = policies.sparge_pv_skip(q, k, mask, plan=PLAN, pv_skip=pv_skip)
    always = GRID.always_keep(BLOCK)
    for b, h, q1, k1 in heads_of(PLAN, q, k):
        expected = np.zeros(less.keep.shape[2:], bool)
        for i, rows in enumerate(blocks(q1, BLOCK[0])):
            top = np.full(len(rows), -np.inf)
            for j, keys in enumerate(blocks(k1, BLOCK[1])):
                if mask.keep[b, h, i, j]:
                    here = (rows @ keys.T / DIM**0.5 * np.log2(np.e)).max(1)
                    expected[i, j] = always[i, j] or (here - top + pv_skip > 0).any()
                    top = np.maximum(top, here)
        np.testing.assert_array_equal(less.keep[b, h], expected)
    if pv_skip == 50:
        np.testing.assert_array_equal(less.keep, mask.keep)
    else:
        assert less.density < mask.density


def test_tuning_meets_its_errors_and_gives_up_on_a_head_it_cannot_prune():
    """Head 0 attends to one key block, head 1 to all alike with values that differ: nothing of it can go."""
    grid = TokenGrid((64,))
    plan = AttentionPlan.dense(grid, heads=2, block=(16, 16))
    rng = np.random.default_rng(5)
    q = np.zeros((1, 64, 2, 4), np.float32)
    k = 0.01 * rng.standard_normal((1, 64, 2, 4)).astype(np.float32)
    q[:, :, 0, 0] = 4
    k[:, 16:32, 0, 0] = 4
    v = (
        rng.standard_normal((1, 64, 2, 4)).astype(np.float32)
        + np.repeat(np.eye(4, dtype=np.float32), 16, 0)[None, :, None]
    )
    tuned = policies.tune_sparge([(q, k, v)], plan=plan, l1=0.05, pv_l1=0.06, simthrs=(-1.0, -0.5), progress=False)
    assert tuned.simthr[1] == 1 and tuned.simthr[0] < 1
    mask = policies.sparge(q, k, plan=plan, cdfthr=tuned.cdfthr, simthr=tuned.simthr)
    density = np.asarray(mask.keep).mean((0, 2, 3))
    assert density[0] == 0.25 and density[1] == 1
    out = policies.masked_attention(q, k, v, mask, plan=plan)
    dense = jax.nn.dot_product_attention(q, k, v)
    error = np.abs(out - dense).sum((0, 1, 3)) / np.abs(dense).sum((0, 1, 3))
    assert error[0] < 0.05 and error[1] < 1e-5


# --- XAttention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride, tau, sink", [(4, 0.9, False), (8, 0.5, True)])
def test_xattention_is_its_definition_in_the_order_of_each_head(stride, tau, sink):
    q, k = tokens(4)
    mask = policies.xattention(q, k, plan=PLAN, tau=tau, stride=stride, sink=sink)
    cells = -(-GRID.tokens // stride)
    for b, h, q1, k1 in heads_of(PLAN, q, k):
        score = np.zeros((cells, cells))
        for g, c, t in itertools.product(range(cells), range(cells), range(stride)):
            row, column = g * stride + stride - 1 - t, c * stride + t
            if row < GRID.tokens and column < GRID.tokens:
                score[g, c] += q1[row] @ k1[column] / (DIM**0.5 * stride)
        p = np.stack([softmax(row) for row in score])
        nq, nk = GRID.blocks(BLOCK)
        keep = np.zeros((nq, nk), bool)
        for i in range(nq):
            rows = p[i * BLOCK[0] // stride : (i + 1) * BLOCK[0] // stride]
            weight = np.array([rows[:, j * BLOCK[1] // stride : (j + 1) * BLOCK[1] // stride].sum() for j in range(nk)])
            keep[i, heaviest(weight, tau * weight.sum(), include_crossing=True)] = True
        keep[:, 0] |= sink
        np.testing.assert_array_equal(mask.keep[b, h], with_text(keep), err_msg=f"{b}, {h}")


def test_the_block_that_crosses_the_threshold():
    weights, limit = jnp.array([[0.3, 0.5, 0.2], [0.1, 0.1, 0.8]]), jnp.array([0.6, 0.6])
    out = _parts.top_p(weights, limit, include_crossing=False)
    np.testing.assert_array_equal(out, [[0, 1, 0], [0, 0, 1]])
    in_ = _parts.top_p(weights, limit, include_crossing=True)
    np.testing.assert_array_equal(in_, [[1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(_parts.top_p(weights, jnp.zeros(2), include_crossing=True), out)  # never none
    for crossing in (True, False):
        assert _parts.top_p(weights, jnp.ones(2), include_crossing=crossing).all()


# --- SparseVideoGen --------------------------------------------------------------------------------------------------


def test_sparse_videogen_is_its_definition():
    q, k, v = tokens(6, count=3)
    rng = jax.random.key(3)
    mask, order = policies.sparse_videogen(q, k, v, grid=GRID, density=0.6, rng=rng, block=BLOCK, rows=7)
    frames, places = 4, 24
    drawn = np.asarray(jax.random.randint(rng, (7,), 0, 96))
    half = int(1.5 * places / BLOCK[1])
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        errors = []
        for temporal in (False, True):
            error = 0.0
            for row in drawn:
                scores = q[b, row + 5, h].astype(float) @ k[b, :, h].astype(float).T / DIM**0.5
                seen = np.ones(GRID.tokens, bool)
                for key in range(96):
                    i, j = row, key
                    if temporal:
                        i, j = (p % places * frames + p // places for p in (row, key))
                    seen[key + 5] = abs(i // BLOCK[1] - j // BLOCK[1]) < half
                full = softmax(scores) @ v[b, :, h]
                error += np.square(softmax(scores[seen]) @ v[b, seen, h] - full).sum()
            errors.append(error)
        assert GRID.orders[order[b, h]] == ("HWF" if errors[1] < errors[0] else "FHW")
    band = policies.window(GRID, density=0.6, block=BLOCK)
    assert mask.keep.shape == (BATCH, HEADS, *GRID.blocks(BLOCK)) and (mask.keep == band.keep[None]).all()


def test_the_band_has_the_published_width():
    """w = n (1 - sqrt(1 - s')) / P with s' = s - 2 T / n: the band of that half width has density s with its text."""
    grid, block, density = TokenGrid((8, 16, 16), text=16, text_position="last"), (16, 16), 0.4
    n = grid.tokens
    published = n * (1 - (1 - (density - 2 * grid.text / n)) ** 0.5)
    keep = np.asarray(policies.window(grid, density=density, block=block).keep)[0]
    middle = len(keep) // 2
    kept = keep[middle, : grid.grid_tokens // 16].sum() * 16 / 2
    assert abs(kept - published) <= 16


def test_sparse_videogen_tells_spatial_from_temporal_heads():
    grid = TokenGrid((8, 4, 8), text=3, text_position="last")
    frame, place = np.divmod(np.arange(256), 32)
    q = np.zeros((1, 259, 2, 40), np.float32)
    q[0, :256, 0, :8] = 9 * np.eye(8)[frame]  # head 0 sees its frame, head 1 its place in all frames
    q[0, :256, 1, :32] = 9 * np.eye(32)[place]
    v = np.random.default_rng(0).standard_normal(q.shape).astype(np.float32)
    mask, order = policies.sparse_videogen(q, q, v, grid=grid, density=0.4, rng=jax.random.key(0), block=(16, 16))
    assert [grid.orders[i] for i in order[0]] == ["FHW", "HWF"]
    plan = AttentionPlan.dense(grid, heads=2, block=(16, 16))
    out = policies.masked_attention(q, q, v, mask, plan=plan, order=order)
    dense = jax.nn.dot_product_attention(q, q, v)
    assert np.abs(out - dense).max() < 1e-2  # the bands hold what the heads look at
    wrong = policies.masked_attention(q, q, v, mask, plan=plan, order=order[:, ::-1])
    assert np.abs(wrong - dense).max() > 0.5


def test_a_sink_keeps_the_first_frames_keys():
    q, k, v = tokens(6, count=3)
    mask, _ = policies.sparse_videogen(q, k, v, grid=GRID, density=0.7, rng=jax.random.key(0), block=BLOCK, sink=True)
    assert mask.keep[..., :3].all() and mask.density == pytest.approx(0.7, abs=0.01)


# --- SparseVideoGen2 -------------------------------------------------------------------------------------------------


def kmeans_oracle(x, centroids, iterations):
    for _ in range(iterations):
        labels = [int(np.argmin([np.sum((t - c) ** 2) for c in centroids])) for t in x]
        new = np.array([x[np.equal(labels, c)].mean(0) if c in labels else old for c, old in enumerate(centroids)])
        moved, centroids = np.sqrt(((new - centroids) ** 2).sum(1)).max(), new
        if moved < 1e-4:
            break
    return np.array([int(np.argmin([np.sum((t - c) ** 2) for c in centroids])) for t in x]), centroids


def test_sparse_videogen2_is_its_definition():
    q, k = tokens(7)
    rng = np.random.default_rng(0)
    start = policies.Centroids(*(rng.standard_normal((BATCH, HEADS, n, DIM)).astype(np.float32) for n in (5, 9)))
    start.k[:, :, -1] = 100.0  # a centroid that nobody joins
    options = dict(grid=GRID, q_clusters=5, k_clusters=9, top_p=0.6, min_ratio=0.25, block=BLOCK)
    found = policies.sparse_videogen2(q, k, start=start, iterations=3, **options)
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        video_q, video_k = (x[b, 5:, h].astype(np.float64) for x in (q, k))
        labels_q, centres_q = kmeans_oracle(video_q, start.q[b, h].astype(float), 3)
        labels_k, centres_k = kmeans_oracle(video_k, start.k[b, h].astype(float), 3)
        np.testing.assert_allclose(found.centroids.q[b, h], centres_q, atol=1e-4)
        np.testing.assert_allclose(found.centroids.k[b, h], centres_k, atol=1e-4)
        sizes = np.bincount(labels_k, minlength=9)
        assert sizes[-1] == 0
        slots_q, slots_k = (np.argsort(x, kind="stable") for x in (labels_q, labels_k))
        np.testing.assert_array_equal(found.q_slots[b, h], [*(slots_q + 5), *range(5)])
        np.testing.assert_array_equal(found.k_slots[b, h], [*(slots_k + 5), *range(5)])
        element = np.zeros((96, 96), bool)
        for row in range(96):
            scores = centres_q[labels_q[row]] @ centres_k.T / DIM**0.5
            weights = sizes * np.exp(scores - scores.max())
            weights = weights / weights.sum()
            kept = {*heaviest(weights, 0.6, include_crossing=True), *np.argsort(-weights, kind="stable")[:2]}
            element[row] = np.isin(labels_k, list(kept))
        assert found.cluster_density[b, h] == pytest.approx((element.sum() + 101**2 - 96**2) / 101**2)
        element = element[slots_q][:, slots_k]
        keep = GRID.always_keep(BLOCK)
        for i, j in np.ndindex(keep.shape):
            keep[i, j] |= element[i * 16 : (i + 1) * 16, j * 8 : (j + 1) * 8].any()
        np.testing.assert_array_equal(found.mask.keep[b, h], keep)


def test_k_means_finds_planted_clusters_and_a_warm_start_stays_there():
    grid = TokenGrid((4, 4, 4), text=2, text_position="last")
    kind = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 16))
    x = np.zeros((1, 66, 1, 4), np.float32)
    x[0, :64, 0] = 12 * np.eye(4)[kind]
    v = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    options = dict(grid=grid, q_clusters=4, k_clusters=4, min_ratio=0.0, block=(16, 16))
    start = policies.Centroids(*(x[:, None, [np.flatnonzero(kind == c)[0] for c in range(4)], 0],) * 2)
    found = policies.sparse_videogen2(x, x, start=start, **options)
    np.testing.assert_array_equal(found.mask.keep[0, 0, :4, :4], np.eye(4, dtype=bool))
    assert found.cluster_density[0, 0] == pytest.approx((4 * 16**2 + 66**2 - 64**2) / 66**2)
    out = policies.slot_attention(x, x, v, found.mask, grid=grid, q_slots=found.q_slots, k_slots=found.k_slots)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(x, x, v), atol=1e-4)
    warm = policies.sparse_videogen2(x, x, start=found.centroids, iterations=0, **options)
    np.testing.assert_array_equal(warm.q_slots, found.q_slots)
    cold = policies.sparse_videogen2(x, x, start=jax.random.key(0), **options)
    assert cold.mask.keep.any(-1).all() and cold.centroids.q.shape == found.centroids.q.shape


def test_slot_attention_is_attention_with_each_head_gathered():
    """Queries and keys in orders of their own, text last, a mask of every batch entry: against the element mask."""
    q, k, v = tokens(8, count=3)
    rng = np.random.default_rng(0)
    q_slots, k_slots = (
        np.stack([[[*(5 + rng.permutation(96)), *range(5)] for _ in range(HEADS)] for _ in range(BATCH)]) for _ in "qk"
    )
    keep = with_text(rng.random((BATCH, HEADS, *GRID.blocks(BLOCK))) < 0.4)
    out = policies.slot_attention(q, k, v, BlockMask(keep, BLOCK), grid=GRID, q_slots=q_slots, k_slots=k_slots)
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        element = np.repeat(np.repeat(keep[b, h], 16, 0), 8, 1)[:101, :101]
        scores = q[b, q_slots[b, h], h].astype(float) @ k[b, k_slots[b, h], h].astype(float).T / DIM**0.5
        p = np.stack([softmax(row) for row in np.where(element, scores, -np.inf)])
        np.testing.assert_allclose(out[b, q_slots[b, h], h], p @ v[b, k_slots[b, h], h], atol=1e-5)


def test_masked_attention_gives_every_batch_entry_its_mask_and_order():
    q, k, v = tokens(9, count=3)
    rng = np.random.default_rng(0)
    mask = BlockMask(with_text(rng.random((BATCH, HEADS, *GRID.blocks(BLOCK))) < 0.4), BLOCK)
    order = np.array([[0, 3], [5, 1]], np.int8)
    out = policies.masked_attention(q, k, v, mask, plan=PLAN, order=order)
    for b in range(BATCH):
        names = [GRID.orders[i] for i in order[b]]
        plan = AttentionPlan.build(GRID, order=names, mask=BlockMask(mask.keep[b], BLOCK))
        one = (slice(b, b + 1),)
        np.testing.assert_allclose(out[b], paro_jax.attention(q[one], k[one], v[one], plan=plan)[0], atol=1e-6)
    shared = policies.masked_attention(q, k, v, BlockMask(mask.keep[0], BLOCK), plan=PLAN)
    np.testing.assert_allclose(
        shared, paro_jax.attention(q, k, v, plan=PLAN.with_mask(BlockMask(mask.keep[0], BLOCK))), atol=1e-6
    )


def test_paro_united_with_a_dynamic_mask_keeps_both():
    q, k = tokens(10)
    rng = np.random.default_rng(0)
    plan = PLAN.with_mask(BlockMask(with_text(rng.random((HEADS, *GRID.blocks(BLOCK))) < 0.2), BLOCK))
    dynamic = policies.sparge(q, k, plan=plan, topk=0.2)
    both = plan.mask() | dynamic
    np.testing.assert_array_equal(both.keep, np.asarray(plan.mask().keep)[None] | np.asarray(dynamic.keep))
    np.testing.assert_array_equal((dynamic & plan.mask()).keep, np.asarray(plan.mask().keep)[None] & dynamic.keep)
    assert max(float(plan.density), float(dynamic.density)) < both.density < plan.density + dynamic.density


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [policies.sparge, policies.xattention])
def test_tokens_and_plans_that_do_not_fit_are_refused(says, policy):
    knob = {"topk": 0.5} if policy is policies.sparge else {"stride": 8}
    q, k = tokens(0)
    with says("plan", "AttentionPlan", "NoneType"):
        policy(q, k, plan=None, **knob)
    with says("plan", "one site", "(3,)"):
        policy(q, k, plan=AttentionPlan.dense(GRID, heads=HEADS, sites=3, block=BLOCK), **knob)
    with says("q", "tokens = 101", "[2, 100, 2, 8]"):
        policy(q[:, 1:], k[:, 1:], plan=PLAN, **knob)
    with says("k", "one shape", "[1, 101, 2, 8]"):
        policy(q, k[:1], plan=PLAN, **knob)
    with says("q", "floats", "int32"):
        policy(q.astype(np.int32), k, plan=PLAN, **knob)


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(), ("topk or cdfthr", "None")),
        (dict(topk=0.5, cdfthr=0.5), ("topk or cdfthr", "not both")),
        (dict(topk=1.5), ("topk", "[0, 1]", "1.5")),
        (dict(cdfthr=-0.1), ("cdfthr", "[0, 1]", "-0.1")),
        (dict(cdfthr=float("nan")), ("cdfthr", "nan")),
        (dict(topk=0.5, simthr=1.01), ("simthr", "[-1, 1]", "1.01")),
        (dict(topk=[0.5, 0.5, 0.5]), ("topk", "2 heads")),
        (dict(topk="half"), ("topk", "half")),
        (dict(topk=True), ("topk", "True")),
    ],
    ids=str,
)
def test_knobs_out_of_range_are_refused_under_jit_too(says, knobs, words):
    with says(*words):
        policies.sparge(*tokens(0), plan=PLAN, **knobs)
    with says(*words):
        jax.eval_shape(lambda q, k: policies.sparge(q, k, plan=PLAN, **knobs), *tokens(0))


def test_other_bad_input_is_refused(says):
    q, k = tokens(0)
    v = q
    with says("stride", "(16, 8)", "16"):
        policies.xattention(q, k, plan=PLAN, stride=16)
    with says("tau", "[0, 1]", "2"):
        policies.xattention(q, k, plan=PLAN, stride=8, tau=2)
    with says("norm", "positive", "0"):
        policies.xattention(q, k, plan=PLAN, stride=8, norm=0)
    rng = jax.random.key(0)
    with says("density", "at least", "0.01"):
        policies.sparse_videogen(q, k, v, grid=GRID, density=0.01, rng=rng, block=BLOCK)
    with says("grid", "video", "(96,)"):
        policies.sparse_videogen(q, k, v, grid=TokenGrid((96,), text=5), density=0.5, rng=rng)
    with says("grid", "TokenGrid", "None"):
        policies.sparse_videogen(q, k, v, grid=None, density=0.5, rng=rng)
    with says("rows", ">= 1", "0"):
        policies.sparse_videogen(q, k, v, grid=GRID, density=0.5, rng=rng, block=BLOCK, rows=0)
    with says("q_clusters", "<= 96", "97"):
        policies.sparse_videogen2(q, k, grid=GRID, q_clusters=97, k_clusters=4, start=rng)
    with says("start.k", "[2, 2, 4, 8]", "[2, 2, 3, 8]"):
        start = policies.Centroids(np.zeros((2, 2, 4, 8)), np.zeros((2, 2, 3, 8)))
        policies.sparse_videogen2(q, k, grid=GRID, q_clusters=4, k_clusters=4, start=start)
    with says("l1", "pv_l1", "0.1"):
        policies.tune_sparge([], plan=PLAN, l1=0.1, pv_l1=0.05)
    with says("samples", "at least one"):
        policies.tune_sparge([], plan=PLAN)
    mask = policies.sparge(q, k, plan=PLAN, topk=0.5)
    with says("pv_skip", "-1"):
        policies.sparge_pv_skip(q, k, mask, plan=PLAN, pv_skip=-1)
    with says("mask", "(16, 8)", "(8, 8)"):
        policies.sparge_pv_skip(q, k, BlockMask(mask.keep, (8, 8)), plan=PLAN)
    with says("mask.keep", "[2, 2, 7, 13]", "[3, 2, 7, 13]"):
        policies.masked_attention(q, k, v, BlockMask(np.ones((3, 2, 7, 13), bool), BLOCK), plan=PLAN)
    with says("order", "FHW", "6"):
        policies.masked_attention(q, k, v, BlockMask(mask.keep[0], BLOCK), plan=PLAN, order=np.array([0, 6]))
    with says("q_slots", "[2, 2, 101]", "[2, 101]"):
        policies.slot_attention(
            q, k, v, mask, grid=GRID, q_slots=np.zeros((2, 101), int), k_slots=np.zeros((2, 101), int)
        )
