"""Small models of every family, with every weight random, inputs that fit them, and files as diffusers saves them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from paro_jax.models import cogvideox, flux, wan

FLUX = flux.FluxConfig(
    num_double=2,
    num_single=3,
    num_heads=2,
    head_dim=16,
    in_channels=4,
    text_embed_dim=24,
    pooled_dim=20,
    text_length=6,
    height=16,
    width=12,
    rope_dims=(4, 6, 6),
)
COGVIDEOX = cogvideox.CogVideoXConfig(
    num_layers=3,
    num_heads=2,
    head_dim=32,
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=24,
    text_length=6,
    frames=3,
    height=8,
    width=12,
)
WAN = wan.WanConfig(
    num_layers=3,
    num_heads=2,
    head_dim=24,
    in_channels=4,
    out_channels=4,
    text_embed_dim=24,
    time_embed_dim=32,
    mlp_dim=64,
    frames=3,
    height=8,
    width=12,
)
# What config.json says of both.
VIDEO = dict(num_layers=3, num_attention_heads=2, in_channels=4, out_channels=4)


def drawn(build: Callable[[], nnx.Module]) -> Any:
    """Every weight random, norms and gates too; the model's own draws, which take long to compile, are not made."""
    graph, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    r = np.random.default_rng(0)

    def draw(path: tuple, shape: tuple[int, ...]) -> nnx.Param:
        return nnx.Param(jnp.asarray(r.normal(0.02, 0.1, shape) + (path[-1] == "scale"), jnp.float32))

    flat = [(path, draw(path, x.get_value().shape)) for path, x in nnx.to_flat_state(params)]
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


class Tiny(NamedTuple):
    """A family: how to build it, at what configuration, its names and configuration in diffusers, and its inputs."""

    config: Any
    build: Callable[[Any], nnx.Module]
    names: Mapping[str, Any]
    published: dict[str, Any]  # config.json
    layers: Callable[[int], Any]  # the configuration with that many layers
    sites: int
    latents: tuple[int, ...]  # without the batch

    def net(self, config: Any = None) -> Any:
        """The model of this configuration, or of the family's own, as `drawn` makes it."""
        return drawn(lambda: self.build(self.config if config is None else config))

    def inputs(self, batch: int = 2) -> tuple[jax.Array, ...]:
        """Latents, timestep, text and, for FLUX, pooled text and guidance; every row another."""
        r = np.random.default_rng(5)
        normal = lambda *shape: jnp.asarray(r.standard_normal((batch, *shape)), jnp.float32)  # noqa: E731
        time = jnp.linspace(0.9, 0.2, batch) * (1 if self.config is FLUX else 1000)
        given = (normal(*self.latents), time, normal(6, self.config.text_embed_dim))
        return (*given, normal(20), jnp.linspace(2.0, 4.0, batch)) if self.config is FLUX else given

    def save(self, net: nnx.Module, folder: Path) -> Path:
        """Write the folder that diffusers' `save_pretrained` would write."""
        tensors = {}
        for path, value in nnx.to_flat_state(nnx.state(net, nnx.Param)):
            *module, leaf = map(str, path)
            bare = ".".join([*module, leaf])
            suffix = "" if bare in self.names else ".bias" if leaf == "bias" else ".weight"
            key = self.names[bare if bare in self.names else ".".join(module)] + suffix
            whole = np.asarray(value.get_value())
            for i, x in enumerate(whole if "{}" in key else [whole]):
                tensors[key.format(i)] = x
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.published))
        return folder


def _layers(config: Any, *fields: str) -> Callable[[int], Any]:
    return lambda n: dataclasses.replace(config, **dict.fromkeys(fields, n))


TINY = {
    "flux": Tiny(
        FLUX,
        lambda c: flux.Flux(c, rngs=nnx.Rngs(0)),
        flux.diffusers_names(FLUX),
        dict(
            _class_name="FluxTransformer2DModel",
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=[4, 6, 6],
        ),
        _layers(FLUX, "num_double", "num_single"),
        5,
        (4, 16, 12),
    ),
    "cogvideox": Tiny(
        COGVIDEOX,
        lambda c: cogvideox.CogVideoX(c, rngs=nnx.Rngs(0)),
        cogvideox.diffusers_names(COGVIDEOX),
        dict(
            _class_name="CogVideoXTransformer3DModel",
            **VIDEO,
            attention_head_dim=32,
            time_embed_dim=16,
            text_embed_dim=24,
            max_text_seq_length=6,
            sample_frames=9,
            sample_height=8,
            sample_width=12,
            use_rotary_positional_embeddings=True,
        ),
        _layers(COGVIDEOX, "num_layers"),
        3,
        (3, 4, 8, 12),
    ),
    "wan": Tiny(
        WAN,
        lambda c: wan.Wan(c, rngs=nnx.Rngs(0)),
        wan.diffusers_names(WAN),
        dict(
            _class_name="WanTransformer3DModel",
            **VIDEO,
            attention_head_dim=24,
            text_dim=24,
            freq_dim=32,
            ffn_dim=64,
        ),
        _layers(WAN, "num_layers"),
        3,
        (4, 3, 8, 12),
    ),
}
