"""FLUX.1 (Black Forest Labs, 2024): an image transformer with joint attention over [text ; image].

Arithmetic and layouts are those of diffusers' `FluxTransformer2DModel`; weights come from there or from the authors'
own file. First double blocks, where text and image have weights of their own, then single blocks over both, attention
beside feed-forward. Each kind lives in one stacked module (leading axis: layer), so two traces serve all layers and
per-layer plans scan along. The model takes time from 0 to 1.
"""

from __future__ import annotations

import dataclasses
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
    layer_norm,
    patchify,
    rotate,
    run_layers,
    split_heads,
    timestep_embedding,
)


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Hyperparameters. `height`, `width`: the latent image that a plan is for, before it is packed 2 x 2.

    `guided`: the model takes the strength of guidance as an input (dev); else it has no such embedder (schnell).
    `rope_dims`: channels that rotate by nothing, by the row and by the column.
    """

    num_double: int = 19
    num_single: int = 38
    num_heads: int = 24
    head_dim: int = 128
    in_channels: int = 16
    text_embed_dim: int = 4096
    pooled_dim: int = 768
    time_embed_dim: int = 256
    text_length: int = 512
    guided: bool = True
    height: int = 128
    width: int = 128
    patch_size: int = 2
    mlp_ratio: int = 4
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 10000.0

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def sites(self) -> int:
        """Attention layers: the leading axis of a plan, double blocks first."""
        return self.num_double + self.num_single

    @property
    def grid(self) -> TokenGrid:
        p = self.patch_size
        return TokenGrid((self.height // p, self.width // p), text=self.text_length, text_position="first")


# Published models, at 1024 x 1024.
FLUX_DEV = FluxConfig()
FLUX_SCHNELL = FluxConfig(guided=False, text_length=256)


def diffusers_names(config: FluxConfig) -> dict[str, str]:
    """Our modules -> those of diffusers' `FluxTransformer2DModel`, for `weights.load`."""
    attention = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "norm_q": "norm_q", "norm_k": "norm_k"}
    added = {"to_q": "add_q_proj", "to_k": "add_k_proj", "to_v": "add_v_proj", "to_out": "to_add_out"}
    added |= {"norm_q": "norm_added_q", "norm_k": "norm_added_k"}
    double = {f"image.{ours}": f"attn.{theirs}" for ours, theirs in (attention | {"to_out": "to_out.0"}).items()}
    double |= {f"text.{ours}": f"attn.{theirs}" for ours, theirs in added.items()}
    for ours, theirs in (("image", ""), ("text", "_context")):
        double |= {
            f"{ours}.modulation": f"norm1{theirs}.linear",
            f"{ours}.mlp_in": f"ff{theirs}.net.0.proj",
            f"{ours}.mlp_out": f"ff{theirs}.net.2",
        }
    single = {ours: f"attn.{theirs}" for ours, theirs in attention.items()}
    single |= {"modulation": "norm.linear", "mlp_in": "proj_mlp", "to_out": "proj_out"}
    embedders = {"time": "timestep_embedder", "pooled": "text_embedder"}
    embedders |= {"guidance": "guidance_embedder"} if config.guided else {}
    return {
        "patch": "x_embedder",
        "text": "context_embedder",
        **{f"{ours}.in_layer": f"time_text_embed.{theirs}.linear_1" for ours, theirs in embedders.items()},
        **{f"{ours}.out_layer": f"time_text_embed.{theirs}.linear_2" for ours, theirs in embedders.items()},
        **{f"double.{ours}": f"transformer_blocks.{{}}.{theirs}" for ours, theirs in double.items()},
        **{f"single.{ours}": f"single_transformer_blocks.{{}}.{theirs}" for ours, theirs in single.items()},
        "modulation_out": "norm_out.linear",
        "proj_out": "proj_out",
    }


def bfl_names(config: FluxConfig) -> dict[str, str | Rows]:
    """Our modules -> those of the authors' own file (`flux1-dev.safetensors`), where q, k, v and more are fused."""
    dim = config.dim
    qkv = {f"to_{role}": ((i * dim, (i + 1) * dim),) for i, role in enumerate("qkv")}
    names: dict[str, str | Rows] = {"patch": "img_in", "text": "txt_in", "proj_out": "final_layer.linear"}
    for ours, theirs in (("time", "time_in"), ("pooled", "vector_in"), ("guidance", "guidance_in")):
        if ours != "guidance" or config.guided:
            names |= {f"{ours}.in_layer": f"{theirs}.in_layer", f"{ours}.out_layer": f"{theirs}.out_layer"}
    for ours, theirs in (("image", "img"), ("text", "txt")):
        block = f"double_blocks.{{}}.{theirs}"
        names |= {f"double.{ours}.{name}": Rows(f"{block}_attn.qkv", rows) for name, rows in qkv.items()}
        names |= {
            f"double.{ours}.modulation": f"{block}_mod.lin",
            f"double.{ours}.norm_q.scale": f"{block}_attn.norm.query_norm.scale",
            f"double.{ours}.norm_k.scale": f"{block}_attn.norm.key_norm.scale",
            f"double.{ours}.to_out": f"{block}_attn.proj",
            f"double.{ours}.mlp_in": f"{block}_mlp.0",
            f"double.{ours}.mlp_out": f"{block}_mlp.2",
        }
    parts = qkv | {"mlp_in": ((3 * dim, (3 + config.mlp_ratio) * dim),)}
    names |= {f"single.{name}": Rows("single_blocks.{}.linear1", rows) for name, rows in parts.items()}
    return names | {
        "single.to_out": "single_blocks.{}.linear2",
        "single.modulation": "single_blocks.{}.modulation.lin",
        "single.norm_q.scale": "single_blocks.{}.norm.query_norm.scale",
        "single.norm_k.scale": "single_blocks.{}.norm.key_norm.scale",
        # The authors keep (shift, scale) here, diffusers and we (scale, shift).
        "modulation_out": Rows("final_layer.adaLN_modulation.1", ((dim, 2 * dim), (0, dim))),
    }


def rope_2d(grid: tuple[int, ...], dims: tuple[int, int, int], text: int, theta: float = 10000.0) -> Rope:
    """Rotation tables `[text + H*W, sum(dims) / 2]`; the first `dims[0]` channels, and text, do not rotate."""
    return axis_rope(
        [np.zeros(1), np.arange(grid[0]), np.arange(grid[1])], dims, text=text, theta=theta, dtype=np.float64
    )


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x `[B, N, C]` normed, then shift and scale `[B, C]` of its whole row of tokens."""
    return layer_norm(x).astype(x.dtype) * (1 + scale[:, None]) + shift[:, None]


class Embedder(nnx.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, channels: int, dim: int, *, rngs: nnx.Rngs):
        self.in_layer = nnx.Linear(channels, dim, rngs=rngs)
        self.out_layer = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class Projections(nnx.Module):
    """What an attention needs of its tokens: q, k, v, and a norm of q and k per head."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.to_q, self.to_k, self.to_v = (nnx.Linear(config.dim, config.dim, rngs=rngs) for _ in range(3))
        self.norm_q, self.norm_k = (nnx.RMSNorm(config.head_dim, epsilon=1e-6, rngs=rngs) for _ in range(2))
        self.mlp_in = nnx.Linear(config.dim, config.mlp_ratio * config.dim, rngs=rngs)

    def qkv(self, h: Array) -> Heads:
        """`[B, N, C]` -> q, k, v `[B, N, heads, D]`, normed, not rotated."""
        q, k, v = (split_heads(linear(h), self.config.num_heads) for linear in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def mlp(self, h: Array) -> Array:
        return activate(self.mlp_in(h))


class Stream(Projections):
    """The weights that text, or the image, has to itself in a double block."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.modulation = nnx.Linear(config.dim, 6 * config.dim, rngs=rngs)
        self.to_out = nnx.Linear(config.dim, config.dim, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_ratio * config.dim, config.dim, rngs=rngs)

    def finish(self, x: Array, o: Array, parts: list[Array]) -> Array:
        """x `[B, N, C]` with the attention's o `[B, N, C]` and the feed-forward added, each through its gate."""
        _, _, gate, shift, scale, gate_mlp = parts
        x = x + gate[:, None] * self.to_out(o)
        return x + gate_mlp[:, None] * self.mlp_out(self.mlp(modulate(x, shift, scale)))


class DoubleBlock(nnx.Module):
    """Joint attention over [text ; image], each with its own weights."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.text = Stream(config, rngs=rngs)
        self.image = Stream(config, rngs=rngs)

    def qkv(self, streams: tuple[Array, Array], parts: tuple[list[Array], list[Array]]) -> tuple[Array, ...]:
        """q, k, v `[B, N, heads, D]`, text first, normed, not rotated."""
        both = zip((self.text, self.image), streams, parts, strict=True)
        return tuple(jnp.concatenate(z, 1) for z in zip(*(s.qkv(modulate(x, *p[:2])) for s, x, p in both), strict=True))

    def parts(self, temb: Array) -> tuple[list[Array], list[Array]]:
        """(shift, scale, gate) for attention and for feed-forward, `[B, C]` each, of text and of the image."""
        text, image = (jnp.split(s.modulation(jax.nn.silu(temb)), 6, axis=-1) for s in (self.text, self.image))
        return text, image

    def heads(self, streams: tuple[Array, Array], temb: Array, rope: Rope) -> Heads:
        """What attention sees when the block runs on `streams`."""
        q, k, v = self.qkv(streams, self.parts(temb))
        return rotate(q, rope), rotate(k, rope), v

    def __call__(
        self,
        streams: tuple[Array, Array],
        temb: Array,
        rope: Rope,
        plan: AttentionPlan | None,
        attention_fn: AttentionFn | None = None,
    ) -> tuple[Array, Array]:
        """streams: text `[B, T, C]` and image `[B, N - T, C]`."""
        parts = self.parts(temb)
        q, k, v = self.qkv(streams, parts)
        if plan is None or attention_fn is not None:
            o = attend((rotate(q, rope), rotate(k, rope), v), attention_fn, plan)
        else:
            # Two projections feed each of q, k and v, so they are arranged once joined.
            q = paro_jax.arrange(q, plan=plan, role="q", rope=rope)
            k = paro_jax.arrange(k, plan=plan, role="k", rope=rope)
            o = attend_arranged(q, k, paro_jax.arrange(v, plan=plan, role="v"), plan)
        o, tokens = o.reshape(*o.shape[:2], -1), streams[0].shape[1]
        text = self.text.finish(streams[0], o[:, :tokens], parts[0])
        return text, self.image.finish(streams[1], o[:, tokens:], parts[1])


class SingleBlock(Projections):
    """Attention and feed-forward side by side over [text ; image], one projection out of both."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.modulation = nnx.Linear(config.dim, 3 * config.dim, rngs=rngs)
        self.to_out = nnx.Linear((1 + config.mlp_ratio) * config.dim, config.dim, rngs=rngs)

    def parts(self, temb: Array) -> list[Array]:
        """shift, scale and gate, `[B, C]` each."""
        return jnp.split(self.modulation(jax.nn.silu(temb)), 3, axis=-1)

    def heads(self, x: Array, temb: Array, rope: Rope) -> Heads:
        """What attention sees when the block runs on x."""
        q, k, v = self.qkv(modulate(x, *self.parts(temb)[:2]))
        return rotate(q, rope), rotate(k, rope), v

    def attention(self, h: Array, rope: Rope, plan: AttentionPlan | None, attention_fn: AttentionFn | None) -> Array:
        """The seam: `[B, N, C]` -> `[B, N, heads, D]`, by `attention_fn` if given."""
        if plan is None or attention_fn is not None:
            q, k, v = self.qkv(h)
            return attend((rotate(q, rope), rotate(k, rope), v), attention_fn, plan)

        def project(role: Literal["q", "k", "v"], linear: nnx.Linear, norm: nnx.RMSNorm | None):
            return paro_jax.project_in(
                h,
                *head_weights(linear, self.config.num_heads),
                plan=plan,
                role=role,
                norm=head_norm(norm) if norm else None,
                rope=rope if norm else None,
            )

        q, k = project("q", self.to_q, self.norm_q), project("k", self.to_k, self.norm_k)
        return attend_arranged(q, k, project("v", self.to_v, None), plan)

    def __call__(
        self, x: Array, temb: Array, rope: Rope, plan: AttentionPlan | None, attention_fn: AttentionFn | None = None
    ) -> Array:
        shift, scale, gate = self.parts(temb)
        h = modulate(x, shift, scale)
        o = self.attention(h, rope, plan, attention_fn)
        return x + gate[:, None] * self.to_out(jnp.concatenate([o.reshape(x.shape), self.mlp(h)], -1))


class Flux(nnx.Module):
    """The transformer: latent image, time, text embeddings and pooled text in, prediction (flow) out."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, pixels = config.dim, config.in_channels * config.patch_size**2
        self.patch = nnx.Linear(pixels, dim, rngs=rngs)
        self.text = nnx.Linear(config.text_embed_dim, dim, rngs=rngs)
        self.time = Embedder(config.time_embed_dim, dim, rngs=rngs)
        self.pooled = Embedder(config.pooled_dim, dim, rngs=rngs)
        if config.guided:
            self.guidance = Embedder(config.time_embed_dim, dim, rngs=rngs)
        self.double = nnx.vmap(lambda r: DoubleBlock(config, rngs=r))(rngs.split(config.num_double))
        self.single = nnx.vmap(lambda r: SingleBlock(config, rngs=r))(rngs.split(config.num_single))
        self.modulation_out = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.proj_out = nnx.Linear(dim, pixels, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timestep: Array,
        text: Array,
        pooled: Array,
        guidance: Array | None = None,
        *,
        plan: AttentionPlan | None = None,
        attention_fn: AttentionFn | None = None,
        carry: Any = None,
        remat: Remat = False,
        unroll: bool = False,
    ) -> Any:
        """Predict.

        latents `[B, C, H, W]`, timestep `[B]` from 0 to 1, text (T5) `[B, T, E]`, pooled (CLIP) `[B, P]`, guidance
        `[B]` for a guided model and None for another -> `[B, C, H, W]`, at the dtype of latents and weights. ValueError
        for inputs or a plan that do not fit.
        `plan`: leading axis (sites,), double blocks, then single ones. `attention_fn(q, k, v)` computes attention in
        place of `paro_jax.attention`, such as `partial(paro_jax.attention, implementation="cudnn")`; with a plan it is
        called as `attention_fn(q, k, v, plan=the layer's)`, for masks made from q and k (`paro_jax.policies`). `carry`:
        what it remembers or is told of each layer, a pytree with leading axis (sites,); it then takes `carry=the
        layer's` and returns (output, the next carry), and so does the model: (prediction, carry).
        `remat`: True computes blocks again in the backward pass; names out of `layers.NAMES`, such as "attention", all
        of them but what is named; a policy of `jax.checkpoint_policies` what it says. `unroll`: compile each layer by
        itself instead of one for all of its kind.
        """
        config, p = self.config, self.config.patch_size
        grid = self.grid_of(latents, timestep, text, pooled, guidance)
        streams, context = self.enter(latents, timestep, text, pooled, guidance)
        if plan is not None:
            check_fits(plan, sites=config.sites, heads=config.num_heads, grid=grid)
        check_carry(carry, attention_fn, config.sites)
        parts = (slice(config.num_double), slice(config.num_double, None))
        plans, carries = ([jax.tree.map(lambda a, s=s: a[s], tree) for s in parts] for tree in (plan, carry))
        how: dict[str, Any] = dict(remat=remat, unroll=unroll)
        streams, first = run_layers(self.double, streams, context, plans[0], attention_fn, carries[0], **how)
        x = jnp.concatenate(streams, axis=1)
        x, last = run_layers(self.single, x, context, plans[1], attention_fn, carries[1], **how)
        scale, shift = jnp.split(self.modulation_out(jax.nn.silu(context[0])), 2, axis=-1)
        x = self.proj_out(modulate(x[:, grid.text :], shift, scale))
        x = x.reshape(-1, *grid.shape, config.in_channels, p, p)
        x = x.transpose(0, 3, 1, 4, 2, 5).reshape(latents.shape)
        return x if carry is None else (x, jax.tree.map(lambda *both: jnp.concatenate(both), first, last))

    def capture(
        self, latents: Array, timestep: Array, text: Array, pooled: Array, guidance: Array | None = None
    ) -> Iterator[Heads]:
        """q, k, v `[B, N, heads, D]` of one layer after the other, normed and rotated, in model order, for `calibrate`.

        Arguments as of a call. One layer is in memory at a time; one compiled program serves all double blocks,
        another all single ones.
        """
        streams, context = jax.jit(Flux.enter)(self, latents, timestep, text, pooled, guidance)
        tokens = sum(x.shape[1] for x in streams)
        streams = yield from capture_blocks(self.double, streams, context, tokens, self.config.num_heads)
        x = jnp.concatenate(streams, axis=1)
        yield from capture_blocks(self.single, x, context, tokens, self.config.num_heads)

    def grid_of(self, latents: Array, timestep: Array, text: Array, pooled: Array, guidance: Array | None) -> TokenGrid:
        """Where the tokens of these inputs sit; ValueError for inputs that do not fit the model."""
        config, p = self.config, self.config.patch_size
        shape, rows = check_latents(latents, "B C H W", config.in_channels, (1, p, p)), latents.shape[0]
        check_shape("timestep", timestep, (rows,), (1,))
        check_shape("text", text, (rows, "T", config.text_embed_dim))
        check_shape("pooled", pooled, (rows, config.pooled_dim), (1, config.pooled_dim))
        if (guidance is not None) != config.guided:
            wanted = "an array [B], such as 3.5 for each image" if config.guided else "None, this model takes none"
            found = "None" if guidance is None else np.shape(guidance)
            raise ValueError(f"guidance: expected {wanted}; found {found}.")
        if guidance is not None:
            check_shape("guidance", guidance, (rows,), (1,))
        return TokenGrid(shape, text=text.shape[1])

    def enter(
        self, latents: Array, timestep: Array, text: Array, pooled: Array, guidance: Array | None
    ) -> tuple[tuple[Array, Array], tuple]:
        """Text tokens `[B, T, C]` and image tokens `[B, N - T, C]`, and what every block wants: temb, rope."""
        config, p = self.config, self.config.patch_size
        grid = self.grid_of(latents, timestep, text, pooled, guidance)
        text, pooled = text.astype(latents.dtype), pooled.astype(latents.dtype)
        rope = rope_2d(grid.shape, config.rope_dims, grid.text, config.rope_theta)
        temb = self.time(self._sinusoids(timestep, latents.dtype)) + self.pooled(pooled)
        if guidance is not None:
            temb = temb + self.guidance(self._sinusoids(guidance, latents.dtype))
        image = self.patch(patchify(latents[:, None], (1, p, p)))
        return (self.text(text), image), (temb, rope)

    def _sinusoids(self, level: Array, dtype: Any) -> Array:
        """`[B]` -> `[B, time_embed_dim]`; time and guidance count in thousandths."""
        return timestep_embedding(level.astype(dtype) * 1000, self.config.time_embed_dim).astype(dtype)
