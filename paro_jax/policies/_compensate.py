"""Skipped blocks stand in as their means: sparse attention that keeps the softmax's whole denominator."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _permute
from paro_jax._attention import attention
from paro_jax._plan import AttentionPlan
from paro_jax.policies._parts import block_tokens, check_site, check_tokens, cut, dot, kernel_order


def compensated_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    plan: AttentionPlan,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`paro_jax.attention` under a plan, with a skipped block standing in as its mean: [B, N, heads, D] in and out.

    `attention` renormalises over kept blocks, as if the others agreed with them. Here a query of block i still sees
    every skipped block j, as one key and one value with the weight of its n_j tokens: with means q_i, k_j, v_j over
    blocks and L_r, o_r the log-sum-exp and the output over the kept blocks of query r,

        s_ij = scale q_i . k_j + log n_j          R_i = log sum_j exp s_ij          u_i = sum_j exp(s_ij - R_i) v_j
        w_r = sigmoid(R_i - L_r)                  output_r = (1 - w_r) o_r + w_r u_i

    sums over the skipped blocks. Exact where the keys of a skipped block are alike and so are the queries of a block;
    else its weight is too
    small, exp being convex, and never too large over a block: what is kept stays in charge.

    The scores are those of blocks with blocks, a 4096th of attention's in blocks of 64 x 64; nothing is calibrated, and
    the kernel is the same. Quantised plans work, and so does `attention_fn=compensated_attention` of the models.
    docs/better_than_the_paper.md has what it brings.

    Raises as `attention` does.
    """
    plan = check_site(plan)
    query, key, value = check_tokens(plan.grid.tokens, plan.heads, query=query, key=key, value=value)
    output, lse = attention(
        query, key, value, plan=plan, scale=scale, implementation=implementation, return_residual=True
    )
    return _compensated(
        query, key, value, output, lse, plan, 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    )


@functools.partial(jax.jit, static_argnames="scale")
def _compensated(query, key, value, output, lse, plan: AttentionPlan, scale: float):
    tokens, (bq, bk) = plan.grid.tokens, plan.block
    q, k, v = kernel_order(plan, query=query, key=key, value=value)
    heard, said = (block_tokens(tokens, size)[None, None, :, None] for size in (bq, bk))
    q, k, v = (cut(x, size).sum(-2) / n for x, size, n in ((q, bq, heard), (k, bk, said), (v, bk, said)))
    keep = plan.mask().keep[None]
    scores = jnp.where(keep, -jnp.inf, scale * dot(q, k) + jnp.log(said).mT)  # [B, heads, nq, nk]
    skips = ~keep.all(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(skips, scores.max(-1, keepdims=True), 0))
    weight = jnp.exp(scores - top)
    total = jnp.where(skips, weight.sum(-1, keepdims=True), 1)
    summary = jnp.einsum("bhij,bhjd->bhid", weight, v, precision="highest") / total
    rest = jnp.where(skips, top + jnp.log(total), -jnp.inf)
    both = jnp.repeat(jnp.concatenate([rest, summary], -1), bq, axis=2)[:, :, :tokens]
    both = _permute.to_model(both, plan.slots)
    part = jax.nn.sigmoid(both[..., :1] - lse[..., None])
    return ((1 - part) * output.astype(jnp.float32) + part * both[..., 1:]).astype(output.dtype)
