"""XAttention (arXiv 2503.16428): the antidiagonals of small cells stand for the blocks they lie in."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax._mask import BlockMask
from paro_jax._plan import AttentionPlan
from paro_jax.policies._parts import (
    block_tokens,
    check_count,
    check_number,
    check_site,
    check_tokens,
    cut,
    dot,
    each,
    kernel_order,
    top_p,
    with_text,
)


def xattention(
    q: Any, k: Any, *, plan: AttentionPlan, tau: Any = 0.9, stride: int = 16, norm: float = 1.0, sink: bool = False
) -> BlockMask:
    """XAttention's mask (arXiv 2503.16428), not causal, in the order of each head of the plan: keep [B, heads, nq, nk].

    q, k [B, N, heads, D], model order. The map is cut in cells of stride x stride; a cell's score is the sum of its
    antidiagonal over sqrt(D) stride norm, each query with one key. Softmax over the cells of a row of cells, summed
    over each block; per block row the heaviest are kept up to and with the one that crosses `tau` of the row's sum.
    `tau` in [0, 1], one number or one per head, may be traced. Cells behind the last token are left out; `sink` keeps
    the first key block, as the original does by accident.

    Made for language models, where order is given; for video take the plan of PARO or of a Gilbert order. Costs
    1 / stride of QK^T, and N / stride numbers a query cell at a time. Raises ValueError unless stride divides blocks.
    """
    plan = check_site(plan)
    q, k = check_tokens(plan.grid.tokens, plan.heads, q=q, k=k)
    check_count("stride", stride)
    if plan.block[0] % stride or plan.block[1] % stride:
        raise ValueError(f"stride must divide the blocks of the plan, {plan.block}; got {stride}.")
    if not norm > 0:
        raise ValueError(f"norm must be a positive number, 1 as published; got {norm!r}.")
    limit = check_number("tau", tau, 0, 1, plan.heads)
    return _xattention(q, k, plan, limit, stride, float(norm), sink)


@partial(jax.jit, static_argnames=("stride", "norm", "sink"))
def _xattention(q, k, plan: AttentionPlan, limit, stride: int, norm: float, sink: bool) -> BlockMask:
    q, k = kernel_order(plan, q=q, k=k)
    bq, bk = plan.block
    nq, nk = plan.grid.blocks(plan.block)
    batch, heads, tokens, head_dim = q.shape
    q = q / (math.sqrt(head_dim) * stride * norm)
    # Query t of a cell meets key stride - 1 - t: one vector of stride x D numbers a cell makes it an inner product.
    q_cells, k_cells = cut(q, bq), cut(k, bk)
    q_cells = jnp.flip(q_cells.reshape(batch, heads, nq, bq // stride, stride, head_dim), 4)
    q_cells = q_cells.reshape(batch, heads, nq, bq // stride, stride * head_dim)
    k_cells = k_cells.reshape(batch, heads, nk * (bk // stride), stride * head_dim)
    cells = -(-tokens // stride)
    real_k = jnp.asarray(np.arange(nk * (bk // stride)) < cells)[None]
    real_q = jnp.asarray(np.arange(nq * (bq // stride)).reshape(nq, -1) < cells)

    def head(q, k):
        def strip(args):
            rows, real = args
            p = jax.nn.softmax(jnp.where(real_k, dot(rows, k), -jnp.inf), axis=-1)
            return jnp.where(real[:, None], p, 0).sum(0).reshape(nk, -1).sum(-1)

        return jax.lax.map(strip, (q, real_q))

    weights = each(head, q_cells, k_cells)
    total = jnp.asarray(np.ceil(block_tokens(tokens, bq) / stride))[None, None]  # a row of cells sums to 1
    keep = top_p(weights, limit[None, :, None] * total, include_crossing=True)
    if sink:
        keep = keep.at[..., 0].set(True)
    return with_text(keep, plan.grid, plan.block)
