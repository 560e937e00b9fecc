"""A published model under `paro calibrate --model flux --weights DIR --embeddings FILE`: what it is asked, and sees.

Text encoders stay with diffusers. FILE is one `.safetensors` file of what they made, under the names that
`pipe.encode_prompt` gives its results, P prompts at once:

    prompt_embeds            [P, T, E]       text: T5 (FLUX.1, CogVideoX) or umT5 (Wan)
    pooled_prompt_embeds     [P, C]          FLUX.1 only: CLIP's pooled output
    negative_prompt_embeds   [1 or P, T, E]  CogVideoX and Wan: what guidance leads away from, often the empty prompt;
                                             without it there is no guidance
    guidance                 [1 or P]        its strength; without: 3.5 for FLUX.1-dev, 6 for CogVideoX, 5 for Wan
    latents                  [P, ...]        the noise to start from, as our models take it: [P, C, H, W] for FLUX.1,
                                             [P, F, C, H, W] for CogVideoX, [P, C, F, H, W] for Wan; without, it is
                                             drawn from --seed

In Python, with diffusers and any of its pipelines for these models:

    positive, negative = pipe.encode_prompt(prompts, do_classifier_free_guidance=True)      # CogVideoX, Wan
    save_file({"prompt_embeds": positive, "negative_prompt_embeds": negative}, "embeddings.safetensors")

    text, pooled, _ = pipe.encode_prompt(prompts, prompt_2=None)                            # FLUX.1
    save_file({"prompt_embeds": text, "pooled_prompt_embeds": pooled}, "embeddings.safetensors")
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

import calibrate
from calibrate._capture import bucket_of
from paro_jax import AttentionPlan, TokenGrid
from paro_jax._cli._show import UserError
from paro_jax.models import samplers
from paro_jax.models.cogvideox import CogVideoXConfig
from paro_jax.models.flux import FluxConfig
from paro_jax.models.wan import WanConfig

Config = FluxConfig | CogVideoXConfig | WanConfig
FAMILIES: dict[str, type[Config]] = {"flux": FluxConfig, "cogvideox": CogVideoXConfig, "wan": WanConfig}
_RANKS = {"prompt_embeds": 3, "pooled_prompt_embeds": 2, "negative_prompt_embeds": 3, "guidance": 1, "latents": None}


@dataclass(frozen=True)
class Embeddings:
    """The tensors of an embeddings file, f32, and its name."""

    path: Path
    tensors: dict[str, np.ndarray]

    @property
    def prompts(self) -> int:
        return len(self.tensors["prompt_embeds"])

    def row(self, name: str, prompt: int, default: Any = None) -> Any:
        """`[1, ...]` of one prompt; what is given once is for all of them."""
        x = self.tensors.get(name)
        return default if x is None else x[prompt : prompt + 1] if len(x) > 1 else x


def read(path: Path, most: int | None = None) -> Embeddings:
    """The file, of `most` prompts at most. UserError for anything that the module's docstring does not name."""
    if not path.is_file():
        raise UserError(f"--embeddings: expected a .safetensors file, found no file at {path}")
    try:
        with safe_open(path, framework="flax") as file:
            names = list(file.keys())
            tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in names if name in _RANKS}
    except SafetensorError as error:
        raise UserError(f"--embeddings: {path} is not a whole safetensors file ({error})") from error
    unknown = sorted(set(names) - _RANKS.keys())
    if unknown or "prompt_embeds" not in tensors:
        found = ", ".join(sorted(names)) or "nothing"
        raise UserError(
            f"--embeddings: {path.name} must hold prompt_embeds [P, T, E] and may hold {', '.join(list(_RANKS)[1:])}; "
            f"found {found}"
        )
    prompts = len(tensors["prompt_embeds"])
    for name, x in tensors.items():
        rank, rows = _RANKS[name], (prompts,) if name in ("pooled_prompt_embeds", "latents") else (1, prompts)
        if (rank is not None and x.ndim != rank) or x.ndim == 0 or len(x) not in rows or x.size == 0:
            raise UserError(
                f"--embeddings: {name}: expected {rank or 'some'} axes, the first of {prompts} prompts; found {x.shape}"
            )
        if not np.isfinite(x).all():
            raise UserError(f"--embeddings: {name} holds NaN or infinity; encode the prompts again, in bfloat16")
    negative = tensors.get("negative_prompt_embeds")
    if negative is not None and negative.shape[1:] != tensors["prompt_embeds"].shape[1:]:
        raise UserError(
            f"--embeddings: negative_prompt_embeds: expected [*, {tensors['prompt_embeds'].shape[1]}, "
            f"{tensors['prompt_embeds'].shape[2]}] as of prompt_embeds; found {negative.shape}"
        )
    if most is not None:
        if most > prompts:
            raise UserError(f"--prompts: expected at most {prompts}, as many as {path.name} holds; found {most}")
        tensors = {name: x[:most] for name, x in tensors.items()}
    return Embeddings(path, tensors)


@dataclass(frozen=True)
class Recipe:
    """How one family is sampled, at one resolution."""

    latents: tuple[int, ...]  # the model's own layout, without the batch
    shape: tuple[int, ...]  # of the grid, in tokens
    sites: int
    steps: int
    guidance: float | None  # None: the model knows none
    sample: Callable[..., Any]  # (predict, noise, steps=, progress=)


def recipe(config: Config, args: argparse.Namespace) -> Recipe:
    """What the command line and the configuration come to; UserError for a size the model cannot have."""
    # Pixels for each latent row and column. The VAE of Wan 2.2 5B, known by its 48 channels, halves once more.
    stride = 16 if isinstance(config, WanConfig) and config.in_channels == 48 else 8
    if isinstance(config, FluxConfig):
        if args.frames is not None:
            raise UserError("--frames belongs to video models; FLUX.1 makes images")
        patch = config.patch_size
    else:
        patch = config.patch[1]
    height, width = (
        _latent(f"--{name}", getattr(args, name), getattr(config, name), stride, patch) for name in ("height", "width")
    )
    if isinstance(config, FluxConfig):
        shape = (height // patch, width // patch)
        usual = samplers.flux_shift(shape[0] * shape[1]) if config.guided else 1.0
        schedule = samplers.FlowSchedule(usual if args.shift is None else args.shift)
        sample = functools.partial(samplers.flow_euler, schedule=schedule)
        latents = (config.in_channels, height, width)
        return Recipe(latents, shape, config.sites, args.steps or (28 if config.guided else 4), 3.5, sample)
    frames = config.frames
    if args.frames is not None:
        if args.frames % 4 != 1:
            below = max(args.frames // 4 * 4 + 1 - 4 * (args.frames % 4 == 0), 1)
            raise UserError(f"--frames: expected 4 k + 1, such as {below} or {below + 4}; found {args.frames}")
        frames = args.frames // 4 + 1
    frames = -(-frames // config.patch[0]) * config.patch[0]
    shape = (frames // config.patch[0], height // patch, width // patch)
    if isinstance(config, CogVideoXConfig):
        if args.shift is not None:
            raise UserError("--shift belongs to FLUX.1 and Wan; CogVideoX has no such setting")
        schedule = samplers.VSchedule(snr_shift=3.0 if config.position == "sincos" else 1.0)
        sample = functools.partial(samplers.ddim, schedule=schedule)
        latents = (frames, config.in_channels, height, width)
        return Recipe(latents, shape, config.num_layers, args.steps or 50, 6.0, sample)
    usual = 5.0 if height * width * stride**2 > 480 * 832 else 3.0
    schedule = samplers.FlowSchedule(usual if args.shift is None else args.shift)
    sample = functools.partial(samplers.unipc, schedule=schedule)
    latents = (config.in_channels, frames, height, width)
    return Recipe(latents, shape, config.num_layers, args.steps or 50, 5.0, sample)


def _latent(option: str, pixels: int | None, default: int, stride: int, patch: int) -> int:
    """Latent rows or columns of so many pixels."""
    unit = stride * patch
    if pixels is None:
        return default
    if pixels % unit:
        below = max(pixels // unit, 1) * unit
        raise UserError(
            f"{option}: expected a multiple of {unit} pixels (the VAE's {stride} x the patch's {patch}), such as "
            f"{below} or {below + unit}; found {pixels}"
        )
    return pixels // stride


def samples(
    args: argparse.Namespace, embeddings: Embeddings, edges: Sequence[float], check: Callable[[TokenGrid], Any]
) -> tuple[calibrate.LiveSamples, TokenGrid, str, dict]:
    """Loads the model, runs it once for each prompt, and gives samples, grid, model name and provenance.

    `check` is given the grid before the model is loaded: it raises where the plan could not be made afterwards.
    The latents of the steps that calibration looks at are kept; their q, k and v are made when they are asked for.
    """
    from paro_jax.demo.run import capture_steps

    # All that can be wrong is known before the weights are read, which takes minutes.
    config, name, how, grid = described(args, embeddings)
    steps = how.steps
    if len(edges) - 1 > steps:
        raise UserError(f"--buckets: expected at most one for each of {steps} steps, found {len(edges) - 1}")
    at = sorted(set(args.at)) if args.at else capture_steps(steps, edges)
    if at[-1] >= steps:
        raise UserError(f"--at: expected steps from 0 to {steps - 1}, found {at[-1]}; --steps sets how many there are")
    if bare := set(range(len(edges) - 1)) - {bucket_of(step / steps, edges) for step in at}:
        raise UserError(f"--at: expected a step in each of {len(edges) - 1} buckets, found none in bucket {min(bare)}")

    grid = replace(grid, bricks=tuple(args.bricks))
    check(grid)
    net = loaded(args)
    dense = AttentionPlan.dense(grid, heads=config.num_heads)
    runs: list[tuple[float, Callable[[], Any]]] = []
    for prompt in range(embeddings.prompts):
        inputs, scale = inputs_of(embeddings, prompt, config, how)
        noise = embeddings.row("latents", prompt)
        if noise is None:
            noise = np.random.default_rng((args.seed, prompt)).standard_normal((1, *how.latents), np.float32)
        for step, (x, timestep) in _watch(net, how, dense, inputs, scale, noise, at).items():
            runs.append((step / steps, functools.partial(net.capture, x, timestep, *inputs)))  # type: ignore[attr-defined]
    provenance = {"weights": Path(args.weights).name, "prompts": embeddings.prompts, "steps": steps, "at": at}
    return calibrate.LiveSamples(runs, sites=how.sites), grid, name, provenance | {"seed": args.seed}


def described(args: argparse.Namespace, embeddings: Embeddings) -> tuple[Config, str, Recipe, TokenGrid]:
    """What --weights holds, its name, how it is sampled, its grid. Loads nothing; UserError where they do not fit."""
    from paro_jax.models import weights

    config = weights.config_of(args.weights, model=_preset(args))
    name = type(config).__name__.removesuffix("Config")
    if args.model in FAMILIES and not isinstance(config, FAMILIES[args.model]):
        other = next(name for name, kind in FAMILIES.items() if isinstance(config, kind))
        raise UserError(f"--model {args.model}: {args.weights} holds {name}; give --model {other}")
    how = recipe(config, args)
    _check_fits(embeddings, config, how, name)
    text = 0 if isinstance(config, WanConfig) else embeddings.tensors["prompt_embeds"].shape[1]
    return config, name, how, TokenGrid(how.shape, text=text)


def loaded(args: argparse.Namespace) -> nnx.Module:
    """The model of --weights."""
    from paro_jax.models import weights

    return weights.from_pretrained(args.weights, model=_preset(args), progress=True)


def _preset(args: argparse.Namespace) -> str | None:
    return None if args.model in FAMILIES else args.model


def _check_fits(embeddings: Embeddings, config: Config, how: Recipe, name: str) -> None:
    """UserError unless the tensors have the widths of the model."""
    wanted: dict[str, tuple[int, int]] = {"prompt_embeds": (2, config.text_embed_dim)}
    pooled = "pooled_prompt_embeds" in embeddings.tensors
    if isinstance(config, FluxConfig):
        wanted["pooled_prompt_embeds"] = (1, config.pooled_dim)
        if not pooled:
            raise UserError(f"--embeddings: FLUX.1 needs pooled_prompt_embeds [P, {config.pooled_dim}] as well")
        for tensor in ("negative_prompt_embeds",) + (() if config.guided else ("guidance",)):
            if tensor in embeddings.tensors:
                raise UserError(f"--embeddings: {tensor}: this FLUX.1 takes none; leave it out")
    elif "guidance" in embeddings.tensors and "negative_prompt_embeds" not in embeddings.tensors:
        raise UserError("--embeddings: guidance needs negative_prompt_embeds, what it leads away from; add them")
    elif pooled:
        raise UserError(f"--embeddings: pooled_prompt_embeds: {name} takes none; were the prompts encoded for FLUX.1?")
    for tensor, (axis, size) in wanted.items():
        shape = embeddings.tensors[tensor].shape
        if shape[axis] != size:
            raise UserError(
                f"--embeddings: {tensor}: expected {size} channels for this {name}, found {shape}; encode the prompts "
                "with this model's own text encoder"
            )
    latents = embeddings.tensors.get("latents")
    if latents is not None and latents.shape[1:] != how.latents:
        raise UserError(
            f"--embeddings: latents: expected {(embeddings.prompts, *how.latents)} for this {name} at this size, found "
            f"{latents.shape}; change --height, --width or --frames, or leave the latents out"
        )


def inputs_of(
    embeddings: Embeddings, prompt: int, config: Config, how: Recipe
) -> tuple[tuple[jax.Array, ...], float | None]:
    """What the model takes after the timestep, and the scale of guidance by two halves (None: there is one half)."""
    text = embeddings.row("prompt_embeds", prompt)
    strength = embeddings.row("guidance", prompt, np.full(1, how.guidance, np.float32))
    if isinstance(config, FluxConfig):
        given = (text, embeddings.row("pooled_prompt_embeds", prompt), *((strength,) if config.guided else ()))
        return tuple(jnp.asarray(x, jnp.bfloat16) for x in given), None
    negative = embeddings.row("negative_prompt_embeds", prompt)
    if negative is None:
        return (jnp.asarray(text, jnp.bfloat16),), None
    return (jnp.asarray(np.concatenate([negative, text]), jnp.bfloat16),), float(strength[0])


class _Enough(Exception):
    """The last step that calibration looks at has been seen."""


def _watch(
    net: nnx.Module,
    how: Recipe,
    dense: AttentionPlan,
    inputs: tuple,
    scale: float | None,
    noise: np.ndarray,
    at: Sequence[int],
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """Latents and timestep that the model is given at each step in `at`, in a dense run of the sampler."""
    seen: dict[int, tuple[jax.Array, jax.Array]] = {}

    def predict(x: jax.Array, timestep: jax.Array, step: jax.Array) -> jax.Array:
        x = x.astype(jnp.bfloat16)
        if int(step) in at:
            seen[int(step)] = (x, timestep)
        if int(step) == at[-1]:
            raise _Enough
        return _predict(net, x, timestep, inputs, dense, sites=how.sites)

    with contextlib.suppress(_Enough):
        how.sample(
            predict if scale is None else samplers.guided(predict, scale),
            jnp.asarray(noise),
            steps=how.steps,
            progress=True,
        )
    return seen


@functools.partial(jax.jit, static_argnames="sites")
def _predict(
    net: Any, x: jax.Array, timestep: jax.Array, inputs: tuple, dense: AttentionPlan, *, sites: int
) -> jax.Array:
    """The unchanged model, its attention streamed over a dense plan: no N x N map at video lengths."""
    plan = jax.tree.map(lambda a: jnp.broadcast_to(a, (sites, *a.shape)), dense)
    return net(x, timestep, *inputs, plan=plan)
