"""Wan 2.1 and 2.2 (arXiv 2503.20314): video diffusion transformers, self-attention over video, text by cross-attention.

Names, arithmetic and layouts are those of diffusers' `WanTransformer3DModel`, text to video. The plan is for the
self-attention; text never enters it. All layers live in one stacked `Block` (leading axis: layer), so one trace serves
them all and per-layer plans scan along. Modulation is computed in float32 whatever the weights are, as the original.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import paro_jax
from paro_jax import AttentionPlan, Rope, TokenGrid
from paro_jax._plan import check_fits
from paro_jax.models.layers import (
    AttentionFn,
    Heads,
    Remat,
    activate,
    attend,
    attend_arranged,
    axis_rope,
    capture_blocks,
    check_carry,
    check_latents,
    check_shape,
    head_weights,
    layer_norm,
    patchify,
    rotate,
    run_layers,
    split_heads,
    timestep_embedding,
)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Hyperparameters. `frames`, `height`, `width`: the latent video that a plan is for, before patching."""

    num_layers: int = 40
    num_heads: int = 40
    head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_embed_dim: int = 4096
    time_embed_dim: int = 256
    mlp_dim: int = 13824
    patch: tuple[int, int, int] = (1, 2, 2)
    frames: int = 21
    height: int = 90
    width: int = 160
    rope_theta: float = 10000.0

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def grid(self) -> TokenGrid:
        sizes = (self.frames, self.height, self.width)
        return TokenGrid(tuple(n // p for n, p in zip(sizes, self.patch, strict=True)))


# Published models, text to video: 81 frames at 720 x 1280 (14B; both experts of Wan 2.2 A14B are this configuration
# too) and at 480 x 832 (1.3B); 121 frames at 704 x 1280 (Wan 2.2 5B, which takes a timestep per token).
WAN_14B = WanConfig()
WAN_1_3B = WanConfig(num_layers=30, num_heads=12, mlp_dim=8960, height=60, width=104)
WAN_2_2_5B = WanConfig(
    num_layers=30, num_heads=24, in_channels=48, out_channels=48, mlp_dim=14336, frames=31, height=44, width=80
)


@dataclasses.dataclass(frozen=True)
class Experts:
    """How Wan 2.2 A14B is sampled: two nets of one configuration, `transformer/` for noise, `transformer_2/` after.

    `boundary`: the noise level from which on up the first is asked (`samplers.experts`). `guidance`: of the first and
    of the second. `shift`, `steps`: of UniPC. Text to video, from the authors' configuration.
    """

    boundary: float = 0.875
    guidance: tuple[float, float] = (4.0, 3.0)
    shift: float = 12.0
    steps: int = 40


A14B = Experts()


def diffusers_names(config: WanConfig) -> dict[str, str]:
    """Our modules -> those of diffusers' `WanTransformer3DModel`, for `weights.load`."""
    attention = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
    attention |= {"norm_q": "norm_q", "norm_k": "norm_k"}
    block = {
        **{f"{ours}.{a}": f"{theirs}.{b}" for a, b in attention.items() for ours, theirs in _ATTENTIONS.items()},
        "norm_cross": "norm2",
        "mlp_in": "ffn.net.0.proj",
        "mlp_out": "ffn.net.2",
        "table": "scale_shift_table",
    }
    return {
        "patch": "patch_embedding",
        "text_in": "condition_embedder.text_embedder.linear_1",
        "text_out": "condition_embedder.text_embedder.linear_2",
        "time_in": "condition_embedder.time_embedder.linear_1",
        "time_out": "condition_embedder.time_embedder.linear_2",
        "modulation": "condition_embedder.time_proj",
        **{f"blocks.{ours}": f"blocks.{{}}.{theirs}" for ours, theirs in block.items()},
        "table": "scale_shift_table",
        "proj_out": "proj_out",
    }


_ATTENTIONS = {"attention": "attn1", "cross": "attn2"}

# What the original keeps in float32 whatever the rest is.
FLOAT32 = ("time_in", "time_out", "table", "blocks.table", "blocks.norm_cross")


def original_names(config: WanConfig) -> dict[str, str]:
    """Our modules -> those of the authors' own file. Its `norm3` is what diffusers calls `norm2`."""
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
    block = {f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in attention.items()}
    block |= {f"cross.{ours}": f"cross_attn.{theirs}" for ours, theirs in attention.items()}
    block |= {"norm_cross": "norm3", "mlp_in": "ffn.0", "mlp_out": "ffn.2", "table": "modulation"}
    return {
        "patch": "patch_embedding",
        "text_in": "text_embedding.0",
        "text_out": "text_embedding.2",
        "time_in": "time_embedding.0",
        "time_out": "time_embedding.2",
        "modulation": "time_projection.1",
        **{f"blocks.{ours}": f"blocks.{{}}.{theirs}" for ours, theirs in block.items()},
        "table": "head.modulation",
        "proj_out": "head.head",
    }


def rope_3d(grid: tuple[int, ...], head_dim: int, theta: float = 10000.0) -> Rope:
    """Rotation tables `[F*H*W, head_dim / 2]`: 2 (D // 6) channels for height, as many for width, the rest for time."""
    side = 2 * (head_dim // 6)
    dims = (head_dim - 2 * side, side, side)
    return axis_rope([np.arange(n) for n in grid], dims, theta=theta, dtype=np.float64)


class Attention(nnx.Module):
    """Projections of one attention; q and k are normed over all heads together, before the split."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.num_heads = config.num_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nnx.Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.norm_q = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.norm_k = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)

    def query(self, x: Array) -> Array:
        """`[B, N, C]` -> `[B, N, heads, D]`, normed."""
        return split_heads(self.norm_q(self.to_q(x)), self.num_heads)

    def key(self, x: Array) -> Array:
        return split_heads(self.norm_k(self.to_k(x)), self.num_heads)

    def out(self, o: Array) -> Array:
        """`[B, N, heads, D]` -> `[B, N, C]`."""
        return self.to_out(o.reshape(*o.shape[:2], -1))

    def qkv(self, h: Array, rope: Rope) -> Heads:
        """`[B, N, C]` -> q, k, v of self-attention, normed and rotated."""
        return rotate(self.query(h), rope), rotate(self.key(h), rope), split_heads(self.to_v(h), self.num_heads)

    def to_self(self, h: Array, rope: Rope, plan: AttentionPlan | None, attention_fn: AttentionFn | None) -> Array:
        """The seam: `[B, N, C]` -> `[B, N, C]`, by `attention_fn` if given."""
        if plan is None or attention_fn is not None:
            return self.out(attend(self.qkv(h, rope), attention_fn, plan))
        # A norm across heads cannot run inside `project_in`, which sees one head at a time; the rotation can.
        q = paro_jax.arrange(self.query(h), plan=plan, role="q", rope=rope)
        k = paro_jax.arrange(self.key(h), plan=plan, role="k", rope=rope)
        v = paro_jax.project_in(h, *head_weights(self.to_v, self.num_heads), plan=plan, role="v")
        return self.out(attend_arranged(q, k, v, plan))

    def to_text(self, h: Array, text: Array) -> Array:
        """Every video token looks at all of the text; `[B, N, C]`, `[B, T, C]` -> `[B, N, C]`."""
        qkv = self.query(h), self.key(text), split_heads(self.to_v(text), self.num_heads)
        return self.out(attend(qkv, None))


class Block(nnx.Module):
    """Self-attention and feed-forward behind adaLN-zero, and cross-attention to the text between them."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.attention = Attention(config, rngs=rngs)
        self.cross = Attention(config, rngs=rngs)
        self.norm_cross = nnx.LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.mlp_in = nnx.Linear(dim, config.mlp_dim, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_dim, dim, rngs=rngs)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (6, dim)) / math.sqrt(dim))

    def modulate(self, x: Array, modulation: Array, which: int) -> tuple[Array, Array]:
        """x `[B, N, C]` normed, scaled and shifted for attention (0) or feed-forward (1), and its gate, f32.

        modulation `[B, 1 or N, 6, C]`, f32: (shift, scale, gate) twice, what `time` adds to the block's own table.
        """
        table = self.table[...].astype(jnp.float32)[None, None] + modulation
        shift, scale, gate = (table[:, :, 3 * which + i] for i in range(3))
        return (layer_norm(x) * (1 + scale) + shift).astype(x.dtype), gate

    def heads(self, x: Array, text: Array, modulation: Array, rope: Rope) -> Heads:
        """What self-attention sees when the block runs on x."""
        del text
        return self.attention.qkv(self.modulate(x, modulation, 0)[0], rope)

    def __call__(
        self,
        x: Array,
        text: Array,
        modulation: Array,
        rope: Rope,
        plan: AttentionPlan | None,
        attention_fn: AttentionFn | None = None,
    ) -> Array:
        h, gate = self.modulate(x, modulation, 0)
        x = (x.astype(jnp.float32) + self.attention.to_self(h, rope, plan, attention_fn) * gate).astype(x.dtype)
        h = self.norm_cross(x.astype(jnp.float32)).astype(x.dtype)
        x = x + self.cross.to_text(h, text)
        h, gate = self.modulate(x, modulation, 1)
        h = self.mlp_out(activate(self.mlp_in(h)))
        return (x.astype(jnp.float32) + h.astype(jnp.float32) * gate).astype(x.dtype)


class Wan(nnx.Module):
    """The transformer: latent video, timestep and text embeddings in, prediction (flow) out."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        pixels, dim = math.prod(config.patch), config.dim
        self.patch = nnx.Linear(config.in_channels * pixels, dim, rngs=rngs)
        self.text_in = nnx.Linear(config.text_embed_dim, dim, rngs=rngs)
        self.text_out = nnx.Linear(dim, dim, rngs=rngs)
        self.time_in = nnx.Linear(config.time_embed_dim, dim, rngs=rngs)
        self.time_out = nnx.Linear(dim, dim, rngs=rngs)
        self.modulation = nnx.Linear(dim, 6 * dim, rngs=rngs)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r))(rngs.split(config.num_layers))
        self.table = nnx.Param(jax.random.normal(rngs.params(), (2, dim)) / math.sqrt(dim))
        self.proj_out = nnx.Linear(dim, config.out_channels * pixels, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timestep: Array,
        text: Array,
        *,
        plan: AttentionPlan | None = None,
        attention_fn: AttentionFn | None = None,
        carry: Any = None,
        remat: Remat = False,
        unroll: bool = False,
    ) -> Any:
        """Predict.

        latents `[B, C, F, H, W]`, timestep `[B]` or one per token `[B, N]` (Wan 2.2 5B), text `[B, T, E]` ->
        `[B, C_out, F, H, W]`, at the dtype of latents and weights. ValueError for inputs or a plan that do not fit: F,
        H, W are multiples of the patch.
        `plan`: leading axis (sites,) = layers. `attention_fn(q, k, v)` computes self-attention in place of
        `paro_jax.attention`, such as `partial(paro_jax.attention, implementation="cudnn")`; with a plan it is called as
        `attention_fn(q, k, v, plan=the layer's)`, for masks made from q and k (`paro_jax.policies`). `carry`: what it
        remembers or is told of each layer, a pytree with leading axis (sites,); it then takes `carry=the layer's` and
        returns (output, the next carry), and so does the model: (prediction, carry).
        `remat`: True computes blocks again in the backward pass; names out of `layers.NAMES`, such as "attention", all
        of them but what is named; a policy of `jax.checkpoint_policies` what it says. `unroll`: compile each layer by
        itself instead of one for all.
        """
        grid, config = self.grid_of(latents, timestep, text), self.config
        if plan is not None:
            check_fits(plan, sites=config.num_layers, heads=config.num_heads, grid=grid)
        check_carry(carry, attention_fn, config.num_layers)
        x, context, temb = self.enter(latents, timestep, text)
        x, after = run_layers(self.blocks, x, context, plan, attention_fn, carry, remat=remat, unroll=unroll)
        table = self.table[...].astype(jnp.float32)[None, None] + temb.astype(jnp.float32)[:, :, None]
        x = self.proj_out((layer_norm(x) * (1 + table[:, :, 1]) + table[:, :, 0]).astype(x.dtype))
        # Pixels come out ordered (frame, row, column, channel), unlike those that go in.
        x = x.reshape(-1, *grid.shape, *config.patch, config.out_channels).transpose(0, 7, 1, 4, 2, 5, 3, 6)
        x = x.reshape(latents.shape[0], config.out_channels, *latents.shape[2:])
        return x if carry is None else (x, after)

    def capture(self, latents: Array, timestep: Array, text: Array) -> Iterator[Heads]:
        """q, k, v `[B, N, heads, D]` of one self-attention after the other, normed and rotated, for `calibrate`.

        Arguments as of a call. One layer is in memory at a time, and one compiled program serves them all.
        """
        x, context, _ = jax.jit(Wan.enter)(self, latents, timestep, text)
        yield from capture_blocks(self.blocks, x, context, x.shape[1], self.config.num_heads)

    def grid_of(self, latents: Array, timestep: Array, text: Array) -> TokenGrid:
        """Where the tokens of these inputs sit; ValueError for inputs that do not fit the model."""
        shape = check_latents(latents, "B C F H W", self.config.in_channels, self.config.patch)
        grid, rows = TokenGrid(shape), latents.shape[0]
        check_shape("timestep", timestep, (rows,), (1,), (rows, grid.tokens))
        check_shape("text", text, (rows, "T", self.config.text_embed_dim))
        return grid

    def enter(self, latents: Array, timestep: Array, text: Array) -> tuple[Array, tuple, Array]:
        """Tokens `[B, N, C]`, what every block wants (text, modulation, rope), and temb `[B, 1 or N, C]`."""
        config = self.config
        grid, text = self.grid_of(latents, timestep, text), text.astype(latents.dtype)
        rope = rope_3d(grid.shape, config.head_dim, config.rope_theta)
        x = self.patch(patchify(latents.swapaxes(1, 2), config.patch))
        # One timestep for all tokens or one for each: [B, 1 or N, ...] from here on.
        timestep = timestep if timestep.ndim == 2 else timestep[:, None]
        time = timestep_embedding(timestep, config.time_embed_dim).astype(self.time_in.kernel.dtype)
        temb = self.time_out(jax.nn.silu(self.time_in(time))).astype(latents.dtype)
        modulation = self.modulation(jax.nn.silu(temb)).astype(jnp.float32).reshape(*temb.shape[:2], 6, config.dim)
        text = self.text_out(jax.nn.gelu(self.text_in(text), approximate=True))
        return x, (text, modulation, rope), temb
