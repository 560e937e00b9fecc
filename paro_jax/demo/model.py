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
    in_channels=12,
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
    """word ids `[B, T]` and a noisy latent video -> v."""

    def __init__(self, config: CogVideoXConfig = CONFIG, *, rngs: nnx.Rngs):
        self.words = nnx.Embed(len(data.WORDS), config.text_embed_dim, rngs=rngs)
        self.places = nnx.Embed(config.text_length, config.text_embed_dim, rngs=rngs)
        self.transformer = CogVideoX(config, rngs=rngs)

    def __call__(self, latents: Array, timestep: Array, words: Array, **options) -> Array:
        """latents `[B, F, C, H, W]`, timestep `[B]`, words int32 `[B, T]`; options as `CogVideoX.__call__`."""
        return self.transformer(latents, timestep, self.text(words).astype(latents.dtype), **options)

    def capture(self, latents: Array, timestep: Array, words: Array) -> Iterator[Heads]:
        """q, k, v of one layer after the other, as `CogVideoX.capture`."""
        yield from self.transformer.capture(latents, timestep, self.text(words).astype(latents.dtype))

    def text(self, words: Array) -> Array:
        """Word ids `[B, T]` -> embeddings `[B, T, E]`."""
        return self.words(words) + self.places(jnp.arange(words.shape[1]))[None]


def initial_noise(seed: int, config: CogVideoXConfig = CONFIG) -> np.ndarray:
    """Standard normal f32 `[1, F, C, H, W]`, the same on every machine."""
    shape = (1, config.frames, config.in_channels, config.height, config.width)
    return np.random.default_rng((seed, 2)).standard_normal(shape, dtype=np.float32)
