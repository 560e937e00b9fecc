"""Block-sparse attention for any device XLA knows: memory O(N D), work proportional to the kept blocks in total.

Method: PAROAttention (arXiv 2506.16054) with FlashAttention's streaming (arXiv 2307.08691) and SageAttention's numerics
(arXiv 2410.02367). Unusual: XLA has no per-program early stop, so a row with few kept blocks would wait for the
fullest. Query block rows of all heads are therefore sorted by their number of kept blocks and walked in teams of
near-equal rows; each team loops over its own number of steps, a few kept blocks a step. Masks are data: changing them
compiles nothing.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _check, _permute
from pallas_kernels._check import FLOATS, WIDTHS
from pallas_kernels._choose import ALL_WIDTHS, Request, widths_served
from pallas_kernels.block_attention.reference import FEATURES, inexact, quantise_p, token_scales

_LOWEST = -3.4028235e38  # a maximum before the first score: finite, so that a masked score of -inf gives exp2(-inf) = 0


@dataclass(frozen=True)
class Tiles:
    """How much one step of the loop does."""

    team: int  # query block rows walked together
    step: int  # kept key blocks per step and row

    def __post_init__(self) -> None:
        assert self.team > 0 and self.step > 0, f"{self=}"


def why_not(request: Request) -> str | None:
    """Serves every width and device at float32, bfloat16 and float16, wherever integers stay exact in float32."""
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype} is not served; it serves {', '.join(FLOATS)}"
    return widths_served(request, ALL_WIDTHS, FEATURES) or inexact(request)


def tiles(rows: int, blocks: int, bq: int, bk: int) -> Tiles:
    """For `rows` rows of bq tokens over `blocks` blocks of bk tokens. Measured on a 2-core CPU, see NOTES.md.

    A dozen teams at least, so that rows with little work do not wait in the team of the fullest.
    """
    return Tiles(team=max(1, min(2048 // bq, rows // 12)), step=max(1, min(256 // bk, blocks)))


class Spec(NamedTuple):
    """What is static about a call."""

    block: tuple[int, int]
    scale: float
    qk: str
    pv: str
    p_scale: str
    out_dtype: Any


def candidates(request: Request) -> tuple[Tiles, ...]:
    """What `tiles` says, then half and twice of it either way."""
    (bq, bk), rows = request.block, request.batch * request.heads * -(-request.q_tokens // request.block[0])
    blocks = -(-request.kv_tokens // bk)
    first = tiles(rows, blocks, bq, bk)
    teams, steps = ((x, max(1, x // 2), 2 * x) for x in (first.team, first.step))
    every = (Tiles(min(team, rows), min(step, blocks)) for team in teams for step in steps)
    return tuple(dict.fromkeys(every))


@partial(jax.jit, static_argnames=("block", "scale", "qk", "pv", "p_scale", "out_dtype", "tiles"))
def run(
    q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta=None, *, block, scale, qk, pv, p_scale, out_dtype,
    tiles=None,
):  # fmt: skip
    """See block_attention; arguments are checked there. Returns (o [B, Nq, H, D], lse f32 [B, Nq, H])."""
    spec = Spec(block, scale, qk, pv, p_scale, out_dtype)
    arrays = _check.share_mesh_axes(q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta)
    q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta = arrays
    if qk == "bf16" and pv == "bf16" and delta is None:
        return _attend(spec, tiles, q, k, v, count, index, slots)
    return _forward(spec, tiles, q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta)


# ---- the schedule ---------------------------------------------------------------------------------------------------


class _Teams(NamedTuple):
    """Rows of all heads sorted by work and cut into teams of T."""

    row: jax.Array  # int32 [teams, T]: row = (batch * heads + head) * row blocks + row block
    head: jax.Array  # int32 [teams, T]: batch * heads + head
    count: jax.Array  # int32 [teams, T]: kept blocks of the row; 0 in the padding of the last team
    mask_row: jax.Array  # int32 [teams, T]: head * row blocks + row block, a row of `index`
    index: jax.Array  # int32 [heads * row blocks, steps * step]: kept blocks; past count, the row's first again
    place: jax.Array  # int32 [rows]: where in teams * T each row went


def _teams(count: jax.Array, index: jax.Array, batch: int, sizes: Tiles) -> _Teams:
    heads, rows, blocks = index.shape
    total = batch * heads * rows
    team = sizes.team
    padding = -total % team
    count = jnp.clip(count, 0, blocks).reshape(-1)
    index = jnp.clip(index, 0, blocks - 1).reshape(-1, blocks)
    # Repeating a kept block costs nothing to mask and never touches a skipped one, which may hold NaN.
    index = jnp.where(jnp.arange(blocks)[None] < count[:, None], index, index[:, :1])
    index = jnp.pad(index, ((0, 0), (0, -blocks % sizes.step)), mode="edge")
    order = jnp.argsort(-jnp.tile(count, batch), stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(total, dtype=jnp.int32))
    order = jnp.pad(order, (0, padding), mode="edge")
    mask_row = order % (heads * rows)
    real = jnp.arange(total + padding) < total
    return _Teams(
        row=order.reshape(-1, team),
        head=(order // rows).reshape(-1, team),
        count=jnp.where(real, count[mask_row], 0).reshape(-1, team),
        mask_row=mask_row.reshape(-1, team),
        index=index,
        place=place,
    )


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, H, N, ...] -> [B * H * n, block, ...], the tail block filled with zeros."""
    tokens = x.shape[2]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -tokens % block)] + [(0, 0)] * (x.ndim - 3))
    return x.reshape(-1, block, *x.shape[3:])


def _kept_blocks(i: jax.Array, kept: jax.Array, counts: jax.Array, step: int) -> tuple[jax.Array, jax.Array]:
    """Step i of a team: (kept blocks int32 [T, step], whether each is within its row's count)."""
    entry = i * step + jnp.arange(step, dtype=jnp.int32)
    chosen = jax.lax.dynamic_slice_in_dim(kept, i * step, step, axis=1)
    return chosen, entry[None] < counts[:, None]


def _tokens(chosen: jax.Array, block: int) -> jax.Array:
    """The tokens of blocks [T, step] -> [T, step, block]."""
    return chosen[:, :, None] * block + jnp.arange(block, dtype=jnp.int32)[None, None]


def _steps(counts: jax.Array, step: int) -> jax.Array:
    """Steps until the fullest row of a team is done."""
    return (counts.max() + step - 1) // step


def _flat(x: jax.Array) -> jax.Array:
    """[T, step, block, ...] -> [T, step * block, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _unteam(x: jax.Array, teams: _Teams, shape: tuple[int, ...]) -> jax.Array:
    """[teams, T, block, ...] -> [B, H, N, ...]."""
    batch, heads, tokens = shape[:3]
    x = x.reshape(-1, *x.shape[2:])[teams.place]
    return x.reshape(batch, heads, -1, *x.shape[2:])[:, :, :tokens]


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Batched over axis 0, f32 out; f32 in full precision."""
    precision = "highest" if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _compute_dtype(width: str, dtype: Any) -> Any:
    """What a product multiplies: the input's own float dtype, or f32 for emulated integers, where it is exact.

    On a CPU always f32: about twice as fast as bfloat16 there (NOTES.md), and the products are the same.
    """
    return dtype if width == "bf16" and jax.default_backend() != "cpu" else jnp.float32


# ---- forward --------------------------------------------------------------------------------------------------------


def _forward(
    spec: Spec, sizes: Tiles | None, q, k, v, count, index, slots, q_scale=None, k_scale=None, v_scale=None, delta=None
):  # fmt: skip
    (batch, heads, q_tokens, head_dim), kv_tokens = q.shape, k.shape[2]
    bq, bk = spec.block
    nk = index.shape[2]
    sizes = sizes or tiles(batch * heads * index.shape[1], nk, bq, bk)
    teams = _teams(count, index, batch, sizes)
    step, team = sizes.step, teams.row.shape[1]
    to_log2 = spec.scale * math.log2(math.e)
    levels = WIDTHS[spec.pv].p_levels
    quantise = spec.pv != "bf16"
    f32 = jnp.float32

    q_blocks, k_blocks, v_blocks = _blocks(q, bq), _blocks(k, bk), _blocks(v, bk)
    row_factor = key_factor = None
    if q_scale is not None and k_scale is not None:
        row_factor = _blocks(token_scales(q_scale, q_tokens, bq) * f32(to_log2), bq)
        key_factor = _blocks(token_scales(k_scale, kv_tokens, bk), bk)
    if delta is not None:  # [B * H * nq, nk, bk]
        delta = jnp.pad(delta * f32(to_log2), [(0, 0)] * 3 + [(0, nk * bk - kv_tokens)]).reshape(-1, nk, bk)
    v_factor = None if v_scale is None or v_scale.shape[2] == 1 else v_scale.reshape(-1, 1, head_dim)
    qk_dtype = _compute_dtype(spec.qk, q.dtype)
    pv_dtype = _compute_dtype(spec.pv, v.dtype)

    def one_team(_, team_rows):
        rows, head, counts, mask_rows = team_rows
        kept = teams.index[mask_rows]
        q_team = q_blocks[rows].astype(qk_dtype)
        prescaled = row_factor is None and q.dtype == f32
        if prescaled:
            q_team = q_team * to_log2

        def one_step(i, state):
            top, row_sum, acc = state
            chosen, live = _kept_blocks(i, kept, counts, step)
            where = head[:, None] * nk + chosen
            k_step = k_blocks[where].astype(qk_dtype).reshape(team, step * bk, head_dim)
            s = _matmul(q_team, k_step, (2, 2))  # [T, bq, step * bk]
            if row_factor is not None and key_factor is not None:
                factor = row_factor[rows][:, :, None] * key_factor[where].reshape(team, 1, step * bk)
                s = jax.lax.optimization_barrier(s * factor)
            elif not prescaled:
                s = s * to_log2
            if delta is not None:
                s = s + delta[rows[:, None], chosen].reshape(team, 1, step * bk)
            live = live[:, :, None] & (_tokens(chosen, bk) < kv_tokens)
            s = jnp.where(live.reshape(team, 1, step * bk), s, -jnp.inf)
            v_step = v_blocks[where].astype(pv_dtype)
            if not quantise:
                new_top = jnp.maximum(top, s.max(axis=2))
                p = jnp.exp2(s - new_top[:, :, None])
                if v.dtype != f32:  # P at the width it is multiplied at, and the row sum from that P
                    p = quantise_p(p, "bf16", v.dtype)
                row_step = p.sum(axis=2)
            else:
                s = s.reshape(team, bq, step, bk)
                block_top = jnp.maximum(s.max(axis=3), _LOWEST)
                new_top = jnp.maximum(top, block_top.max(axis=2))
                if spec.p_scale == "running":
                    block_top = jnp.maximum(jax.lax.cummax(block_top, axis=2), top[:, :, None])
                p = quantise_p(jnp.exp2(s - block_top[..., None]), spec.pv, v.dtype)
                p = (p * jnp.exp2(block_top - new_top[:, :, None])[..., None]).reshape(team, bq, step * bk)
                row_step = p.sum(axis=2)
                if v_factor is not None:
                    v_step = v_step * v_factor[where]
            fade = jnp.exp2(top - new_top)
            acc = acc * fade[:, :, None] + _matmul(
                p.astype(pv_dtype), v_step.reshape(team, step * bk, head_dim), (2, 1)
            )
            return new_top, row_sum * fade + row_step, acc

        start = (jnp.full((team, bq), _LOWEST, f32), jnp.zeros((team, bq), f32), jnp.zeros((team, bq, head_dim), f32))
        start = _like(start, q_team)
        top, row_sum, acc = jax.lax.fori_loop(0, _steps(counts, step), one_step, start)
        some = (counts > 0)[:, None] & (row_sum != 0)  # NaN stays NaN
        row_sum = jnp.where(some, row_sum, 1.0)
        o = jnp.where(some[..., None], acc / row_sum[..., None], 0.0)
        return None, (o, jnp.where(some, math.log(2) * (top + jnp.log2(row_sum / levels)), -jnp.inf))

    _, (o, lse) = jax.lax.scan(one_team, None, teams[:4])
    o = _unteam(o, teams, q.shape)
    if v_scale is not None and v_factor is None:
        o = o * v_scale
    lse = _unteam(lse, teams, q.shape)
    return _to_model(o.astype(spec.out_dtype), slots), _to_model(lse[..., None], slots)[..., 0]


def _like(tree: Any, example: jax.Array) -> Any:
    """`tree` varying over the mesh axes that `example` varies over (shard_map only)."""
    return jax.tree.map(lambda leaf: _check.share_mesh_axes(leaf, example)[0], tree)


def _to_model(x: jax.Array, slots: jax.Array | None) -> jax.Array:
    return jnp.swapaxes(x, 1, 2) if slots is None else _permute.to_model(x, slots)


def _to_kernel(x: jax.Array, slots: jax.Array | None) -> jax.Array:
    return jnp.swapaxes(x, 1, 2) if slots is None else _permute.to_kernel(x, slots)


# ---- gradient -------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: Spec, sizes: Tiles | None, q, k, v, count, index, slots):
    return _forward(spec, sizes, q, k, v, count, index, slots)


def _attend_fwd(spec, sizes, q, k, v, count, index, slots):
    o, lse = _forward(spec, sizes, q, k, v, count, index, slots)
    return (o, lse), (q, k, v, count, index, slots, o, lse)


def _attend_bwd(spec, sizes, saved, cotangents):
    """In tiles of its own: its steps hold more than the forward's."""
    return attend_bwd(spec, saved, cotangents)


def attend_bwd(spec, saved, cotangents):
    """FlashAttention's backward: P again from the saved log-sum-exp; dq by rows, dk and dv by columns."""
    q, k, v, count, index, slots, o, lse = saved
    f32 = jnp.float32
    do, dlse = cotangents
    # dS = P * (dP - sum(do * o) + dlse), since d lse / d score = P.
    offset = (do.astype(f32) * o.astype(f32)).sum(axis=-1) - dlse
    do = _to_kernel(do.astype(f32), slots)
    offset = _to_kernel(offset[..., None], slots)[..., 0]
    lse = _to_kernel(lse[..., None], slots)[..., 0]
    log2_sum = jnp.where(lse == -jnp.inf, 0.0, lse * math.log2(math.e))  # rows without a block are never visited

    bq, bk = spec.block
    queries = [_blocks(x, bq) for x in (q, do, log2_sum, offset)]
    keys = [_blocks(x, bk) for x in (k, v)]

    # dq: a team of query blocks, each over its kept key blocks.
    (batch, heads), (nq, nk) = q.shape[:2], index.shape[1:]
    sizes = tiles(batch * heads * nq, nk, bq, bk)
    query_teams = _teams(count, index, batch, sizes)

    def one_query_team(_, team_rows):
        rows, head, counts, mask_rows = team_rows
        kept = query_teams.index[mask_rows]
        q_team, do_team, sum_team, offset_team = (x[rows] for x in queries)

        def one_step(i, dq):
            chosen, live = _kept_blocks(i, kept, counts, sizes.step)
            k_step, v_step = (_flat(x[head[:, None] * nk + chosen]) for x in keys)
            live = live[:, :, None] & (_tokens(chosen, bk) < k.shape[2])
            _, ds = _score_gradient(spec, q_team, do_team, sum_team, offset_team, k_step, v_step, _flat(live)[:, None])
            return dq + _matmul(ds, k_step.astype(f32), (2, 1))

        start = _like(jnp.zeros(q_team.shape, f32), q_team)
        dq = jax.lax.fori_loop(0, _steps(counts, sizes.step), one_step, start)
        # A row that keeps nothing was handed some block to look at, which may hold NaN.
        return None, jnp.where((counts > 0)[:, None, None], dq, 0.0)

    _, dq = jax.lax.scan(one_query_team, None, query_teams[:4])
    dq = _unteam(dq, query_teams, q.shape)

    # dk, dv: a team of key blocks, each over the query blocks that keep it.
    sizes = tiles(batch * heads * nk, nq, bk, bq)
    key_teams = _teams(*_transposed(count, index), batch, sizes)

    def one_key_team(_, team_rows):
        rows, head, counts, mask_rows = team_rows
        kept = key_teams.index[mask_rows]
        k_team, v_team = (x[rows] for x in keys)

        def one_step(i, state):
            dk, dv = state
            chosen, live = _kept_blocks(i, kept, counts, sizes.step)
            q_step, do_step, sum_step, offset_step = (_flat(x[head[:, None] * nq + chosen]) for x in queries)
            live = jnp.repeat(live, bq, axis=1)[:, :, None]
            p, ds = _score_gradient(spec, q_step, do_step, sum_step, offset_step, k_team, v_team, live)
            return dk + _matmul(ds, q_step.astype(f32), (1, 1)), dv + _matmul(p, do_step, (1, 1))

        start = _like((jnp.zeros(k_team.shape, f32),) * 2, k_team)
        grads = jax.lax.fori_loop(0, _steps(counts, sizes.step), one_step, start)
        return None, tuple(jnp.where((counts > 0)[:, None, None], x, 0.0) for x in grads)

    _, (dk, dv) = jax.lax.scan(one_key_team, None, key_teams[:4])
    dk, dv = _unteam(dk, key_teams, k.shape), _unteam(dv, key_teams, k.shape)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


def _score_gradient(spec: Spec, q, do, log2_sum, offset, k, v, live) -> tuple[jax.Array, jax.Array]:
    """(P, d loss / d (q k^T)) of [T, queries, keys] scores; zero where not live."""
    s = _matmul(q, k, (2, 2)) * (spec.scale * math.log2(math.e))
    p = jnp.where(live, jnp.exp2(s - log2_sum[:, :, None]), 0.0)
    dp = _matmul(do, v.astype(jnp.float32), (2, 2))
    # Chosen, not multiplied: a NaN beside a masked score must not become 0 * NaN.
    return p, jnp.where(live, p * (dp - offset[:, :, None]) * spec.scale, 0.0)


def _transposed(count: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The schedule by key block: count [H, nk], index [H, nk, nq] of the query blocks that keep it."""
    heads, rows, blocks = index.shape
    used = jnp.arange(blocks)[None, None] < jnp.clip(count, 0, blocks)[:, :, None]
    head, row = jnp.arange(heads)[:, None, None], jnp.arange(rows)[None, :, None]
    # An unused entry writes out of range, where it is dropped.
    keep = jnp.zeros((heads, blocks, rows), bool)
    keep = keep.at[head, jnp.where(used, jnp.clip(index, 0, blocks - 1), blocks), row].set(True, mode="drop")
    return keep.sum(axis=2, dtype=jnp.int32), jnp.argsort(~keep, axis=2, stable=True).astype(jnp.int32)


_attend.defvjp(_attend_fwd, _attend_bwd)
