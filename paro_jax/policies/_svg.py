"""SparseVideoGen (arXiv 2502.01776): each head is spatial or temporal, and a few sampled rows tell which."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax._grid import TokenGrid
from paro_jax._mask import BlockMask
from paro_jax.policies._basic import band
from paro_jax.policies._parts import Block, check_count, check_grid, check_number, check_tokens

SPATIAL, TEMPORAL = "FHW", "HWF"


def sparse_videogen(
    q: Any,
    k: Any,
    v: Any,
    *,
    grid: TokenGrid,
    density: float,
    rng: jax.Array,
    block: Block = (64, 64),
    rows: int = 32,
    profile: float = 1.5,
    sink: bool = False,
) -> tuple[BlockMask, jax.Array]:
    """SparseVideoGen's masks and orders (arXiv 2502.01776, section 3): keep [B, heads, nq, nk], order int8 [B, heads].

    q, k, v [B, N, heads, D], model order, of a video grid. `rows` query rows are drawn with the key `rng` and attend
    fully, and through a spatial and a temporal profile: bands of `profile` frames (CogVideoX 1.5, Wan 2) in model
    order, and with the tokens of one place side by side. The profile whose output has the least squared error names
    the order of the head, "FHW" or "HWF" (positions in `grid.orders`). In either order the executed mask is one and
    the same band, whose width follows from `density`, text included: what the original calls sparsity. `sink`: the
    first frame's worth of key slots is kept too, in the profiles as in the mask (Wan).

    A class table made offline is `AttentionPlan.build(grid, order=[...], mask=window(grid, density=...))`. Layers and
    times that stay dense are the caller's choice, by plan and by step. Raises ValueError for a density out of reach.
    """
    grid = check_grid(grid)
    if len(grid.shape) != 3:
        raise ValueError(
            f"grid must be a video, (frames, height, width); got shape {grid.shape}. Images have no frames."
        )
    q, k, v = check_tokens(grid.tokens, q=q, k=k, v=v)
    check_count("rows", rows)
    check_number("profile", profile, 0, grid.shape[0])
    places = grid.grid_tokens // grid.shape[0]
    always = grid.always_keep(block)
    if sink:
        always = always | (np.arange(always.shape[1]) * block[1] < places)
    mask = band(grid, density, always, block)
    errors = _profile_errors(q, k, v, rng, grid, block[1], rows, float(profile), sink)
    names = jnp.asarray([grid.order_id(name) for name in (SPATIAL, TEMPORAL)], jnp.int8)
    order = names[jnp.argmin(errors, -1)]
    return BlockMask(jnp.broadcast_to(mask.keep[None], (*order.shape, *mask.keep.shape[1:])), mask.block), order


@partial(jax.jit, static_argnames=("grid", "size", "rows", "profile", "sink"))
def _profile_errors(q, k, v, rng, grid: TokenGrid, size: int, rows: int, profile: float, sink: bool) -> jax.Array:
    """float32 [B, heads, 2]: squared error of the sampled rows through the spatial and the temporal profile."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    frames, places = grid.shape[0], grid.grid_tokens // grid.shape[0]
    drawn = jax.random.randint(rng, (rows,), 0, grid.grid_tokens)  # on the grid: text rows are dense in both profiles
    token = np.arange(grid.grid_tokens)
    half = max(1, int(profile * places / size))  # in blocks, as the band is

    def profile_mask(place):
        near = jnp.abs(place(drawn)[:, None] // size - jnp.asarray(place(token) // size)[None]) < half
        return near | jnp.asarray(place(token) < places)[None] if sink else near

    near = [profile_mask(place) for place in (lambda p: p, lambda p: p % places * frames + p // places)]
    shift = grid.text if grid.text_position == "first" else 0
    padding = (shift, grid.text - shift)
    near = jnp.stack([jnp.pad(x, ((0, 0), padding), constant_values=True) for x in near])  # text columns are on

    def head(args):
        q, k, v = args
        scores = jnp.einsum("brd,bnd->brn", q, k, precision="highest") / math.sqrt(q.shape[-1])

        def output(seen):
            p = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf), axis=-1)
            return jnp.einsum("brn,bnd->brd", p, v, precision="highest")

        full = output(jnp.ones_like(near[0]))
        return jnp.stack([jnp.square(output(seen) - full).mean((1, 2)) for seen in near], -1)

    errors = jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q[:, drawn + shift], k, v)))
    return jnp.swapaxes(errors, 0, 1)
