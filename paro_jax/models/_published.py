"""What is known of published checkpoints: their names, and how a peer's `config.json` becomes one of our configs.

A setting that our models cannot honour is refused by name; nothing in a `config.json` is passed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from paro_jax.models import cogvideox, flux, wan
from paro_jax.models._mapping import Names
from paro_jax.models._safetensors import WeightsError, check_dtype

Config = flux.FluxConfig | cogvideox.CogVideoXConfig | wan.WanConfig
Model = flux.Flux | cogvideox.CogVideoX | wan.Wan

# Names for `from_pretrained(model=)` and the command line. Both experts of Wan 2.2 A14B have one configuration.
PRESETS: dict[str, Config] = {
    "flux-dev": flux.FLUX_DEV,
    "flux-schnell": flux.FLUX_SCHNELL,
    "cogvideox-2b": cogvideox.COGVIDEOX_2B,
    "cogvideox-5b": cogvideox.COGVIDEOX_5B,
    "cogvideox1.5-5b": cogvideox.COGVIDEOX_1_5_5B,
    "wan2.1-1.3b": wan.WAN_1_3B,
    "wan2.1-14b": wan.WAN_14B,
    "wan2.2-a14b": wan.WAN_14B,
    "wan2.2-5b": wan.WAN_2_2_5B,
}


CLASSES: dict[type, type] = {
    flux.FluxConfig: flux.Flux,
    cogvideox.CogVideoXConfig: cogvideox.CogVideoX,
    wan.WanConfig: wan.Wan,
}


def build(config: Config) -> Model:
    """The model of a config, with random weights."""
    return CLASSES[type(config)](config, rngs=nnx.Rngs(0))


def names(config: Config, keys: Iterable[str]) -> Names:
    """Our modules -> those of the layout that `keys` are of: diffusers', or of FLUX and Wan the authors' own."""
    match config:
        case flux.FluxConfig():
            bfl = any(key.startswith("double_blocks.") for key in keys)
            return flux.bfl_names(config) if bfl else flux.diffusers_names(config)
        case wan.WanConfig():
            original = any(".self_attn." in key for key in keys)
            return wan.original_names(config) if original else wan.diffusers_names(config)
        case cogvideox.CogVideoXConfig():
            return cogvideox.diffusers_names(config)


def dtypes(config: Config, dtype: Any) -> Callable[[str], Any]:
    """Name of a parameter -> `dtype`, or float32 where the original computes in nothing less. None stays None.

    WeightsError for a dtype that weights cannot be cast to.
    """
    check_dtype(dtype)
    float32 = wan.FLOAT32 if isinstance(config, wan.WanConfig) else ()

    def dtype_of(name: str) -> Any:
        inside = any(name == module or name.startswith(f"{module}.") for module in float32)
        return jnp.promote_types(dtype, jnp.float32) if inside and dtype is not None else dtype

    return dtype_of


# The first is diffusers'; the authors' own repositories have a config.json too, which has other keys.
_THEIR_CLASSES: dict[type, tuple[str, ...]] = {
    flux.FluxConfig: ("FluxTransformer2DModel",),
    cogvideox.CogVideoXConfig: ("CogVideoXTransformer3DModel",),
    wan.WanConfig: ("WanTransformer3DModel", "WanModel"),
}

# Constructor arguments of diffusers' classes with their defaults: what a `config.json` means that lacks them.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": dict(
        patch_size=1,
        in_channels=64,
        out_channels=None,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    ),
    "CogVideoXTransformer3DModel": dict(
        num_attention_heads=30,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        flip_sin_to_cos=True,
        freq_shift=0,
        time_embed_dim=512,
        ofs_embed_dim=None,
        text_embed_dim=4096,
        num_layers=30,
        dropout=0.0,
        attention_bias=True,
        sample_width=90,
        sample_height=60,
        sample_frames=49,
        patch_size=2,
        patch_size_t=None,
        temporal_compression_ratio=4,
        max_text_seq_length=226,
        activation_fn="gelu-approximate",
        timestep_activation_fn="silu",
        norm_elementwise_affine=True,
        norm_eps=1e-5,
        spatial_interpolation_scale=1.875,
        temporal_interpolation_scale=1.0,
        use_rotary_positional_embeddings=False,
        use_learned_positional_embeddings=False,
        patch_bias=True,
    ),
    "WanTransformer3DModel": dict(
        patch_size=(1, 2, 2),
        num_attention_heads=40,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=13824,
        num_layers=40,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=1024,
        pos_embed_seq_len=None,
    ),
}


def config_from_diffusers(settings: Mapping[str, Any], where: Any) -> Config:
    """Our config of a diffusers `config.json`. `where` names the file in an error.

    The grid that a plan is for (`frames`, `height`, `width`, `text_length`) is, where a `config.json` has none, that of
    the published model with these hyperparameters, else the default of our config.

    Raises:
      WeightsError: another class than ours, or settings that our models do not have; all of them are listed.
    """
    name = settings.get("_class_name")
    if name not in _DEFAULTS:
        raise WeightsError(
            f"{where}: _class_name: expected one of {', '.join(_DEFAULTS)}, found {name!r}; name the folder of a "
            "transformer that we have, or say with model= what the weights are of."
        )
    defaults = _DEFAULTS[name]
    given = {key: _tuple(value) for key, value in settings.items() if not key.startswith("_")}
    problems = [f"{key} = {given[key]!r}, which is unknown to us" for key in given if key not in defaults]
    for key, default in defaults.items():
        if not _like(given.setdefault(key, default), default):
            problems.append(f"{key} = {given[key]!r}, where a value like {default!r} is expected")
    if not problems:
        needs, config = _READERS[name](given)
        problems = [
            f"{key} = {given[key]!r}, where we have only {' or '.join(map(repr, only))}"
            for key, only in needs.items()
            if given[key] not in only
        ]
        if not problems:
            return config
    raise WeightsError(
        f"{where}: settings that our {name} does not have: {'; '.join(problems)}. Use a text-to-image or text-to-video "
        "checkpoint of FLUX.1, CogVideoX or Wan."
    )


def check_class(settings: Mapping[str, Any], config: Config, where: Any) -> None:
    """WeightsError if a `config.json` is of another class of model than `config`."""
    found = settings.get("_class_name")
    expected = _THEIR_CLASSES[type(config)]
    if found is not None and found not in expected:
        raise WeightsError(
            f"{where}: _class_name: expected {expected[0]} for model={type(config).__name__}, found {found!r}; name "
            "other weights or another model."
        )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _like(value: Any, default: Any) -> bool:
    """Whether a value can stand where `default` does: of its type, and no size below 1."""
    if default is None:
        return value is None or type(value) in (int, float, str)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(_like(v, 1) for v in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default) and (type(value) is not int or value >= min(default, 1))


def _published(config: Config, grid: tuple[str, ...]) -> Config:
    """The preset that differs from `config` in nothing but fields of `grid`; `config` itself if there is none."""
    for preset in PRESETS.values():
        if type(preset) is type(config):
            same = dataclasses.replace(config, **{field: getattr(preset, field) for field in grid})
            if same == preset:
                return preset
    return config


def _flux(given: Mapping[str, Any]) -> tuple[dict[str, tuple], Config]:
    channels, axes = given["in_channels"], given["axes_dims_rope"]
    if sum(axes) != given["attention_head_dim"] or any(n % 2 for n in axes):
        axes = "even numbers that add up to attention_head_dim"
    needs = {"patch_size": (1,), "out_channels": (None, channels), "axes_dims_rope": (axes,)}
    config = flux.FluxConfig(
        num_double=given["num_layers"],
        num_single=given["num_single_layers"],
        num_heads=given["num_attention_heads"],
        head_dim=given["attention_head_dim"],
        in_channels=channels // 4,  # they count a packed patch of 2 x 2
        text_embed_dim=given["joint_attention_dim"],
        pooled_dim=given["pooled_projection_dim"],
        guided=given["guidance_embeds"],
        rope_dims=given["axes_dims_rope"],
    )
    return needs, _published(config, ("height", "width", "text_length"))


def _video(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the configs of CogVideoX and Wan share."""
    ours = {"num_layers": "num_layers", "num_heads": "num_attention_heads", "head_dim": "attention_head_dim"}
    ours |= {"in_channels": "in_channels", "out_channels": "out_channels"}
    return {field: given[theirs] for field, theirs in ours.items()}


def _cogvideox(given: Mapping[str, Any]) -> tuple[dict[str, tuple], Config]:
    rotary, frames = given["use_rotary_positional_embeddings"], given["patch_size_t"]
    needs: dict[str, tuple] = {
        "in_channels": (given["out_channels"],),  # more, where an image is a condition
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "ofs_embed_dim": (None,),
        "dropout": (0.0,),
        "attention_bias": (True,),
        "activation_fn": ("gelu-approximate",),
        "timestep_activation_fn": ("silu",),
        "norm_elementwise_affine": (True,),
        "norm_eps": (1e-5,),
        "temporal_interpolation_scale": (1.0,),
        "use_learned_positional_embeddings": (False,),
        # Of patches in space alone; a patch that spans frames always has its bias, whatever this says.
        "patch_bias": (True,) if frames is None else (True, False),
    }
    if given["attention_head_dim"] % 16:
        needs["attention_head_dim"] = ("multiples of 16, of which the axes rotate 4, 6 and 6",)
    if frames is not None:
        needs["use_rotary_positional_embeddings"] = (True,)
    config = cogvideox.CogVideoXConfig(
        **_video(given),
        time_embed_dim=given["time_embed_dim"],
        text_embed_dim=given["text_embed_dim"],
        text_length=given["max_text_seq_length"],
        frames=(given["sample_frames"] - 1) // given["temporal_compression_ratio"] + 1,
        height=given["sample_height"],
        width=given["sample_width"],
        patch_size=given["patch_size"],
        patch_frames=1 if frames is None else frames,
        position="sincos" if not rotary else "rope" if frames is None else "rope_slice",
        sincos_scale=given["spatial_interpolation_scale"],
    )
    # With patches that span frames, sample_height and sample_width bound the positions: no resolution is told.
    return needs, config if frames is None else _published(config, ("height", "width"))


def _wan(given: Mapping[str, Any]) -> tuple[dict[str, tuple], Config]:
    needs = {
        "in_channels": (given["out_channels"],),  # more, where an image is a condition
        "cross_attn_norm": (True,),
        "qk_norm": ("rms_norm_across_heads",),
        "eps": (1e-6,),
        "image_dim": (None,),
        "added_kv_proj_dim": (None,),
        "pos_embed_seq_len": (None,),
        "rope_max_seq_len": (1024,),
    }
    config = wan.WanConfig(
        **_video(given),
        text_embed_dim=given["text_dim"],
        time_embed_dim=given["freq_dim"],
        mlp_dim=given["ffn_dim"],
        patch=given["patch_size"],
    )
    return needs, _published(config, ("frames", "height", "width"))


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[dict[str, tuple], Config]]] = {
    "FluxTransformer2DModel": _flux,
    "CogVideoXTransformer3DModel": _cogvideox,
    "WanTransformer3DModel": _wan,
}
