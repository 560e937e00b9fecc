"""CogVideoX (arXiv 2408.06072): a video diffusion transformer with joint attention over [text ; video].

Names, arithmetic and layouts are those of diffusers' `CogVideoXTransformer3DModel`. All layers live in one stacked
`Block` (leading axis: layer), so one trace serves them all and per-layer plans scan along.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import paro_jax
from paro_jax import AttentionPlan, Rope, TokenGrid
from paro_jax._plan import check_fits
from paro_jax.models._mapping import Rows
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
    head_norm,
    head_weights,
    patchify,
    rotate,
    run_layers,
    timestep_embedding,
)

POSITIONS = ("rope", "rope_slice", "sincos")


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """Hyperparameters. `frames`, `height`, `width`: the latent video that the model is trained at, before patching.

    `position`: "rope" rotates by 0, 1, 2, ... at the trained height and width, and elsewhere by a stretched crop of
    them; "rope_slice" by 0, 1, 2, ... at every size; "sincos" adds sinusoids to the video tokens and rotates nothing.
    """

    num_layers: int = 42
    num_heads: int = 48
    head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    text_length: int = 226
    frames: int = 13
    height: int = 60
    width: int = 90
    patch_size: int = 2
    mlp_ratio: int = 4
    rope_theta: float = 10000.0
    patch_frames: int = 1
    position: str = "rope"
    sincos_scale: float = 1.875  # rows and columns are that much closer together, "sincos" only

    def __post_init__(self):
        if self.position not in POSITIONS:
            raise ValueError(f"position: expected one of {', '.join(POSITIONS)}, found {self.position!r}.")

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.patch_frames, self.patch_size, self.patch_size

    @property
    def padded_frames(self) -> int:
        """Latent frames to denoise, whole patches; the original then drops the first `padded_frames - frames`."""
        return -(-self.frames // self.patch_frames) * self.patch_frames

    @property
    def grid(self) -> TokenGrid:
        sizes = (self.padded_frames, self.height, self.width)
        shape = tuple(n // p for n, p in zip(sizes, self.patch, strict=True))
        return TokenGrid(shape, text=self.text_length, text_position="first")


# Published models, at the resolution they were trained for: 49 frames at 480 x 720, and 81 at 768 x 1360.
COGVIDEOX_2B = CogVideoXConfig(num_layers=30, num_heads=30, position="sincos")
COGVIDEOX_5B = CogVideoXConfig()
COGVIDEOX_1_5_5B = CogVideoXConfig(frames=21, height=96, width=170, patch_frames=2, position="rope_slice")


def diffusers_names(config: CogVideoXConfig) -> dict[str, str | Rows]:
    """Our modules -> those of diffusers' `CogVideoXTransformer3DModel`, for `weights.load`."""
    block = {
        "norm1.linear": "norm1.linear",
        "norm1.norm": "norm1.norm",
        "to_q": "attn1.to_q",
        "to_k": "attn1.to_k",
        "to_v": "attn1.to_v",
        "to_out": "attn1.to_out.0",
        "norm_q": "attn1.norm_q",
        "norm_k": "attn1.norm_k",
        "norm2.linear": "norm2.linear",
        "norm2.norm": "norm2.norm",
        "mlp_in": "ff.net.0.proj",
        "mlp_out": "ff.net.2",
    }
    return {
        "patch": "patch_embed.proj",
        "text": "patch_embed.text_proj",
        "time_in": "time_embedding.linear_1",
        "time_out": "time_embedding.linear_2",
        **{f"blocks.{ours}": f"transformer_blocks.{{}}.{theirs}" for ours, theirs in block.items()},
        "norm_final": "norm_final",
        "modulation_out": "norm_out.linear",
        "norm_out": "norm_out.norm",
        "proj_out": "proj_out",
    }


def rope_3d(
    grid: tuple[int, ...],
    head_dim: int,
    text: int,
    theta: float = 10000.0,
    native: tuple[int, int] | None = None,
) -> Rope:
    """Rotation tables `[text + F*H*W, head_dim / 2]` for interleaved pairs: D/4 time, 3D/8 height, 3D/8 width.

    Text tokens come first and do not rotate. `native`: the (height, width) in tokens that the model was trained at; a
    grid of another size is stretched to fill it along one axis and centred along the other. None counts 0, 1, 2, ...
    float32 throughout, as the original.
    """
    positions = [np.arange(n, dtype=np.float32) for n in grid]
    if native is not None:
        (height, width), (most_high, most_wide) = grid[1:], native
        if height / width > most_high / most_wide:
            size = most_high, round(most_high / height * width)
        else:
            size = round(most_wide / width * height), most_wide
        for axis, (n, whole, used) in enumerate(zip(grid[1:], native, size, strict=True), start=1):
            start = round((whole - used) / 2.0)
            positions[axis] = np.linspace(start, (start + used) * (n - 1) / n, n).astype(np.float32)
    dims = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    return axis_rope(positions, dims, text=text, theta=theta, dtype=np.float32)


def sincos_3d(grid: tuple[int, ...], dim: int, scale: float) -> Array:
    """Additive positions f32 `[F*H*W, dim]`: dim/4 for time, 3 dim/8 for width, 3 dim/8 for height; sines first."""
    frames, height, width = grid

    def table(size: int, channels: int, scale: float, place: tuple[int, int, int]) -> Array:
        positions = (np.arange(size, dtype=np.float32) / np.float32(scale)).astype(np.float64)
        angles = positions[:, None] / 10000 ** (np.arange(channels // 2) / (channels / 2))[None, :]
        both = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)
        return jnp.broadcast_to(both.reshape(*place, channels), (*grid, channels))

    # One short table per axis, broadcast here: whole, it would be a 130 MB constant of the compiled model.
    time = table(frames, dim // 4, 1.0, (frames, 1, 1))
    across = table(width, dim * 3 // 8, scale, (1, 1, width))
    down = table(height, dim * 3 // 8, scale, (1, height, 1))
    return jnp.concatenate([time, across, down], axis=-1).reshape(-1, dim)


class Modulation(nnx.Module):
    """adaLN-zero for both streams: one shared affine LayerNorm; (shift, scale, gate) for video, then for text."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(config.time_embed_dim, 6 * config.dim, rngs=rngs)
        self.norm = nnx.LayerNorm(config.dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Array, temb: Array, is_text: Array) -> tuple[Array, Array]:
        """x `[B, N, C]`, temb `[B, T]`, is_text bool `[1, N, 1]` -> modulated x and the gate `[B, N, C]`."""
        parts = jnp.split(self.linear(jax.nn.silu(temb)), 6, axis=-1)
        shift, scale, gate = (
            jnp.where(is_text, ours[:, None], video[:, None]) for video, ours in zip(parts[:3], parts[3:], strict=True)
        )
        return self.norm(x) * (1 + scale) + shift, gate


class Block(nnx.Module):
    """Joint attention and feed-forward over [text ; video], each behind adaLN-zero."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.config = config
        self.norm1 = Modulation(config, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = (nnx.Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.norm_q = nnx.LayerNorm(config.head_dim, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.norm_k = nnx.LayerNorm(config.head_dim, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.norm2 = Modulation(config, rngs=rngs)
        self.mlp_in = nnx.Linear(dim, config.mlp_ratio * dim, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_ratio * dim, dim, rngs=rngs)

    def __call__(
        self,
        x: Array,
        temb: Array,
        is_text: Array,
        rope: Rope | None,
        plan: AttentionPlan | None,
        attention_fn: AttentionFn | None = None,
    ) -> Array:
        h, gate = self.norm1(x, temb, is_text)
        x = x + gate * self.attention(h, rope, plan, attention_fn)
        h, gate = self.norm2(x, temb, is_text)
        return x + gate * self.mlp_out(activate(self.mlp_in(h)))

    def attention(
        self, h: Array, rope: Rope | None, plan: AttentionPlan | None, attention_fn: AttentionFn | None
    ) -> Array:
        """The seam: `[B, N, C]` -> `[B, N, C]`, by `attention_fn` if given."""
        if plan is None or attention_fn is not None:
            o = attend(self.qkv(h, rope), attention_fn, plan)
        else:

            def project(role: Literal["q", "k", "v"], linear: nnx.Linear, norm: nnx.LayerNorm | None):
                return paro_jax.project_in(
                    h,
                    *head_weights(linear, self.config.num_heads),
                    plan=plan,
                    role=role,
                    norm=head_norm(norm) if norm else None,
                    rope=rope if norm else None,
                )

            q = project("q", self.to_q, self.norm_q)
            k = project("k", self.to_k, self.norm_k)
            o = attend_arranged(q, k, project("v", self.to_v, None), plan)
        return self.to_out(o.reshape(*o.shape[:2], -1))

    def heads(self, x: Array, temb: Array, is_text: Array, rope: Rope | None) -> Heads:
        """What attention sees when the block runs on x."""
        return self.qkv(self.norm1(x, temb, is_text)[0], rope)

    def qkv(self, h: Array, rope: Rope | None) -> Heads:
        """`[B, N, C]` -> q, k, v, normed and rotated."""
        q, k, v = (
            linear(h).reshape(*h.shape[:2], self.config.num_heads, self.config.head_dim)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        q, k = self.norm_q(q), self.norm_k(k)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)


class CogVideoX(nnx.Module):
    """The transformer: latent video, timestep and text embeddings in, prediction (v) out."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.config = config
        pixels, dim, time = math.prod(config.patch), config.dim, config.time_embed_dim
        self.patch = nnx.Linear(config.in_channels * pixels, dim, rngs=rngs)
        self.text = nnx.Linear(config.text_embed_dim, dim, rngs=rngs)
        self.time_in = nnx.Linear(dim, time, rngs=rngs)
        self.time_out = nnx.Linear(time, time, rngs=rngs)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r))(rngs.split(config.num_layers))
        self.norm_final = nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.modulation_out = nnx.Linear(time, 2 * dim, rngs=rngs)
        self.norm_out = nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
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

        latents `[B, F, C, H, W]`, timestep `[B]`, text `[B, T, E]` -> `[B, F, C_out, H, W]`, at the dtype of latents
        and weights. ValueError for inputs or a plan that do not fit: F, H, W are multiples of the patch, and
        `config.padded_frames` is such an F.
        `plan`: leading axis (sites,) = layers. `attention_fn(q, k, v)` computes attention in place of
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
        x, context = self.enter(latents, timestep, text)
        x, after = run_layers(self.blocks, x, context, plan, attention_fn, carry, remat=remat, unroll=unroll)
        x = self.norm_final(x)[:, grid.text :]
        shift, scale = jnp.split(self.modulation_out(jax.nn.silu(context[0])), 2, axis=-1)
        x = self.proj_out(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(-1, *grid.shape, config.out_channels, *config.patch).transpose(0, 1, 5, 4, 2, 6, 3, 7)
        x = x.reshape(*latents.shape[:2], config.out_channels, *latents.shape[3:])
        return x if carry is None else (x, after)

    def capture(self, latents: Array, timestep: Array, text: Array) -> Iterator[Heads]:
        """q, k, v `[B, N, heads, D]` of one layer after the other, normed and rotated, in model order, for `calibrate`.

        Arguments as of a call. One layer is in memory at a time, and one compiled program serves them all.
        """
        x, context = jax.jit(CogVideoX.enter)(self, latents, timestep, text)
        yield from capture_blocks(self.blocks, x, context, x.shape[1], self.config.num_heads)

    def grid_of(self, latents: Array, timestep: Array, text: Array) -> TokenGrid:
        """Where the tokens of these inputs sit; ValueError for inputs that do not fit the model."""
        shape = check_latents(latents, "B F C H W", self.config.in_channels, self.config.patch)
        rows = latents.shape[0]
        check_shape("timestep", timestep, (rows,), (1,))
        check_shape("text", text, (rows, "T", self.config.text_embed_dim))
        return TokenGrid(shape, text=text.shape[1])

    def enter(self, latents: Array, timestep: Array, text: Array) -> tuple[Array, tuple]:
        """Tokens `[B, N, C]`, text first, and what every block wants: temb, is_text, rope."""
        config, p = self.config, self.config.patch_size
        grid, text = self.grid_of(latents, timestep, text), text.astype(latents.dtype)
        time = timestep_embedding(timestep, config.dim).astype(latents.dtype)
        temb = self.time_out(jax.nn.silu(self.time_in(time)))
        x = self.patch(patchify(latents, config.patch))
        rope = None
        if config.position == "sincos":
            x = x + sincos_3d(grid.shape, config.dim, config.sincos_scale).astype(x.dtype)[None]
        else:
            native = (config.height // p, config.width // p) if config.position == "rope" else None
            rope = rope_3d(grid.shape, config.head_dim, grid.text, config.rope_theta, native)
        x = jnp.concatenate([self.text(text), x], axis=1)
        is_text = (jnp.arange(x.shape[1]) < grid.text)[None, :, None]
        return x, (temb, is_text, rope)
