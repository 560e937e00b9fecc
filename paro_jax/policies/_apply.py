"""Attention under what a policy returned: a mask of every batch entry's own, or tokens in an order without a name."""

from typing import Any

import jax
import jax.numpy as jnp

from paro_jax._attention import attention
from paro_jax._grid import TokenGrid
from paro_jax._mask import BlockMask
from paro_jax._plan import AttentionPlan
from paro_jax._quant import QuantSpec
from paro_jax.policies._parts import check_grid, check_site, check_tokens

_UNQUANTISED = QuantSpec()


def masked_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: BlockMask,
    *,
    plan: AttentionPlan,
    order: Any = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`paro_jax.attention` under a policy's mask in place of the plan's: [B, N, heads, D] in and out, model order.

    `mask.keep`: [heads, nq, nk], or [B, heads, nq, nk] as the policies return that look at q and k. `order`: int8
    positions in `plan.order_names`, [heads] or [B, heads], where the policy has one. Batch entries with masks of their
    own are computed one after the other. Fits a model's `dense` argument:

        def dense(q, k, v):
            return masked_attention(q, k, v, sparge(q, k, plan=plan, topk=0.3), plan=plan)
    """
    plan = check_site(plan)
    query, key, value = check_tokens(plan.grid.tokens, plan.heads, query=query, key=key, value=value)
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask must be a BlockMask, as policies return it; got {type(mask).__name__}.")
    options: dict[str, Any] = dict(scale=scale, implementation=implementation)
    if mask.keep.ndim == 3:
        return attention(query, key, value, plan=plan.with_mask(mask, order), **options)
    batch = query.shape[0]
    expected = (batch, plan.heads, *plan.grid.blocks(plan.block))
    if tuple(mask.keep.shape) != expected:
        raise ValueError(
            f"mask.keep must be {list(expected[1:])} or {list(expected)} to fit query and plan; got "
            f"{list(mask.keep.shape)}."
        )
    order = plan.order if order is None else jnp.asarray(order)
    if order.ndim == 1:
        order = jnp.broadcast_to(order[None], (batch, *order.shape))
    if order.shape != expected[:2]:
        raise ValueError(f"order must be {list(expected[1:2])} or {list(expected[:2])}; got {list(order.shape)}.")

    def entry(args):
        q, k, v, keep, order = args
        own = plan.with_mask(BlockMask(keep, mask.block), order)
        return attention(q[None], k[None], v[None], plan=own, **options)[0]

    return jax.lax.map(entry, (query, key, value, jnp.asarray(mask.keep), order))


def slot_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: BlockMask,
    *,
    grid: TokenGrid,
    q_slots: Any,
    k_slots: Any,
    quant: QuantSpec = _UNQUANTISED,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention in orders that have no name, such as those of k-means: [B, N, heads, D] in and out, model order.

    A plan holds orders by name, and one for q, k and v; an order made from the data has no name, and need not be the
    same for q and k. Here the tokens are gathered by `q_slots` and `k_slots` (int32 [B, heads, N], kernel slot -> model
    token, text last), attend on a 1-D grid in its own order, and the result is gathered back: four passes over the
    tokens, which a named order does not need.
    """
    grid = check_grid(grid)
    query, key, value = check_tokens(grid.tokens, query=query, key=key, value=value)
    batch, tokens, heads, _ = query.shape
    q_slots, k_slots = jnp.asarray(q_slots), jnp.asarray(k_slots)
    for name, slots in (("q_slots", q_slots), ("k_slots", k_slots)):
        if slots.shape != (batch, heads, tokens) or not jnp.issubdtype(slots.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers [batch, heads, tokens] = {[batch, heads, tokens]}; got {slots.dtype} "
                f"{list(slots.shape)}."
            )
    line = TokenGrid((grid.grid_tokens,), text=grid.text, text_position="last")
    plan = AttentionPlan.dense(line, heads=heads, block=mask.block, quant=quant)
    q, k, v = _gather(query, q_slots), _gather(key, k_slots), _gather(value, k_slots)
    out = masked_attention(q, k, v, mask, plan=plan, scale=scale, implementation=implementation)
    return _gather(out, jnp.argsort(q_slots, axis=-1))


def _gather(x: jax.Array, slots: jax.Array) -> jax.Array:
    """[B, N, heads, D] by slots [B, heads, N]."""
    return jnp.take_along_axis(x, jnp.swapaxes(slots, 1, 2)[..., None], axis=1)
