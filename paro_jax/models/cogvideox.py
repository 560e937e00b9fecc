"""CogVideoX (arXiv 2408.06072): a video diffusion transformer with joint attention over [text ; video].

Names, arithmetic and layouts are those of diffusers' `CogVideoXTransformer3DModel`. All layers live in one stacked
`Block` (leading axis: layer), so one trace serves them all and per-layer plans scan along.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import paro_jax
from paro_jax import AttentionPlan, Norm, Rope, TokenGrid


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """Hyperparameters. `frames`, `height`, `width` are the latent video's, before patching by `patch_size` in space."""

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

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def grid(self) -> TokenGrid:
        p = self.patch_size
        return TokenGrid((self.frames, self.height // p, self.width // p), text=self.text_length, text_position="first")


def timestep_embedding(timestep: Array, dim: int) -> Array:
    """Sinusoids of diffusion time `[B]` -> `[B, dim]`, cosines first, frequencies 10000^(-i / (dim/2)) (DDPM)."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(dim // 2, dtype=np.float32) / (dim // 2))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_3d(grid: tuple[int, int, int], head_dim: int, text: int, theta: float = 10000.0) -> Rope:
    """Rotation tables `[text + F*H*W, head_dim / 2]` for interleaved pairs: D/4 time, 3D/8 height, 3D/8 width.

    Text tokens come first and do not rotate (cos 1, sin 0). float32 throughout, as the original.
    """
    angles = []
    for axis, size in enumerate(grid):
        dim = head_dim // 4 if axis == 0 else head_dim // 8 * 3
        frequencies = 1.0 / (np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim))
        table = np.arange(size, dtype=np.float32)[:, None] * frequencies[None, :]
        where = [1, 1, 1, dim // 2]
        where[axis] = size
        angles.append(np.broadcast_to(table.reshape(where), (*grid, dim // 2)))
    video = np.concatenate(angles, axis=-1).reshape(-1, head_dim // 2)
    table = np.concatenate([np.zeros((text, head_dim // 2), np.float32), video])
    return Rope(jnp.asarray(np.cos(table)), jnp.asarray(np.sin(table)))


class Modulation(nnx.Module):
    """adaLN-zero for both streams: one shared affine LayerNorm; (shift, scale, gate) for video, then for text."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(config.time_embed_dim, 6 * config.dim, rngs=rngs)
        self.norm = nnx.LayerNorm(config.dim, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Array, temb: Array, text: int) -> tuple[Array, Array]:
        """x `[B, N, C]` (text first), temb `[B, T]` -> modulated x and the gate `[B, N, C]`."""
        parts = jnp.split(self.linear(jax.nn.silu(temb)), 6, axis=-1)
        is_text = (jnp.arange(x.shape[1]) < text)[None, :, None]
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
        self.norm_q = nnx.LayerNorm(config.head_dim, epsilon=1e-6, rngs=rngs)
        self.norm_k = nnx.LayerNorm(config.head_dim, epsilon=1e-6, rngs=rngs)
        self.norm2 = Modulation(config, rngs=rngs)
        self.mlp_in = nnx.Linear(dim, config.mlp_ratio * dim, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_ratio * dim, dim, rngs=rngs)

    def __call__(self, x: Array, temb: Array, rope: Rope, plan: AttentionPlan | None, text: int) -> Array:
        h, gate = self.norm1(x, temb, text)
        x = x + gate * self.attention(h, rope, plan)
        h, gate = self.norm2(x, temb, text)
        return x + gate * self.mlp_out(jax.nn.gelu(self.mlp_in(h), approximate=True))

    def attention(self, h: Array, rope: Rope, plan: AttentionPlan | None) -> Array:
        """The seam: `[B, N, C]` -> `[B, N, C]`, dense without a plan."""
        if plan is None:
            o = paro_jax.attention(*self.heads(h, rope))
        else:

            def project(role: str, linear: nnx.Linear, norm: nnx.LayerNorm | None):
                heads = (self.config.num_heads, self.config.head_dim)
                return paro_jax.project_in(
                    h,
                    linear.kernel[...].reshape(-1, *heads),
                    linear.bias[...].reshape(heads),
                    plan=plan,
                    role=role,
                    norm=Norm("layer", norm.scale[...], norm.bias[...], norm.epsilon) if norm else None,
                    rope=rope if norm else None,
                )

            q = project("q", self.to_q, self.norm_q)
            k = project("k", self.to_k, self.norm_k)
            o = paro_jax.attend(q, k, project("v", self.to_v, None), plan=plan)
        return self.to_out(o.reshape(*o.shape[:2], -1))

    def heads(self, h: Array, rope: Rope) -> tuple[Array, Array, Array]:
        """q, k, v `[B, N, heads, D]` in model order, normed and rotated: what `calibrate` wants to see."""
        q, k, v = (
            linear(h).reshape(*h.shape[:2], self.config.num_heads, self.config.head_dim)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        return rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope), v


def rotate(x: Array, rope: Rope) -> Array:
    """Rotary embedding of pairs (x[2i], x[2i+1]), in f32 (RoFormer); x `[B, N, heads, D]`, tables `[N, D/2]`."""
    cos, sin = rope.cos[None, :, None, :], rope.sin[None, :, None, :]
    a, b = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


class CogVideoX(nnx.Module):
    """The transformer: latent video, timestep and text embeddings in, prediction (v) out."""

    def __init__(self, config: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.config = config
        p, dim, time = config.patch_size, config.dim, config.time_embed_dim
        self.patch = nnx.Linear(config.in_channels * p * p, dim, rngs=rngs)
        self.text = nnx.Linear(config.text_embed_dim, dim, rngs=rngs)
        self.time_in = nnx.Linear(dim, time, rngs=rngs)
        self.time_out = nnx.Linear(time, time, rngs=rngs)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r))(rngs.split(config.num_layers))
        self.norm_final = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.modulation_out = nnx.Linear(time, 2 * dim, rngs=rngs)
        self.norm_out = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.proj_out = nnx.Linear(dim, config.out_channels * p * p, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timestep: Array,
        text: Array,
        *,
        plan: AttentionPlan | None = None,
        capture: bool = False,
        remat: bool = False,
    ) -> Any:
        """Predict.

        latents `[B, F, C, H, W]`, timestep `[B]`, text `[B, T, E]` -> `[B, F, C_out, H, W]`.
        `plan`: leading axis (sites,) = layers; None is dense. With `capture`, also q, k, v `[layers, B, N, heads, D]`
        after norm and rotation, as attention sees them. `remat` recomputes blocks in the backward pass.
        """
        batch, frames, channels, height, width = latents.shape
        p = self.config.patch_size
        if channels != self.config.in_channels or height % p or width % p:
            raise ValueError(
                f"latents: expected [B, F, {self.config.in_channels}, H, W] with H and W multiples of {p}, "
                f"found {latents.shape}; check the latent channels and pad the video to whole patches."
            )
        grid = (frames, height // p, width // p)
        temb = self.time_out(
            jax.nn.silu(self.time_in(timestep_embedding(timestep, self.config.dim).astype(latents.dtype)))
        )
        # Patch pixels are ordered (channel, row, column), as a convolution's kernel is when flattened.
        x = latents.reshape(batch, frames, channels, grid[1], p, grid[2], p).transpose(0, 1, 3, 5, 2, 4, 6)
        x = self.patch(x.reshape(batch, -1, channels * p * p))
        x = jnp.concatenate([self.text(text), x], axis=1)
        tokens = text.shape[1]
        rope = rope_3d(grid, self.config.head_dim, tokens, self.config.rope_theta)

        def layer(x, block_and_plan):
            block, plan = block_and_plan
            seen = block.heads(block.norm1(x, temb, tokens)[0], rope) if capture else None
            return block(x, temb, rope, plan, tokens), seen

        x, seen = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (self.blocks, plan))
        x = self.norm_final(x)[:, tokens:]
        shift, scale = jnp.split(self.modulation_out(jax.nn.silu(temb)), 2, axis=-1)
        x = self.proj_out(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(batch, *grid, self.config.out_channels, p, p).transpose(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(batch, frames, self.config.out_channels, height, width)
        return (x, seen) if capture else x
