"""The demo model: captions through a small learned embedding into our own CogVideoX."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from paro_jax.demo import data
from paro_jax.models.cogvideox import CogVideoX, CogVideoXConfig
from paro_jax.models.layers import Heads
from paro_jax.models.samplers import VSchedule

CONFIG = CogVideoXConfig(
    num_layers=6,
    num_heads=6,
    head_dim=32,
    in_channels=12 + 15,  # pixels, and where they are
    out_channels=12,
    time_embed_dim=128,
    text_embed_dim=64,
    text_length=data.CAPTION_WORDS,
    frames=data.FRAMES,
    height=data.HEIGHT // 2,
    width=data.WIDTH // 2,
    rope_theta=100.0,  # the axes are at most 13 long: low frequencies would never turn
)
SCHEDULE = VSchedule(snr_shift=3.0)
WEIGHTS = pathlib.Path(__file__).with_name("weights.safetensors")


class DemoModel(nnx.Module):
    """word ids `[B, T]` and a noisy latent video -> v.

    Beside its 12 channels every latent pixel gets those of `where`: rotary attention alone knows only differences of
    places, and the captions speak of places.
    """

    def __init__(self, config: CogVideoXConfig = CONFIG, *, rngs: nnx.Rngs):
        self.words = nnx.Embed(len(data.WORDS), config.text_embed_dim, rngs=rngs)
        self.places = nnx.Embed(config.text_length, config.text_embed_dim, rngs=rngs)
        self.transformer = CogVideoX(config, rngs=rngs)

    def __call__(self, latents: Array, timestep: Array, words: Array, first: Array | None = None, **options) -> Array:
        """latents `[B, F, 12, H, W]`, timestep `[B]`, words int32 `[B, T]`; options as `CogVideoX.__call__`.

        `first`: int32 `[B]`, which frame of the video the first one is; None is 0.
        """
        return self.transformer(*self.inputs(latents, timestep, words, first), **options)

    def capture(self, latents: Array, timestep: Array, words: Array) -> Iterator[Heads]:
        """q, k, v of one layer after the other, as `CogVideoX.capture`."""
        yield from self.transformer.capture(*self.inputs(latents, timestep, words))

    def inputs(self, latents: Array, timestep: Array, words: Array, first: Array | None = None) -> tuple[Array, ...]:
        """What the transformer takes: latents and `where`, timestep, text embeddings `[B, T, E]`."""
        latents = jnp.concatenate([latents, where(latents.shape, first).astype(latents.dtype)], axis=2)
        text = self.words(words) + self.places(jnp.arange(words.shape[1]))[None]
        return latents, timestep, text.astype(latents.dtype)


def where(shape: tuple[int, ...], first: Array | None = None, config: CogVideoXConfig = CONFIG) -> Array:
    """Places in the video as f32 `[B, F, 15, H, W]`: per axis u in [-1, 1], and sine and cosine of pi u and 2 pi u.

    `shape`: `[B, F, C, H, W]`; `first` as of `DemoModel`.
    """
    batch, frames, _, height, width = shape
    first = jnp.zeros(batch, jnp.int32) if first is None else first
    whole = (config.frames, config.height, config.width)
    parts = []
    for axis, size in enumerate((frames, height, width)):
        u = (jnp.arange(size)[None] + (first[:, None] if axis == 0 else 0) + 0.5) * (2 / whole[axis]) - 1
        waves = jnp.stack([u, *(wave(n * jnp.pi * u) for n in (1, 2) for wave in (jnp.sin, jnp.cos))], axis=1)
        others = [2 + other for other in range(3) if other != axis]
        parts.append(jnp.broadcast_to(jnp.expand_dims(waves, others), (batch, 5, frames, height, width)))
    return jnp.swapaxes(jnp.concatenate(parts, axis=1), 1, 2)


def initial_noise(seed: int, config: CogVideoXConfig = CONFIG) -> np.ndarray:
    """Standard normal f32 `[1, F, C, H, W]`, the same on every machine."""
    shape = (1, config.frames, config.out_channels, config.height, config.width)
    return np.random.default_rng((seed, 2)).standard_normal(shape, dtype=np.float32)
