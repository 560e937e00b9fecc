"""What the models share: sinusoids of time, rotary tables, rotation, attention, a stack of layers, patches, capture."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.ad_checkpoint import checkpoint_name

import paro_jax
from paro_jax import AttentionPlan, Norm, Rope, TokenBlocks, TokenGrid

Heads = tuple[Array, Array, Array]  # q, k, v of one attention layer, [B, N, heads, D] in model order
# Attention in place of ours: q, k, v of a layer -> [B, N, heads, D]. By keyword it is given what the model was called
# with, the layer's own: `plan`, and `carry`, with which it returns (output, the next carry).
AttentionFn = Callable[..., Any]
Remat = bool | str | Sequence[str] | Callable[..., bool]

# What a block computes under a name, for `remat`: q, k and v as attention takes them; what attention gives, [B, N,
# heads, D]; and the wide product of the feed-forward, before its activation. Wan has two attentions in a block.
NAMES = ("qkv", "attention", "mlp")


def timestep_embedding(timestep: Array, dim: int) -> Array:
    """Sinusoids of diffusion time `[...]` -> f32 `[..., dim]`, cosines first, frequencies 10000^(-i / (dim/2)) (DDPM).

    Angles reach 1000, where one unit in the last place of a frequency shows in the output of a whole model. So the
    exponent is rounded to float32 at every step, as the originals do, and only the exponential is exact.
    """
    half = dim // 2
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[..., None] * frequencies.reshape([1] * timestep.ndim + [half])
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def axis_rope(
    positions: Sequence[np.ndarray], dims: Sequence[int], *, text: int = 0, theta: float = 10000.0, dtype: Any
) -> Rope:
    """Rotation tables f32 `[text + product of the axis lengths, sum(dims) / 2]` for interleaved pairs (RoFormer).

    `positions`: one array per axis of the grid, `dims`: how many channels rotate by it. Text tokens come first and do
    not rotate (cos 1, sin 0). `dtype`: that in which the original computes its angles.
    """
    grid = tuple(len(p) for p in positions)
    angles = []
    for axis, (places, dim) in enumerate(zip(positions, dims, strict=True)):
        frequencies = 1.0 / (dtype(theta) ** (np.arange(0, dim, 2, dtype=dtype) / dtype(dim)))
        table = np.asarray(places, dtype)[:, None] * frequencies[None, :]
        where = [1] * len(grid) + [dim // 2]
        where[axis] = grid[axis]
        angles.append(np.broadcast_to(table.reshape(where), (*grid, dim // 2)))
    table = np.concatenate(angles, axis=-1).reshape(-1, sum(dims) // 2)
    table = np.concatenate([np.zeros((text, table.shape[1]), dtype), table])
    return Rope(jnp.asarray(np.cos(table), jnp.float32), jnp.asarray(np.sin(table), jnp.float32))


def rotate(x: Array, rope: Rope) -> Array:
    """Rotary embedding of pairs (x[2i], x[2i+1]), in f32 (RoFormer); x `[B, N, heads, D]`, tables `[N, D/2]`."""
    cos, sin = rope.cos[None, :, None, :], rope.sin[None, :, None, :]
    a, b = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def layer_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Layer norm over the last axis with nothing learned, f32 whatever comes in."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


def split_heads(x: Array, heads: int) -> Array:
    """`[B, N, heads * D]` -> `[B, N, heads, D]`."""
    return x.reshape(*x.shape[:2], heads, -1)


class Linear(nnx.Module):
    """Linear layer `[..., in]` -> `[..., out]` with `weight` `[out, in]`, as PyTorch and all published files have it.

    `nnx.Linear` has the transpose, under the name `kernel`. A product takes either as it lies, but turning billions of
    numbers round costs more than reading them, so ours are kept as they come. Drawn as `nnx.Linear` draws its own.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        drawn = nnx.Linear(in_features, out_features, rngs=rngs)
        assert drawn.bias is not None
        self.weight, self.bias = nnx.Param(drawn.kernel[...].T), nnx.Param(drawn.bias[...])

    def __call__(self, x: Array) -> Array:
        x, weight, bias = dtypes.promote_dtype((x, self.weight[...], self.bias[...]))
        y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
        return y + bias.reshape([1] * (y.ndim - 1) + [-1])


def head_weights(linear: Linear, heads: int) -> tuple[Array, Array]:
    """Kernel `[C, heads, D]` and bias `[heads, D]` of a projection, as `paro_jax.project_in` takes them."""
    weight, bias = linear.weight[...], linear.bias[...]
    # A matrix that is turned, then split, XLA multiplies by as it lies; split first, it is copied at every call.
    return weight.T.reshape(weight.shape[1], heads, -1), bias.reshape(heads, -1)


def head_norm(norm: nnx.LayerNorm | nnx.RMSNorm) -> Norm:
    """A norm over the channels of one head, as `paro_jax.arrange` takes it."""
    scale = None if norm.scale is None else norm.scale[...]
    if isinstance(norm, nnx.RMSNorm):
        return Norm("rms", scale, None, norm.epsilon)
    return Norm("layer", scale, None if norm.bias is None else norm.bias[...], norm.epsilon)


def attend(qkv: Heads, attention_fn: AttentionFn | None, plan: AttentionPlan | None = None) -> Array:
    """Attention, `[B, N, heads, D]`: by `attention_fn`, or else `paro_jax.attention`. Named for `remat`."""
    given = {} if plan is None else {"plan": plan}
    return checkpoint_name((attention_fn or paro_jax.attention)(*checkpoint_name(qkv, "qkv"), **given), "attention")


def attend_arranged(q: TokenBlocks, k: TokenBlocks, v: TokenBlocks, plan: AttentionPlan) -> Array:
    """Attention of what was arranged for a plan, `[B, N, heads, D]` in model order. Named for `remat`."""
    q, k, v = checkpoint_name((q, k, v), "qkv")
    return checkpoint_name(paro_jax.attend(q, k, v, plan=plan), "attention")


def activate(wide: Array) -> Array:
    """Tanh-GELU in the middle of a feed-forward. What comes in is named for `remat`."""
    return jax.nn.gelu(checkpoint_name(wide, "mlp"), approximate=True)


def run_layers(
    blocks: nnx.Module,
    x: Any,
    context: tuple,
    plan: AttentionPlan | None,
    attention_fn: AttentionFn | None,
    carry: Any = None,
    *,
    remat: Remat = False,
    unroll: bool = False,
) -> tuple[Any, Any]:
    """x through all layers of a stack: `x = block(x, *context, plan, attention_fn)`, with a layer's weights and plan.

    Returns x and the next `carry`: what `attention_fn` made of its slice in every layer, stacked; None for None.
    `remat`, of the backward pass: False keeps all that it needs, True the input of each block alone, names out of
    `NAMES` that input and what bears them, and a function is a policy of `jax.checkpoint`; the rest is computed again.
    `unroll`: compile every layer by itself rather than one program that all of them run in turn.
    """

    def layer(x: Any, per_layer: Any) -> tuple[Any, Any]:
        block, plan, before = per_layer
        if before is None or attention_fn is None:
            return block(x, *context, plan, attention_fn), None
        compute, after = attention_fn, []

        def attend_and_carry(*qkv: Array, **given: Any) -> Array:  # so that a block need not know of carries
            o, mine = compute(*qkv, **given, carry=before)
            after.append(mine)
            return o

        x = block(x, *context, plan, attend_and_carry)
        return x, after[0]

    if remat is not False:
        # In a loop nothing outside can take the second computation for the first, so nothing need hinder it.
        layer = jax.checkpoint(layer, policy=_policy(remat), prevent_cse=unroll)
    return jax.lax.scan(layer, x, (blocks, plan, carry), unroll=unroll)


def check_carry(carry: Any, attention_fn: AttentionFn | None, sites: int) -> None:
    """ValueError unless there is an `attention_fn` to take the carry, and its arrays have a leading axis of layers."""
    if carry is not None and attention_fn is None:
        raise ValueError("carry: expected None without attention_fn, found one; give the function that takes it.")
    for leaf in jax.tree.leaves(carry):
        if np.shape(leaf)[:1] != (sites,):
            raise ValueError(f"carry: expected arrays with a leading axis of {sites} layers, found {np.shape(leaf)}.")


def _policy(remat: Remat) -> Callable[..., bool] | None:
    if remat is True:
        return None
    if callable(remat):
        return remat
    names = (remat,) if isinstance(remat, str) else remat
    if not isinstance(names, Sequence) or not names or (unknown := [name for name in names if name not in NAMES]):
        found = remat if not isinstance(names, Sequence) or not names else unknown
        raise ValueError(
            f"remat: expected False, True, names out of {', '.join(NAMES)}, or a policy of jax.checkpoint_policies; "
            f"found {found!r}."
        )
    return jax.checkpoint_policies.save_only_these_names(*names)


def patchify(video: Array, patch: tuple[int, int, int]) -> Array:
    """Video `[B, F, C, H, W]` -> `[B, tokens, C * f * h * w]`, patch pixels ordered (channel, frame, row, column).

    That is the order of a convolution's kernel when flattened. Tokens run over F, then H, then W.
    """
    batch, frames, channels, height, width = video.shape
    f, h, w = patch
    x = video.reshape(batch, frames // f, f, channels, height // h, h, width // w, w)
    return x.transpose(0, 1, 4, 6, 3, 2, 5, 7).reshape(batch, -1, channels * f * h * w)


def check_latents(latents: Any, axes: str, channels: int, patch: tuple[int, int, int]) -> tuple[int, ...]:
    """The grid in tokens; ValueError unless latents are floats, with the model's channels and whole patches.

    `axes` names those of the latents, as in "B F C H W"; the grid has those of F, H and W that are there.
    """
    names, shape = axes.split(), np.shape(latents)
    sizes = dict(zip(names, shape, strict=False))
    inside = {axis: size for axis, size in zip("FHW", patch, strict=True) if axis in names}
    whole = all(sizes.get(axis, 0) % size == 0 for axis, size in inside.items())
    if len(shape) != len(names) or sizes["C"] != channels or not whole or 0 in shape:
        wanted = ", ".join(str(channels) if name == "C" else name for name in names)
        frames = f"F a multiple of {patch[0]}, " if patch[0] > 1 else ""
        raise ValueError(
            f"latents: expected [{wanted}] with {frames}H and W multiples of {patch[1]}, found {shape}; check the "
            "latent channels and pad to whole patches."
        )
    if not jnp.issubdtype(latents.dtype, jnp.floating):  # everything is computed at their dtype
        raise ValueError(f"latents: expected floating point, found {latents.dtype}; cast them to bfloat16 or float32.")
    return tuple(sizes[axis] // size for axis, size in inside.items())


def check_shape(name: str, x: Any, *allowed: tuple[int | str, ...]) -> None:
    """ValueError unless x has one of the shapes, where a letter stands for any size from 1."""
    shape = np.shape(x)

    def fits(sizes: tuple[int | str, ...]) -> bool:
        pairs = zip(shape, sizes, strict=False)
        return len(shape) == len(sizes) and all(n == m or (isinstance(m, str) and n != 0) for n, m in pairs)

    if any(map(fits, allowed)):
        return
    wanted = " or ".join(f"[{', '.join(map(str, sizes))}]" for sizes in allowed)
    raise ValueError(
        f"{name}: expected {wanted} for these latents and this model, found {list(shape)}; give one row for each row "
        "of the latents (`guided` asks with twice as many)."
    )


def capture_blocks(blocks: nnx.Module, x: Any, context: tuple, tokens: int, heads: int) -> Generator[Heads, None, Any]:
    """What every model's `capture` is made of: run stacked `blocks` on x one by one, yield what attention sees in each.

    A block is called as `block(x, *context, plan)` and `block.heads(x, *context)`. Returns x after the last block
    (`x = yield from capture_blocks(...)`). Memory is that of one layer whatever their number: the layer is a traced
    number, so one compiled program serves all, and attention is streamed over a dense plan, exact and without a map.
    """
    plan = AttentionPlan.dense(TokenGrid((tokens,)), heads=heads)
    for layer in range(len(jax.tree.leaves(blocks)[0])):
        x, qkv = run_block(blocks, layer, x, context, plan)
        yield qkv
    return x


@jax.jit
def run_block(blocks: Any, layer: Array, x: Any, context: tuple, plan: AttentionPlan) -> tuple[Any, Heads]:
    """x after one layer of a stack, and the q, k, v of its attention."""
    block = jax.tree.map(lambda a: a[layer], blocks)
    return block(x, *context, plan), block.heads(x, *context)
